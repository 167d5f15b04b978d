"""What exists: checkpoints, their commit and removal, the history, and what a run makes of them."""

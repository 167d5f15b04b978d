"""`highcamp demo`: the main job on real data, in a minute: train, be killed, go on, look at the result."""

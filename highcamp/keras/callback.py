class CheckpointCallback: pass

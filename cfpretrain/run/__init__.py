"""What a run leaves and what reads it: folder, checkpoints, metrics."""

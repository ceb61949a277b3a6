"""Training data: shard folders on disk (shards.py) and the batches of a run (loader.py)."""

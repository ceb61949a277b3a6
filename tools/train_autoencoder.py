"""Trains a small KL autoencoder on image shards: examples/digits/train_autoencoder.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.train_autoencoder import main

if __name__ == "__main__":
    main()

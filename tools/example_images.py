"""Writes real digits that ship inside packages as image files: examples/digits/example_images.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.example_images import main

if __name__ == "__main__":
    main()

"""Writes real digits with captions that are true by measurement: examples/digits/captioned_digits.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.captioned_digits import main

if __name__ == "__main__":
    main()

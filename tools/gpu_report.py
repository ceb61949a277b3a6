"""Measures everything on one GPU: tools/measure.py report."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.measure import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])

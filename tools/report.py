"""Samples and scores a run of the digits demo: examples/digits/report.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.report import main

if __name__ == "__main__":
    main()

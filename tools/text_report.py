"""Scores a run of the digits demo with texts: examples/digits/text_report.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.digits.text_report import main

if __name__ == "__main__":
    main()

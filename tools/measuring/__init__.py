"""What tools/measure.py measures, a module each; what they share is in common.py."""

import sys
from pathlib import Path


def tool(what: str, *options: object) -> list[str]:
    """The command of a measurement, for a process of its own."""
    return [sys.executable, str(Path(__file__).parents[1] / "measure.py"), what, *map(str, options)]

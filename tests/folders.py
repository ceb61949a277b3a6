"""What lies in folders of a test."""

import json
import os
from pathlib import Path
from typing import Any


def content(path: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it; of a file, itself."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.name if file == path else str(file.relative_to(path)): file.read_bytes() for file in files}


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Bomb:
    """Unpickled in careless hands, it makes a folder: by `os.mkdir`, or by a text that is run."""

    def __init__(self, trace: Path, by: str = "mkdir") -> None:
        text = f"__import__('os').mkdir({str(trace)!r})"
        self._call = (os.mkdir, (str(trace),)) if by == "mkdir" else (eval, (text,))

    def __reduce__(self) -> Any:
        return self._call

"""File systems of a few MiB, to fill or to turn read-only."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system at a new folder, of a size such as "16m"; the test is skipped where none may be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system was refused: {mounted.stderr}")
    try:
        yield folder
    finally:
        # A rank that a failed test left behind may still have files open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The system's command."""
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)

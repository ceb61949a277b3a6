"""Outputs that are whole or not there: made in a hidden folder under a lock, and given their name at the end."""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from cfpretrain.checkpoint import flush
from cfpretrain.console import UserError
from cfpretrain.files import parse_json
from cfpretrain.tensor_files import reason_of

LOCK_FILE = "lock"
WRITING = ".writing."  # before the name of a file, until it is whole


def take_hidden(folder: Path, out: Path, name: str) -> int:
    """Makes the hidden folder in which an output comes into being, or takes it over from a process that was killed.

    Args:
        folder: the hidden one.
        out: what is made there.
        name: argument or option that gave `out`, for messages.

    Returns:
        The descriptor of the folder's lock, which is held until it is closed or the process ends.

    Raises:
        UserError: another process works there, or something else is in the way.
        OSError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"{name}: expected {folder} to be a folder, where {out} is made; remove it") from error
    file = folder / LOCK_FILE
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have finished, and moved or removed the folder, since it was opened.
        if os.path.samestat(os.fstat(descriptor), os.stat(file)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    raise UserError(f"{name}: {out} is being written by another process; wait for its end, or stop it")


@contextmanager
def whole_or_nothing(out: Path, name: str) -> Iterator[Path]:
    """A hidden path for a file or a folder that becomes `out` at the end of the block; where that fails, it is removed.

    What a killed process left is removed by the next one; two at once are refused.

    Args:
        out: nothing may be there.
        name: argument that gave it, for messages.

    Raises:
        UserError: something is there, another process writes it, or it cannot be written.
    """
    folder = out.with_name(f".{out.name}.partial")
    try:
        lock = take_hidden(folder, out, name)
        try:
            refuse_existing(out, name)
            clear(folder)
            yield folder / out.name
            for path in sorted(folder.rglob("*")):
                flush(path)
            refuse_existing(out, name)
            os.rename(folder / out.name, out)
            flush(out.parent)
        finally:
            remove_hidden(folder)
            os.close(lock)
    except OSError as error:
        fix = "free some space" if error.errno == errno.ENOSPC else "mend it"
        raise UserError(f"{name}: {out} cannot be written ({reason_of(error)}); {fix} or give another") from error


def remove_hidden(folder: Path) -> None:
    """Removes the folder of `take_hidden`, whose lock is held."""
    with suppress(OSError):
        clear(folder)
        # Last: once it is gone another process may begin, and what lies there then is its own.
        (folder / LOCK_FILE).unlink()
        folder.rmdir()


def clear(folder: Path) -> None:
    """Empties the folder of `take_hidden`, whose lock is held."""
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover.name != LOCK_FILE:
            leftover.unlink()


def replace_file(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is never there in part, on the disk once this returns.

    Args:
        file: what is there is replaced.
        write: puts its bytes into an open one.

    Raises:
        OSError: it cannot be written.
    """
    writing = file.with_name(f"{WRITING}{file.name}")
    with writing.open("wb") as opened:
        write(opened)
    flush(writing)
    os.replace(writing, file)


def parse_plan(text: str) -> dict[str, Any]:
    """The settings that some work was done with, of JSON; ValueError where it is none."""
    plan = parse_json(text)
    if not isinstance(plan, dict):
        raise ValueError("it holds no keys with values")
    return plan


def refuse_existing(path: Path, name: str) -> None:
    """Raises UserError where something is at this path; `name` is the argument that gave it."""
    if os.path.lexists(path):
        raise UserError(f"{name}: expected a path where nothing is yet, got {path}; remove it or give another")

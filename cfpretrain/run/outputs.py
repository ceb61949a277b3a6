"""Outputs that are whole or not there: made in a hidden folder under a lock, and given their name at the end."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.console import UserError, reason_of
from cfpretrain.base.files import parse_json

LOCK_FILE = "lock"


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
        files.make_folder(folder, private=True)
    except FileExistsError as error:
        raise UserError(f"{name}: {error.filename} is in the way of {out}: {error.strerror}; remove it") from error
    lock = files.try_lock(folder / LOCK_FILE)
    if lock is None:
        raise UserError(f"{name}: {out} is being written by another process; wait for its end, or stop it")
    files.remove_leftovers(folder)
    files.remove_leftovers(out.parent.resolve(), out.name)
    return lock


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
            files.clear(folder, LOCK_FILE)
            yield folder / out.name
            for path in sorted(folder.rglob("*")):
                files.flush(path)
            refuse_existing(out, name)
            files.publish(folder / out.name, out)
        finally:
            remove_hidden(folder)
            os.close(lock)
    except OSError as error:
        fix = "free some space" if error.errno == errno.ENOSPC else "mend it"
        raise UserError(f"{name}: {out} cannot be written ({reason_of(error)}); {fix} or give another") from error


def remove_hidden(folder: Path) -> None:
    """Removes the folder of `take_hidden`, whose lock is held."""
    files.remove_locked(folder, LOCK_FILE)


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

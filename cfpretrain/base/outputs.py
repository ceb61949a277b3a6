"""Outputs that are whole or not there: made in a hidden folder under a lock, and given their name at the end."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.console import UserError, one_line, reason_of, say
from cfpretrain.base.differences import differences
from cfpretrain.base.files import parse_json, read_text

LOCK_FILE = "lock"


class Unfinished:
    """Work on an output: a hidden folder beside it, `.NAME.KIND`, held by one process until the output is whole.

    A killed process frees the lock, and the next one goes on with its files.

    Args:
        option: the argument or option that gave the output, for messages; "" for none.
        plan: JSON-able, all that the output depends on; see `begin`.
        plan_file: name of the file in the folder that holds the plan.
    """

    def __init__(
        self,
        out: Path,
        option: str = "",
        plan: Mapping[str, Any] | None = None,
        kind: str = "unfinished",
        plan_file: str = "settings.json",
    ) -> None:
        self.out, self.folder = out, out.parent / f".{out.name}.{kind}"
        self.plan: dict[str, Any] = json.loads(json.dumps(plan or {}))  # as it will be read
        self.plan_file = self.folder / plan_file
        self._says = f"{option}: " if option else ""
        self._lock: int | None = None

    def take(self) -> None:
        """Makes the folder, or takes it over from a process that was killed; OSError where it cannot be written."""
        try:
            files.make_folder(self.folder, private=True)
        except FileExistsError as error:
            reason = f"{error.filename} is in the way of {self.out}: {error.strerror}"
            raise UserError(f"{self._says}{reason}; remove it") from error
        self._lock = files.try_lock(self.folder / LOCK_FILE)
        if self._lock is None:
            raise UserError(f"{self._says}{self.out} is being written by another process; wait for its end, or stop it")
        files.remove_leftovers(self.folder)
        files.remove_leftovers(self.out.parent.resolve(), self.out.name)

    def begin(self, starts_over: Callable[[dict[str, Any]], bool] = lambda _: False) -> None:
        """Takes the folder and compares plans; other work is refused, or dropped where `starts_over` of its plan."""
        with self.writing():
            self.take()
            there = self._read_plan()
            if there is not None:
                different = differences(there, self.plan)
                if different and not starts_over(there):
                    raise UserError(
                        f"{self._says}{self.folder} is the unfinished work of other settings ({different}); give "
                        "those, or delete it to begin again"
                    )
                if different:
                    say(f"{self.folder}: other inputs than before ({different}); starting over")
                    files.clear(self.folder, LOCK_FILE)
            files.replace(self.plan_file, json.dumps(self.plan, indent=2) + "\n")

    def _read_plan(self) -> dict[str, Any] | None:
        """The plan of the work in the folder; None where none was begun."""
        with self.reading(self.plan_file):
            try:
                return parse_plan(read_text(self.plan_file))
            except FileNotFoundError:
                return None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """UserError that the output cannot be written, where the block raises an OSError."""
        with writing(f"{self._says}{self.out}"):
            yield

    @contextmanager
    def reading(self, file: Path) -> Iterator[None]:
        """UserError that a file of the folder is damaged, where the block raises an error."""
        try:
            yield
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(
                f"{self._says}{file} is damaged ({one_line(error)}); delete {self.folder} to begin again"
            ) from error

    def publish(self, made: Path | None = None) -> None:
        """Gives the output (`made`, in the folder, or the folder itself) its name, and ends the work."""
        with self.writing():
            files.publish(made or self.folder, self.out)
            if made is None:
                files.remove(self.out / LOCK_FILE)
                self.release()
            else:
                self.remove()

    def remove(self) -> None:
        """Removes the folder, which is held, and frees it."""
        files.remove_locked(self.folder, LOCK_FILE)
        self.release()

    def release(self) -> None:
        """Frees the folder, as the end of the process does."""
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None


@contextmanager
def whole_or_nothing(out: Path, option: str) -> Iterator[Path]:
    """A hidden path for a file or a folder that becomes `out` at the end of the block; where that fails, it is removed.

    Nothing may be at `out`. The files of a killed process are removed by the next one; two at once are refused.
    """
    work = Unfinished(out, option, kind="partial")
    try:
        work.take()
        try:
            refuse_existing(out, option)
            files.clear(work.folder, LOCK_FILE)
            yield work.folder / out.name
            for path in sorted(work.folder.rglob("*")):
                files.flush(path)
            refuse_existing(out, option)
            files.publish(work.folder / out.name, out)
        finally:
            work.remove()
    except UserError:
        raise
    except OSError as error:
        fix = "free some space" if error.errno == errno.ENOSPC else "fix that"
        raise UserError(f"{option}: {out} cannot be written ({reason_of(error)}); {fix} or give another") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """UserError that something cannot be written, where the block raises an OSError; for work that then goes on."""
    try:
        yield
    except UserError:  # which may be an OSError too
        raise
    except OSError as error:
        raise UserError(
            f"{what} cannot be written ({reason_of(error)}); fix that, and the same command goes on"
        ) from error


def parse_plan(text: str) -> dict[str, Any]:
    """The plan in a JSON text; ValueError where it is none."""
    plan = parse_json(text)
    if not isinstance(plan, dict):
        raise ValueError("it holds no keys with values")
    return plan


def refuse_existing(path: Path, option: str) -> None:
    """UserError where something is at the path that `option` gave."""
    if os.path.lexists(path):
        raise UserError(f"{option}: expected a path where nothing is yet, got {path}; remove it or give another")

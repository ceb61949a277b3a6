"""Copies of remote shard files, in a folder that any number of runs, ranks and workers may share.

A copy lies under the hash of its content, so it is never out of date. A file is fetched in a folder of its own,
HASH.BYTES.part, under a lock: so it is fetched once, its bytes count against the limit, and what a killed process
leaves there is removed by the next.
"""

import mmap
import os
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from cfpretrain.base import files
from cfpretrain.base.config import DataConfig
from cfpretrain.base.console import UserError, explaining, say
from cfpretrain.base.files import open_unbuffered

_POLL_SECONDS = 0.05
_LOCK = "lock"
_COPY = re.compile(r"[0-9a-f]{128}")
_PART = re.compile(r"[0-9a-f]{128}\.([0-9]+)\.part")


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard folder, as its index describes it."""

    name: str  # within the folder
    num_bytes: int
    digest: str  # its blake2b hash, hexadecimal


class RetryBudget:
    """How long a storage that is away is asked again for a file, counted from the first failure.

    Processes forked from the one that made it share it: one of them speaks for all, and `end` ends all their waiting.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._owner = os.getpid()
        self._shared = mmap.mmap(-1, 2)  # is a failure reported; is it over

    def end(self) -> None:
        """The run needs no more data."""
        self._shared[1] = 1

    def check(self) -> None:
        """UserError once the run needs no more data, or is gone."""
        if self._shared[1] or self._owner not in (os.getpid(), os.getppid()):
            raise UserError("data: the training process needs no more data")

    def sleep(self, seconds: float) -> None:
        """Waits; errors as of `check`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.5))

    def report_failure(self, what: str, reason: str) -> None:
        """Says, once, that the storage is away."""
        if not self._shared[0]:
            self._shared[0] = 1
            say(f"WARNING: {what} cannot be read ({reason}); asking again for up to {self.seconds:g} s")

    def report_success(self, what: str) -> None:
        """Says that the storage is back, where it was away."""
        if self._shared[0]:
            self._shared[0] = 0
            say(f"{what} was read: the storage is back")


@dataclass(frozen=True)
class Cache:
    """Copies of remote shard files."""

    folder: Path  # holds nothing else
    limit_bytes: int  # the most that they fill; the least recently used are removed; 0 = no limit
    budget: RetryBudget

    @classmethod
    def of(cls, data: DataConfig) -> "Cache":
        """As a config says."""
        return cls(Path(data.cache_folder), int(data.cache_limit_gb * 1e9), RetryBudget(data.download_patience_seconds))

    def open(self, file: ShardFile, fetch: Callable[[Path], None]) -> FileIO:
        """Opens the copy of a file. Where there is none, waits for a process that fetches it, or has it `fetch`ed."""
        copy = self.folder / file.digest
        part = copy.with_name(f"{file.digest}.{file.num_bytes}.part")
        opened = open_whole(copy, file.num_bytes)
        full_since: float | None = None
        with self._writing():
            files.make_folder(self.folder, follow=True)  # the user's own may be a link
            while not isinstance(opened, FileIO):
                lock = _take(part)  # by which its bytes count
                if lock is not None:
                    try:
                        opened = open_whole(copy, file.num_bytes)
                        if isinstance(opened, FileIO):  # another process has fetched it
                            break
                        if self._make_room():
                            return self._fetch(part, copy, fetch)
                    finally:
                        _release(part, lock)
                    full_since = full_since or time.monotonic()
                    if time.monotonic() - full_since > self.budget.seconds:
                        raise UserError(
                            f"data.cache_limit_gb: {self.folder} has no room for {file.name}: all of it is taken by "
                            "files that other processes are fetching; raise the limit, or lower data.num_workers"
                        )
                self.budget.sleep(_POLL_SECONDS)
                opened = open_whole(copy, file.num_bytes)
        with suppress(OSError):
            os.utime(copy)  # used just now
        return opened

    def _fetch(self, part: Path, copy: Path, fetch: Callable[[Path], None]) -> FileIO:
        files.clear(part, _LOCK)  # of what a killed process left
        fetch(part / "copy")
        with self._locked():  # else `_make_room` might find neither the part nor the copy
            opened = open_unbuffered(part / "copy")  # while no process may remove it
            files.move(part / "copy", copy)
        return opened

    def drop(self, file: ShardFile) -> None:
        """Removes the copy of a file."""
        with self._writing():
            files.remove(self.folder / file.digest)

    def _locked(self) -> AbstractContextManager[None]:
        return files.locked(self.folder / _LOCK, lambda: self.budget.sleep(_POLL_SECONDS))

    def _make_room(self) -> bool:
        """Removes the least recently used copies until the limit is kept; False where files in the making exceed it."""
        if not self.limit_bytes:
            return True
        copies, left = [], self.limit_bytes
        with self._locked():
            for entry in os.scandir(self.folder):
                if _COPY.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        copies.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif found := _PART.fullmatch(entry.name):
                    part = Path(entry.path)
                    lock = _take(part)
                    if lock is None:
                        left -= int(found[1])
                    else:  # of a killed process
                        _release(part, lock)
            if left < 0:
                return False
            for _, size, path in sorted(copies, reverse=True):  # the latest used first
                left -= size
                if left < 0:
                    files.remove(Path(path))  # its readers keep it open
        return True

    def _writing(self) -> AbstractContextManager[None]:
        return explaining(
            f"data.cache_folder: {self.folder} cannot be written ({{reason}}); free space there, choose another "
            "folder, or set data.cache_limit_gb to what it may hold"
        )


def open_whole(path: Path, num_bytes: int) -> FileIO | str:
    """A file of this size, open; or what is wrong with it. Damaged bytes are found by the samples' checksums."""
    try:
        opened = open_unbuffered(path)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    size = os.fstat(opened.fileno()).st_size
    if size == num_bytes:
        return opened
    opened.close()
    return f"got {size}"


def _take(part: Path) -> int | None:
    """The lock of the folder in which a file is fetched, which is made; None where another process has it."""
    try:
        files.make_folder(part)
        return files.try_lock(part / _LOCK)
    except FileNotFoundError:
        return None  # its holder has just removed it


def _release(part: Path, lock: int) -> None:
    files.remove_locked(part, _LOCK)
    os.close(lock)

"""Where shard files lie: a folder of this machine, or an address from which copies are made.

Copies lie in a cache folder under the hash of their content: any number of runs, ranks and workers may share it, and
nothing stale is taken for something else. A file that is being fetched lies in a folder of its own, HASH.BYTES.part,
with a lock: it is fetched once, and what a killed process leaves there is removed by the next.
"""

import errno
import hashlib
import mmap
import os
import random
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO, Protocol
from urllib.parse import urlsplit

from cfpretrain.base import files
from cfpretrain.base.background import Task
from cfpretrain.base.config import DataConfig
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.base.files import MAX_TEXT_BYTES, open_to_read, open_unbuffered, read_text
from cfpretrain.data.mosaic import CloudDownloader

_READ_SECONDS = 60.0  # a storage that sends nothing for so long is away
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two questions to a storage that is away
_POLL_SECONDS = 0.05
_MOST_WRONG_COPIES = 3
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EMFILE}
_LOCK, _RESERVED = "lock", "reserved"
_COPY = re.compile(r"[0-9a-f]{128}")
_PART = re.compile(r"[0-9a-f]{128}\.([0-9]+)\.part")


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard folder, as its index describes it.

    Attributes:
        name: within the folder.
        num_bytes: of the whole file.
        digest: its blake2b hash, hexadecimal.
    """

    name: str
    num_bytes: int
    digest: str


class Source(Protocol):
    """Gives the files of one shard folder, wherever it lies."""

    address: str  # as the user gave it

    def opened(self, name: str, max_bytes: int) -> AbstractContextManager[IO[bytes]]:
        """A file that has no place in the cache, to read; OSError or UserError where it cannot be read."""
        ...

    def text(self, name: str) -> str:
        """The content of a small file; FileNotFoundError where there is none."""
        ...

    def open(self, file: ShardFile) -> FileIO:
        """A local file with the bytes of `file`, unbuffered; cheap where it is at hand.

        Open, because a copy may be removed by whoever needs its room: what is open can still be read.

        Raises:
            UserError: it is missing, cut short, or cannot be fetched.
        """
        ...

    def drop(self, file: ShardFile) -> bool:
        """Forgets a file that proved damaged; whether another may come when it is opened again."""
        ...


class LocalFolder:
    """A shard folder on this machine."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.address, self._folder, self._key = str(folder), Path(folder), key

    def opened(self, name: str, max_bytes: int) -> AbstractContextManager[IO[bytes]]:
        """See `Source`."""
        return open_to_read(self._folder / name, max_bytes)

    def text(self, name: str) -> str:
        """See `Source`."""
        return read_text(self._folder / name)

    def open(self, file: ShardFile) -> FileIO:
        """See `Source`."""
        path = f"{self.address}/{file.name}"
        try:
            opened = open_unbuffered(Path(path))
            size = os.fstat(opened.fileno()).st_size
            if size == file.num_bytes:
                return opened
            opened.close()
            problem = f"got {size}"
        except FileNotFoundError:
            problem = "it is missing"
        except OSError as error:
            problem = f"it cannot be read ({error.strerror})"
        raise UserError(
            f"{self._key}: {path}: expected a file of {file.num_bytes} bytes, {problem}; copy it from where it is "
            "whole, or write the folder again"
        )

    def drop(self, file: ShardFile) -> bool:
        """See `Source`; the file stays."""
        return False


class Patience:
    """How long a storage that is away is asked again for a file, counted from the first failure.

    Processes forked from the one that made it share it: one of them speaks for all, and `end` ends all their waiting.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._owner = os.getpid()
        self._shared = mmap.mmap(-1, 2)  # is someone waiting; is it over

    @property
    def is_own(self) -> bool:
        """Whether this process made it, and not one that this was forked from."""
        return self._owner == os.getpid()

    def end(self) -> None:
        """Nobody needs what is being waited for."""
        self._shared[1] = 1

    def check(self) -> None:
        """UserError where waiting is in vain."""
        if self._shared[1] or self._owner not in (os.getpid(), os.getppid()):
            raise UserError("data: the training process needs no more data")

    def note_trouble(self, what: str, reason: str) -> None:
        """Says, once, that the storage is away."""
        if not self._shared[0]:
            self._shared[0] = 1
            say(f"WARNING: {what} cannot be read ({reason}); asking again for up to {self.seconds:g} s")

    def note_answer(self, what: str) -> None:
        """Says that the storage is back, where it was away."""
        if self._shared[0]:
            self._shared[0] = 0
            say(f"{what} was read: the storage is back")


@dataclass(frozen=True)
class CacheSettings:
    """How copies of remote shards are made and kept.

    Attributes:
        folder: for the copies; holds nothing else.
        limit_bytes: the most that they fill, the least recently used make place; 0 = no limit.
        patience: with a storage that is away.
    """

    folder: Path
    limit_bytes: int
    patience: Patience

    @classmethod
    def of(cls, data: DataConfig) -> "CacheSettings":
        """As a config says."""
        return cls(Path(data.cache_folder), int(data.cache_limit_gb * 1e9), Patience(data.download_patience_seconds))


class RemoteFolder:
    """A shard folder in an object store or on another machine, and the copies made of it.

    The transfer is MosaicML streaming's: s3:// with boto3, its credentials from the environment or ~/.aws and another
    server from S3_ENDPOINT_URL; gs://, oci://, azure://, sftp:// and others with their own clients.
    """

    def __init__(self, address: str, key: str, cache: CacheSettings) -> None:
        self.address, self._key, self._cache = address.rstrip("/"), key, cache
        self._client: tuple[int, CloudDownloader] | None = None  # and the process that may use it

    @contextmanager
    def opened(self, name: str, max_bytes: int) -> Iterator[IO[bytes]]:
        """See `Source`."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            local = Path(folder) / name
            self._fetch(name, local, _Trouble(), max_bytes)
            with open_to_read(local) as opened:
                yield opened

    def text(self, name: str) -> str:
        """See `Source`."""
        with self.opened(name, MAX_TEXT_BYTES) as opened:
            return opened.read().decode()

    def open(self, file: ShardFile) -> FileIO:
        """See `Source`.

        Beside the transfers it takes at most twice the patience: for room in the cache, and for a storage that is away.
        """
        copy = self._copy(file)
        if (opened := _opened_if_whole(copy, file)) is not None:
            with suppress(OSError):
                os.utime(copy)  # used just now
            return opened
        limit = self._cache.limit_bytes
        if limit and file.num_bytes > limit:
            raise UserError(
                f"data.cache_limit_gb: expected at least {file.num_bytes / 1e9:g}, the size of {file.name} in "
                f"{self.address}, got {limit / 1e9:g}; raise it, or set 0 for no limit"
            )
        with self._writing():
            part = copy.with_name(f"{file.digest}.{file.num_bytes}.part")
            with _held(part, self._cache.patience):
                opened = _opened_if_whole(copy, file)  # where another process has fetched it meanwhile
                if opened is None:
                    self._reserve(part, file)
                    self._fetch_whole(file, part / "copy")
                    opened = open_unbuffered(part / "copy")  # while nobody may remove it
                    # Who makes room counts it once, in the making or as a copy.
                    with _locked(self._cache.folder / _LOCK, self._cache.patience) if limit else nullcontext():
                        files.move(part / "copy", copy)
        return opened

    def drop(self, file: ShardFile) -> bool:
        """See `Source`."""
        with self._writing():
            files.remove(self._copy(file))
        return True

    def _copy(self, file: ShardFile) -> Path:
        return self._cache.folder / file.digest

    # ------------------------------------------------------------------
    # Fetching

    def _fetch_whole(self, file: ShardFile, local: Path) -> None:
        trouble = _Trouble()
        for _ in range(_MOST_WRONG_COPIES):
            self._fetch(file.name, local, trouble, file.num_bytes)
            with open_to_read(local, follow=False) as opened:
                digest = hashlib.file_digest(opened, hashlib.blake2b).hexdigest()
            if digest == file.digest:
                return
            got = f"{local.stat().st_size} bytes of hash {digest:.16}..."
            files.remove(local)
        raise UserError(
            f"{self._key}: {self.address}/{file.name}: expected {file.num_bytes} bytes of hash {file.digest:.16}..., "
            f"as the index says, got {got}, {_MOST_WRONG_COPIES} times; upload the folder again"
        )

    def _fetch(self, name: str, local: Path, trouble: "_Trouble", max_bytes: int) -> None:
        """Copies a file; asks again, as long as the patience lasts, where the storage is away."""
        what, patience, pause = f"{self.address}/{name}", self._cache.patience, _FIRST_PAUSE
        while True:
            try:
                files.remove(local)  # the client would take it for whole
                self._transfer(what, local, max_bytes)
                break
            except UserError:
                raise
            except Exception as error:  # whatever the clients of the storages raise
                self._client = None
                reason = _reason(error)
                self._raise_if_final(what, error, reason)
                left = patience.seconds - trouble.seconds()
                if left <= 0:
                    raise UserError(
                        f"{self._key}: {what} could not be read for {trouble.seconds():.0f} s ({reason}); fix "
                        "the storage, the network or the address (for s3 also S3_ENDPOINT_URL), then give the same "
                        "command again; data.download_patience_seconds says how long to wait"
                    ) from error
            patience.note_trouble(what, reason)
            # Spread, so that the workers of many ranks do not all come back in the same moment.
            _sleep(min(left, pause * random.SystemRandom().uniform(0.5, 1.0)), patience)
            pause = min(2 * pause, _LONGEST_PAUSE)
        patience.note_answer(what)

    def _transfer(self, what: str, local: Path, max_bytes: int) -> None:
        """Downloads a file; where more comes than was announced it fails."""
        # In a thread, which a process that ends does not wait for: a storage may keep silent for a minute.
        transfer = Task(lambda: self._download(what, local), "transfer")
        is_over = False
        try:
            while not is_over:
                transfer.join(_POLL_SECONDS)
                is_over = not transfer.is_alive()
                if _bytes_of(local) > max_bytes:
                    raise UserError(
                        f"{self._key}: {what}: expected at most {max_bytes} bytes, got more; upload the folder again"
                    )
                if self._cache.patience.is_own:  # a worker's keeps nobody waiting, and its copy may serve again
                    self._cache.patience.check()
        finally:
            if not is_over:
                # The clients, all of them in Python, have no way to give a transfer up, and it would fill the disk.
                transfer.stop()
        if transfer.error is not None:
            raise transfer.error

    def _download(self, what: str, local: Path) -> None:
        # boto3's own retries are silent and know no deadline; `_fetch` asks again instead.
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
        if self._client is None or self._client[0] != os.getpid():  # a fork must not share connections
            self._client = os.getpid(), CloudDownloader.get(what)
        self._client[1].download(what, str(local), max(1.0, min(_READ_SECONDS, self._cache.patience.seconds)))

    def _raise_if_final(self, what: str, error: Exception, reason: str) -> None:
        """Raises where asking again would not help."""
        status, kind = _http_status(error), type(error).__name__
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise error  # of the cache
        if status == 404 or (isinstance(error, FileNotFoundError) and error.filename is None):
            raise _MissingError(
                f"{self._key}: {what}: expected a file, but it does not exist; give the address of a whole shard folder"
            ) from error
        if status in (401, 403) or "Credential" in kind or "Profile" in kind:
            refused = f"HTTP status {status}" if status else reason
            raise UserError(
                f"{self._key}: {what}: access is refused ({refused}); check the name and that the credentials in the "
                "environment (for s3 AWS_ACCESS_KEY_ID, AWS_PROFILE) may read there"
            ) from error
        is_final = status is not None and 400 <= status < 500 and status not in (408, 425, 429)
        if is_final or isinstance(error, ValueError | ImportError) or kind == "ParamValidationError":
            raise UserError(f"{self._key}: {what} cannot be read ({reason}); check the address") from error

    # ------------------------------------------------------------------
    # The cache

    def _reserve(self, part: Path, file: ShardFile) -> None:
        """Makes room for a file within the limit, and keeps it in the name of `part`."""
        limit, patience, trouble = self._cache.limit_bytes, self._cache.patience, _Trouble()
        if not limit:
            return
        while True:
            with _locked(self._cache.folder / _LOCK, patience):
                if self._make_room(limit - file.num_bytes):
                    files.create(part / _RESERVED).close()
                    return
            # The rest is reserved by copies in the making: those will be copies that can go.
            if trouble.seconds() > patience.seconds:
                raise UserError(
                    f"data.cache_limit_gb: {self._cache.folder} has no room for {file.name}: all of it is taken by "
                    "files that other processes are fetching; raise the limit, or lower data.num_workers"
                )
            _sleep(_POLL_SECONDS, patience)

    def _make_room(self, limit: int) -> bool:
        """Removes the least recently used copies until no more than `limit` bytes are left; whether that succeeded."""
        copies, total = [], 0
        for entry in os.scandir(self._cache.folder):
            if _COPY.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    copies.append((stat.st_mtime_ns, stat.st_size, entry.path))
                    total += stat.st_size
            elif (found := _PART.fullmatch(entry.name)) and not _removed_if_abandoned(Path(entry.path)):
                total += int(found[1]) * (Path(entry.path) / _RESERVED).exists()
        for _, size, path in sorted(copies):
            if total <= limit:
                break
            files.remove(Path(path))  # who is reading it keeps what it has opened
            total -= size
        return total <= limit

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            raise UserError(
                f"data.cache_folder: {self._cache.folder} cannot be written ({error.strerror or error}); free space "
                "there, choose another folder, or set data.cache_limit_gb to what it may hold"
            ) from error


class _Trouble:
    """Something that does not succeed, and since when: what went well before does not count."""

    def __init__(self) -> None:
        self._begin: float | None = None

    def seconds(self) -> float:
        """Since the first call, which comes with the first failure."""
        if self._begin is None:
            self._begin = time.monotonic()
        return time.monotonic() - self._begin


class _MissingError(UserError, FileNotFoundError):
    """A file that the storage does not have."""


def open_source(address: str | Path, key: str, cache: CacheSettings | None = None) -> Source:
    """The source behind a folder's path or address.

    Args:
        address: a folder of this machine, or an address such as s3://bucket/folder.
        key: config key or option that gave it, for messages.
        cache: of copies, for an address; None as the config has it by default.

    Raises:
        UserError: there is no such folder, or no way to read such an address.
    """
    if "://" not in str(address):
        if not Path(address).is_dir():
            raise UserError(
                f"{key}: expected a folder of shards, but {address} does not exist; make shards with "
                "tools/make_shards.py and tools/encode_latents.py"
            )
        return LocalFolder(address, key)
    address = str(address)
    parts = urlsplit(address)
    if parts.password or parts.query:
        raise UserError(f"{key}: expected an address without a password, since it is recorded; use the environment")
    try:
        CloudDownloader.get(address)
    except ValueError as error:
        raise UserError(f"{key}: expected a folder or an address like s3://bucket/folder, got {address}") from error
    except ImportError as error:
        raise UserError(f"{key}: {address} needs a package that is missing ({error}); install it") from error
    return RemoteFolder(address, key, cache or CacheSettings.of(DataConfig()))


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # boto3's
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        response = getattr(error, "status_code", getattr(error, "code", None))
    return response if isinstance(response, int) else None


def _reason(error: Exception) -> str:
    """What an error says, on one line and without what may be secret."""
    return re.sub(r"\?\S*", "", re.sub(r"//[^/\s]*@", "//", one_line(error)))[:200]


def _bytes_of(local: Path) -> int:
    """What has come of a file so far, in a folder of its own; clients give it other names until it is whole."""
    found = 0
    for folder, _, names in os.walk(local.parent):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(os.path.join(folder, name)).st_size
    return found


def _opened_if_whole(copy: Path, file: ShardFile) -> FileIO | None:
    # The bytes are held against the hash when they come; later damage is found by the samples' checksums.
    try:
        opened = open_unbuffered(copy)
    except FileNotFoundError:
        return None
    if os.fstat(opened.fileno()).st_size == file.num_bytes:
        return opened
    opened.close()
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def _sleep(seconds: float, patience: Patience) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        patience.check()
        time.sleep(min(left, 0.5))


@contextmanager
def _held(part: Path, patience: Patience) -> Iterator[None]:
    """Holds the folder of a file in the making, emptied of what a killed process left; it is gone afterwards."""
    with _locked(part / _LOCK, patience):
        files.clear(part, _LOCK)
        try:
            yield
        finally:
            files.remove_locked(part, _LOCK)


def _removed_if_abandoned(part: Path) -> bool:
    """Removes the folder of a file in the making where nobody makes it any more; whether it is gone."""
    try:
        files.check_folder(part)
        lock = files.try_lock(part / _LOCK)
    except FileNotFoundError:
        return True
    if lock is None:
        return False
    files.remove_locked(part, _LOCK)
    os.close(lock)
    return True


@contextmanager
def _locked(file: Path, patience: Patience) -> Iterator[None]:
    """Holds a lock; it is free once its holder lets go or dies."""
    while (descriptor := _try_lock(file)) is None:
        _sleep(_POLL_SECONDS, patience)
    try:
        yield
    finally:
        os.close(descriptor)


def _try_lock(file: Path) -> int | None:
    try:
        # The user's own cache folder may be a link; what lies in it is not trusted.
        files.make_folder(file.parent, follow=not _PART.fullmatch(file.parent.name))
        return files.try_lock(file)
    except FileNotFoundError:
        return None  # its last holder has just removed the folder

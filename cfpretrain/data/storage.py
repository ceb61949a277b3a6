"""Where shard files lie: a folder of this machine, or an address from which copies are fetched."""

import errno
import hashlib
import os
import random
import re
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from cfpretrain.base import files
from cfpretrain.base.background import Task
from cfpretrain.base.config import DataConfig
from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.files import MAX_TEXT_BYTES, open_to_read
from cfpretrain.data.cache import Cache, ShardFile, open_whole
from cfpretrain.data.mosaic import CloudDownloader

_READ_SECONDS = 60.0  # a storage that sends nothing for so long is away
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0  # seconds between two requests to a storage that is away
_POLL_SECONDS = 0.05
_MOST_WRONG_COPIES = 3
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EMFILE}


class Source(ABC):
    """Gives the files of one shard folder, wherever it lies."""

    address: str  # as the user gave it

    @abstractmethod
    def opened(self, name: str, max_bytes: int) -> AbstractContextManager[IO[bytes]]:
        """A file that has no place in the cache, to read; OSError or UserError where it cannot be read."""

    def text(self, name: str) -> str:
        """The content of a small file; FileNotFoundError where there is none."""
        with self.opened(name, MAX_TEXT_BYTES) as opened:
            return opened.read().decode()

    @abstractmethod
    def open(self, file: ShardFile) -> FileIO:
        """A local file with the bytes of `file`, unbuffered; cheap where it is at hand.

        It is given open, since a copy may be removed by a process that needs its room: what is open can still be read.
        UserError where it is missing, cut short, or cannot be fetched.
        """

    @abstractmethod
    def drop(self, file: ShardFile) -> bool:
        """Forgets a file that proved damaged; whether another may come when it is opened again."""


class LocalFolder(Source):
    """A shard folder on this machine."""

    def __init__(self, folder: str | Path, key: str) -> None:
        self.address, self._folder, self._key = str(folder), Path(folder), key

    def opened(self, name: str, max_bytes: int) -> AbstractContextManager[IO[bytes]]:
        return open_to_read(self._folder / name, max_bytes)

    def open(self, file: ShardFile) -> FileIO:
        opened = open_whole(self._folder / file.name, file.num_bytes)
        if isinstance(opened, str):
            raise UserError(
                f"{self._key}: {self.address}/{file.name}: expected a file of {file.num_bytes} bytes, {opened}; "
                "copy it from where it is whole, or write the folder again"
            )
        return opened

    def drop(self, file: ShardFile) -> bool:
        return False  # the file is the user's


class RemoteFolder(Source):
    """A shard folder in an object store or on another machine, and the copies made of it.

    The transfer is MosaicML streaming's: s3:// with boto3, its credentials from the environment or ~/.aws and another
    server from S3_ENDPOINT_URL; gs://, oci://, azure://, sftp:// and others with their own clients.
    """

    def __init__(self, address: str, key: str, cache: Cache) -> None:
        self.address, self._key, self._cache = address.rstrip("/"), key, cache
        self._client: tuple[int, CloudDownloader] | None = None  # and the process that may use it

    @contextmanager
    def opened(self, name: str, max_bytes: int) -> Iterator[IO[bytes]]:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            local = Path(folder) / name
            self._fetch(name, local, max_bytes)
            with open_to_read(local) as opened:
                yield opened

    def open(self, file: ShardFile) -> FileIO:
        limit = self._cache.limit_bytes
        if limit and file.num_bytes > limit:
            raise UserError(
                f"data.cache_limit_gb: expected at least {file.num_bytes / 1e9:g}, the size of {file.name} in "
                f"{self.address}, got {limit / 1e9:g}; raise it, or set 0 for no limit"
            )
        return self._cache.open(file, lambda local: self._fetch(file.name, local, file.num_bytes, file.digest))

    def drop(self, file: ShardFile) -> bool:
        self._cache.drop(file)
        return True

    def _fetch(self, name: str, local: Path, max_bytes: int, digest: str | None = None) -> None:
        """Copies a file, with this hash where one is given; asks again while the storage is away."""
        what, budget, pause = f"{self.address}/{name}", self._cache.budget, _FIRST_PAUSE
        failing_since: float | None = None
        num_wrong = 0
        while True:
            try:
                files.remove(local)  # the client would take it for whole
                self._transfer(what, local, max_bytes)
            except UserError:
                raise
            except Exception as error:  # whatever the clients of the storages raise
                self._client = None
                reason = _reason(error)
                self._raise_if_final(what, error, reason)
                failing_since = failing_since or time.monotonic()
                failing_seconds = time.monotonic() - failing_since
                if failing_seconds >= budget.seconds:
                    raise UserError(
                        f"{self._key}: {what} could not be read for {failing_seconds:.0f} s ({reason}); fix "
                        "the storage, the network or the address (for s3 also S3_ENDPOINT_URL), then give the same "
                        "command again; data.download_patience_seconds says how long to wait"
                    ) from error
                budget.report_failure(what, reason)
                # Spread, so that the workers of many ranks do not all come back in the same moment.
                spread_pause = pause * random.SystemRandom().uniform(0.5, 1.0)
                budget.sleep(min(budget.seconds - failing_seconds, spread_pause))
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            budget.report_success(what)
            if digest is None:
                return
            with open_to_read(local, follow=False) as opened:
                got = hashlib.file_digest(opened, hashlib.blake2b).hexdigest()
            if got == digest:
                return
            num_wrong += 1
            if num_wrong == _MOST_WRONG_COPIES:
                raise UserError(
                    f"{self._key}: {what}: expected {max_bytes} bytes of hash {digest:.16}..., as the index says, got "
                    f"{local.stat().st_size} bytes of hash {got:.16}..., {num_wrong} times; upload the folder again"
                )

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
                self._cache.budget.check()
        finally:
            # The clients, all of them in Python, have no way to give a transfer up, and it would fill the disk.
            transfer.stop()
        if transfer.error is not None:
            raise transfer.error

    def _download(self, what: str, local: Path) -> None:
        # boto3's own retries are silent and know no deadline; `_fetch` asks again instead.
        os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")
        if self._client is None or self._client[0] != os.getpid():  # a fork must not share connections
            self._client = os.getpid(), CloudDownloader.get(what)
        self._client[1].download(what, str(local), max(1.0, min(_READ_SECONDS, self._cache.budget.seconds)))

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


class _MissingError(UserError, FileNotFoundError):
    """A file that the storage does not have."""


def open_source(address: str | Path, key: str, cache: Cache | None = None) -> Source:
    """The source behind a folder's path or address; UserError where there is none, or no way to read it.

    Args:
        address: a folder of this machine, or an address such as s3://bucket/folder.
        key: config key or option that gave it, for messages.
        cache: of copies, for an address; None as the config has it by default.
    """
    if "://" not in str(address):
        if not Path(address).is_dir():
            raise UserError(
                f"{key}: expected a folder of shards, but {address} does not exist; make shards with "
                "tools/make_shards.py, and of latents with tools/encode_latents.py"
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
    return RemoteFolder(address, key, cache or Cache.of(DataConfig()))


def _bytes_of(local: Path) -> int:
    """What has come of a file so far, in a folder of its own; clients give it other names until it is whole."""
    found = 0
    for folder, _, names in os.walk(local.parent):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.lstat(os.path.join(folder, name)).st_size
    return found


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

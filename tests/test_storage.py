"""Copies of remote shards: fetched once, whole, within the limit, whatever is killed; every failure has its message."""

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.data import storage
from cfpretrain.data.cache import Cache, RetryBudget, ShardFile
from cfpretrain.data.storage import LocalFolder, RemoteFolder, Source, open_source
from tests.disks import mount, mounted_disk
from tests.processes import wait_until

ADDRESS = "s3://bucket/shards"
NUM_BYTES = 1000
FORK = multiprocessing.get_context("fork")


def content_of(number: int, num_bytes: int = NUM_BYTES) -> bytes:
    return bytes((number * 7 + i) % 256 for i in range(num_bytes))


def file_of(number: int, num_bytes: int = NUM_BYTES) -> ShardFile:
    content = content_of(number, num_bytes)
    return ShardFile(f"shard.{number:05d}.mds", num_bytes, hashlib.blake2b(content).hexdigest())


class Store:
    """Stands for a storage: a folder, from which files are copied slowly, in two writes; it may be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder.parent / "log"
        self.failures: list[Exception] = []
        self.before_second_half: Callable[[str], None] = lambda name: None
        folder.mkdir()
        self.log.touch()

    def download(self, what: str, local: Path) -> None:
        name = what.removeprefix(f"{ADDRESS}/")
        with self.log.open("a") as log:
            log.write(f"{name}\n")
        if self.failures:
            raise self.failures.pop(0)
        content = (self.folder / name).read_bytes()
        with local.open("wb") as opened:
            opened.write(content[: len(content) // 2])
            opened.flush()
            self.before_second_half(name)
            opened.write(content[len(content) // 2 :])

    def asked(self) -> list[str]:
        """The files asked for so far, by any process."""
        return self.log.read_text().split()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    monkeypatch.setattr(RemoteFolder, "_download", lambda _, what, local: store.download(what, local))
    monkeypatch.setattr(storage, "_FIRST_PAUSE", 0.01)
    for number in range(6):
        (store.folder / file_of(number).name).write_bytes(content_of(number))
    yield store
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def remote(folder: Path, limit_bytes: int = 0, retry_seconds: float = 30.0) -> RemoteFolder:
    return RemoteFolder(ADDRESS, "data.shards", Cache(folder, limit_bytes, RetryBudget(retry_seconds)))


def content(source: Source, file: ShardFile) -> bytes:
    with source.open(file) as opened:
        return opened.read()


def copies_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def digests(*numbers: int) -> set[str]:
    return {file_of(number).digest for number in numbers}


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of this machine


def test_a_local_folder_gives_its_own_files(tmp_path: Path) -> None:
    source = open_source(tmp_path, "--images")
    assert isinstance(source, LocalFolder)
    (tmp_path / "index.json").write_text("text")
    assert source.text("index.json") == "text"
    with pytest.raises(FileNotFoundError):
        source.text("other.json")
    path = tmp_path / file_of(1).name
    message = error_of(lambda: content(source, file_of(1)))
    assert message.startswith(f"--images: {path}: expected a file of 1000 bytes, it is missing; ")
    path.write_bytes(content_of(1)[:-1])
    assert "expected a file of 1000 bytes, got 999" in error_of(lambda: content(source, file_of(1)))
    path.write_bytes(content_of(1))
    assert content(source, file_of(1)) == content_of(1)
    assert not source.drop(file_of(1))  # damaged or not, it is the user's
    assert path.exists()


def test_addresses_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "does not exist; make shards with" in error_of(lambda: open_source(tmp_path / "no", "key"))
    message = error_of(lambda: open_source("carrier://pigeon/1", "data.shards"))
    assert message == "data.shards: expected a folder or an address like s3://bucket/folder, got carrier://pigeon/1"
    message = error_of(lambda: open_source("sftp://me:hunter2@host/folder", "data.shards"))
    assert "password" in message
    assert "hunter2" not in message
    assert open_source("s3://bucket/folder/", "data.shards").address == "s3://bucket/folder"


# ---------------------------------------------------------------------------------------------------------------------
# The cache


def test_a_file_is_fetched_once_and_whole(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    source = remote(cache)
    for _ in range(2):
        for number in (0, 1):
            assert content(source, file_of(number)) == content_of(number)
    # Another run, or another data set with the same file.
    assert content(remote(cache), file_of(1)) == content_of(1)
    assert store.asked() == [file_of(0).name, file_of(1).name]
    assert copies_in(cache) == digests(0, 1)


def test_the_least_recently_used_make_place(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "notes.txt").write_text("x" * 5000)  # not ours: neither counted nor removed
    source = remote(cache, limit_bytes=3 * NUM_BYTES)
    for number in (0, 1, 2, 0, 3, 0, 4):
        assert content(source, file_of(number)) == content_of(number)
        time.sleep(0.02)  # time stamps of files move in steps of some milliseconds
    assert copies_in(cache) == digests(0, 3, 4) | {"notes.txt"}
    assert store.asked() == [file_of(number).name for number in (0, 1, 2, 3, 4)]
    assert content(remote(cache, limit_bytes=NUM_BYTES), file_of(5)) == content_of(5)
    assert copies_in(cache) == digests(5) | {"notes.txt"}


def test_what_is_open_stays_readable_when_it_makes_place(store: Store, tmp_path: Path) -> None:
    source = remote(tmp_path / "cache", limit_bytes=NUM_BYTES)
    for is_there in (False, True):  # just fetched, or found in the cache
        if is_there:
            content(source, file_of(0))
        with source.open(file_of(0)) as opened:
            assert content(source, file_of(1)) == content_of(1)
            assert copies_in(tmp_path / "cache") == digests(1)
            assert opened.read() == content_of(0)


def test_a_limit_below_one_file_is_refused(store: Store, tmp_path: Path) -> None:
    message = error_of(lambda: content(remote(tmp_path / "cache", limit_bytes=NUM_BYTES - 1), file_of(0)))
    assert message.startswith("data.cache_limit_gb: expected at least 1e-06, the size of shard.00000.mds")
    assert not store.asked()


def test_a_damaged_copy_is_fetched_again(store: Store, tmp_path: Path) -> None:
    source = remote(tmp_path / "cache")
    assert content(source, file_of(0)) == content_of(0)
    (path,) = (tmp_path / "cache").glob("[0-9a-f]*")
    path.write_bytes(b"short")
    assert content(source, file_of(0)) == content_of(0)
    path.write_bytes(b"x" * NUM_BYTES)  # seen by the reader only, which says so
    assert source.drop(file_of(0))
    assert content(source, file_of(0)) == content_of(0)
    assert len(store.asked()) == 3


def test_a_wrong_download_is_not_taken(store: Store, tmp_path: Path) -> None:
    source, there = remote(tmp_path / "cache"), store.folder / file_of(0).name
    there.write_bytes(content_of(1))
    message = error_of(lambda: content(source, file_of(0)))
    assert f"{ADDRESS}/shard.00000.mds: expected 1000 bytes of hash {file_of(0).digest[:16]}" in message
    assert message.endswith("3 times; upload the folder again")
    there.write_bytes(content_of(0)[:500])
    assert "got 500 bytes" in error_of(lambda: content(source, file_of(0)))
    assert copies_in(tmp_path / "cache") == set()
    store.before_second_half = lambda name: there.write_bytes(content_of(0))
    assert content(source, file_of(0)) == content_of(0)


def test_a_transfer_that_is_given_up_ends(store: Store, tmp_path: Path) -> None:
    """Of a file without an end, which would fill the disk."""
    written = []

    def write_on(name: str) -> None:
        part = tmp_path / "cache" / f"{file_of(0).digest}.{NUM_BYTES}.part"
        with (part / "copy.more").open("wb", buffering=0) as more:
            while True:
                written.append(more.write(bytes(NUM_BYTES)))
                time.sleep(0.01)

    store.before_second_half = write_on
    source = remote(tmp_path / "cache")
    assert "expected at most 1000 bytes, got more; upload the folder again" in error_of(lambda: source.open(file_of(0)))
    wait_until(lambda: not any(thread.name == "transfer" for thread in threading.enumerate()))
    assert written
    assert copies_in(tmp_path / "cache") == set()


def test_a_full_disk(store: Store, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as disk:
        (disk / "other").write_bytes(bytes(64 << 10))
        large = file_of(9, 100 << 10)
        (store.folder / large.name).write_bytes(content_of(9, large.num_bytes))
        message = error_of(lambda: content(remote(disk / "cache"), large))
        assert message.startswith(f"data.cache_folder: {disk}/cache cannot be written (No space left on device); free")
        assert copies_in(disk / "cache") == set()
        (disk / "other").unlink()
        assert content(remote(disk / "cache"), large) == content_of(9, large.num_bytes)
    assert len(store.asked()) == 2  # asking again would not have helped


def test_a_read_only_cache_gives_what_it_has(store: Store, tmp_path: Path) -> None:
    with mounted_disk(tmp_path / "disk", "128k") as disk:
        content(remote(disk), file_of(0))
        assert mount("-o", "remount,ro", str(disk)).returncode == 0
        assert content(remote(disk), file_of(0)) == content_of(0)
        message = error_of(lambda: content(remote(disk), file_of(1)))
        assert message.startswith(f"data.cache_folder: {disk} cannot be written (Read-only file system)")


# ---------------------------------------------------------------------------------------------------------------------
# Storages that fail


def answer(status: int) -> Exception:
    """As boto3 tells a refusal."""
    error = Exception(f"An error occurred ({status})")
    error.response = {"ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    return error


def test_a_storage_that_comes_back(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.failures = [ConnectionError("https://me:hunter2@host/x?token=1 refused"), TimeoutError(), answer(503)]
    assert content(remote(tmp_path / "cache"), file_of(0)) == content_of(0)
    assert len(store.asked()) == 4
    assert capsys.readouterr().out.splitlines() == [
        f"[cfpretrain] WARNING: {ADDRESS}/shard.00000.mds cannot be read (https://host/x refused); "
        "asking again for up to 30 s",
        f"[cfpretrain] {ADDRESS}/shard.00000.mds was read: the storage is back",
    ]


def test_a_storage_that_stays_away(store: Store, tmp_path: Path) -> None:
    store.failures = [ConnectionError("connection refused")] * 1000
    message = error_of(lambda: content(remote(tmp_path / "cache", retry_seconds=5.0), file_of(0)))
    begin = f"data.shards: {ADDRESS}/shard.00000.mds could not be read for "
    said = re.match(re.escape(begin) + r"(\d+) s \(connection refused\); fix the storage", message)
    assert said
    assert int(said[1]) >= 5  # by its own account all of its budget
    assert "S3_ENDPOINT_URL" in message
    assert "data.download_patience_seconds" in message
    assert len(store.asked()) > 3
    assert copies_in(tmp_path / "cache") == set()


def test_the_retry_budget_begins_with_the_first_failure(store: Store, tmp_path: Path) -> None:
    """Neither waiting for another process's copy nor a long transfer that breaks off takes any of it."""
    cache, held = tmp_path / "cache", threading.Event()
    part = cache / f"{file_of(0).digest}.{NUM_BYTES}.part"
    part.mkdir(parents=True)

    def hold() -> None:
        lock = files.try_lock(part / "lock")
        assert lock is not None
        held.set()
        time.sleep(0.5)
        os.close(lock)

    def break_off(name: str) -> None:
        assert not other.is_alive()
        store.before_second_half = lambda name: None
        time.sleep(0.5)
        raise ConnectionError("broken off")

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    store.before_second_half = break_off
    assert content(remote(cache, retry_seconds=0.3), file_of(0)) == content_of(0)
    other.join()
    assert len(store.asked()) == 2


class NoCredentialsError(Exception):
    """Named as botocore's."""


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (answer(404), "expected a file, but it does not exist"),
        (FileNotFoundError("Object not found"), "expected a file, but it does not exist"),
        (answer(403), "access is refused (HTTP status 403)"),
        (NoCredentialsError("Unable to locate credentials"), "access is refused (Unable to locate credentials)"),
        (answer(400), "cannot be read (An error occurred (400)); check the address"),
        (ValueError("Invalid endpoint: x"), "cannot be read (Invalid endpoint: x); check the address"),
    ],
)
def test_refusals_are_final(store: Store, tmp_path: Path, failure: Exception, words: str) -> None:
    store.failures = [failure]
    message = error_of(lambda: content(remote(tmp_path / "cache"), file_of(0)))
    assert message.startswith(f"data.shards: {ADDRESS}/shard.00000.mds")
    assert words in message
    assert len(store.asked()) == 1


def test_a_small_file_that_is_not_there(store: Store, tmp_path: Path) -> None:
    (store.folder / "index.json").write_text("content")
    store.failures = [ConnectionError()]
    source = remote(tmp_path / "cache")
    assert source.text("index.json") == "content"
    store.failures = [answer(404)]
    with pytest.raises(FileNotFoundError):
        source.text("cfpretrain.json")
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def start(function: Callable[..., None], *args: Any) -> Any:
    process = FORK.Process(target=function, args=args)
    process.start()
    return process


def read_in_turn(source: RemoteFolder, numbers: list[int]) -> None:
    """In a process of its own; fails where a file is wrong or the limit is passed."""
    for number in numbers:
        assert content(source, file_of(number)) == content_of(number)  # though others may need the room at once
        limit, folder = source._cache.limit_bytes, source._cache.folder
        with files.locked(folder / "lock", lambda: time.sleep(0.01)):  # nothing is removed meanwhile
            sizes = [path.stat().st_size for path in folder.iterdir() if len(path.name) == 128]
        assert not limit or sum(sizes) <= limit


def test_processes_that_want_the_same_file_fetch_it_once(store: Store, tmp_path: Path) -> None:
    store.before_second_half = lambda name: time.sleep(0.2)
    sources = [remote(tmp_path / "cache") for _ in range(4)]  # four jobs
    processes = [start(read_in_turn, source, [0, 1]) for source in sources]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(store.asked()) == [file_of(0).name, file_of(1).name]


def test_processes_share_a_cache_of_one_file(store: Store, tmp_path: Path) -> None:
    """Room for one file and a half: whoever fetches reserves it, the others wait."""
    store.before_second_half = lambda name: time.sleep(0.01)
    orders = ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2])
    processes = [start(read_in_turn, remote(tmp_path / "cache", 3 * NUM_BYTES // 2), order) for order in orders]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(copies_in(tmp_path / "cache")) == 1


def test_a_cache_that_others_fill_is_said(store: Store, tmp_path: Path) -> None:
    """What they fetch leaves no room; copies are not removed in vain."""
    cache = tmp_path / "cache"
    content(remote(cache, 3 * NUM_BYTES // 2), file_of(0))
    part = cache / f"{file_of(1).digest}.{NUM_BYTES}.part"
    part.mkdir()
    lock = files.try_lock(part / "lock")
    assert lock is not None
    with pytest.raises(UserError, match=r"data\.cache_limit_gb: .*cache has no room for shard\.00002\.mds: .*lower"):
        remote(cache, 3 * NUM_BYTES // 2, retry_seconds=0.2).open(file_of(2))
    assert file_of(0).digest in copies_in(cache)
    os.close(lock)
    assert content(remote(cache, 3 * NUM_BYTES // 2), file_of(2)) == content_of(2)


def test_what_a_killed_download_leaves_is_removed_by_the_next(store: Store, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def stall(name: str) -> None:
        (tmp_path / "stalled").touch()
        time.sleep(60)

    def kill_one_in_the_middle() -> None:
        store.before_second_half = stall
        process = start(read_in_turn, remote(cache, 2 * NUM_BYTES), [0])
        wait_until((tmp_path / "stalled").exists)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (tmp_path / "stalled").unlink()
        store.before_second_half = lambda name: None
        assert copies_in(cache) == {f"{file_of(0).digest}.{NUM_BYTES}.part"}

    kill_one_in_the_middle()
    assert content(remote(cache, 2 * NUM_BYTES), file_of(0)) == content_of(0)
    assert copies_in(cache) == digests(0)
    # Neither do leftovers of other files keep their room.
    shutil.rmtree(cache)
    kill_one_in_the_middle()
    for number in (1, 2):
        content(remote(cache, 2 * NUM_BYTES), file_of(number))
    assert copies_in(cache) == digests(1, 2)


def test_waiting_ends_with_the_need(store: Store, tmp_path: Path) -> None:
    """A worker that waits for a storage does not keep its rank, which is ending, or outlive it for long."""
    store.failures = [ConnectionError()] * 100_000
    source = remote(tmp_path / "cache", retry_seconds=600)
    worker = start(read_in_turn, source, [0])
    wait_until(lambda: len(store.asked()) > 2)
    source._cache.budget.end()
    worker.join(30)
    assert worker.exitcode == 1

    def rank() -> None:
        worker = start(read_in_turn, remote(tmp_path / "cache", retry_seconds=600), [0])
        (tmp_path / "worker").write_text(str(worker.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    start(rank).join()
    pid = int((tmp_path / "worker").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text())

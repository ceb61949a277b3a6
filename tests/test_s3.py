"""Training data from a real S3-protocol server on loopback, which dies, comes back, lacks files and damages them."""

import gc
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.data import storage
from cfpretrain.data.loader import Loader, Position, order_fingerprint
from cfpretrain.data.online import open_training_data
from cfpretrain.data.samples import Samples
from tests.digits import digits, digits_info, small_run, write_latents
from tests.image_files import digits as digits_in_colour
from tests.image_files import encoded, write_images
from tests.latent_shards import as_read, config_for, write_samples
from tests.object_store import BUCKET, ObjectStore, running_store
from tests.processes import REPOSITORY, run_in_processes, shared_memory, wait_until
from tests.test_inspect_shards import REJECTED, png, rejecting
from tools import inspect_shards

NUM_SAMPLES, NUM_SHARDS = 101, 6
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with running_store() as store:
        yield store


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents with their posteriors and mirrors, in six shards."""
    return write_samples(tmp_path_factory.mktemp("s3") / "shards", NUM_SAMPLES, has_posterior=True, has_mirror=True)


def shard_bytes(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("*.mds"))


def s3_config(address: str, cache: Path, folder: Path, num_workers: int = 1, **data: Any) -> Config:
    """With room for two and a half of the six shards: every epoch fetches again. A worker's client takes a second."""
    settings = {"cache_limit_gb": 2.5 * shard_bytes(folder) / 1e9, "download_patience_seconds": 60.0, **data}
    return local_config(address, num_workers=num_workers, cache_folder=str(cache), **settings)


def local_config(folder: Path | str, **settings: Any) -> Config:
    # The smallest block for shards of twenty: one or two at a time, so that few are fetched.
    return config_for(folder, mirror_prob=0.5, shuffle_block_size=27, **settings)


def take(loader: Loader, num_steps: int) -> list[Samples]:
    return [batch for _ in range(num_steps) for batch in next(loader)]


def local_batches(folder: Path, num_steps: int, position: Position | None = None) -> list[Samples]:
    with closing(Loader(local_config(folder), as_read, 0, 1, position)) as loader:
        return take(loader, num_steps)


def assert_equal(found: list[Samples], wanted: list[Samples]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.epoch == other.epoch
        for name in ("ids_B", "labels_B", "latents_BCYX"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert "very-secret" not in str(raised.value)
    return str(raised.value)


def test_shards_in_the_store_are_those_of_the_folder(
    store: ObjectStore, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = store.upload(folder, "plain")
    config = s3_config(address, tmp_path / "cache", folder, num_workers=2)
    with closing(Loader(config, as_read, 0, 1)) as loader:
        local = local_config(folder)
        assert loader.fingerprint == order_fingerprint(local, open_training_data(local).folders)
        assert_equal(take(loader, 6), local_batches(folder, 6))
        position = loader.position
    assert "WARNING: data.cache_limit_gb = " in capsys.readouterr().out
    kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.is_file()]
    # Maybe of none: there is room for two, and the two workers may have been stopped while each fetched one.
    assert sum(kept) <= config.data.cache_limit_gb * 1e9
    with closing(
        Loader(s3_config(address, tmp_path / "other", folder, num_workers=0), as_read, 0, 1, position)
    ) as loader:
        assert_equal(take(loader, 3), local_batches(folder, 3, position))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of the transfer that is given up
def test_an_object_larger_than_declared_is_cut(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    """It neither fills the disk past the limit of the cache nor is asked for again."""
    large = tmp_path / "large"
    shutil.copytree(folder, large)
    for file in large.glob("*.mds"):
        with file.open("r+b") as opened:
            opened.truncate(32 * 2**20)
    address = store.upload(large, "large")
    config = s3_config(address, tmp_path / "cache", folder, num_workers=0)
    with closing(Loader(config, as_read, 0, 1)) as loader:
        said = error_of(lambda: take(loader, 1))
    size = (folder / "shard.00000.mds").stat().st_size
    assert re.fullmatch(rf"data.shards: {address}/shard.0000\d.mds: expected at most \d+ bytes, got more; .*", said)
    assert size < config.data.cache_limit_gb * 1e9 < 32 * 2**20
    assert not any(path.is_file() and path.name != "lock" for path in (tmp_path / "cache").rglob("*"))
    # Its socket is closed here, and not in a later test.
    wait_until(lambda: not any(thread.name == "transfer" for thread in threading.enumerate()))
    gc.collect()


def test_the_server_dies_in_mid_epoch_and_comes_back(
    store: ObjectStore, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    address = store.upload(folder, "dies")

    healer = threading.Timer(0.5, store.start)
    with closing(Loader(s3_config(address, tmp_path / "cache", folder, num_workers=2), as_read, 0, 1)) as loader:
        found = take(loader, 2)
        store.kill()
        healer.start()
        found += take(loader, 5)
        healer.join()
    assert_equal(found, local_batches(folder, 7))
    said = capfd.readouterr().out
    assert f"WARNING: {address}/shard.0" in said
    assert "asking again for up to 60 s" in said
    assert "was read: the storage is back" in said
    assert "very-secret" not in said


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in six shards."""
    files = [encoded(image) for image in digits_in_colour(0, NUM_SAMPLES, 16)]
    shards = [files[begin : begin + 20] for begin in range(0, NUM_SAMPLES, 20)]
    return write_images(tmp_path_factory.mktemp("s3") / "images", shards, 16, class_names=("a", "b", "c"))


def test_the_server_dies_under_image_shards_and_comes_back(
    store: ObjectStore, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are encoded by a thread, which waits as the one that trains would."""
    address, pixels = store.upload(images, "images"), {"shape": (3, 16, 16), "encode_batch_size": 4}
    with closing(Loader(local_config(images, **pixels), as_read, 0, 1)) as loader:
        wanted = take(loader, 7)
    healer = threading.Timer(0.5, store.start)
    config = s3_config(address, tmp_path / "cache", images, num_workers=1, **pixels)
    with closing(Loader(config, as_read, 0, 1)) as loader:
        found = take(loader, 2)
        store.kill()
        healer.start()
        found += take(loader, 5)
        healer.join()
    assert_equal(found, wanted)
    said = capfd.readouterr().out
    assert f"WARNING: {address}/shard.0" in said
    assert "the storage is back" in said


def test_the_server_stays_away(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    address = store.upload(folder, "gone")
    config = s3_config(address, tmp_path / "cache", folder, download_patience_seconds=1.5)
    try:
        with closing(Loader(config, as_read, 0, 1)) as loader:
            next(loader)
            store.kill()
            message = error_of(lambda: take(loader, 10))
        assert message.startswith(f"data.shards: {address}/shard.0000")
        assert "Could not connect to the endpoint" in message
        assert "give the same command again" in message
        assert not multiprocessing.active_children()
        message = error_of(lambda: Loader(config, as_read, 0, 1))
        assert message.startswith(f"data.shards: {address}/cfpretrain.json could not be read for ")
    finally:
        store.start()


def test_mistaken_addresses(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    address = store.upload(folder, "mistaken", "index.json")
    assert f"{address} has no cfpretrain.json" in error_of(
        lambda: Loader(s3_config(address, tmp_path / "cache", folder), as_read, 0, 1)
    )
    nowhere = s3_config("s3://no-such-bucket/shards", tmp_path / "cache", folder)
    assert "s3://no-such-bucket/shards has no cfpretrain.json" in error_of(lambda: Loader(nowhere, as_read, 0, 1))


def test_a_file_that_the_store_lacks_or_has_damaged(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    address = store.upload(folder, "damaged")
    key, name = "damaged/shard.00004.mds", f"{address}/shard.00004.mds"
    whole = (folder / "shard.00004.mds").read_bytes()

    def error_in_the_epoch() -> str:
        with closing(Loader(s3_config(address, tmp_path / "cache", folder), as_read, 0, 1)) as loader:
            return error_of(lambda: take(loader, 4))

    for damaged in (whole[:-1], whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        store.client().put_object(Bucket=BUCKET, Key=key, Body=damaged)
        message = error_in_the_epoch()
        assert message.startswith(f"data.shards: {name}: expected {len(whole)} bytes of hash")
        assert message.endswith("upload the folder again")
    store.client().delete_object(Bucket=BUCKET, Key=key)
    assert error_in_the_epoch().startswith(f"data.shards: {name}: expected a file, but it does not exist; give")


def test_a_copy_with_a_flipped_byte_is_fetched_again(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    address, cache = store.upload(folder, "flipped"), tmp_path / "cache"
    config = s3_config(address, cache, folder, cache_limit_gb=0.0)
    with closing(Loader(config, as_read, 0, 1)) as loader:
        take(loader, 4)
    copies = list(cache.glob("[0-9a-f]*"))
    assert len(copies) == NUM_SHARDS
    for path in copies:
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
    with closing(Loader(config, as_read, 0, 1)) as loader:
        assert_equal(take(loader, 8), local_batches(folder, 8))
    assert sorted(path.read_bytes() for path in copies) == sorted(path.read_bytes() for path in folder.glob("*.mds"))


def test_a_folder_in_the_store_is_inspected(
    store: ObjectStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cache, limit = tmp_path / "cache", 1.5 * shard_bytes(folder) / 1e9
    options = ["--cache-folder", str(cache), "--cache-limit-gb", str(limit), "--download-patience-seconds", "60"]
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", store.upload(folder, "inspected"), "--verify", *options])
    inspect_shards.main()
    assert f"verified: {NUM_SHARDS} files, {NUM_SAMPLES} samples, every hash" in capsys.readouterr().out
    kept = [path.stat().st_size for path in cache.iterdir() if path.is_file()]
    assert 0 < sum(kept) <= limit * 1e9
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", "s3://bucket/folder", "--cache-limit-gb", "-1"])
    with pytest.raises(SystemExit):
        inspect_shards.main()
    assert "--cache-limit-gb: expected at least 0, got -1" in capsys.readouterr().err


def test_a_long_list_of_rejected_images_in_the_store_is_read(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rejected = rejecting(1000, f"{REJECTED}\n" * 1000)
    images = write_images(tmp_path / "images", [[png(16)] * 2], 16, **rejected)
    monkeypatch.setattr(storage, "MAX_TEXT_BYTES", (images / "rejected.jsonl").stat().st_size - 1)
    options = ["--cache-folder", str(tmp_path / "cache"), "--verify"]
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", store.upload(images, "rejected"), *options])
    inspect_shards.main()
    assert "verified: 1 files, 2 samples" in capsys.readouterr().out


def read_epochs(config: Config, started: str) -> None:
    """In a process of its own: goes through the data until it is killed."""
    with closing(Loader(config, as_read, 0, 1)) as loader:
        Path(started).touch()
        take(loader, 100_000)


def test_two_jobs_share_a_cache_and_one_is_killed(store: ObjectStore, folder: Path, tmp_path: Path) -> None:
    address = store.upload(folder, "shared")
    config = s3_config(address, tmp_path / "cache", folder)
    shared_before = shared_memory()
    wanted = local_batches(folder, 4)
    for attempt in range(2):
        started = tmp_path / f"started{attempt}"
        other = FORK.Process(target=read_epochs, args=(config, str(started)))
        other.start()
        wait_until(started.exists)
        with closing(Loader(config, as_read, 0, 1)) as loader:
            found = take(loader, 2)
            os.kill(other.pid or 0, signal.SIGKILL)
            other.join()
            assert_equal(found + take(loader, 2), wanted)
    # Until the last workers of the dead have seen it.
    wait_until(lambda: shared_memory() <= shared_before)


def train(arguments: list[str], environment: dict[str, str]) -> None:
    """In each rank."""
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    sys.argv = ["cfpretrain/train.py", *arguments]
    runpy.run_path(str(REPOSITORY / "cfpretrain" / "train.py"), run_name="__main__")


@pytest.mark.slow
def test_training_from_the_store_is_training_from_the_folder(store: ObjectStore, tmp_path: Path) -> None:
    folder = write_latents(tmp_path / "digits", digits_info(100), digits(100), samples_per_shard=10)
    address = store.upload(folder, "digits")
    losses = []
    for shards, limit in ((str(folder), 0.0), (address, 5.5 * shard_bytes(folder) / 1e9)):
        run = tmp_path / f"run{len(losses)}"
        cache = [f"data.cache_folder={tmp_path / 'cache'}", f"data.cache_limit_gb={limit}"]
        arguments = small_run(Path("unused"), run, f"data.shards={shards}", *cache, "data.num_workers=2")
        run_in_processes(train, 2, arguments, store.environment())
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    # Of ten shards there is room for five; the four workers may have been stopped while each fetched one.
    assert 0 < len([path for path in (tmp_path / "cache").iterdir() if len(path.name) == 128]) <= 5

"""Shard folders in the making: any writers, any order, any kills, the same bytes; all of it or nothing."""

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cfpretrain.base.console import UserError
from cfpretrain.data.shard_writer import ShardWriter, merged_versions
from cfpretrain.data.shards import ImagesInfo, Shards, image_columns, read_info
from tests.disks import mount, mounted_disk
from tests.folders import content

NUM_SHARDS, EACH = 6, 5
PLAN = {"made": "by a test", "sizes": [1, 2]}


def info(num_samples: int = NUM_SHARDS * EACH) -> ImagesInfo:
    return ImagesInfo(("one", "two"), num_samples, 0, "lossless", 8, 1, "test")


def samples(number: int) -> Iterator[dict[str, Any]]:
    for i in range(number * EACH, (number + 1) * EACH):
        yield {"id": i, "label": i % 2, "caption": f"number {i}", "image": bytes([i]) * 3000}


def make(folder: Path) -> ShardWriter:
    return ShardWriter(folder, image_columns(), PLAN)


def write_all(folder: Path, order: list[int]) -> ShardWriter:
    writer = make(folder)
    writer.begin()
    for number in order:
        writer.write(number, samples(number), lambda number=number: {"number": number})
    writer.finish(info(), NUM_SHARDS, {"notes.txt": "hello"})
    return writer


def write_missing(writer: ShardWriter) -> None:
    for number in writer.missing(NUM_SHARDS):
        writer.write(number, samples(number), lambda number=number: {"number": number})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    write_all(folder, list(range(NUM_SHARDS)))
    return content(folder)


def test_the_order_of_writing_leaves_no_trace(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "shards"
    write_all(folder, [3, 0, 5, 1, 4, 2])
    assert content(folder) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
    assert whole["notes.txt"] == b"hello"
    shards = Shards(folder)
    assert [shards.sample(i)["id"] for i in range(len(shards))] == list(range(NUM_SHARDS * EACH))
    assert shards.sample(7)["caption"] == "number 7"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # LocalDataset leaves its index open
def test_the_index_holds_the_description_too_and_mosaicml_reads_it(tmp_path: Path, whole: dict[str, bytes]) -> None:
    from streaming import LocalDataset

    index = json.loads(whole["index.json"])
    assert index["cfpretrain.json.blake2b"] == hashlib.blake2b(whole["cfpretrain.json"]).hexdigest()
    write_all(tmp_path / "shards", list(range(NUM_SHARDS)))
    samples_read = LocalDataset(str(tmp_path / "shards"))
    assert [samples_read[i]["id"] for i in range(len(samples_read))] == list(range(NUM_SHARDS * EACH))


def test_versions_of_all_that_wrote_are_kept() -> None:
    records = [{"versions": {"torch": "2.9", "cfpretrain": version}} for version in ("2", "1", "2")]
    assert merged_versions(records) == {"torch": "2.9", "cfpretrain": "1, 2"}


def test_it_goes_on_where_it_was(tmp_path: Path, whole: dict[str, bytes]) -> None:
    folder = tmp_path / "shards"
    first = make(folder)
    assert not first.is_complete()
    first.begin()
    first.write(2, samples(2), lambda: {"number": 2})
    with pytest.raises(UserError, match="is being written by another process"):
        make(folder).begin()
    first.unfinished.release()  # as the end of its process does
    second = make(folder)
    second.begin()
    assert second.missing(NUM_SHARDS) == [0, 1, 3, 4, 5]
    write_missing(second)
    assert second.records(NUM_SHARDS) == [{"number": number} for number in range(NUM_SHARDS)]
    assert not folder.exists()
    second.finish(info(), NUM_SHARDS, {"notes.txt": "hello"})
    assert content(folder) == whole
    assert make(folder).is_complete()


def test_a_shard_may_stay_empty(tmp_path: Path) -> None:
    writer = make(tmp_path / "shards")
    writer.begin()
    writer.write(0, samples(0))
    writer.write(1, [])
    writer.write(2, samples(2))
    writer.finish(info(2 * EACH), 3)
    assert Shards(tmp_path / "shards").shard_sizes.tolist() == [EACH, EACH]


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    writer = make(tmp_path / "shards")
    writer.begin()
    writer.write(0, [])
    with pytest.raises(UserError, match="expected some samples, got none"):
        writer.finish(info(0), 1)


def test_shards_that_are_not_all_that_was_announced_get_no_name(tmp_path: Path) -> None:
    """A mistake of ours; under `python -O`, too."""
    writer = make(tmp_path / "shards")
    writer.begin()
    (sample, *others) = samples(0)
    with pytest.raises(RuntimeError, match=r"sample 0 has columns .*'width'"):
        writer.write(0, [{**sample, "width": 3}, *others])
    write_missing(writer)
    with pytest.raises(RuntimeError, match=f"{NUM_SHARDS * EACH} samples were written and 1000 announced"):
        writer.finish(info(1000), NUM_SHARDS)
    few = dataclasses.replace(info(), class_names=("only",))
    with pytest.raises(RuntimeError, match="a label is beyond the 1 classes"):
        writer.finish(few, NUM_SHARDS)
    assert not (tmp_path / "shards").exists()


def test_a_writer_that_fails_leaves_the_shard_unwritten(tmp_path: Path) -> None:
    def failing() -> Iterator[dict[str, Any]]:
        yield from list(samples(0))[:3]
        raise KeyboardInterrupt

    writer = make(tmp_path / "shards")
    writer.begin()
    with pytest.raises(KeyboardInterrupt):
        writer.write(0, failing())
    assert writer.missing(1) == [0]
    assert not list(writer.unfinished.folder.glob("*.mds"))
    assert not list(writer.unfinished.folder.glob(".writing.*"))


def write_missing_and_finish(folder: Path) -> None:
    """In a process of its own, to be killed."""
    writer = make(folder)
    if not writer.is_complete():
        writer.begin()
        write_missing(writer)
        writer.finish(info(), NUM_SHARDS, {"notes.txt": "hello"})


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # python 3.12; the children import nothing
def test_kills_leave_no_trace(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Killed at many moments, also between the last acts of finishing, it ends in the same bytes."""
    num_killed = 0
    for trial in range(8):
        folder = tmp_path / str(trial) / "shards"
        for kill in range(50):
            child = os.fork()
            if child == 0:
                write_missing_and_finish(folder)
                os._exit(0)
            time.sleep(0.001 * (trial + 1) + 0.003 * kill)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            num_killed += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status):
                break
            if folder.exists():  # the name comes last
                assert read_info(folder) == info()
        write_missing_and_finish(folder)
        assert content(folder) == whole
        assert [path.name for path in folder.parent.iterdir()] == ["shards"]
    assert num_killed > 8


def test_other_work_is_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_all(folder, list(range(NUM_SHARDS)))
    before = content(folder)
    other = ShardWriter(folder, image_columns(), {**PLAN, "sizes": [3]})
    with pytest.raises(UserError, match=r"holds other shards already \(sizes: \[1, 2\] there, \[3\] now\)"):
        other.is_complete()
    assert content(folder) == before
    (folder / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(UserError, match="holds no complete shards"):
        make(folder).is_complete()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    with pytest.raises(UserError, match=r"notes is not empty and holds no complete shards.*another folder"):
        make(tmp_path / "notes").is_complete()
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "notes" / "todo.txt").is_complete()
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "notes" / "todo.txt" / "out").begin()
    assert (tmp_path / "notes" / "todo.txt").read_text() == "milk"


def test_what_no_finished_folder_can_take_the_place_of_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for folder in (Path(), Path("nowhere/.."), tmp_path / "link", tmp_path / "dangling"):
        with pytest.raises(UserError, match=r"is a link, a mount point, .* give the plain name of a new folder"):
            make(folder).is_complete()
    with mounted_disk(tmp_path / "disk", "64k") as disk, pytest.raises(UserError, match=r"disk is a link, a mount"):
        make(disk).is_complete()
    with pytest.raises(UserError, match=r"cannot be written \(File name too long "):
        make(tmp_path / ("x" * 300)).is_complete()
    (tmp_path / ".shards.unfinished").touch()
    with pytest.raises(UserError, match=r"shards\.unfinished is in the way .*; remove it"):
        make(tmp_path / "shards").begin()


def test_a_link_to_what_is_complete_is_no_mistake(tmp_path: Path) -> None:
    write_all(tmp_path / "shards", list(range(NUM_SHARDS)))
    (tmp_path / "link").symlink_to("shards")
    assert make(tmp_path / "link").is_complete()


@pytest.mark.parametrize("name", ["plan.json", "records/00000.json"])
@pytest.mark.parametrize("content", [b"", b'{"entry": ', b"\xff", b"3"])
def test_a_damaged_file_of_unfinished_work_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    writer = make(tmp_path / "shards")
    writer.begin()
    writer.write(0, samples(0))
    writer.unfinished.release()
    (writer.unfinished.folder / name).write_bytes(content)
    again = make(tmp_path / "shards")

    def go_on() -> None:
        again.begin()
        again.record(0)

    with pytest.raises(UserError, match=f"{name} is damaged .*; delete {writer.unfinished.folder} to begin again"):
        go_on()
    again.unfinished.release()


def test_unfinished_work_of_other_settings_is_refused(tmp_path: Path) -> None:
    def of(*sizes: int) -> ShardWriter:
        return ShardWriter(tmp_path / "shards", image_columns(), {**PLAN, "sizes": sizes})

    for sizes in ((1,), (2,)):  # of nothing written, nothing can be lost
        writer = of(*sizes)
        writer.begin()
        writer.unfinished.release()
    writer.write(0, samples(0))
    other = of(3)
    with pytest.raises(UserError, match=r"unfinished work of other settings \(sizes: \[2\] there, \[3\] now"):
        other.begin()
    other.unfinished.release()
    of(2).begin()


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with mounted_disk(tmp_path / "disk", "64k") as disk:
        writer = make(disk / "shards")
        writer.begin()
        with pytest.raises(UserError, match=r"No space left on device.*the same command goes on"):
            write_missing(writer)
        writer.unfinished.release()
        assert mount("-o", "remount,size=4m", str(disk)).returncode == 0
        writer = make(disk / "shards")
        writer.begin()
        assert 0 < len(writer.missing(NUM_SHARDS)) < NUM_SHARDS
        write_missing(writer)
        writer.finish(info(), NUM_SHARDS, {"notes.txt": "hello"})
        assert content(disk / "shards") == whole

"""Checkpoints beside training: no crash, full disk, lost folder or hung write costs the last good one."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cfpretrain.base import runtime
from cfpretrain.base.console import EXIT_REQUEUE, UserError
from cfpretrain.base.stopping import StopRequest
from cfpretrain.base.watchdog import Watchdog
from cfpretrain.run import checkpoint, checkpoint_writer
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.checkpoint_writer import CheckpointWriter, Outcome
from cfpretrain.run.state import read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError
from tests import checkpoints
from tests.checkpoints import (
    CONFIG,
    CONTENTS,
    SHAPES,
    Full,
    KilledError,
    Rank,
    cut,
    failing,
    flip_byte,
    holds,
    killed_at,
    load,
    make_state,
    make_store,
    message,
    names_in,
    random_bits,
    save,
    whole,
    write_partial_as_ranks,
    zero_like,
)
from tests.disks import mount, mounted_disk
from tests.processes import run_in_processes

# ---------------------------------------------------------------------------------------------------------------------
# Two real ranks


def _share(full: Full, rank: int) -> Rank:
    """An uneven division over two ranks; rank 0 holds nothing of `blocks.0.b`."""
    bounds = {"blocks.0.w": 7, "blocks.0.b": 0, "scale": 1, "empty": 0}
    pairs = []
    for name, middle in bounds.items():
        numel = full["weights"][name].numel()
        begin, end = ((0, middle), (middle, numel))[rank]
        if begin < end or name == "empty":
            pairs.append(cut(full, name, begin, end, replicated=False))
    return [fragment for fragment, _ in pairs], [ema for _, ema in pairs]


def _kind_and_message(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except UserError as error:
        return type(error).__name__, str(error)
    return "none", ""


def _two_ranks_beside_training(store: CheckpointStore, share: Rank, step: int, late_rank: int) -> dict[str, Any]:
    """Steps of a run whose one rank is slow at writing; what is there before and after it is done."""
    may_write, pwrite = threading.Event(), os.pwrite
    if runtime.rank() == late_rank:
        os.pwrite = lambda *args: may_write.wait() and pwrite(*args)
    writer = CheckpointWriter(store, *share)
    writer.begin(make_state(step))
    outcomes, busy = [], []
    for _ in range(5):
        flags = runtime.sum_over_ranks(torch.tensor([writer.is_working, writer.has_failed]).long()).tolist()
        outcomes.append(writer.advance(*(flag > 0 for flag in flags)))
        busy.append(writer.is_busy)
        time.sleep(0.02)
    before = store.candidates()[0]
    runtime.barrier()
    may_write.set()
    outcome = writer.wait()
    os.pwrite = pwrite
    return {"outcomes": outcomes, "busy": busy, "before": before, "outcome": outcome, "busy_after": writer.is_busy}


def _two_ranks(folder: Path) -> dict[str, Any]:
    runtime.start(torch.device("cpu"))
    rank = runtime.rank()
    store = make_store(folder, keep_last=1)
    first, second = random_bits(SHAPES, 1), random_bits(SHAPES, 2)
    checkpoints.write(store, make_state(1), *_share(first, rank))
    checkpoints.write(store, make_state(2), *whole(second, replicated=True))
    path = folder / "step_00000002"
    other = _share(zero_like(second), 1 - rank)
    state = checkpoint.load(path, *other, config=CONFIG)
    found: dict[str, Any] = {"state": state.step, "bits": holds(other, second)}
    pwrite, preadv = os.pwrite, os.preadv
    if rank == 1:
        os.pwrite = failing
    found["full_disk"] = message(lambda: checkpoints.write(store, make_state(3), *_share(first, rank)))
    os.pwrite = pwrite
    found["after_full_disk"] = (store.candidates()[0] == path, sorted(names_in(folder)))
    if rank == 1:
        os.preadv = failing
    found["bad_read"] = message(lambda: checkpoint.load(path, *other, config=CONFIG))
    os.preadv = preadv
    fewer = [f for f in other[0] if f.name != "scale"]
    fewer_ema = [e for f, e in zip(*other, strict=True) if f.name != "scale"]
    found["other_tensors"] = _kind_and_message(lambda: checkpoint.load(path, fewer, fewer_ema, config=CONFIG))
    runtime.barrier()
    if rank == 0:
        flip_byte(path / "exp_avg_sq.safetensors", -5)  # in the share that rank 1 verifies
    runtime.barrier()
    untouched = _share(first, rank)
    found["flipped"] = _kind_and_message(lambda: checkpoint.load(path, *untouched, config=CONFIG))
    found["untouched"] = holds(untouched, first)
    checkpoints.write(store, make_state(3), *_share(first, rank))
    runtime.barrier()  # rank 0 deletes the old ones while the others go on
    found["names"] = sorted(names_in(folder))
    found["late"] = [_two_ranks_beside_training(store, _share(first, rank), 4 + late, late) for late in range(2)]
    return found


def test_two_ranks_write_read_and_fail_together(tmp_path: Path):
    ranks = run_in_processes(_two_ranks, 2, tmp_path)
    for found in ranks:
        assert found["state"] == 2
        assert found["bits"]
        assert "No space left" in found["full_disk"]
        assert str(tmp_path / "step_00000003") in found["full_disk"]
        assert found["after_full_disk"] == (True, ["latest", "step_00000002"])
        assert "cannot be read: No space left" in found["bad_read"]
        assert found["other_tensors"][0] == "UserError"
        assert "unknown: scale" in found["other_tensors"][1]
        assert found["flipped"][0] == "DamagedCheckpointError"
        assert "exp_avg_sq.safetensors: values" in found["flipped"][1]
        assert found["untouched"]
        assert found["names"] == ["latest", "step_00000003"]
        for late, seen in enumerate(found["late"]):
            assert seen["outcomes"] == [None] * 5, "nothing is published before the last rank has written"
            assert seen["busy"] == [True] * 5
            assert seen["before"] == tmp_path / f"step_0000000{3 + late}"
            assert seen["outcome"] == Outcome(4 + late, tmp_path / f"step_0000000{4 + late}", None)
            assert not seen["busy_after"]
    first = random_bits(SHAPES, 1)
    assert holds(load(tmp_path / "step_00000005")[1], first)


# ---------------------------------------------------------------------------------------------------------------------
# Beside training


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Writes wait inside the block until the event is set; at its end they go on."""
    may_write, pwrite = threading.Event(), os.pwrite
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *args: may_write.wait() and pwrite(*args))
        try:
            yield may_write
        finally:
            may_write.set()


def test_the_checkpoint_holds_the_values_of_its_beginning(tmp_path: Path):
    store, full = make_store(tmp_path), random_bits(SHAPES, 1)
    fragments, ema = whole(full)
    writer = CheckpointWriter(store, fragments, ema)
    assert (writer.is_busy, writer.is_working, writer.has_failed, writer.wait()) == (False, False, False, None)
    guard = {"losses": [1.0]}
    with held_back():
        writer.begin(make_state(1, guard=guard))
        assert (writer.is_busy, writer.is_working, writer.has_failed) == (True, True, False)
        for fragment, average in zip(fragments, ema, strict=True):
            for values in (fragment.values, *fragment.state.values(), average):
                values.zero_()
        guard["losses"].append(2.0)
        assert writer.advance(any_working=True, any_failed=False) is None
        assert not store.candidates()
    assert writer.wait() == Outcome(1, tmp_path / "step_00000001", None)
    assert not writer.is_busy
    state, rank = load(tmp_path / "step_00000001")
    assert holds(rank, full)
    assert state == make_state(1, guard={"losses": [1.0]})


def test_one_in_flight_and_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rank = whole(random_bits(SHAPES, 1))
    sizes: list[int] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: sizes.append(args[0]) or empty(*args, **options))
    writer = CheckpointWriter(make_store(tmp_path), *rank)
    assert sizes == [31] * 4  # the values of SHAPES
    with held_back():
        writer.begin(make_state(1))
        with pytest.raises(RuntimeError, match="one checkpoint at a time"):
            writer.begin(make_state(2))
    assert writer.wait() == Outcome(1, tmp_path / "step_00000001", None)
    for step in (2, 3):
        writer.begin(make_state(step))
        assert writer.wait() == Outcome(step, tmp_path / f"step_0000000{step}", None)
    assert len(sizes) == 4, "the buffers are allocated once"
    assert names_in(tmp_path) == {"latest", "step_00000002", "step_00000003"}


def test_a_failed_checkpoint_ends_with_its_reason_and_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store, full = make_store(tmp_path), random_bits(SHAPES, 1)
    writer = CheckpointWriter(store, *whole(full))
    monkeypatch.setattr(os, "fsync", failing)
    writer.begin(make_state(1))
    outcome = writer.wait()
    assert outcome is not None
    assert (outcome.step, outcome.path) == (1, None)
    assert "step_00000001 cannot be written: No space left on device; earlier checkpoints are untouched" in (
        outcome.error or ""
    )
    assert (names_in(tmp_path), writer.is_busy, writer.has_failed) == (set(), False, False)
    monkeypatch.undo()
    writer.begin(make_state(1))
    assert writer.wait() == Outcome(1, tmp_path / "step_00000001", None)
    assert holds(load(tmp_path / "step_00000001")[1], full)


def test_our_own_mistakes_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = CheckpointWriter(make_store(tmp_path), *whole(random_bits(SHAPES, 1)))
    monkeypatch.setattr(checkpoint_writer, "write_ranges", lambda *_: 1 / 0)
    writer.begin(make_state(1))
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_the_hashes_of_all_ranks_are_joined_and_cover_each_value(tmp_path: Path):
    full = {c: {"p": torch.ones(10)} for c in CONTENTS}
    hashes = write_partial_as_ranks(tmp_path, [whole(full, replicated=True)] * 2, full, step=1)
    store = make_store(tmp_path)
    with pytest.raises(DamagedCheckpointError, match="each value of weights once"):
        store.publish(1, [hashes[0]] * 2, make_state(1).to_json())
    assert store.candidates() == []
    store.publish(1, hashes[::-1], make_state(1).to_json())
    ranges = json.loads((tmp_path / "step_00000001" / "ranges.json").read_text())
    assert [row[:2] for row in ranges["ema"]["p"]] == [[0, 5], [5, 10]]


# ---------------------------------------------------------------------------------------------------------------------
# Slow and hung writes


def _ticks_of(action: Callable[[], Any]) -> int:
    before = runtime.num_ticks()
    action()
    return runtime.num_ticks() - before


def test_waiting_ticks_only_as_long_as_something_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = CheckpointWriter(make_store(tmp_path), *whole(random_bits(SHAPES, 1)))
    is_held, may_write, pwrite = threading.Event(), threading.Semaphore(0), os.pwrite
    ticks: list[list[int]] = [[]]  # at each poll while a write was held back

    def held_write(*args: Any) -> int:
        is_held.set()
        may_write.acquire()
        return pwrite(*args)

    def poll(values: torch.Tensor) -> torch.Tensor:
        if is_held.is_set():
            ticks[-1].append(runtime.num_ticks())
            if len(ticks[-1]) == 8:
                ticks.append([])
                is_held.clear()
                may_write.release()
        return values.clone()

    monkeypatch.setattr(os, "pwrite", held_write)
    monkeypatch.setattr(runtime, "sum_over_ranks", poll)
    writer.begin(make_state(1))
    assert writer.wait() == Outcome(1, tmp_path / "step_00000001", None)
    held = ticks[:-1]
    assert len(held) == 19, "as many as writes"
    assert all(len(set(at_polls[2:])) == 1 for at_polls in held), "what moved before is seen by the second poll"
    after = [at_polls[-1] for at_polls in held]
    # 4 x 3 chunks; the 4 ends of files come with a chunk's tick or have one of their own; then publishing.
    assert 12 <= after[-1] - after[0] <= 17


def test_waiting_for_nothing_does_not_tick(tmp_path: Path):
    writer = CheckpointWriter(make_store(tmp_path), *whole(random_bits(SHAPES, 1)))
    assert _ticks_of(writer.wait) == 0


def _two_ranks_one_of_them_slow(folder: Path) -> tuple[int, Outcome | None]:
    runtime.start(torch.device("cpu"))
    rank, pwrite = runtime.rank(), os.pwrite
    if rank == 1:
        os.pwrite = lambda *args: time.sleep(0.03) or pwrite(*args)
    writer = CheckpointWriter(make_store(folder), *_share(random_bits(SHAPES, 1), rank))
    writer.begin(make_state(1))
    outcome = writer.wait()
    return runtime.num_ticks(), outcome


def test_all_ranks_tick_alike_whoever_gets_on(tmp_path: Path):
    (first, outcome), (second, _) = run_in_processes(_two_ranks_one_of_them_slow, 2, tmp_path)
    assert outcome == Outcome(1, tmp_path / "step_00000001", None)
    assert first == second > 5


def _two_ranks_one_of_them_hangs(folder: Path) -> None:
    runtime.start(torch.device("cpu"))
    rank = runtime.rank()
    store, share = make_store(folder), _share(random_bits(SHAPES, 1), rank)
    checkpoints.write(store, make_state(1), *share)
    Watchdog(2.0, (folder.parent / f"reason_{rank}").write_text, StopRequest())
    if rank == 1:
        os.pwrite = lambda *_: threading.Event().wait()
    writer = CheckpointWriter(store, *share)
    writer.begin(make_state(2))
    writer.wait()


def test_a_write_that_hangs_ends_the_run(tmp_path: Path):
    folder = tmp_path / "checkpoints"
    with pytest.raises(RuntimeError, match=f"died with exit code {EXIT_REQUEUE}"):
        run_in_processes(_two_ranks_one_of_them_hangs, 2, folder, timeout_s=60)
    assert "guard.rank_timeout_seconds" in (tmp_path / "reason_0").read_text()
    assert make_store(folder).candidates()[0] == folder / "step_00000001"


# ---------------------------------------------------------------------------------------------------------------------
# Crashes


@pytest.mark.parametrize("step", [3, 2], ids=["a_new_step", "the_latest_step_again"])
def test_dying_at_any_change_of_the_file_system_leaves_a_usable_checkpoint(tmp_path: Path, step: int):
    template = tmp_path / "template"
    save(make_store(template), 1)
    before = save(make_store(template), 2)
    after = random_bits(SHAPES, 99)
    outcomes = []
    for call in itertools.count(1):
        store = make_store(tmp_path / f"call_{call}")
        shutil.copytree(template, store.folder)
        mutations: list[str] = []
        with killed_at(call, mutations):
            try:
                checkpoints.write(store, make_state(step, seed=99), *whole(after))
                break
            except KilledError:
                pass
        path = store.candidates()[0]
        assert path is not None
        state, rank = load(path)
        expected = after if state.seed == 99 else before
        assert holds(rank, expected), f"call {call}, {mutations[-1]}"
        outcomes.append(state.seed == 99)
        # A run that goes on cleans up, whatever it found.
        again = save(store, 4)
        assert names_in(store.folder) <= {"latest", "step_00000002", "step_00000003", "step_00000004"}
        assert holds(load(store.folder / "step_00000004")[1], again)
        shutil.rmtree(store.folder)
    assert len(outcomes) > 40
    assert outcomes == sorted(outcomes), "once the new checkpoint is the one to resume from, it stays so"
    assert set(outcomes) == {False, True}


def _save_until_killed(store: CheckpointStore, step: int) -> None:
    while True:
        step += 1
        full = {c: {"p": torch.full((64, 1024), float(step + i))} for i, c in enumerate(CONTENTS)}
        checkpoints.write(store, make_state(step), *whole(full))


def _kill_rounds(folder: Path, num_rounds: int) -> list[int]:
    """Kills a process that only saves, again and again; returns the step found complete after each kill."""
    store = make_store(folder)
    chance = random.Random(0)
    found = []
    for _ in range(num_rounds):
        begin = found[-1] if found else 0
        child = os.fork()
        if child == 0:
            _save_until_killed(store, begin)
        while not (paths := store.candidates()) or read_state(paths[0]).step <= begin:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = store.candidates()[0]
        rank = whole({c: {"p": torch.zeros(64, 1024)} for c in CONTENTS})
        step = checkpoint.load(path, *rank, config=CONFIG).step
        assert holds(rank, {c: {"p": torch.full((64, 1024), float(step + i))} for i, c in enumerate(CONTENTS)})
        found.append(step)
    return found


def test_a_real_kill_leaves_a_usable_checkpoint(tmp_path: Path):
    (found,) = run_in_processes(_kill_rounds, 1, tmp_path, 12)
    assert found == sorted(set(found))
    assert len(found) == 12


# A save of SHAPES writes 4 headers, 4 x 3 tensors with values, the hashes, the state, `latest`.
@pytest.mark.parametrize("call", [1, 5, 16, 17, 18, 19])
def test_a_full_disk_costs_only_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    store = make_store(tmp_path)
    full = save(store, 1)
    pwrite, calls = os.pwrite, itertools.count(1)
    monkeypatch.setattr(os, "pwrite", lambda *args: failing() if next(calls) >= call else pwrite(*args))
    with pytest.raises(UserError, match=r"step_00000002 cannot be written: No space left on device.*free some space"):
        save(store, 2)
    monkeypatch.undo()
    complete = {"latest", "step_00000001"}
    # Where only moving `latest` failed, the new folder is complete and has its name.
    assert names_in(tmp_path) == (complete | {"step_00000002"} if call == 19 else complete)
    assert store.candidates()[0] == tmp_path / "step_00000001"
    assert holds(load(tmp_path / "step_00000001")[1], full)
    save(store, 3)
    assert store.candidates()[0] == tmp_path / "step_00000003"


def _save_under_a_file_size_limit(folder: Path) -> str:
    store = make_store(folder)
    save(store, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return message(lambda: save(store, 2, {"p": (100_000,)}))


def test_the_systems_own_refusal_is_told(tmp_path: Path):
    (message,) = run_in_processes(_save_under_a_file_size_limit, 1, tmp_path)
    assert "step_00000002 cannot be written: File too large" in message
    assert "\n" not in message
    assert names_in(tmp_path) == {"latest", "step_00000001"}


def test_an_unwritable_folder_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoint folder .*/file/checkpoints cannot be written: .*run\.folder"):
        save(make_store(tmp_path / "file" / "checkpoints"), 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    with mounted_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_fills_half_way(small_disk: Path):
    store, full = make_store(small_disk), random_bits({"p": (12_000,)}, 1)
    rank = whole(full)
    writer = CheckpointWriter(store, *rank)
    writer.begin(make_state(1))
    assert writer.wait() == Outcome(1, small_disk / "step_00000001", None)
    (small_disk / "something_else").write_bytes(bytes(700_000))
    writer.begin(make_state(2))
    outcome = writer.wait()
    assert outcome is not None
    assert "step_00000002 cannot be written: No space left on device" in (outcome.error or "")
    assert names_in(small_disk) == {"latest", "step_00000001", "something_else"}
    assert holds(load(small_disk / "step_00000001", {"p": (12_000,)})[1], full)
    (small_disk / "something_else").unlink()
    writer.begin(make_state(3))
    assert writer.wait() == Outcome(3, small_disk / "step_00000003", None)
    assert store.candidates() == [small_disk / "step_00000003", small_disk / "step_00000001"]


def test_a_folder_that_became_read_only(small_disk: Path, capsys: pytest.CaptureFixture[str]):
    # A read-only mount, since permissions do not bind root.
    store, full = make_store(small_disk), random_bits(SHAPES, 1)
    writer = CheckpointWriter(store, *whole(full))
    writer.begin(make_state(1))
    assert writer.wait() == Outcome(1, small_disk / "step_00000001", None)
    assert mount("-o", "remount,ro", str(small_disk)).returncode == 0
    writer.begin(make_state(2))
    outcome = writer.wait()
    assert outcome is not None
    assert "step_00000002 cannot be written: Read-only file system" in (outcome.error or "")
    assert store.candidates()[0] == small_disk / "step_00000001"
    assert holds(load(small_disk / "step_00000001")[1], full)
    assert mount("-o", "remount,rw", str(small_disk)).returncode == 0
    writer.begin(make_state(2))
    assert writer.wait() == Outcome(2, small_disk / "step_00000002", None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["partial", "all"])
def test_a_folder_that_vanishes_during_a_write(tmp_path: Path, what: str):
    pwrite = os.pwrite
    num_failed = 0
    for vanish_at in range(1, 20):
        folder, away = tmp_path / f"{vanish_at}", tmp_path / f"{vanish_at}_away"
        store = make_store(folder)
        full = save(store, 1)
        after = random_bits(SHAPES, 2)
        calls = itertools.count(1)

        def write(*args: Any, folder: Path = folder, away: Path = away, calls: Any = calls, at: int = vanish_at) -> int:
            if next(calls) == at:
                gone = folder if what == "all" else folder / "step_00000002.partial"
                if gone.exists():
                    gone.rename(away)
            return pwrite(*args)

        writer = CheckpointWriter(store, *whole(after))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "pwrite", write)
            writer.begin(make_state(2))
            outcome = writer.wait()
        assert outcome is not None
        if what == "all":
            away.rename(folder)
        if outcome.error is None:
            assert holds(load(folder / "step_00000002")[1], after)
        else:
            num_failed += 1
            assert "step_00000002 cannot be written: No such file or directory" in outcome.error
            assert store.candidates()[0] == folder / "step_00000001"
        assert holds(load(folder / "step_00000001")[1], full)
    assert num_failed >= 18

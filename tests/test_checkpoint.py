"""Checkpoints: bits survive any change of ranks, and no crash, full disk or damaged file costs the last good one."""

import collections
import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfpretrain import checkpoint, runtime, tensor_files
from cfpretrain.checkpoint import (
    CheckpointStore,
    CheckpointWriter,
    DamagedCheckpointError,
    Outcome,
    TrainingState,
    read_state,
    read_tensors,
)
from cfpretrain.console import UserError
from cfpretrain.tensor_files import HashedRange
from tests.processes import run_in_processes

CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
MODEL = {"width": 32, "depth": 2, "position_embedding": "sincos"}
SHAPES = {"blocks.0.w": (4, 6), "blocks.0.b": (6,), "scale": (), "empty": (0, 3)}

Full = dict[str, dict[str, Tensor]]  # content -> name -> full tensor
Rank = tuple[list["Fragment"], list[Tensor]]


@dataclass(frozen=True)
class Fragment:
    """Stands in for the engine's."""

    name: str
    shape: tuple[int, ...]
    offset: int
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    replicated: bool


def random_bits(shapes: dict[str, tuple[int, ...]], seed: int) -> Full:
    """Any bits, not-a-numbers and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        content: {
            name: torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
            for name, shape in shapes.items()
        }
        for content in CONTENTS
    }


def cut(full: Full, name: str, begin: int, end: int, replicated: bool) -> tuple[Fragment, Tensor]:
    """One rank's copies of a flat range of a parameter."""
    pieces = {content: full[content][name].reshape(-1)[begin:end].clone() for content in CONTENTS}
    shape = tuple(full["weights"][name].shape)
    fragment = Fragment(
        name, shape, begin, pieces["weights"], pieces["exp_avg"], pieces["exp_avg_sq"], replicated=replicated
    )
    return fragment, pieces["ema"]


def zero_like(full: Full) -> Full:
    return {content: {name: torch.zeros_like(t) for name, t in full[content].items()} for content in CONTENTS}


def whole(full: Full, replicated: bool = False) -> Rank:
    """One rank that holds everything."""
    pairs = [cut(full, name, 0, full["weights"][name].numel(), replicated) for name in full["weights"]]
    return [fragment for fragment, _ in pairs], [ema for _, ema in pairs]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def holds(rank: Rank, full: Full) -> bool:
    """Whether a rank's tensors are those ranges of `full`, bit by bit."""
    for fragment, ema in zip(*rank, strict=True):
        expected, expected_ema = cut(
            full, fragment.name, fragment.offset, fragment.offset + len(fragment.values), fragment.replicated
        )
        pairs = [
            (fragment.values, expected.values),
            (ema, expected_ema),
            (fragment.exp_avg, expected.exp_avg),
            (fragment.exp_avg_sq, expected.exp_avg_sq),
        ]
        if not all(same_bits(a, b) for a, b in pairs):
            return False
    return True


def make_state(step: int, **changes: Any) -> TrainingState:
    values: dict[str, Any] = {
        "step": step,
        "optimizer_step": step,
        "num_skipped": 0,
        "num_rewinds": 0,
        "epoch": 1,
        "samples_in_epoch": 24,
        "train_seconds": 1.5,
        "seed": 0,
        "model": MODEL,
        "data_fingerprint": "f00d",
        "guard": {"losses": [0.1, 2.5e-17]},
        "wandb_run_id": None,
        "versions": {"torch": "2"},
    }
    return TrainingState(**(values | changes))


def make_store(folder: Path, keep_last: int = 2, keep_every_steps: int = 0) -> CheckpointStore:
    return CheckpointStore(folder, keep_last, keep_every_steps)


def save(
    store: CheckpointStore, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int | None = None
) -> Full:
    full = random_bits(shapes, step if seed is None else seed)
    store.save(make_state(step), *whole(full))
    return full


def load(path: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[TrainingState, Rank]:
    rank = whole(zero_like(random_bits(shapes, 0)))
    state = CheckpointStore.load(path, *rank, model=MODEL)
    return state, rank


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# Bits, whatever the ranks


def draw_ranks(draw: Callable[..., Any], full: Full) -> list[Rank]:
    """A random division of every parameter over 1 to 4 ranks, some of which may hold nothing of it."""
    num_ranks = draw(st.integers(1, 4))
    ranks: list[Rank] = [([], []) for _ in range(num_ranks)]
    for name, tensor in full["weights"].items():
        replicated = draw(st.booleans())
        cuts = sorted(draw(st.lists(st.integers(0, tensor.numel()), min_size=num_ranks - 1, max_size=num_ranks - 1)))
        bounds = [0, *cuts, tensor.numel()]
        for rank, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin == end and not replicated and rank > 0 and draw(st.booleans()):
                continue
            begin, end = (0, tensor.numel()) if replicated else (begin, end)
            fragment, ema = cut(full, name, begin, end, replicated)
            ranks[rank][0].append(fragment)
            ranks[rank][1].append(ema)
    return ranks


def write_as_ranks(store: CheckpointStore, ranks: Sequence[Rank], full: Full, step: int) -> Path:
    """What a writer does on several ranks, one rank after another in this process, the last one first."""
    final = store.folder / f"step_{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    store.folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tuple(t.shape) for name, t in full["weights"].items()}
    for index, rank in reversed(list(enumerate(ranks))):
        snapshot = checkpoint._Snapshot(*rank, index, len(ranks))
        snapshot.take()
        checkpoint._write_share(partial, shapes, step, snapshot, index)
    store._publish(partial, final, make_state(step).to_json(), len(ranks))
    return final


shape_lists = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=shape_lists, seed=st.integers(0, 2**31), buffer_values=st.integers(1, 200))
def test_bits_survive_any_change_of_ranks(data: Any, shapes: list[tuple[int, ...]], seed: int, buffer_values: int):
    full = random_bits({f"p.{i}": shape for i, shape in enumerate(shapes)}, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "CHUNK_VALUES", buffer_values)
        store = make_store(Path(folder) / "checkpoints")
        path = write_as_ranks(store, draw_ranks(data.draw, full), full, step=7)
        for rank in draw_ranks(data.draw, zero_like(full)):
            checkpoint._read_ranges(path, *rank)
            assert holds(rank, full)
        for content in CONTENTS:
            with safetensors.safe_open(path / f"{content}.safetensors", "pt") as opened:
                assert list(opened.keys()) == sorted(full[content])
                assert opened.metadata()["format"] == "pt"
                assert all(same_bits(opened.get_tensor(name), t) for name, t in full[content].items())


def test_save_and_load_alone(tmp_path: Path):
    store = make_store(tmp_path / "run" / "checkpoints")
    full = save(store, 500)
    path = store.latest()
    assert path == tmp_path / "run" / "checkpoints" / "step_00000500"
    assert (store.folder / "latest").read_text() == "step_00000500\n"
    assert names_in(path) == {"state.json", "ranges.json", *(f"{content}.safetensors" for content in CONTENTS)}
    state, rank = load(path)
    assert state == make_state(500) == read_state(path)
    assert holds(rank, full)
    for which in ("ema", "weights"):
        tensors = read_tensors(path, which)
        assert set(tensors) == set(SHAPES)
        assert all(same_bits(t, full[which][name]) for name, t in tensors.items())


def test_weights_that_require_gradients(tmp_path: Path):
    store = make_store(tmp_path)
    full = save(store, 1)
    fragments, ema = whole(zero_like(full))
    fragments = [dataclasses.replace(f, values=f.values.requires_grad_()) for f in fragments]
    store.load(tmp_path / "step_00000001", fragments, ema, model=MODEL)
    store.save(make_state(2), fragments, ema)
    assert holds(load(tmp_path / "step_00000002")[1], full)


def test_a_rank_writes_only_its_share_of_what_all_hold(tmp_path: Path):
    full = [{c: {"p": torch.full((5,), float(rank))} for c in CONTENTS} for rank in range(2)]
    path = write_as_ranks(make_store(tmp_path), [whole(f, replicated=True) for f in full], full[0], step=1)
    for content in CONTENTS:
        written = safetensors.torch.load_file(path / f"{content}.safetensors")["p"]
        assert written.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_staging_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files, "CHUNK_VALUES", 1024)
    store = make_store(tmp_path)
    sizes: list[int] = []
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: sizes.append(len(data)) or pwrite(fd, data, at))
    monkeypatch.setattr(os, "preadv", lambda fd, left, at: sizes.append(len(left[0])) or preadv(fd, left, at))
    full = save(store, 1, {"p": (100, 100)})
    _, rank = load(tmp_path / "step_00000001", {"p": (100, 100)})
    assert holds(rank, full)
    assert max(sizes) == 4096
    assert len(sizes) >= 2 * 4 * 10


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, left, at: preadv(fd, [left[0][:5]], at))
    full = save(make_store(tmp_path), 1)
    state, rank = load(tmp_path / "step_00000001")
    assert (state, holds(rank, full)) == (make_state(1), True)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([("p", (4,), 0, 2), ("p", (4,), 3, 4)], "begins at 3"),  # a gap
        ([("p", (4,), 0, 3), ("p", (4,), 2, 4)], "begins at 2"),  # an overlap
        ([("p", (4,), 0, 3)], "3 of 4"),
        ([("p", (4,), 0, 4), ("p", (2, 2), 4, 4)], "shape"),
    ],
)
def test_ranges_must_cover_each_parameter_once(rows: list[Any], what: str):
    with pytest.raises(AssertionError, match=what):
        checkpoint._join_ranges(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Two real ranks


def _message(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


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


def _failing(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _kind_and_message(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except UserError as error:
        return type(error).__name__, str(error)
    return "none", ""


def _flip_byte(file: Path, at: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 4
    file.write_bytes(damaged)


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
    before = store.latest()
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
    store.save(make_state(1), *_share(first, rank))
    store.save(make_state(2), *whole(second, replicated=True))
    path = folder / "step_00000002"
    other = _share(zero_like(second), 1 - rank)
    state = store.load(path, *other, model=MODEL)
    found: dict[str, Any] = {"state": state.step, "bits": holds(other, second)}
    pwrite, preadv = os.pwrite, os.preadv
    if rank == 1:
        os.pwrite = _failing
    found["full_disk"] = _message(lambda: store.save(make_state(3), *_share(first, rank)))
    os.pwrite = pwrite
    found["after_full_disk"] = (store.latest() == path, sorted(names_in(folder)))
    if rank == 1:
        os.preadv = _failing
    found["bad_read"] = _message(lambda: store.load(path, *other, model=MODEL))
    os.preadv = preadv
    fewer = [f for f in other[0] if f.name != "scale"]
    fewer_ema = [e for f, e in zip(*other, strict=True) if f.name != "scale"]
    found["other_tensors"] = _kind_and_message(lambda: store.load(path, fewer, fewer_ema, model=MODEL))
    runtime.barrier()
    if rank == 0:
        _flip_byte(path / "exp_avg_sq.safetensors", -5)  # in the share that rank 1 verifies
    runtime.barrier()
    untouched = _share(first, rank)
    found["flipped"] = _kind_and_message(lambda: store.load(path, *untouched, model=MODEL))
    found["untouched"] = holds(untouched, first)
    store.save(make_state(3), *_share(first, rank))
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


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 1000), max_size=30), world_size=st.integers(1, 5))
def test_the_ranks_verify_every_range_once_and_equal_shares(sizes: list[int], world_size: int):
    ends = list(itertools.accumulate(sizes))
    ranges = [HashedRange("p", end - size, end, "") for end, size in zip(ends, sizes, strict=True)]
    contents: Any = {"weights": (None, ranges[::2]), "ema": (None, ranges[1::2])}
    verified: list[list[tuple[str, HashedRange]]] = [[] for _ in range(world_size)]
    with pytest.MonkeyPatch.context() as patch:
        for rank, mine in enumerate(verified):
            patch.setattr(checkpoint, "verify_ranges", lambda file, _, r, m=mine: m.extend((file.stem, p) for p in r))
            checkpoint._verify_share(Path(), contents, rank, world_size)
    assert [place for mine in verified for place in mine] == [
        (content, place) for content, (_, places) in contents.items() for place in places
    ]
    shares = [sum(place.end - place.begin for _, place in mine) for mine in verified]
    assert max(shares) <= sum(sizes) / world_size + max(sizes, default=0)


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
            for values in (fragment.values, fragment.exp_avg, fragment.exp_avg_sq, average):
                values.zero_()
        guard["losses"].append(2.0)
        assert writer.advance(any_working=True, any_failed=False) is None
        assert store.latest() is None
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
        with pytest.raises(AssertionError, match="one checkpoint at a time"):
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
    monkeypatch.setattr(os, "fsync", _failing)
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
    monkeypatch.setattr(checkpoint, "_write_share", lambda *_: 1 / 0)
    writer.begin(make_state(1))
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def _written_by_two(folder: Path) -> Path:
    """A partial folder that two ranks have written and nobody published."""
    full = {c: {"p": torch.ones(10)} for c in CONTENTS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "_publish", lambda *_: None)
        path = write_as_ranks(make_store(folder), [whole(full, replicated=True)] * 2, full, step=1)
    return path.with_name(f"{path.name}.partial")


def test_the_hashes_of_another_node_are_waited_for(tmp_path: Path):
    partial = _written_by_two(tmp_path)
    expected = checkpoint._merge_hashes(partial, 2)
    assert [row[:2] for row in json.loads(expected)["ema"]["p"]] == [[0, 5], [5, 10]]
    part = partial / "ranges_00001.json"
    text = part.read_text()
    merged: list[bytes] = []
    part.unlink()
    thread = threading.Thread(target=lambda: merged.append(checkpoint._merge_hashes(partial, 2)))
    thread.start()
    for visible in ("", text[:20], text):
        time.sleep(0.03)
        part.write_text(visible)
    thread.join()
    assert merged == [expected]


def test_hashes_that_never_come_fail_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_MAX_PART_WAIT_SECONDS", 0.05)
    partial = _written_by_two(tmp_path)
    (partial / "ranges_00001.json").unlink()
    with pytest.raises(FileNotFoundError, match="ranges_00001"):
        checkpoint._merge_hashes(partial, 2)


def test_what_is_not_covered_is_not_published(tmp_path: Path):
    partial = _written_by_two(tmp_path)
    (partial / "ranges_00001.json").write_bytes((partial / "ranges_00000.json").read_bytes())
    with pytest.raises(DamagedCheckpointError, match="each value of weights once"):
        checkpoint._merge_hashes(partial, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Crashes


class KilledError(BaseException):
    """Like a kill, it is no Exception: nothing handles it."""


@contextmanager
def killed_at(call: int, mutations: list[str]) -> Iterator[None]:
    """Lets the process die at its `call`-th change of the file system (a write dies half-way)."""

    def watch(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            mutations.append(name)
            if len(mutations) == call:
                if name == "pwrite":
                    real(args[0], args[1][: len(args[1]) // 2], args[2])
                raise KilledError(name)
            return real(*args, **options)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("open", "mkdir", "ftruncate", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, watch(name))
        yield


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
                store.save(make_state(step, seed=99), *whole(after))
                break
            except KilledError:
                pass
        path = store.latest()
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
        store.save(make_state(step), *whole(full))


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
        while (path := store.latest()) is None or read_state(path).step <= begin:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path = store.latest()
        assert path is not None
        rank = whole({c: {"p": torch.zeros(64, 1024)} for c in CONTENTS})
        step = store.load(path, *rank, model=MODEL).step
        assert holds(rank, {c: {"p": torch.full((64, 1024), float(step + i))} for i, c in enumerate(CONTENTS)})
        found.append(step)
    return found


def test_a_real_kill_leaves_a_usable_checkpoint(tmp_path: Path):
    (found,) = run_in_processes(_kill_rounds, 1, tmp_path, 12)
    assert found == sorted(set(found))
    assert len(found) == 12


# A save of SHAPES writes 4 headers, 4 x 3 tensors with values, the hashes as a part and whole, the state, `latest`.
@pytest.mark.parametrize("call", [1, 5, 16, 17, 18, 19, 20])
def test_a_full_disk_costs_only_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int):
    store = make_store(tmp_path)
    full = save(store, 1)
    pwrite, calls = os.pwrite, itertools.count(1)
    monkeypatch.setattr(os, "pwrite", lambda *args: _failing() if next(calls) >= call else pwrite(*args))
    with pytest.raises(UserError, match=r"step_00000002 cannot be written: No space left on device.*free some space"):
        save(store, 2)
    monkeypatch.undo()
    complete = {"latest", "step_00000001"}
    # Where only moving `latest` failed, the new folder is complete and has its name.
    assert names_in(tmp_path) == (complete | {"step_00000002", "latest.partial"} if call == 20 else complete)
    assert store.latest() == tmp_path / "step_00000001"
    assert holds(load(tmp_path / "step_00000001")[1], full)
    save(store, 3)
    assert store.latest() == tmp_path / "step_00000003"


def _save_under_a_file_size_limit(folder: Path) -> str:
    store = make_store(folder)
    save(store, 1)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    return _message(lambda: save(store, 2, {"p": (100_000,)}))


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
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system was refused: {mounted.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True)


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
    assert _mount("-o", "remount,ro", str(small_disk)).returncode == 0
    writer.begin(make_state(2))
    outcome = writer.wait()
    assert outcome is not None
    assert "step_00000002 cannot be written: Read-only file system" in (outcome.error or "")
    assert store.latest() == small_disk / "step_00000001"
    assert holds(load(small_disk / "step_00000001")[1], full)
    assert _mount("-o", "remount,rw", str(small_disk)).returncode == 0
    writer.begin(make_state(2))
    assert writer.wait() == Outcome(2, small_disk / "step_00000002", None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("what", ["partial", "all"])
def test_a_folder_that_vanishes_during_a_write(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch):
    deadlines: list[float] = []
    read_part = checkpoint._read_part
    monkeypatch.setattr(
        checkpoint, "_read_part", lambda file, deadline: deadlines.append(deadline) or read_part(file, 0.0)
    )
    pwrite = os.pwrite
    num_failed = 0
    for vanish_at in range(1, 21):
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
            assert store.latest() == folder / "step_00000001"
        assert holds(load(folder / "step_00000001")[1], full)
    assert num_failed >= 19
    assert set(deadlines) == {0.0}, "what this very rank has written is not waited for"


# ---------------------------------------------------------------------------------------------------------------------
# Which checkpoints there are


@pytest.mark.parametrize(
    ("keep_last", "keep_every_steps", "kept"),
    [(1, 0, {50}), (2, 0, {40, 50}), (1, 20, {20, 40, 50}), (3, 20, {20, 30, 40, 50}), (9, 0, {10, 20, 30, 40, 50})],
)
def test_retention(tmp_path: Path, keep_last: int, keep_every_steps: int, kept: set[int]):
    store = make_store(tmp_path, keep_last, keep_every_steps)
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert names_in(tmp_path) == {"latest", *(f"step_{step:08d}" for step in kept)}


def test_retention_leaves_later_steps_of_another_line_alone(tmp_path: Path):
    for step in (10, 20, 30):
        save(make_store(tmp_path, keep_last=3), step)
    (tmp_path / "latest").write_text("step_00000010\n")
    store = make_store(tmp_path, keep_last=1)
    save(store, 15)
    assert store.latest() == tmp_path / "step_00000015"
    assert names_in(tmp_path) == {"latest", "step_00000015", "step_00000020", "step_00000030"}


def test_what_cannot_be_deleted_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    store = make_store(tmp_path, keep_last=1)
    save(store, 1)

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    writer = CheckpointWriter(store, *whole(random_bits(SHAPES, 2)))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        writer.begin(make_state(2))
        assert writer.wait() == Outcome(2, tmp_path / "step_00000002", None)
    assert "step_00000001.deleted cannot be deleted now: Device or resource busy" in capsys.readouterr().out
    writer.begin(make_state(2))
    assert writer.wait() == Outcome(2, tmp_path / "step_00000002", None)
    assert names_in(tmp_path) == {"latest", "step_00000002"}


def test_leftovers_go_and_strangers_stay(tmp_path: Path):
    store = make_store(tmp_path)
    save(store, 1)
    for name in ("step_00000002.partial", "step_00000003.deleted", "step_00000001.replaced", "mine", "step_7.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "latest.partial").write_text("step_0")
    save(store, 2)
    assert names_in(tmp_path) == {"latest", "step_00000001", "step_00000002", "mine", "step_7.partial"}


def test_no_checkpoint_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert make_store(tmp_path).latest() is None
    assert make_store(tmp_path / "absent").latest() is None
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["missing", "empty", "gone", "incomplete"])
def test_latest_falls_back_to_the_newest_complete_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    store = make_store(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(store, step)
    expected = tmp_path / "step_00000003"
    if damage == "missing":
        (tmp_path / "latest").unlink()
    elif damage == "empty":
        (tmp_path / "latest").write_text("")
    elif damage == "gone":
        shutil.rmtree(expected)
        expected = tmp_path / "step_00000002"
    else:
        (expected / "state.json").unlink()
        expected = tmp_path / "step_00000002"
    assert store.latest() == expected
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert expected.name in said


def test_latest_naming_an_older_one_is_obeyed(tmp_path: Path):
    store = make_store(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "latest").write_text("step_00000001")
    assert store.latest() == tmp_path / "step_00000001"


@pytest.mark.parametrize(
    ("latest", "steps"),
    [("step_00000003", [3, 2, 1]), ("step_00000002", [2, 1]), ("step_00000009", [4, 3, 2, 1]), (None, [4, 3, 2, 1])],
)
def test_candidates_begin_with_the_latest_and_go_back(tmp_path: Path, latest: str | None, steps: list[int]):
    store = make_store(tmp_path, keep_last=9)
    for step in (1, 2, 3, 4):
        save(store, step)
    if latest is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_text(latest)
    assert store.candidates() == [tmp_path / f"step_0000000{step}" for step in steps]
    assert store.latest() == tmp_path / f"step_0000000{steps[0]}"


def test_no_checkpoint_has_no_candidates(tmp_path: Path):
    assert make_store(tmp_path / "absent").candidates() == []


def test_one_that_was_moved_aside_is_still_the_latest(tmp_path: Path):
    """A kill while the step was written again, on a line of training that went back."""
    store = make_store(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / "latest").write_text("step_00000002\n")
    (tmp_path / "step_00000002").rename(tmp_path / "step_00000002.replaced")
    assert store.candidates() == [tmp_path / "step_00000002.replaced", tmp_path / "step_00000001"]
    full = random_bits(SHAPES, 2)
    assert holds(load(tmp_path / "step_00000002.replaced")[1], full)
    CheckpointWriter(store, *whole(full))
    assert store.latest() == tmp_path / "step_00000002"


def test_a_damaged_newest_one_leaves_the_one_before(tmp_path: Path):
    store = make_store(tmp_path, keep_last=9)
    fulls = {step: save(store, step) for step in (1, 2, 3)}
    newest, middle, oldest = store.candidates()
    file = newest / "weights.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    _flip_byte(middle / "exp_avg.safetensors", -20)
    for path in (newest, middle):
        with pytest.raises(DamagedCheckpointError):
            load(path)
    state, rank = load(oldest)
    assert (state.step, holds(rank, fulls[1])) == (1, True)


def test_links_lead_nowhere(tmp_path: Path):
    store = make_store(tmp_path / "checkpoints", keep_last=9)
    save(store, 1)
    (tmp_path / "checkpoints" / "step_00000001").rename(tmp_path / "elsewhere")
    (store.folder / "step_00000001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"latest: expected the name of a checkpoint in this folder .*, a link"):
        store.candidates()
    (store.folder / "latest").unlink()
    assert store.candidates() == []
    # A planted link is neither written through nor deleted through.
    (store.folder / "step_00000002.partial").symlink_to(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()}
    save(store, 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "elsewhere").iterdir()} == before
    assert store.candidates() == [store.folder / "step_00000002"]


@pytest.mark.parametrize("name", ["state.json", "ranges.json", "ema.safetensors"])
def test_a_file_that_is_a_link_is_refused(tmp_path: Path, name: str):
    save(make_store(tmp_path / "checkpoints"), 1)
    file = tmp_path / "checkpoints" / "step_00000001" / name
    file.rename(tmp_path / name)
    file.symlink_to(tmp_path / name)
    with pytest.raises(DamagedCheckpointError, match="symbolic links"):
        load(file.parent)


@pytest.mark.parametrize("name", ["../step_00000001", "/tmp/step_00000001", "step_00000001/..", "..", "a\nb", "step_x"])
def test_latest_pointing_elsewhere_is_refused(tmp_path: Path, name: str):
    store = make_store(tmp_path / "checkpoints")
    save(store, 1)
    shutil.copytree(tmp_path / "checkpoints" / "step_00000001", tmp_path / "step_00000001")
    (store.folder / "latest").write_text(name)
    with pytest.raises(UserError, match=r"latest: expected the name of a checkpoint .* such as step_00000500, got"):
        store.latest()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(make_store(tmp_path), 1)
    return tmp_path / "step_00000001"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[1]", "expected keys with values"),
        ('{"schema_version": 2}', "step: missing"),
    ],
)
def test_a_damaged_state_is_refused(saved: Path, text: str, what: str):
    (saved / "state.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=what) as raised:
        load(saved)
    assert f"{saved / 'state.json'}: " in str(raised.value)
    assert f"delete {saved}" in str(raised.value)


def _damage(path: Path, full: Full, file: Path) -> str:
    """How loading takes a checkpoint one of whose files was changed."""
    rank = whole(zero_like(full))
    try:
        state = CheckpointStore.load(path, *rank, model=MODEL)
    except UserError as error:
        if not holds(rank, zero_like(full)):
            return "read before all was verified"
        if file.name == "state.json" and "newer cfpretrain" in str(error):
            return "refused"
        return "noticed" if isinstance(error, DamagedCheckpointError) else f"taken for a mistake: {error}"
    return "harmless" if state == make_state(1) and holds(rank, full) else "not noticed"


def test_any_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path):
    """A bit of every fifth byte of each file, in turn."""
    full = save(make_store(tmp_path), 1, {"w": (4, 6), "b": (6,), "scale": ()})
    saved = tmp_path / "step_00000001"
    found = collections.Counter()
    for file in sorted(saved.iterdir()):
        good = file.read_bytes()
        for at in range(len(file.name) % 5, len(good), 5):
            damaged = bytearray(good)
            damaged[at] ^= 1 << at % 8
            file.write_bytes(damaged)
            found[_damage(saved, full, file)] += 1
        file.write_bytes(good)
    assert found.keys() <= {"noticed", "harmless", "refused"}, found
    # `2.5E-17` is `2.5e-17`, and the schema may be another.
    assert found["harmless"] + found["refused"] <= 2
    assert found["noticed"] > 600


@pytest.mark.parametrize("which", ["ema", "weights"])
def test_whole_tensors_are_verified(saved: Path, which: Any):
    _flip_byte(saved / f"{which}.safetensors", -1)
    with pytest.raises(DamagedCheckpointError, match=rf"{which}\.safetensors: values 0 to 1 of scale are not those"):
        read_tensors(saved, which)
    read_tensors(saved, "weights" if which == "ema" else "ema")


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weights": 1, "ema": {}, "exp_avg": {}, "exp_avg_sq": {}}'])
def test_damaged_hashes_are_refused(saved: Path, text: str):
    (saved / "ranges.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"ranges\.json: expected"):
        load(saved)
    with pytest.raises(DamagedCheckpointError, match=r"ranges\.json: expected"):
        read_tensors(saved, "weights")


def test_a_number_that_was_changed_by_hand_is_noticed(saved: Path):
    plain = json.loads((saved / "state.json").read_text())
    for changed in (plain | {"samples_in_epoch": 25}, {k: v for k, v in plain.items() if k != "sha256"}):
        (saved / "state.json").write_text(json.dumps(changed))
        with pytest.raises(DamagedCheckpointError, match=r"state\.json: its contents are not those"):
            load(saved)


def test_an_older_schema_is_refused_by_that_name(saved: Path):
    (saved / "state.json").write_text(json.dumps({"schema_version": 1, "versions": {"cfpretrain": "0.1"}}))
    with pytest.raises(UserError, match=r"schema_version 1 was written by an older cfpretrain.*0\.1") as raised:
        load(saved)
    assert raised.type is UserError


def test_a_file_without_permission_is_no_damage(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "preadv", refused)
    for action in (lambda: load(saved), lambda: read_tensors(saved, "ema")):
        with pytest.raises(UserError, match="cannot be read: Permission denied") as raised:
            action()
        assert raised.type is UserError


def test_a_state_that_is_no_text_is_refused(saved: Path):
    (saved / "state.json").write_bytes(b"\xff\x00")
    with pytest.raises(DamagedCheckpointError, match=r"state\.json cannot be read"):
        read_state(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", "1"),
        ("train_seconds", math.nan),
        ("train_seconds", math.inf),
        ("model", []),
        ("versions", {"torch": 2}),
        ("data_fingerprint", None),
        ("wandb_run_id", 3),
        ("schema_version", 0),
        ("schema_version", None),
        ("colour", "red"),
    ],
)
def test_each_key_of_the_state_is_checked(key: str, value: Any):
    plain = json.loads(make_state(1).to_json()) | {key: value}
    with pytest.raises(DamagedCheckpointError, match=rf"here/state\.json: {key}: "):
        TrainingState.from_json(json.dumps(plain), Path("here/state.json"))


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 10**9),
    seconds=st.floats(0, 1e12),
    run=st.none() | st.text(max_size=5),
    model=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.floats(-9, 9))),
)
def test_the_state_survives_json(step: int, seconds: float, run: str | None, model: dict[str, Any]):
    state = make_state(step, train_seconds=seconds, wandb_run_id=run, model=model)
    assert TrainingState.from_json(state.to_json(), Path("here")) == state


def test_a_newer_schema_is_refused_by_that_name(saved: Path):
    plain = {"schema_version": 3, "versions": {"cfpretrain": "9.1"}, "new_key": 1}
    (saved / "state.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"schema_version 3 was written by a newer cfpretrain.*9\.1") as raised:
        load(saved)
    assert raised.type is UserError


def test_another_model_is_refused_with_its_keys(saved: Path):
    rank = whole(random_bits(SHAPES, 5))
    other = {"width": 64, "depth": 2, "num_heads": 4}
    with pytest.raises(UserError) as raised:
        CheckpointStore.load(saved, *rank, model=other)
    assert "model.width is 32 there and 64 in the config" in str(raised.value)
    assert "model.num_heads is absent there and 4 in the config" in str(raised.value)
    assert "model.position_embedding is sincos there and absent in the config" in str(raised.value)
    assert "depth" not in str(raised.value)
    assert holds(rank, random_bits(SHAPES, 5)), "nothing may be read before all is checked"


def test_tuples_of_the_config_are_lists_in_the_file():
    make_state(1, model={"sizes": [1, 2]}).check_model({"sizes": (1, 2)}, "here")


def test_other_tensors_are_refused_by_name(saved: Path):
    shapes = {"blocks.0.w": (6, 4), "scale": (), "empty": (0, 3), "head": (2,)}
    with pytest.raises(UserError, match=r"weights\.safetensors is of another model") as raised:
        load(saved, shapes)
    assert "missing: head" in str(raised.value)
    assert "unknown: blocks.0.b" in str(raised.value)
    assert "of another shape: blocks.0.w (4, 6) there and (6, 4) here" in str(raised.value)


def test_many_other_tensors_make_a_short_message(saved: Path):
    with pytest.raises(UserError, match="and 95 more"):
        load(saved, SHAPES | {f"head.{i}": (1,) for i in range(100)})


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("num_bytes", [0, 5, 100, -4, +4])
def test_a_file_of_another_size_is_refused(saved: Path, content: str, num_bytes: int):
    file = saved / f"{content}.safetensors"
    os.truncate(file, num_bytes if num_bytes in (0, 5, 100) else file.stat().st_size + num_bytes)
    with pytest.raises(DamagedCheckpointError, match=rf"{content}\.safetensors: expected .* got .*delete {saved}"):
        load(saved)
    if content in ("ema", "weights"):
        with pytest.raises(DamagedCheckpointError, match=rf"{content}\.safetensors: expected"):
            read_tensors(saved, content)


def test_a_missing_file_is_refused(saved: Path):
    (saved / "exp_avg.safetensors").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read: No such file.*exp_avg\.safetensors"):
        load(saved)


def test_a_file_of_another_content_or_step_is_refused(saved: Path):
    shutil.copy(saved / "weights.safetensors", saved / "ema.safetensors")
    with pytest.raises(DamagedCheckpointError, match="expected ema written by cfpretrain"):
        load(saved)
    save(make_store(saved.parent), 2)
    shutil.copy(saved.parent / "step_00000002" / "ema.safetensors", saved / "ema.safetensors")
    with pytest.raises(DamagedCheckpointError, match="expected step 1, got step 2"):
        load(saved)
    with pytest.raises(DamagedCheckpointError, match="expected step 1, got step 2"):
        read_tensors(saved, "ema")


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"p": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 8]}},
        {"p": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"p": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"p": {"dtype": "F32", "shape": "2", "data_offsets": [0, "8"]}},
        {"p": {"shape": [2]}},
        {"p": 3},
    ],
)
def test_a_strange_header_is_refused(saved: Path, entries: Any):
    text = json.dumps(entries).encode()
    (saved / "ema.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(DamagedCheckpointError, match=r"ema\.safetensors: expected a safetensors header"):
        read_tensors(saved, "ema")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [False, True], ids=["pickle", "torch_save"])
def test_a_planted_pickle_is_refused_and_not_run(saved: Path, tmp_path: Path, archive: bool):
    file, trace = saved / "weights.safetensors", tmp_path / "it_ran"
    if archive:
        torch.save(_Bomb(trace), file)
    else:
        file.write_bytes(pickle.dumps(_Bomb(trace)))
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors: expected a safetensors file"):
        read_tensors(saved, "weights")
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors: expected a safetensors file"):
        load(saved)
    assert not trace.exists()


def test_files_of_others_are_refused(saved: Path):
    safetensors.torch.save_file({"p": torch.ones(2)}, saved / "ema.safetensors", {"format": "pt"})
    with pytest.raises(
        DamagedCheckpointError, match="expected ema written by cfpretrain, got a safetensors file with metadata"
    ):
        read_tensors(saved, "ema")


def test_what_is_no_complete_checkpoint_is_refused(saved: Path, tmp_path: Path):
    (saved / "state.json").unlink()
    for path in (saved, tmp_path / "absent", tmp_path / "latest", tmp_path):
        with pytest.raises(UserError, match=rf"{path} is not a complete checkpoint: expected a folder such as"):
            read_tensors(path, "ema")
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            load(path)

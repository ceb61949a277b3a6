"""Checkpoints: bits survive any change of ranks, and no crash, full disk or damaged file costs the last good one."""

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
import tempfile
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

from cfpretrain import checkpoint, runtime
from cfpretrain.checkpoint import CheckpointStore, TrainingState, read_state, read_tensors
from cfpretrain.console import UserError
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
        "epoch": 1,
        "samples_in_epoch": 24,
        "train_seconds": 1.5,
        "seed": 0,
        "model": MODEL,
        "data_fingerprint": "f00d",
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
    """What `save` does on several ranks, one rank after another in this process."""
    final = store.folder / f"step_{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    checkpoint._lay_out(partial, {name: tuple(t.shape) for name, t in full["weights"].items()}, step)
    for index, rank in enumerate(ranks):
        checkpoint._write_ranges(partial, *rank, index, len(ranks))
    store._publish(partial, final, make_state(step))
    return final


shape_lists = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shapes=shape_lists, seed=st.integers(0, 2**31), buffer_values=st.integers(1, 200))
def test_bits_survive_any_change_of_ranks(data: Any, shapes: list[tuple[int, ...]], seed: int, buffer_values: int):
    full = random_bits({f"p.{i}": shape for i, shape in enumerate(shapes)}, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_BUFFER_VALUES", buffer_values)
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
    assert names_in(path) == {"state.json", *(f"{content}.safetensors" for content in CONTENTS)}
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
    monkeypatch.setattr(checkpoint, "_BUFFER_VALUES", 1024)
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
    found["other_tensors"] = _message(lambda: store.load(path, fewer, fewer_ema, model=MODEL))
    store.save(make_state(3), *_share(first, rank))
    runtime.barrier()  # rank 0 deletes the old ones while the others go on
    found["names"] = sorted(names_in(folder))
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
        assert "unknown: scale" in found["other_tensors"]
        assert found["names"] == ["latest", "step_00000003"]
    first = random_bits(SHAPES, 1)
    assert holds(load(tmp_path / "step_00000003")[1], first)


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


# A save of SHAPES writes 4 headers, 4 x 3 tensors with values, the state, and last `latest`.
@pytest.mark.parametrize("call", [1, 5, 16, 17, 18])
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
    assert names_in(tmp_path) == (complete | {"step_00000002", "latest.partial"} if call == 18 else complete)
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
    with pytest.raises(UserError, match="step_00000001 cannot be written: "):
        save(make_store(tmp_path / "file" / "checkpoints"), 1)


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

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(store, 2)
    assert "step_00000001.deleted cannot be deleted now: Device or resource busy" in capsys.readouterr().out
    monkeypatch.undo()
    save(store, 3)
    assert names_in(tmp_path) == {"latest", "step_00000003"}


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
        ('{"schema_version": 1}', "step: missing"),
    ],
)
def test_a_damaged_state_is_refused(saved: Path, text: str, what: str):
    (saved / "state.json").write_text(text)
    with pytest.raises(UserError, match=what) as raised:
        load(saved)
    assert f"{saved / 'state.json'}: " in str(raised.value)
    assert f"delete {saved}" in str(raised.value)


def test_a_state_that_is_no_text_is_refused(saved: Path):
    (saved / "state.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
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
    with pytest.raises(UserError, match=rf"here/state\.json: {key}: "):
        TrainingState.from_json(json.dumps(plain), "here/state.json")


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 10**9),
    seconds=st.floats(0, 1e12),
    run=st.none() | st.text(max_size=5),
    model=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.floats(-9, 9))),
)
def test_the_state_survives_json(step: int, seconds: float, run: str | None, model: dict[str, Any]):
    state = make_state(step, train_seconds=seconds, wandb_run_id=run, model=model)
    assert TrainingState.from_json(state.to_json(), "here") == state


def test_a_newer_schema_is_refused_by_that_name(saved: Path):
    plain = {"schema_version": 2, "versions": {"cfpretrain": "9.1"}, "new_key": 1}
    (saved / "state.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"schema_version 2 was written by a newer cfpretrain.*9\.1"):
        load(saved)


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
    with pytest.raises(UserError, match=rf"{content}\.safetensors: expected .* got .*delete {saved}"):
        load(saved)
    if content in ("ema", "weights"):
        with pytest.raises(UserError, match=rf"{content}\.safetensors: expected"):
            read_tensors(saved, content)


def test_a_missing_file_is_refused(saved: Path):
    (saved / "exp_avg.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be read: No such file.*exp_avg\.safetensors"):
        load(saved)


def test_a_file_of_another_content_or_step_is_refused(saved: Path):
    shutil.copy(saved / "weights.safetensors", saved / "ema.safetensors")
    with pytest.raises(UserError, match="expected ema written by cfpretrain"):
        load(saved)
    save(make_store(saved.parent), 2)
    shutil.copy(saved.parent / "step_00000002" / "ema.safetensors", saved / "ema.safetensors")
    with pytest.raises(UserError, match="expected step 1, got step 2"):
        load(saved)
    with pytest.raises(UserError, match="expected step 1, got step 2"):
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
    with pytest.raises(UserError, match=r"ema\.safetensors: expected a safetensors header"):
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
    with pytest.raises(UserError, match=r"weights\.safetensors: expected a safetensors file"):
        read_tensors(saved, "weights")
    with pytest.raises(UserError, match=r"weights\.safetensors: expected a safetensors file"):
        load(saved)
    assert not trace.exists()


def test_files_of_others_are_refused(saved: Path):
    safetensors.torch.save_file({"p": torch.ones(2)}, saved / "ema.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="expected ema written by cfpretrain, got a safetensors file with metadata"):
        read_tensors(saved, "ema")


def test_what_is_no_complete_checkpoint_is_refused(saved: Path, tmp_path: Path):
    (saved / "state.json").unlink()
    for path in (saved, tmp_path / "absent", tmp_path / "latest", tmp_path):
        with pytest.raises(UserError, match=rf"{path} is not a complete checkpoint: expected a folder such as"):
            read_tensors(path, "ema")
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            load(path)

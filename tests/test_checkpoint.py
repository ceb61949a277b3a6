"""Checkpoints: bits survive any change of ranks, and what is damaged or of another line is never taken for good."""

import collections
import dataclasses
import errno
import itertools
import json
import math
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.run import checkpoint, checkpoint_store, tensor_files
from cfpretrain.run.checkpoint import TensorFile, open_tensors, open_weights
from cfpretrain.run.checkpoint_store import Best, CheckpointStore, is_healthy
from cfpretrain.run.checkpoint_writer import CheckpointWriter, Outcome
from cfpretrain.run.state import TrainingState, read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError, HashedRange
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
    names_in,
    random_bits,
    same_bits,
    save,
    whole,
    write_as_ranks,
    zero_like,
)
from tests.processes import launcher_environment

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
            checkpoint._read_ranges(open_tensors(path, 7, CONTENTS), *rank)
            assert holds(rank, full)
        for content in CONTENTS:
            with safetensors.safe_open(path / f"{content}.safetensors", "pt") as opened:
                assert list(opened.keys()) == sorted(full[content])
                assert opened.metadata()["format"] == "pt"
                assert all(same_bits(opened.get_tensor(name), t) for name, t in full[content].items())


def test_save_and_load_alone(tmp_path: Path):
    store = make_store(tmp_path / "run" / "checkpoints")
    full = save(store, 500)
    path = store.candidates()[0]
    assert path == tmp_path / "run" / "checkpoints" / "step_00000500"
    assert (store.folder / "latest").read_text() == "step_00000500\n"
    assert names_in(path) == {"state.json", "ranges.json", *(f"{content}.safetensors" for content in CONTENTS)}
    state, rank = load(path)
    assert state == make_state(500) == read_state(path)
    assert holds(rank, full)
    for which in ("ema", "weights"):
        tensors = open_weights(path, which).read_all()
        assert set(tensors) == set(SHAPES)
        assert all(same_bits(t, full[which][name]) for name, t in tensors.items())


def test_weights_that_require_gradients(tmp_path: Path):
    store = make_store(tmp_path)
    full = save(store, 1)
    fragments, ema = whole(zero_like(full))
    fragments = [dataclasses.replace(f, values=f.values.requires_grad_()) for f in fragments]
    checkpoint.load(tmp_path / "step_00000001", fragments, ema, config=CONFIG)
    checkpoints.write(store, make_state(2), fragments, ema)
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


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 1000), max_size=30), world_size=st.integers(1, 5))
def test_the_ranks_verify_every_range_once_and_equal_shares(sizes: list[int], world_size: int):
    ends = list(itertools.accumulate(sizes))
    ranges = [HashedRange("p", end - size, end, "") for end, size in zip(ends, sizes, strict=True)]
    opened: Any = [TensorFile(Path("weights"), None, ranges[::2]), TensorFile(Path("ema"), None, ranges[1::2])]
    verified: list[list[tuple[str, HashedRange]]] = [[] for _ in range(world_size)]
    with pytest.MonkeyPatch.context() as patch:
        for rank, mine in enumerate(verified):
            patch.setattr(checkpoint, "verify_ranges", lambda file, _, r, m=mine: m.extend((file.stem, p) for p in r))
            checkpoint._verify_share(opened, rank, world_size)
    assert [place for mine in verified for place in mine] == [
        (one.path.stem, place) for one in opened for place in one.ranges
    ]
    shares = [sum(place.end - place.begin for _, place in mine) for mine in verified]
    assert max(shares) <= sum(sizes) / world_size + max(sizes, default=0)


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


SICK = {"num_skips_in_row": 2}


def test_retention_keeps_the_newest_one_that_can_be_gone_back_to(tmp_path: Path):
    store = make_store(tmp_path, keep_last=2)
    for step, guard in ((10, {}), (20, {"num_skips_in_row": 0}), (30, SICK), (40, SICK), (50, SICK)):
        save(store, step, guard=guard)
    assert names_in(tmp_path) == {"latest", "step_00000020", "step_00000040", "step_00000050"}
    assert [is_healthy(path) for path in store.candidates()] == [False, False, True]
    save(store, 60)
    assert names_in(tmp_path) == {"latest", "step_00000050", "step_00000060"}


def test_one_that_cannot_be_read_is_none_to_go_back_to(tmp_path: Path):
    store = make_store(tmp_path, keep_last=1)
    save(store, 10)
    save(make_store(tmp_path, keep_last=2), 20)
    (tmp_path / "step_00000020" / "state.json").write_text("{")
    save(store, 30, guard=SICK)
    assert names_in(tmp_path) == {"latest", "step_00000010", "step_00000030"}
    assert not is_healthy(tmp_path / "step_00000020")


def best(step: int, score: float, features: str = "same") -> Best:
    return Best(step, score, {"features": features, "num_images": 50})


def names_of(*steps: int) -> set[str]:
    return {"latest", "best.json", *(f"step_{step:08d}" for step in steps)}


def test_the_best_one_stays_until_a_better_one_is_named(tmp_path: Path):
    store = make_store(tmp_path, keep_last=1)
    assert store.best() is None
    named = []
    for step, score in ((10, 5.0), (20, 6.0), (30, 5.0), (40, 4.0), (50, 7.0)):
        save(store, step)
        named.append(store.keep_if_best(best(step, score)))
        assert make_store(tmp_path, keep_last=9).best() == best(
            40 if step >= 40 else 10, min(score, 5.0) if step < 50 else 4.0
        )
    assert named == [True, False, False, True, False]
    save(store, 60)
    assert names_in(tmp_path) == names_of(40, 60)
    note = json.loads((tmp_path / "best.json").read_text())
    assert (note["checkpoint"], note["step"], note["score"]) == ("step_00000040", 40, 4.0)
    assert store.keep_if_best(best(40, 4.5)), "the same checkpoint scored again"
    assert store.best() == best(40, 4.5)


def test_nothing_goes_while_the_best_one_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = make_store(tmp_path, keep_last=1)
    save(store, 10)
    assert store.keep_if_best(best(10, 1.0))
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_store, "read_json", failing)
        save(store, 20)
        save(store, 30)
    assert names_in(tmp_path) == names_of(10, 20, 30)
    save(store, 40)
    assert names_in(tmp_path) == names_of(10, 40)


def test_scores_that_were_measured_otherwise_are_not_compared(tmp_path: Path):
    store = make_store(tmp_path, keep_last=1)
    save(store, 10)
    assert store.keep_if_best(best(10, 1.0))
    save(store, 20)
    assert store.keep_if_best(best(20, 9.0, "other"))
    save(store, 30)
    assert names_in(tmp_path) == names_of(20, 30)


def test_a_best_one_that_is_gone_or_left_behind_is_none(tmp_path: Path):
    store = make_store(tmp_path, keep_last=9)
    for step in (10, 20, 30):
        save(store, step)
    store.keep_if_best(best(20, 1.0))
    store.set_aside(20, [])
    assert store.best() == best(20, 1.0)
    store.set_aside(10, [])
    assert names_in(tmp_path) == {"latest", "step_00000010", "step_00000020.abandoned", "step_00000030.abandoned"}
    # The other line comes by the same step: its score is not this one's.
    save(store, 20)
    assert store.best() is None
    assert store.keep_if_best(best(20, 3.0))
    shutil.rmtree(tmp_path / "step_00000020")
    assert store.best() is None
    assert store.keep_if_best(best(10, 5.0))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"step": 10}', '{"step": 10, "score": "low", "measured_by": {}}'])
def test_a_damaged_note_of_the_best_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str):
    store = make_store(tmp_path, keep_last=9)
    save(store, 10)
    (tmp_path / "best.json").write_text(text)
    assert store.best() is None
    assert "best.json is damaged and left out" in capsys.readouterr().out
    assert store.keep_if_best(best(10, 5.0))
    assert store.best() == best(10, 5.0)


def test_retention_leaves_later_steps_of_another_line_alone(tmp_path: Path):
    for step in (10, 20, 30):
        save(make_store(tmp_path, keep_last=3), step)
    (tmp_path / "latest").write_text("step_00000010\n")
    store = make_store(tmp_path, keep_last=1)
    save(store, 15)
    assert store.candidates()[0] == tmp_path / "step_00000015"
    assert names_in(tmp_path) == {"latest", "step_00000015", "step_00000020", "step_00000030"}


# ---------------------------------------------------------------------------------------------------------------------
# Set aside


def test_another_line_is_out_of_the_way_once_it_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = make_store(tmp_path, keep_last=2)
    fulls = {step: save(make_store(tmp_path, keep_last=9), step) for step in (10, 20, 30)}
    (tmp_path / "latest").write_text("step_00000010\n")
    store.set_aside(10, [])
    aside = {"step_00000020.abandoned", "step_00000030.abandoned"}
    assert names_in(tmp_path) == {"latest", "step_00000010", *aside}
    said = capsys.readouterr().out
    assert said.count("\n") == 2
    assert said.count(" is abandoned: it is now step_000000") == 2
    for step in (15, 20, 25, 30, 35):
        save(store, step)
        assert store.candidates()[0] == tmp_path / f"step_{step:08d}"
    assert names_in(tmp_path) == {"latest", "step_00000030", "step_00000035", *aside}
    assert store.candidates() == [tmp_path / "step_00000035", tmp_path / "step_00000030"]
    assert holds(load(tmp_path / "step_00000030.abandoned")[1], fulls[30])
    store.set_aside(35, [])
    assert capsys.readouterr().out == ""


def test_damaged_ones_are_set_aside_and_numbered(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = make_store(tmp_path, keep_last=9)
    save(store, 10)
    for _ in range(3):
        for step in (20, 30):
            save(store, step)
            flip_byte(tmp_path / f"step_{step:08d}" / "ema.safetensors", -1)
        store.set_aside(10, store.candidates()[:2])
        assert store.candidates() == [tmp_path / "step_00000010"]
        said = capsys.readouterr().out
        assert said.count(" is damaged: it is now step_000000") == 2, "and `latest` names one that is there"
        assert said.count("\n") == 2
    save(store, 20)
    assert names_in(tmp_path) == {
        "latest",
        "step_00000010",
        "step_00000020",
        *(f"step_000000{step}.damaged{number}" for step in (20, 30) for number in ("", "_2", "_3")),
    }


def test_what_a_damaged_one_was_replacing_is_abandoned(tmp_path: Path):
    store = make_store(tmp_path, keep_last=9)
    for step in (10, 20):
        save(store, step)
    shutil.copytree(tmp_path / "step_00000020", tmp_path / "step_00000020.replaced")
    flip_byte(tmp_path / "step_00000020" / "ema.safetensors", -1)
    store.set_aside(10, [tmp_path / "step_00000020"])
    assert names_in(tmp_path) == {"latest", "step_00000010", "step_00000020.damaged", "step_00000020.abandoned"}


def test_nothing_is_written_where_there_is_nothing_to_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = make_store(tmp_path)
    for step in (10, 20):
        save(store, step)
    changes: list[str] = []
    with killed_at(1, changes):
        store.set_aside(20, [])
        for name, value in launcher_environment(rank=1, world_size=2, port=29500).items():
            monkeypatch.setenv(name, value)
        store.set_aside(10, [tmp_path / "step_00000010"])
    assert changes == []


def _usable(store: CheckpointStore) -> tuple[int, list[Path]]:
    """What a run resumes from: its step, and the damaged ones before it in the line."""
    damaged = []
    for path in store.candidates():
        try:
            return load(path)[0].step, damaged
        except DamagedCheckpointError:
            damaged.append(path)
    return 0, damaged


def test_dying_while_others_are_set_aside_leaves_the_same_line(tmp_path: Path):
    template = make_store(tmp_path / "template", keep_last=9)
    for step in (10, 20, 30, 40):
        save(template, step)
    (template.folder / "latest").write_text("step_00000030\n")
    flip_byte(template.folder / "step_00000030" / "ema.safetensors", -1)
    for call in itertools.count(1):
        store = make_store(tmp_path / f"call_{call}")
        shutil.copytree(template.folder, store.folder)
        changes: list[str] = []
        with suppress(KilledError), killed_at(call, changes):
            store.set_aside(20, [store.folder / "step_00000030"])
        step, damaged = _usable(store)
        assert step == 20, f"call {call}, {changes[-1]}"
        store.set_aside(step, damaged)
        store.remove_leftovers()
        assert {"step_00000010", "step_00000020", "step_00000040.abandoned"} < names_in(store.folder)
        assert len(names_in(store.folder)) == 5
        if len(changes) < call:
            break
    assert call > 5


def test_what_cannot_be_set_aside_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    store = make_store(tmp_path)
    for step in (10, 20):
        save(store, step)
    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(os, "replace", failing)
    store.set_aside(10, [])
    said = capsys.readouterr().out
    assert f"{tmp_path} cannot be written now: No space left on device" in said
    assert "step_00000020 cannot be renamed to step_00000020.abandoned now: No space left on device" in said
    assert said.count("\n") == 2


# ---------------------------------------------------------------------------------------------------------------------
# Leftovers, and which one is the latest


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
    files.hidden_beside(tmp_path / "latest").write_text("step_0")
    save(store, 2)
    assert names_in(tmp_path) == {"latest", "step_00000001", "step_00000002", "mine", "step_7.partial"}


def test_no_checkpoint_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert not make_store(tmp_path).candidates()
    assert not make_store(tmp_path / "absent").candidates()
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
    assert store.candidates()[0] == expected
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert expected.name in said


@pytest.mark.parametrize("lost", ["folders", "states"])
def test_latest_with_nothing_left_is_no_new_beginning(tmp_path: Path, lost: str):
    store = make_store(tmp_path)
    save(store, 1)
    if lost == "folders":
        shutil.rmtree(tmp_path / "step_00000001")
    else:
        (tmp_path / "step_00000001" / "state.json").unlink()
    with pytest.raises(UserError, match="names step_00000001, which is gone, and no complete checkpoint is left"):
        store.candidates()


def test_latest_naming_an_older_one_is_obeyed(tmp_path: Path):
    store = make_store(tmp_path)
    save(store, 1)
    save(store, 2)
    (tmp_path / "latest").write_text("step_00000001")
    assert store.candidates()[0] == tmp_path / "step_00000001"


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
    assert store.candidates()[0] == tmp_path / f"step_0000000{steps[0]}"


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
    assert store.candidates()[0] == tmp_path / "step_00000002"


def test_a_damaged_newest_one_leaves_the_one_before(tmp_path: Path):
    store = make_store(tmp_path, keep_last=9)
    fulls = {step: save(store, step) for step in (1, 2, 3)}
    newest, middle, oldest = store.candidates()
    file = newest / "weights.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    flip_byte(middle / "exp_avg.safetensors", -20)
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


def test_latest_as_a_link_is_refused_and_its_target_stays_secret(tmp_path: Path):
    store = make_store(tmp_path / "checkpoints")
    save(store, 1)
    (tmp_path / "key").write_text("secret")
    (store.folder / "latest").unlink()
    (store.folder / "latest").symlink_to(tmp_path / "key")
    with pytest.raises(UserError, match=r"^\S*latest cannot be read: .*; fix or delete it$") as error:
        store.candidates()
    assert "secret" not in str(error.value)


def test_checkpoints_of_elsewhere_are_refused(tmp_path: Path):
    """A run's folder may be a link; one within it may lead to another run, whose checkpoints retention would delete."""
    theirs = make_store(tmp_path / "theirs" / "checkpoints", keep_last=9)
    for step in (1, 2):
        save(theirs, step)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "checkpoints").symlink_to(theirs.folder)
    store = make_store(tmp_path / "ours" / "checkpoints", keep_last=1)
    with pytest.raises(UserError, match=r"checkpoints: expected a folder, got a link, .*; move what it leads to"):
        store.candidates()
    with pytest.raises(UserError, match="cannot be written: expected a folder of your own, got a link"):
        save(store, 3)
    assert names_in(theirs.folder) == {"latest", "step_00000001", "step_00000002"}
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    assert make_store(tmp_path / "link" / "checkpoints").candidates()


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
        store.candidates()


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
        state = checkpoint.load(path, *rank, config=CONFIG)
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
    flip_byte(saved / f"{which}.safetensors", -1)
    with pytest.raises(DamagedCheckpointError, match=rf"{which}\.safetensors: values 0 to 1 of scale are not those"):
        open_weights(saved, which).read_all()
    open_weights(saved, "weights" if which == "ema" else "ema").read_all()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"weights": 1, "ema": {}, "exp_avg": {}, "exp_avg_sq": {}}'])
def test_damaged_hashes_are_refused(saved: Path, text: str):
    (saved / "ranges.json").write_text(text)
    with pytest.raises(DamagedCheckpointError, match=r"ranges\.json: expected"):
        load(saved)
    with pytest.raises(DamagedCheckpointError, match=r"ranges\.json: expected"):
        open_weights(saved, "weights").read_all()


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
    for action in (lambda: load(saved), lambda: open_weights(saved, "ema").read_all()):
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
        ("step", "one"),
        ("train_seconds", math.nan),
        ("train_seconds", math.inf),
        ("config", []),
        ("history", {}),
        ("class_names", [1]),
        ("autoencoder", None),
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
    with pytest.raises(DamagedCheckpointError, match=rf"here/state\.json: {key}[\w.]*: "):
        TrainingState.from_json(json.dumps(plain), Path("here/state.json"))


@settings(max_examples=30, deadline=None)
@given(
    step=st.integers(0, 10**9),
    seconds=st.floats(0, 1e12),
    run=st.none() | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5),
    section=st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.lists(st.floats(-9, 9))),
)
def test_the_state_survives_json(step: int, seconds: float, run: str | None, section: dict[str, Any]):
    state = make_state(step, train_seconds=seconds, wandb_run_id=run, config={"train": section})
    assert TrainingState.from_json(state.to_json(), Path("here")) == state


def test_a_newer_schema_is_refused_by_that_name(saved: Path):
    plain = {"schema_version": 4, "versions": {"cfpretrain": "9.1"}, "new_key": 1}
    (saved / "state.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"schema_version 4 was written by a newer cfpretrain.*9\.1") as raised:
        load(saved)
    assert raised.type is UserError


def test_another_model_is_refused_with_its_keys(saved: Path):
    rank = whole(random_bits(SHAPES, 5))
    other = {"model": {"width": 64, "depth": 2, "num_heads": 4}}
    with pytest.raises(UserError) as raised:
        checkpoint.load(saved, *rank, config=other)
    assert "model.width is 32 there and 64 in the config" in str(raised.value)
    assert "model.num_heads is absent there and 4 in the config" in str(raised.value)
    assert "model.position_embedding is sincos there and absent in the config" in str(raised.value)
    assert "depth" not in str(raised.value)
    assert holds(rank, random_bits(SHAPES, 5)), "nothing may be read before all is checked"


def test_tuples_of_the_config_are_lists_in_the_file():
    make_state(1, config={"model": {"sizes": [1, 2]}}).check_config({"model": {"sizes": (1, 2)}}, "here")


def test_other_tensors_are_refused_by_name(saved: Path):
    shapes = {"blocks.0.w": (6, 4), "scale": (), "empty": (0, 3), "head": (2,)}
    with pytest.raises(UserError, match=r"weights\.safetensors is of another model") as raised:
        load(saved, shapes)
    assert "missing: head" in str(raised.value)
    assert "unknown: blocks.0.b" in str(raised.value)
    assert "of another shape: blocks.0.w (4, 6) instead of (6, 4)" in str(raised.value)


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
            open_weights(saved, content).read_all()


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
        open_weights(saved, "ema").read_all()


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
    with pytest.raises(
        DamagedCheckpointError, match=r"ema\.safetensors: expected (a safetensors header|ema written by)"
    ):
        open_weights(saved, "ema").read_all()


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
        open_weights(saved, "weights").read_all()
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors: expected a safetensors file"):
        load(saved)
    assert not trace.exists()


def test_files_of_others_are_refused(saved: Path):
    safetensors.torch.save_file({"p": torch.ones(2)}, saved / "ema.safetensors", {"format": "pt"})
    with pytest.raises(
        DamagedCheckpointError, match="expected ema written by cfpretrain, got a safetensors file with metadata"
    ):
        open_weights(saved, "ema").read_all()


def test_what_is_no_complete_checkpoint_is_refused(saved: Path, tmp_path: Path):
    (saved / "state.json").unlink()
    for path in (saved, tmp_path / "absent", tmp_path / "latest", tmp_path):
        with pytest.raises(UserError, match=rf"{path} is not a complete checkpoint: expected a folder such as"):
            open_weights(path, "ema").read_all()
        with pytest.raises(UserError, match="is not a complete checkpoint"):
            load(path)

"""Tensors with any bits, held by any ranks, and the saving and loading of them."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.run import checkpoint, checkpoint_writer
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import Fragment

CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
CONFIG = {"model": {"width": 32, "depth": 2, "position_embedding": "sincos"}}
SHAPES = {"blocks.0.w": (4, 6), "blocks.0.b": (6,), "scale": (), "empty": (0, 3)}

Full = dict[str, dict[str, Tensor]]  # content -> name -> full tensor
Rank = tuple[list[Fragment], list[Tensor]]


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
    state = {name: pieces[name] for name in CONTENTS[2:]}
    fragment = Fragment(name, shape, begin, pieces["weights"], state, replicated)
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
            *((fragment.state[name], expected.state[name]) for name in CONTENTS[2:]),
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
        "config": CONFIG,
        "history": [],
        "class_names": [],
        "autoencoder": "",
        "working_folder": "",
        "data_fingerprint": "f00d",
        "guard": {"losses": [0.1, 2.5e-17]},
        "wandb_run_id": None,
        "versions": {"torch": "2"},
    }
    return TrainingState(**(values | changes))


def make_store(folder: Path, keep_last: int = 2, keep_every_steps: int = 0) -> CheckpointStore:
    return CheckpointStore(folder, keep_last, keep_every_steps)


def write(store: CheckpointStore, state: TrainingState, fragments: Sequence[Any], ema_values: Sequence[Tensor]) -> Path:
    """Writes one checkpoint of all ranks and waits for it."""
    writer = checkpoint_writer.CheckpointWriter(store, fragments, ema_values)
    writer.begin(state)
    outcome = writer.wait()
    assert outcome is not None
    if outcome.path is None:
        raise UserError(outcome.error)
    return outcome.path


def save(store: CheckpointStore, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES, **changes: Any) -> Full:
    full = random_bits(shapes, step)
    write(store, make_state(step, **changes), *whole(full))
    return full


def load(path: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[TrainingState, Rank]:
    rank = whole(zero_like(random_bits(shapes, 0)))
    state = checkpoint.load(path, *rank, config=CONFIG)
    return state, rank


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_partial_as_ranks(folder: Path, ranks: Sequence[Rank], full: Full, step: int) -> list[dict[str, Any]]:
    """What writers do on several ranks before anything is published, one rank after another, the last one first."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {content: {name: tuple(t.shape) for name, t in full[content].items()} for content in CONTENTS}
    hashes = []
    for index, rank in reversed(list(enumerate(ranks))):
        part = checkpoint_writer.RankPart(*rank, shapes, index, len(ranks))
        part.take()
        hashes.append(part.write(folder / f"step_{step:08d}.partial", step, lambda: None))
    return hashes[::-1]


def write_as_ranks(store: CheckpointStore, ranks: Sequence[Rank], full: Full, step: int) -> Path:
    """A checkpoint that several ranks have written, in this process."""
    store.publish(step, write_partial_as_ranks(store.folder, ranks, full, step), make_state(step).to_json())
    return store.path(step)


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


def failing(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def flip_byte(file: Path, at: int) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 4
    file.write_bytes(damaged)


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

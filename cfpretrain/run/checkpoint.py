"""Checkpoints that know neither ranks nor ZeRO stages, and hold no pickle.

A complete checkpoint is a folder `step_00000500/` of safetensors files (`weights`, `ema`, and one for each name of the
optimizer's state, such as `exp_avg` and `exp_avg_sq`: the parameters that have it in fp32 and full shape, sorted by
name), `ranges.json`, a hash for every range of them ({content: {name: [[begin, end, sha256], ...]}}, in values), and
`state.json`, the counters and the record of what was trained, with a hash of their own (`state.py`).
Anyone reads the files with safetensors. Each rank writes the flat ranges it owns straight to their place in the files
and reads the ranges it needs, so resuming on other ranks or another ZeRO stage is reading other slices.

A folder is complete before it has its name, and `latest`, a text file with the name to resume from, moves last.
`best.json` names the one with the best score, where a run scores itself.

    step_X.partial   being written          step_X.replaced   the earlier folder of the step being written again
    step_X           complete               step_X.deleted    being deleted
    step_X.damaged   not what was written   step_X.abandoned  of a line of training that the run has gone back behind

The last two stay until a person deletes them; nothing resumes from them.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.console import UserError
from cfpretrain.base.differences import tensor_differences
from cfpretrain.base.files import read_json
from cfpretrain.run.state import TrainingState, read_state
from cfpretrain.run.tensor_files import (
    DamagedCheckpointError,
    Fragment,
    HashedRange,
    Header,
    Shapes,
    checked_hashes,
    read_header,
    read_values,
    read_whole,
    remedy,
    unreadable,
    verify_ranges,
)

WEIGHTS, EMA = "weights", "ema"  # contents; the others are the optimizer's
RANGES_FILE = "ranges.json"
_MAX_RANGES_BYTES, _MAX_RANGES_VALUES = 2**27, 8_000_000  # of a thousand ranks


# ---------------------------------------------------------------------------------------------------------------------
# The tensors


def tensor_file(folder: Path, content: str) -> Path:
    """Where a checkpoint keeps the tensors of one content."""
    return folder / f"{content}.safetensors"


def held_tensors(
    content: str, fragments: Sequence[Fragment], ema_values: Sequence[Tensor]
) -> list[tuple[Fragment, Tensor]]:
    """This rank's 1-D fp32 tensors of one content, each with the fragment that says where its values belong."""
    pairs = []
    for fragment, average in zip(fragments, ema_values, strict=True):
        values = {WEIGHTS: fragment.values, EMA: average, **fragment.state}.get(content)
        if values is None:
            continue
        if (values.dtype, tuple(values.shape)) != (torch.float32, (fragment.values.numel(),)):
            raise RuntimeError(f"{content} of {fragment.name}: {values.dtype} of shape {tuple(values.shape)}")
        pairs.append((fragment, values))
    return pairs


def gather_shapes(fragments: Sequence[Fragment]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The full shapes by content and name; a rank alone may hold nothing of some."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for rows in runtime.gather([(f.name, tuple(f.shape), tuple(f.state)) for f in fragments]):
        for name, shape, state_names in rows:
            for content in (WEIGHTS, EMA, *state_names):
                if found.setdefault(content, {}).setdefault(name, shape) != shape:
                    raise RuntimeError(f"{name} has shape {shape} on one rank and another on another")
    return found


@dataclass(frozen=True)
class TensorFile:
    """A file of a checkpoint whose header and hashes are sound; its values are held against the hashes in reading."""

    path: Path
    header: Header
    ranges: Sequence[HashedRange]

    @functools.cached_property
    def _ranges_by_name(self) -> dict[str, list[HashedRange]]:
        found: dict[str, list[HashedRange]] = {name: [] for name in self.header.shapes}
        for place in self.ranges:
            found[place.name].append(place)
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, fp32, in full shape, on the CPU; errors as of `open_weights`."""
        alone = dataclasses.replace(self.header, shapes={name: self.header.shapes[name]})
        with _reading(self.path):
            return read_whole(self.path, alone, self._ranges_by_name[name])[name]

    def read_all(self) -> dict[str, Tensor]:
        """All tensors by name; as `read`."""
        return {name: self.read(name) for name in self.header.shapes}


def open_tensors(checkpoint: Path, step: int, contents: Iterable[str]) -> dict[str, TensorFile]:
    """Finds the tensors of these contents, and their hashes.

    Raises:
        DamagedCheckpointError: they are not what was written, or of another step.
        OSError: a file cannot be read.
    """
    source, opened = checkpoint / RANGES_FILE, {}
    try:
        plain = read_json(source, _MAX_RANGES_BYTES, False, _MAX_RANGES_VALUES)
    except ValueError as error:
        raise DamagedCheckpointError(f"{source}: expected JSON, got {error}; {remedy(source)}") from error
    if not isinstance(plain, dict) or not set(contents) <= plain.keys():
        raise DamagedCheckpointError(
            f"{source}: expected hashes of {', '.join(contents)}, got {plain!r:.80}; {remedy(source)}"
        )
    for content in contents:
        file = tensor_file(checkpoint, content)
        header = read_header(file)
        if header.metadata["step"] != str(step):
            raise DamagedCheckpointError(
                f"{file}: expected step {step}, got step {header.metadata['step']}; {remedy(file)}"
            )
        opened[content] = TensorFile(file, header, checked_hashes(plain[content], header, source))
    return opened


def open_weights(path: Path, which: Literal["ema", "weights"]) -> TensorFile:
    """The averages ("ema", for sampling and export) or the trained weights of a checkpoint, to be read one by one.

    Raises:
        DamagedCheckpointError: it is not what was written.
    """
    state = read_state(path)
    with _reading(tensor_file(path, which)):
        return open_tensors(path, state.step, [which])[which]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unreadable(f"{error.filename or file} cannot be read", error, remedy(file)) from error


def _verify_share(opened: Iterable[TensorFile], rank: int, world_size: int) -> None:
    """Holds this rank's share of all values against their hashes; over all ranks it is every value."""
    opened = list(opened)
    num_values = sum(place.end - place.begin for one in opened for place in one.ranges)
    num_before = 0
    for one in opened:
        mine = []
        for place in one.ranges:
            size = place.end - place.begin
            # The middle decides, so that the shares follow one another and are about equal.
            if (2 * num_before + size) * world_size // (2 * num_values) == rank:
                mine.append(place)
            num_before += size
        verify_ranges(one.path, one.header, mine)


def _read_ranges(opened: Mapping[str, TensorFile], fragments: Sequence[Fragment], ema_values: Sequence[Tensor]) -> None:
    """Fills one rank's fragments and averages from the files."""
    for content, one in opened.items():
        with files.opened(one.path, os.O_RDONLY) as descriptor:
            for fragment, values in held_tensors(content, fragments, ema_values):
                if fragment.name not in one.header.shapes:  # frozen there
                    values.zero_()
                elif content != EMA or not fragment.is_frozen:  # else its average is the weight itself
                    read_values(descriptor, one.header.position(fragment.name, fragment.offset), values)


def check_shapes(opened: TensorFile, expected: Shapes) -> None:
    """Refuses a file of other tensors than those of the run's model."""
    different = tensor_differences(opened.header.shapes, expected)
    if different:
        raise UserError(
            f"{opened.path} is of another model: tensors {different}; "
            "use the config it was trained with or another run.folder"
        )


def _check_optimizer(there: Mapping[str, Any], here: Mapping[str, Any], path: Path) -> None:
    """Refuses the state of another optimizer, by the configs."""
    one, other = (config.get("train", {}).get("optimizer", "adamw") for config in (there, here))
    if one != other:
        raise UserError(
            f"checkpoint {path} holds the state of train.optimizer = {one}, and the config says {other}; "
            "set it alike or choose another run.folder"
        )


def _expected(
    here: Mapping[str, Shapes], content: str, there: Shapes, saved: Mapping[str, Any], config: Mapping[str, Any]
) -> Shapes:
    """The tensors that a file of this content is to hold, by those of the engine and the two configs.

    Of the optimizer's state, that of parameters which are frozen here may be there too, and is left; that of those
    which were frozen there is not, and begins at 0.
    """
    if content in (WEIGHTS, EMA):
        return here[content]
    frozen = {name: shape for name, shape in here[WEIGHTS].items() if name not in here[content] and name in there}
    expected = {**here[content], **frozen}
    before, now = (list(one.get("train", {}).get("freeze", [])) for one in (saved, config))
    if before == now:
        return expected
    return {name: shape for name, shape in expected.items() if name in there}


@contextmanager
def _reading_on_all_ranks(path: Path) -> Iterator[None]:
    """Runs a block on each rank; where it fails on one, all ranks raise the same error."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except OSError as error:
        fix = "fix this, or delete the folder to resume from an earlier checkpoint"
        problem = unreadable(f"checkpoint {path} cannot be read", error, fix)
    told = None if problem is None else (str(problem), isinstance(problem, DamagedCheckpointError))
    for found in runtime.gather(told):
        if found is not None:
            text, is_damaged = found
            raise DamagedCheckpointError(text) if is_damaged else UserError(text)


def load(
    path: Path, fragments: Sequence[Fragment], ema_values: Sequence[Tensor], config: Mapping[str, Any]
) -> TrainingState:
    """Fills this rank's fragments and averages from a checkpoint, whatever ranks and ZeRO stage wrote it.

    Every byte is held against its hash before the first tensor is read; the ranks share this work. The caller
    refreshes its low-precision weights after.

    Args:
        path: the checkpoint's folder.
        fragments: values and the optimizer's state are overwritten.
        ema_values: aligned with the fragments; overwritten.
        config: the run's, as plain values.

    Raises:
        DamagedCheckpointError: on all ranks: it is not what was written; an earlier one may be whole.
    """
    shapes = gather_shapes(fragments)
    with _reading_on_all_ranks(path):
        state = read_state(path)
        state.check_config(config, str(path))
        _check_optimizer(state.config, config, path)
        opened = open_tensors(path, state.step, shapes)
        for content, one in opened.items():
            check_shapes(one, _expected(shapes, content, one.header.shapes, state.config, config))
    with _reading_on_all_ranks(path):
        _verify_share(opened.values(), runtime.rank(), runtime.world_size())
    with _reading_on_all_ranks(path):
        _read_ranges(opened, fragments, ema_values)
    return state

"""Checkpoints that know neither ranks nor ZeRO stages, and hold no pickle.

A complete checkpoint is a folder `step_00000500/` of four safetensors files (`weights`, `ema`, `exp_avg`,
`exp_avg_sq`: every parameter in fp32 and full shape, sorted by name), `ranges.json`, a hash for every range of them
({content: {name: [[begin, end, sha256], ...]}}, in values), and `state.json`, the counters and the record of what was
trained, with a hash of their own (`training_state`).
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
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.console import UserError, reason_of, say
from cfpretrain.base.files import read_json, read_text
from cfpretrain.run.state import STATE_FILE, TrainingState, dump, read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError as DamagedCheckpointError  # those who load catch it
from cfpretrain.run.tensor_files import (
    Fragment,
    HashedRange,
    Header,
    check_cover,
    hashes_from_plain,
    read_header,
    read_values,
    read_whole,
    remedy,
    unreadable,
    verify_ranges,
)

CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
RANGES_FILE = "ranges.json"
_LATEST_FILE, BEST_FILE = "latest", "best.json"
_COMPLETE_NAME = re.compile(r"step_([0-9]{8,18})")
_LEFTOVER_NAME = re.compile(r"(step_[0-9]{8,18})\.(partial|deleted|replaced)")
_NUM_NAMES_SHOWN = 5
_MAX_NAME_BYTES = 4096  # of what `latest` may hold
_MAX_RANGES_BYTES = 2**27  # of a thousand ranks


# ---------------------------------------------------------------------------------------------------------------------
# One rank's part of the tensors


def tensors_by_content(fragments: Sequence[Fragment], ema_values: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """One rank's 1-D fp32 tensors by content, in the order of the fragments."""
    tensors = {
        "weights": [fragment.values for fragment in fragments],
        "ema": list(ema_values),
        "exp_avg": [fragment.exp_avg for fragment in fragments],
        "exp_avg_sq": [fragment.exp_avg_sq for fragment in fragments],
    }
    for content, values in tensors.items():
        for fragment, value in zip(fragments, values, strict=True):
            found = (value.dtype, tuple(value.shape))
            if found != (torch.float32, (fragment.values.numel(),)):
                raise RuntimeError(f"{content} of {fragment.name}: {found}")
    return tensors


def written_range(fragment: Fragment, rank: int, world_size: int) -> tuple[int, int]:
    """The part of its own values that a rank writes: an equal share of what every rank holds."""
    num_values = fragment.values.numel()
    if not fragment.replicated:
        return 0, num_values
    return num_values * rank // world_size, num_values * (rank + 1) // world_size


def _read_ranges(folder: Path, fragments: Sequence[Fragment], ema_values: Sequence[Tensor]) -> None:
    """Fills one rank's fragments and averages from the files."""
    for content, tensors in tensors_by_content(fragments, ema_values).items():
        file = tensor_file(folder, content)
        header = read_header(file)
        with files.opened(file, os.O_RDONLY) as descriptor:
            for fragment, values in zip(fragments, tensors, strict=True):
                read_values(descriptor, header.position(fragment.name, fragment.offset), values)


def tensor_file(folder: Path, content: str) -> Path:
    """Where a checkpoint keeps the tensors of one content."""
    return folder / f"{content}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that survive a crash


def remove(path: Path) -> None:
    """Deletes a folder or a file; what cannot be deleted is said, since training can go on and a later run retries."""
    try:
        files.remove(path)
    except OSError as error:
        say(f"{path} cannot be deleted now: {reason_of(error)}")


def _move(path: Path, target: Path) -> bool:
    """Renames a folder; what cannot be renamed is said."""
    try:
        files.move(path, target)
    except OSError as error:
        say(f"{path} cannot be renamed to {target.name} now: {reason_of(error)}")
        return False
    return True


@contextmanager
def _reading_on_all_ranks(path: Path) -> Iterator[None]:
    """Runs a block on each rank; where it fails on one, all ranks raise the same error."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    except OSError as error:
        fix = "mend this, or delete the folder to resume from an earlier checkpoint"
        problem = unreadable(f"checkpoint {path} cannot be read", error, fix)
    told = None if problem is None else (str(problem), isinstance(problem, DamagedCheckpointError))
    for found in runtime.gather(told):
        if found is not None:
            text, is_damaged = found
            raise DamagedCheckpointError(text) if is_damaged else UserError(text)


# ---------------------------------------------------------------------------------------------------------------------
# The store


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best score so far.

    Attributes:
        step: of the checkpoint.
        score: the smaller, the better.
        measured_by: JSON-able; scores that were measured otherwise are not compared.
    """

    step: int
    score: float
    measured_by: dict[str, Any]


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run: which there are, which to resume from, which stay. All ranks call `load` together."""

    folder: Path
    keep_last: int  # newest checkpoints that stay; at least 1
    keep_every_steps: int  # and every one whose step is a multiple of this; 0 = none

    def __post_init__(self) -> None:
        assert self.keep_last >= 1
        assert self.keep_every_steps >= 0

    def latest(self) -> Path | None:
        """The first of `candidates`; None where there is none."""
        return next(iter(self.candidates()), None)

    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first: the one that `latest` names, then those before it, newest first.

        Where `latest` is missing or names one that is gone, it says so, and all complete ones are returned. It only
        reads, so every rank may call it, before the first save of a run.

        Raises:
            UserError: `latest` holds something else than the name of a checkpoint in this folder, or one that is
                gone where no other is left.
        """
        if self.folder.is_symlink():
            raise UserError(
                f"{self.folder}: expected a folder, got a link, which may lead to another run's checkpoints; move what "
                "it leads to into its place, or make the whole run folder a link"
            )
        named = self._named_by_latest()
        complete = self._complete()
        newest_first = sorted(complete, reverse=True)
        if named is not None and named in complete:
            return [complete[step] for step in newest_first if step <= named]
        paths = [complete[step] for step in newest_first]
        found = "is missing" if named is None else f"names step_{named:08d}, which is gone"
        if named is not None and not paths:
            raise UserError(
                f"{self.folder / _LATEST_FILE} {found}, and no complete checkpoint is left; "
                "restore one, or choose another run.folder to begin again"
            )
        if paths:
            say(f"{self.folder / _LATEST_FILE} {found}; the newest complete checkpoint is {paths[0]}")
        return paths

    @staticmethod
    def load(
        path: Path, fragments: Sequence[Fragment], ema_values: Sequence[Tensor], config: Mapping[str, Any]
    ) -> TrainingState:
        """Fills fragments and averages from a checkpoint, whatever ranks and ZeRO stage wrote it.

        Every byte is held against its hash before the first tensor is read; the ranks share this work. The caller
        refreshes its low-precision weights after.

        Args:
            path: the checkpoint's folder.
            fragments: this rank's ranges; values and moments are overwritten.
            ema_values: the averages, aligned with the fragments; overwritten.
            config: the run's, as plain values.

        Returns:
            The counters and the record.

        Raises:
            DamagedCheckpointError: on all ranks: it is not what was written; an earlier one may be whole.
            UserError: on all ranks: not a complete checkpoint, of another schema or of another model.
        """
        shapes = gather_shapes(fragments)
        with _reading_on_all_ranks(path):
            state = read_state(path)
            state.check_config(config, str(path))
            hashes = read_hashes(path)
            contents = {content: check_file(path, content, state.step, hashes) for content in CONTENTS}
            for content, (header, _) in contents.items():
                _check_shapes(tensor_file(path, content), header, shapes)
        with _reading_on_all_ranks(path):
            _verify_share(path, contents, runtime.rank(), runtime.world_size())
        with _reading_on_all_ranks(path):
            _read_ranges(path, fragments, ema_values)
        return state

    def remove_leftovers(self) -> None:
        """Deletes what is half-written or half-deleted, while nothing is in flight."""
        for path in sorted(self.folder.iterdir()):
            match = _LEFTOVER_NAME.fullmatch(path.name)
            if match is None:
                continue
            original = path.with_name(match[1])
            if match[2] == "replaced" and not original.exists():
                _move(path, original)
            else:
                remove(path)
        files.remove_leftovers(self.folder)

    def publish(self, partial: Path, final: Path, state_text: str) -> None:
        """Turns a written folder into the checkpoint to resume from; each line leaves something usable.

        Args:
            partial: all but the counters.
            final: its name as a checkpoint.
            state_text: the counters, as JSON.

        Raises:
            OSError: it cannot be written.
        """
        files.replace(partial / STATE_FILE, state_text)
        files.flush(partial)
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            remove(replaced)
            files.move(final, replaced)
        files.move(partial, final)
        files.flush(self.folder)
        self._point_latest_at(final.name)
        remove(replaced)

    def apply_retention(self, step: int) -> None:
        """Deletes what need not stay after a save at `step`; steps beyond it are of another line: left alone."""
        earlier = sorted(s for s in self._complete() if s <= step)
        try:
            healthy, best = self._newest_healthy(earlier), self.best()
        except OSError as error:  # it may be the best that would go
            say(f"WARNING: no earlier checkpoint is deleted, since {BEST_FILE} cannot be read: {reason_of(error)}")
            return
        for old in earlier[: -self.keep_last]:
            if (
                old == healthy
                or (best is not None and old == best.step)
                or (self.keep_every_steps and old % self.keep_every_steps == 0)
            ):
                continue
            path = self.folder / _name_of(old)
            _move(path, path.with_name(f"{path.name}.deleted"))
        self.remove_leftovers()

    def _newest_healthy(self, steps: Sequence[int]) -> int | None:
        """The one to go back to after sick steps: it stays, however many were written among them."""
        return next((s for s in reversed(steps) if is_healthy(self.folder / _name_of(s))), None)

    def best(self) -> Best | None:
        """What `keep_if_best` named last; None where there is none, its checkpoint is gone, or the note is damaged.

        Raises:
            OSError: it cannot be read now.
        """
        file = self.folder / BEST_FILE
        try:
            plain = read_json(file, follow=False)
            best = Best(int(plain["step"]), float(plain["score"]), dict(plain["measured_by"]))
            if not _COMPLETE_NAME.fullmatch(_name_of(best.step)):
                raise ValueError("step: expected a whole number of at most 18 digits")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            say(f"WARNING: {file} is damaged and left out: {reason_of(error)}")
            return None
        return best if (self.folder / _name_of(best.step) / STATE_FILE).is_file() else None

    def keep_if_best(self, new: Best) -> bool:
        """Names a complete checkpoint the best where none has a better score; it stays. Rank 0 calls it.

        One whose score was measured otherwise makes place for it.

        Raises:
            OSError: the note cannot be written.
        """
        old = self.best()
        is_rival = old is not None and old.step != new.step and old.measured_by == new.measured_by
        if old is not None and is_rival and old.score <= new.score:
            return False
        self._replace(BEST_FILE, dump({"checkpoint": _name_of(new.step), **dataclasses.asdict(new)}))
        return True

    def set_aside(self, resumed_step: int, damaged: Sequence[Path]) -> None:
        """Takes out of the line of checkpoints what the run does not go on from; rank 0 does, the others do nothing.

        Damaged ones become `step_X.damaged`, complete ones above the step `step_X.abandoned`; they stay on disk, and
        each is said. What cannot be renamed is said too. It is called before a `CheckpointWriter` is made.

        Args:
            resumed_step: of the checkpoint that the run goes on from.
            damaged: checkpoints of this store that were refused.
        """
        if runtime.rank() != 0:
            return
        kinds = {path: "damaged" for path in damaged if path.exists()}
        kinds = {path: "abandoned" for step, path in self._complete().items() if step > resumed_step} | kinds
        if not kinds:
            return
        try:
            best = self.best()
            if best is not None and self.folder / _name_of(best.step) in kinds:
                remove(self.folder / BEST_FILE)
            # Before the first is renamed: from here on a kill leaves none of them a candidate.
            self._point_latest_at(_name_of(resumed_step))
        except OSError as error:
            say(f"{self.folder} cannot be written now: {reason_of(error)}")
        for path, kind in kinds.items():
            self._rename_aside(path, kind)
        # One that was being replaced comes to light only when what replaced it is gone.
        for step, path in self._complete().items():
            if step > resumed_step and path not in kinds:
                self._rename_aside(path, "abandoned")

    def _rename_aside(self, path: Path, kind: str) -> None:
        name = f"{path.name.removesuffix('.replaced')}.{kind}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        target = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
        if _move(path, target):
            say(f"{path} is {kind}: it is now {target.name}, and yours to delete")

    def _point_latest_at(self, name: str) -> None:
        self._replace(_LATEST_FILE, f"{name}\n")

    def _replace(self, name: str, text: str) -> None:
        files.replace(self.folder / name, text)
        files.flush(self.folder)

    def _named_by_latest(self) -> int | None:
        file = self.folder / _LATEST_FILE
        try:
            # The target of a link is not read, so that no message shows it.
            name = read_text(file, _MAX_NAME_BYTES, follow=False).strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {reason_of(error)}; mend or delete it") from error
        if not name:
            return None
        match = _COMPLETE_NAME.fullmatch(name)
        if match is None or (self.folder / name).is_symlink():
            got = f"{name!r:.80}" if match is None else f"{name}, a link"
            raise UserError(
                f"{file}: expected the name of a checkpoint in this folder such as step_00000500, got {got}; "
                "write such a name or delete the file"
            )
        return int(match[1])

    def _complete(self) -> dict[int, Path]:
        """The complete checkpoints by step, with those that a kill left moved aside and not yet replaced."""
        complete: dict[int, Path] = {}
        if not self.folder.is_dir():
            return complete
        for path in sorted(self.folder.iterdir(), reverse=True):  # step_X comes after step_X.replaced: it wins
            match = _COMPLETE_NAME.fullmatch(path.name.removesuffix(".replaced"))
            if match and not path.is_symlink() and (path / STATE_FILE).is_file():
                complete[int(match[1])] = path
        return complete


def _name_of(step: int) -> str:
    return f"step_{step:08d}"


def is_healthy(path: Path) -> bool:
    """Whether a checkpoint can be read and was not written in a row of skipped steps."""
    try:
        return bool(read_state(path).guard.get("num_skips_in_row", 0) == 0)
    except UserError:
        return False


def read_tensors(path: Path, which: Literal["ema", "weights"]) -> dict[str, Tensor]:
    """All averages or weights of a checkpoint, whole and on the CPU: for tools, on one process.

    Args:
        path: the checkpoint's folder.
        which: "ema" for sampling and export, "weights" for the trained weights themselves.

    Returns:
        fp32 tensors by parameter name, in full shape.

    Raises:
        DamagedCheckpointError: it is not what was written.
        UserError: not a complete checkpoint of ours.
    """
    state = read_state(path)
    file = tensor_file(path, which)
    try:
        header, ranges = check_file(path, which, state.step, read_hashes(path))
        return read_whole(file, header, ranges)
    except OSError as error:
        raise unreadable(f"{file} cannot be read", error, remedy(file)) from error


def read_hashes(path: Path) -> dict[str, Any]:
    file = path / RANGES_FILE
    try:
        plain = read_json(file, _MAX_RANGES_BYTES, follow=False)
    except ValueError as error:
        raise DamagedCheckpointError(f"{file}: expected JSON, got {error}; {remedy(file)}") from error
    if not isinstance(plain, dict) or set(plain) != set(CONTENTS):
        raise DamagedCheckpointError(
            f"{file}: expected hashes of {', '.join(CONTENTS)}, got {plain!r:.80}; {remedy(file)}"
        )
    return plain


def check_file(path: Path, content: str, step: int, hashes: Mapping[str, Any]) -> tuple[Header, list[HashedRange]]:
    """The header of a tensor file and the hashes of all its values; refuses a file of another step."""
    file = tensor_file(path, content)
    header = read_header(file)
    if header.metadata.get("step") != str(step):
        raise DamagedCheckpointError(
            f"{file}: expected step {step}, got step {header.metadata.get('step')}; {remedy(file)}"
        )
    ranges = hashes_from_plain(hashes[content], path / RANGES_FILE)
    check_cover(ranges, hashes[content], header, path / RANGES_FILE)
    return header, ranges


def _verify_share(
    path: Path, contents: Mapping[str, tuple[Header, Sequence[HashedRange]]], rank: int, world_size: int
) -> None:
    """Holds this rank's share of all values against their hashes; over all ranks it is every value."""
    num_values = sum(place.end - place.begin for _, ranges in contents.values() for place in ranges)
    num_before = 0
    for content, (header, ranges) in contents.items():
        mine = []
        for place in ranges:
            size = place.end - place.begin
            # The middle decides, so that the shares follow one another and are about equal.
            if (2 * num_before + size) * world_size // (2 * num_values) == rank:
                mine.append(place)
            num_before += size
        verify_ranges(tensor_file(path, content), header, mine)


def _check_shapes(file: Path, header: Header, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses a file of other tensors than the run's."""
    missing = [name for name in shapes if name not in header.shapes]
    unknown = [name for name in header.shapes if name not in shapes]
    other = [
        f"{name} {header.shapes[name]} there and {shapes[name]} here"
        for name in shapes
        if name in header.shapes and header.shapes[name] != shapes[name]
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": other}
    problems = [f"{what}: {_some(names)}" for what, names in found.items() if names]
    if problems:
        raise UserError(
            f"{file} is of another model: tensors {', '.join(problems)}; "
            "use the config it was trained with or another run.folder"
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else ""
    return ", ".join(names[:_NUM_NAMES_SHOWN]) + more


def gather_shapes(fragments: Sequence[Fragment]) -> dict[str, tuple[int, ...]]:
    """The full shape of every parameter of the run; a rank alone may hold nothing of some."""
    rank, world_size = runtime.rank(), runtime.world_size()
    rows = []
    for fragment in fragments:
        begin, end = written_range(fragment, rank, world_size)
        rows.append((fragment.name, tuple(fragment.shape), fragment.offset + begin, fragment.offset + end))
    return _join_ranges([row for rows_of_rank in runtime.gather(rows) for row in rows_of_rank])


def _join_ranges(rows: Sequence[tuple[str, tuple[int, ...], int, int]]) -> dict[str, tuple[int, ...]]:
    """Shapes by name from all ranks' (name, shape, begin, end); each parameter is covered exactly once."""
    shapes = {name: shape for name, shape, _, _ in rows}
    covered = dict.fromkeys(shapes, 0)
    for name, shape, begin, end in sorted(rows):
        if shape != shapes[name]:
            raise RuntimeError(f"{name} has shape {shape} on one rank and {shapes[name]} on another")
        if begin == end:
            continue
        if begin != covered[name]:
            raise RuntimeError(f"ranges of {name}: one ends at {covered[name]}, the next begins at {begin}")
        covered[name] = end
    for name, shape in shapes.items():
        if covered[name] != math.prod(shape):
            raise RuntimeError(f"{name}: {covered[name]} of {math.prod(shape)} values are covered")
    return shapes

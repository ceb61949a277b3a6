"""Checkpoints that know neither ranks nor ZeRO stages, and hold no pickle.

A complete checkpoint is a folder `step_00000500/` of four safetensors files (`weights`, `ema`, `exp_avg`,
`exp_avg_sq`: every parameter in fp32 and full shape, sorted by name) and `state.json`, the counters. Anyone reads the
files with safetensors. Each rank writes the flat ranges it owns straight to their place in the files and reads the
ranges it needs, so resuming on other ranks or another ZeRO stage is reading other slices.

A folder is complete before it has its name, and `latest`, a text file with the name to resume from, moves last:

    step_X.partial   being written          step_X.replaced   the earlier folder of the step being written again
    step_X           complete               step_X.deleted    being deleted

Every byte of a tensor leaves through `_write_values` and comes back through `_read_values`: hashes of ranges belong
there. `save` lays out, writes and publishes: a writer in the background would take over the last two.
"""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from cfpretrain import runtime
from cfpretrain.console import UserError, say

if TYPE_CHECKING:
    from cfpretrain.engine import Fragment

SCHEMA_VERSION = 1

_CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
_STATE_FILE = "state.json"
_LATEST_FILE = "latest"
_COMPLETE_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER_NAME = re.compile(r"(step_\d{8,})\.(partial|deleted|replaced)")
_VALUE_BYTES = 4
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_BUFFER_VALUES = 1 << 24  # values staged at once: 64 MiB
_NUM_NAMES_SHOWN = 5

assert sys.byteorder == "little", "safetensors files are little-endian"


# ---------------------------------------------------------------------------------------------------------------------
# The counters


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides its tensors to go on as if it had never stopped."""

    step: int  # optimizer steps taken or skipped = global batches consumed
    optimizer_step: int  # steps Adam has applied: its bias correction
    num_skipped: int  # steps skipped for non-finite gradients
    epoch: int
    samples_in_epoch: int  # samples of this epoch consumed, over all ranks
    train_seconds: float
    seed: int
    model: dict[str, Any]  # the model's part of the config
    data_fingerprint: str
    wandb_run_id: str | None
    versions: dict[str, str]  # of the packages that wrote it
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The state as JSON text, one key a line."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> "TrainingState":
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.
            source: the file it came from, for messages.

        Raises:
            UserError: not JSON, a newer schema, or keys missing, unknown or of another type; all keys in one message.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise UserError(f"{source}: expected JSON, got {error}; {_remedy(source)}") from error
        if not isinstance(plain, dict):
            raise UserError(f"{source}: expected keys with values, got {plain!r:.40}; {_remedy(source)}")
        version = plain.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UserError(
                f"{source}: schema_version {version} was written by a newer cfpretrain; this one reads up to "
                f"{SCHEMA_VERSION}: install the version that wrote it ({plain.get('versions')!r:.80})"
            )
        problems = _state_problems(plain)
        if problems:
            raise UserError(f"{source}: {' | '.join(problems)}; {_remedy(source)}")
        return cls(**plain)

    def check_model(self, model: Mapping[str, Any], source: str) -> None:
        """Refuses to continue another model.

        Args:
            model: the model's part of the config, as plain values.
            source: the checkpoint, for the message.

        Raises:
            UserError: names each key that differs, with both values.
        """
        # Through JSON and back, since a tuple of the config is a list in the file.
        wanted = json.loads(json.dumps(dict(model)))
        absent = "absent"
        differing = [
            f"model.{key} is {self.model.get(key, absent)} there and {wanted.get(key, absent)} in the config"
            for key in sorted(self.model.keys() | wanted.keys())
            if self.model.get(key, absent) != wanted.get(key, absent)
        ]
        if differing:
            raise UserError(
                f"checkpoint {source} is of another model: {', '.join(differing)}; "
                "set these keys alike or choose another run.folder"
            )


def _state_problems(plain: dict[str, Any]) -> list[str]:
    hints = typing.get_type_hints(TrainingState)
    problems = [f"{key}: missing" for key in hints if key not in plain]
    if plain.get("schema_version") == 0:
        problems.append("schema_version: expected at least 1, got 0")
    for key, value in plain.items():
        if key not in hints:
            problems.append(f"{key}: unknown key")
        elif not _has_type(value, hints[key]):
            problems.append(f"{key}: expected {_describe(hints[key])}, got {value!r:.40}")
    return problems


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of a field's type; every number of a state counts something, so none is negative."""
    if isinstance(value, bool):
        return False
    if hint in (int, float):
        return isinstance(value, hint | int) and math.isfinite(value) and value >= 0
    if typing.get_origin(hint) is dict:
        texts_only = typing.get_args(hint)[1] is str
        return isinstance(value, dict) and not (texts_only and any(not isinstance(v, str) for v in value.values()))
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    names: dict[Any, str] = {int: "a whole number of at least 0", float: "a number of at least 0", str: "a text"}
    return names.get(hint, "a text or null" if hint == str | None else "keys with values")


def _remedy(source: str | Path) -> str:
    return f"restore it, or delete {Path(source).parent} to resume from an earlier checkpoint"


# ---------------------------------------------------------------------------------------------------------------------
# The tensor files


@dataclass(frozen=True)
class _Header:
    """Where the tensors of one safetensors file lie."""

    shapes: dict[str, tuple[int, ...]]
    begins: dict[str, int]  # byte of the file at which each tensor's first value lies
    metadata: dict[str, str]
    num_bytes: int  # of the whole file


def _encode_header(shapes: Mapping[str, tuple[int, ...]], metadata: dict[str, str]) -> tuple[bytes, int]:
    """The first bytes of a safetensors file of fp32 tensors, and the size of the whole file in bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name in sorted(shapes):
        end = begin + _VALUE_BYTES * math.prod(shapes[name])
        entries[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + begin


def _read_header(file: Path) -> _Header:
    """Reads and checks the header of one of our files; raises UserError where it is not one or was cut off."""
    with open(file, "rb") as opened:
        num_bytes = os.fstat(opened.fileno()).st_size
        num_header_bytes = int.from_bytes(opened.read(8), "little")
        if num_header_bytes > min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise UserError(f"{file}: expected a safetensors file, got something else or a part; {_remedy(file)}")
        text = opened.read(num_header_bytes)
    try:
        header = _parse_header(json.loads(text), 8 + num_header_bytes)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: expected a safetensors header, got {error!r:.120}; {_remedy(file)}") from error
    if header.metadata.get("producer") != "cfpretrain" or header.metadata.get("content") != file.stem:
        raise UserError(
            f"{file}: expected {file.stem} written by cfpretrain, "
            f"got a safetensors file with metadata {header.metadata!r:.80}; {_remedy(file)}"
        )
    if header.num_bytes != num_bytes:
        raise UserError(f"{file}: expected {header.num_bytes} bytes, got {num_bytes}; {_remedy(file)}")
    return header


def _parse_header(entries: dict[str, Any], data_begin: int) -> _Header:
    metadata = entries.pop("__metadata__", {})
    shapes: dict[str, tuple[int, ...]] = {}
    begins: dict[str, int] = {}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} of dtype {entry['dtype']} instead of F32")
        if begin != position or end - begin != _VALUE_BYTES * math.prod(shape):
            raise ValueError(f"{name} at bytes {begin} to {end}")
        shapes[name], begins[name], position = shape, data_begin + begin, end
    return _Header(shapes, begins, dict(metadata), data_begin + position)


def _bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = values.numpy()
    # An empty array cannot be cast.
    return memoryview(array).cast("B") if array.size else memoryview(b"")


def _write_fully(descriptor: int, data: bytes | memoryview, position: int) -> None:
    left = memoryview(data)
    while left:
        num_written = os.pwrite(descriptor, left, position)
        left, position = left[num_written:], position + num_written


def _write_values(descriptor: int, position: int, values: Tensor) -> None:
    """Writes a 1-D fp32 tensor of any device at a byte of a file, through a bounded buffer."""
    for chunk in torch.split(values.detach(), _BUFFER_VALUES):
        _write_fully(descriptor, _bytes_of(chunk.cpu().contiguous()), position)
        position += _VALUE_BYTES * chunk.numel()


def _read_values(descriptor: int, position: int, values: Tensor) -> None:
    """Fills a 1-D fp32 tensor of any device from a byte of a file, through a bounded buffer."""
    buffer = torch.empty(min(values.numel(), _BUFFER_VALUES), dtype=torch.float32)
    for chunk in torch.split(values.detach(), _BUFFER_VALUES):
        staged = buffer[: chunk.numel()]
        left = _bytes_of(staged)
        while left:
            num_read = os.preadv(descriptor, [left], position)
            if num_read == 0:
                raise OSError(errno.EIO, "a tensor file became shorter while it was read")
            left, position = left[num_read:], position + num_read
        chunk.copy_(staged)


def _tensors_by_content(fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    tensors = {
        "weights": [fragment.values for fragment in fragments],
        "ema": list(ema_values),
        "exp_avg": [fragment.exp_avg for fragment in fragments],
        "exp_avg_sq": [fragment.exp_avg_sq for fragment in fragments],
    }
    for content, values in tensors.items():
        for fragment, value in zip(fragments, values, strict=True):
            found = (value.dtype, tuple(value.shape))
            assert found == (torch.float32, (fragment.values.numel(),)), f"{content} of {fragment.name}: {found}"
    return tensors


def _written_range(fragment: "Fragment", rank: int, world_size: int) -> tuple[int, int]:
    """The part of its own values that a rank writes: an equal share of what every rank holds."""
    num_values = fragment.values.numel()
    if not fragment.replicated:
        return 0, num_values
    return num_values * rank // world_size, num_values * (rank + 1) // world_size


def _write_ranges(
    folder: Path, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor], rank: int, world_size: int
) -> None:
    """Writes one rank's ranges into the files that rank 0 has laid out, down to the disk."""
    for content, tensors in _tensors_by_content(fragments, ema_values).items():
        file = folder / f"{content}.safetensors"
        begins = _read_header(file).begins
        with _opened(file, os.O_WRONLY) as descriptor:
            for fragment, values in zip(fragments, tensors, strict=True):
                begin, end = _written_range(fragment, rank, world_size)
                position = begins[fragment.name] + _VALUE_BYTES * (fragment.offset + begin)
                _write_values(descriptor, position, values[begin:end])
            os.fsync(descriptor)


def _read_ranges(folder: Path, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> None:
    """Fills one rank's fragments and averages from the files."""
    for content, tensors in _tensors_by_content(fragments, ema_values).items():
        file = folder / f"{content}.safetensors"
        begins = _read_header(file).begins
        with _opened(file, os.O_RDONLY) as descriptor:
            for fragment, values in zip(fragments, tensors, strict=True):
                _read_values(descriptor, begins[fragment.name] + _VALUE_BYTES * fragment.offset, values)


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(file, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that survive a crash


def _write_file(file: Path, data: bytes, num_bytes: int) -> None:
    """Makes a file of `num_bytes` that begins with `data`, down to the disk."""
    with _opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        os.ftruncate(descriptor, num_bytes)
        _write_fully(descriptor, data, 0)
        os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    """Brings the names in a folder down to the disk."""
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems keep names safe by themselves and refuse the call.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def _remove(path: Path) -> None:
    """Deletes a folder or a file; what cannot be deleted is said, since training can go on and a later save retries."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} cannot be deleted now: {_reason(error)}")


def _reason(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


@contextmanager
def _all_ranks(task: str, fix: str) -> Iterator[None]:
    """Runs a block on each rank; where it fails on one, all ranks raise the same UserError."""
    with runtime.together():
        try:
            yield
        except OSError as error:
            raise UserError(f"{task}: {_reason(error)}; {fix}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The store


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run: `save`, `latest`, `load`. All ranks call `save` and `load` together."""

    folder: Path
    keep_last: int  # newest checkpoints that stay; at least 1
    keep_every_steps: int  # and every one whose step is a multiple of this; 0 = none

    def __post_init__(self) -> None:
        assert self.keep_last >= 1
        assert self.keep_every_steps >= 0

    def save(self, state: TrainingState, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> Path:
        """Writes a checkpoint, makes it the one to resume from, and deletes those that retention lets go.

        Args:
            state: the counters; `state.step` names the folder. Rank 0's are written.
            fragments: this rank's ranges of the parameters; over all ranks they cover each parameter once.
            ema_values: the averages, 1-D fp32, aligned with the fragments.

        Returns:
            The folder of the complete checkpoint.

        Raises:
            UserError: on all ranks, when one of them cannot write; the earlier checkpoints stay as they were.
        """
        final = self.folder / f"step_{state.step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        shapes = _gather_shapes(fragments)
        task = f"checkpoint {final} cannot be written"
        fix = (
            "earlier checkpoints are untouched; free some space there or choose another run.folder that all nodes share"
        )
        try:
            with _all_ranks(task, fix):
                if runtime.rank() == 0:
                    self._remove_leftovers()
                    _lay_out(partial, shapes, state.step)
            with _all_ranks(task, fix):
                _write_ranges(partial, fragments, ema_values, runtime.rank(), runtime.world_size())
            with _all_ranks(task, fix):
                if runtime.rank() == 0:
                    self._publish(partial, final, state)
        except UserError:
            if runtime.rank() == 0:
                _remove(partial)
            runtime.barrier()  # every rank is here; the first to leave may end them all
            raise
        if runtime.rank() == 0:
            self._delete_old(state.step)
        return final

    def latest(self) -> Path | None:
        """The checkpoint to resume from: the one that `latest` names, else the newest complete one, else None.

        It only reads, so every rank may call it, before the first save of a run.

        Raises:
            UserError: `latest` holds something else than the name of a checkpoint in this folder.
        """
        named = self._named_by_latest()
        if named is not None and (self.folder / named / _STATE_FILE).is_file():
            return self.folder / named
        complete = self._complete()
        if not complete and named is None:
            return None
        found = "is missing" if named is None else f"names {named}, which is gone"
        newest = complete[max(complete)] if complete else None
        say(f"{self.folder / _LATEST_FILE} {found}; the newest complete checkpoint is {newest}")
        return newest

    @staticmethod
    def load(
        path: Path, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor], model: Mapping[str, Any]
    ) -> TrainingState:
        """Fills fragments and averages from a checkpoint, whatever ranks and ZeRO stage wrote it.

        All tensors are checked before the first one is read; the caller refreshes its low-precision weights after.

        Args:
            path: the checkpoint's folder.
            fragments: this rank's ranges; values and moments are overwritten.
            ema_values: the averages, aligned with the fragments; overwritten.
            model: the model's part of the config, as plain values.

        Returns:
            The counters.

        Raises:
            UserError: on all ranks: not a complete checkpoint, damaged, of a newer schema or of another model.
        """
        shapes = _gather_shapes(fragments)
        task = f"checkpoint {path} cannot be read"
        fix = "mend this, or delete the folder to resume from an earlier checkpoint"
        with _all_ranks(task, fix):
            state = read_state(path)
            state.check_model(model, str(path))
            for content in _CONTENTS:
                _check_file(path / f"{content}.safetensors", shapes, state.step)
        with _all_ranks(task, fix):
            _read_ranges(path, fragments, ema_values)
        return state

    def _remove_leftovers(self) -> None:
        """Deletes what a killed run left half-written or half-deleted."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            match = _LEFTOVER_NAME.fullmatch(path.name)
            if match is None:
                continue
            original = path.with_name(match[1])
            if match[2] == "replaced" and not original.exists():
                os.rename(path, original)
            else:
                _remove(path)
        _remove(self.folder / f"{_LATEST_FILE}.partial")

    def _publish(self, partial: Path, final: Path, state: TrainingState) -> None:
        """Turns a written folder into the checkpoint to resume from; each line leaves something usable."""
        text = state.to_json().encode()
        _write_file(partial / _STATE_FILE, text, len(text))
        _flush_folder(partial)
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            os.rename(final, replaced)
        os.rename(partial, final)
        _flush_folder(self.folder)
        name = f"{final.name}\n".encode()
        moving = self.folder / f"{_LATEST_FILE}.partial"
        _write_file(moving, name, len(name))
        os.replace(moving, self.folder / _LATEST_FILE)
        _flush_folder(self.folder)
        _remove(replaced)

    def _delete_old(self, step: int) -> None:
        """Applies retention after a save at `step`; steps beyond it are of another line of training: left alone."""
        earlier = sorted(s for s in self._complete() if s <= step)
        for old in earlier[: -self.keep_last]:
            if self.keep_every_steps and old % self.keep_every_steps == 0:
                continue
            path = self.folder / f"step_{old:08d}"
            leaving = path.with_name(f"{path.name}.deleted")
            try:
                os.rename(path, leaving)
            except OSError as error:
                say(f"{path} cannot be deleted now: {_reason(error)}")
            else:
                _remove(leaving)

    def _named_by_latest(self) -> str | None:
        file = self.folder / _LATEST_FILE
        try:
            name = file.read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {_reason(error)}; mend or delete it") from error
        if name and not _COMPLETE_NAME.fullmatch(name):
            raise UserError(
                f"{file}: expected the name of a checkpoint in this folder such as step_00000500, got {name!r:.80}; "
                "write such a name or delete the file"
            )
        return name or None

    def _complete(self) -> dict[int, Path]:
        """The complete checkpoints by step, with those that a kill left moved aside and not yet replaced."""
        complete: dict[int, Path] = {}
        if not self.folder.is_dir():
            return complete
        for path in sorted(self.folder.iterdir(), reverse=True):  # step_X comes after step_X.replaced: it wins
            match = _COMPLETE_NAME.fullmatch(path.name.removesuffix(".replaced"))
            if match and (path / _STATE_FILE).is_file():
                complete[int(match[1])] = path
        return complete


def read_state(path: Path) -> TrainingState:
    """The counters of a complete checkpoint.

    Raises:
        UserError: `path` is not the folder of a complete checkpoint, or its state.json is damaged or newer.
    """
    file = path / _STATE_FILE
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint: expected a folder such as checkpoints/step_00000500 "
            f"with {_STATE_FILE} in it; give the path of one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}; {_remedy(file)}") from error
    return TrainingState.from_json(text, str(file))


def read_tensors(path: Path, which: Literal["ema", "weights"]) -> dict[str, Tensor]:
    """All averages or weights of a checkpoint, whole and on the CPU: for tools, on one process.

    Args:
        path: the checkpoint's folder.
        which: "ema" for sampling and export, "weights" for the trained weights themselves.

    Returns:
        fp32 tensors by parameter name, in full shape.

    Raises:
        UserError: not a complete checkpoint of ours, or damaged.
    """
    state = read_state(path)
    file = path / f"{which}.safetensors"
    try:
        header = _read_header(file)
        _check_file(file, header.shapes, state.step)
        return safetensors.torch.load_file(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {_reason(error)}; {_remedy(file)}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}; {_remedy(file)}") from error


def _lay_out(partial: Path, shapes: Mapping[str, tuple[int, ...]], step: int) -> None:
    """Makes the folder and its tensor files at full size, with their headers and no values yet."""
    os.makedirs(partial.parent, exist_ok=True)
    os.mkdir(partial)
    for content in _CONTENTS:
        metadata = {"format": "pt", "producer": "cfpretrain", "content": content, "step": str(step)}
        header, num_bytes = _encode_header(shapes, metadata)
        _write_file(partial / f"{content}.safetensors", header, num_bytes)
    _flush_folder(partial)


def _check_file(file: Path, shapes: Mapping[str, tuple[int, ...]], step: int) -> None:
    """Refuses a tensor file of another step or of other tensors."""
    header = _read_header(file)
    if header.metadata.get("step") != str(step):
        raise UserError(f"{file}: expected step {step}, got step {header.metadata.get('step')}; {_remedy(file)}")
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


def _gather_shapes(fragments: Sequence["Fragment"]) -> dict[str, tuple[int, ...]]:
    """The full shape of every parameter of the run; a rank alone may hold nothing of some."""
    rank, world_size = runtime.rank(), runtime.world_size()
    rows = []
    for fragment in fragments:
        begin, end = _written_range(fragment, rank, world_size)
        rows.append((fragment.name, tuple(fragment.shape), fragment.offset + begin, fragment.offset + end))
    return _join_ranges([row for rows_of_rank in runtime.gather(rows) for row in rows_of_rank])


def _join_ranges(rows: Sequence[tuple[str, tuple[int, ...], int, int]]) -> dict[str, tuple[int, ...]]:
    """Shapes by name from all ranks' (name, shape, begin, end); asserts that each parameter is covered exactly once."""
    shapes = {name: shape for name, shape, _, _ in rows}
    covered = dict.fromkeys(shapes, 0)
    for name, shape, begin, end in sorted(rows):
        assert shape == shapes[name], f"{name} has shape {shape} on one rank and {shapes[name]} on another"
        if begin == end:
            continue
        assert begin == covered[name], f"ranges of {name}: one ends at {covered[name]}, the next begins at {begin}"
        covered[name] = end
    for name, shape in shapes.items():
        assert covered[name] == math.prod(shape), f"{name}: {covered[name]} of {math.prod(shape)} values are covered"
    return shapes

"""Checkpoints that know neither ranks nor ZeRO stages, and hold no pickle.

A complete checkpoint is a folder `step_00000500/` of four safetensors files (`weights`, `ema`, `exp_avg`,
`exp_avg_sq`: every parameter in fp32 and full shape, sorted by name), `ranges.json`, a hash for every range of them
({content: {name: [[begin, end, sha256], ...]}}, in values), and `state.json`, the counters, with a hash of their own.
Anyone reads the files with safetensors. Each rank writes the flat ranges it owns straight to their place in the files
and reads the ranges it needs, so resuming on other ranks or another ZeRO stage is reading other slices.

A folder is complete before it has its name, and `latest`, a text file with the name to resume from, moves last:

    step_X.partial   being written          step_X.replaced   the earlier folder of the step being written again
    step_X           complete               step_X.deleted    being deleted

In the partial folder each rank leaves the hashes of its ranges (`ranges_00003.json`), from which rank 0 makes
`ranges.json` at the end. Each rank makes what is missing there, so none waits for another before it writes.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from cfpretrain import runtime
from cfpretrain.console import UserError, say
from cfpretrain.tensor_files import (
    VALUE_BYTES,
    HashedRange,
    Header,
    bytes_of,
    check_cover,
    hashes_from_plain,
    hashes_to_plain,
    make_header,
    opened,
    read_header,
    read_values,
    read_whole,
    remedy,
    verify_ranges,
    write_fully,
    write_ranges,
)
from cfpretrain.tensor_files import DamagedCheckpointError as DamagedCheckpointError  # those who load catch it

if TYPE_CHECKING:
    from cfpretrain.engine import Fragment

SCHEMA_VERSION = 2  # 1 had no hashes, and neither `guard` nor `num_rewinds`

_CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
_STATE_FILE = "state.json"
_RANGES_FILE = "ranges.json"
_LATEST_FILE = "latest"
_COMPLETE_NAME = re.compile(r"step_(\d{8,})")
_LEFTOVER_NAME = re.compile(r"(step_\d{8,})\.(partial|deleted|replaced)")
_NUM_NAMES_SHOWN = 5
_MAX_PART_WAIT_SECONDS = 60.0  # for a network file system to show what another node has written
_POLL_SECONDS = 0.01


# ---------------------------------------------------------------------------------------------------------------------
# The counters


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides its tensors to go on as if it had never stopped."""

    step: int  # optimizer steps taken or skipped = global batches consumed
    optimizer_step: int  # steps Adam has applied: its bias correction
    num_skipped: int  # steps that the weights know nothing of: skipped, or gone back behind
    num_rewinds: int
    epoch: int
    samples_in_epoch: int  # samples of this epoch consumed, over all ranks
    train_seconds: float
    seed: int
    model: dict[str, Any]  # the model's part of the config
    data_fingerprint: str
    guard: dict[str, Any]  # the window of losses and gradient norms that says what is usual
    wandb_run_id: str | None
    versions: dict[str, str]  # of the packages that wrote it
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """The state as JSON text, one key a line, and a hash of it."""
        plain = json.loads(_dump(dataclasses.asdict(self)))
        return _dump(plain | {"sha256": _hash(plain)})

    @classmethod
    def from_json(cls, text: str, source: Path) -> "TrainingState":
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.
            source: the file it came from, for messages.

        Raises:
            DamagedCheckpointError: not JSON; keys missing, unknown or of another type, all in one message; or not
                what was written.
            UserError: of another schema.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpointError(f"{source}: expected JSON, got {error}; {remedy(source)}") from error
        if not isinstance(plain, dict):
            raise DamagedCheckpointError(f"{source}: expected keys with values, got {plain!r:.40}; {remedy(source)}")
        _check_schema(plain, source)
        sha256 = plain.pop("sha256", None)
        problems = _state_problems(plain)
        if problems:
            raise DamagedCheckpointError(f"{source}: {' | '.join(problems)}; {remedy(source)}")
        if sha256 is None or sha256 != _hash(plain):
            raise DamagedCheckpointError(
                f"{source}: its contents are not those that were written (sha256); {remedy(source)}"
            )
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


def _dump(plain: dict[str, Any]) -> str:
    return json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _hash(plain: dict[str, Any]) -> str | None:
    try:
        return hashlib.sha256(_dump(plain).encode(), usedforsecurity=False).hexdigest()
    except ValueError:  # a number that is not finite: we wrote none
        return None


def _check_schema(plain: dict[str, Any], source: Path) -> None:
    version = plain.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{source}: schema_version {version} was written by a newer cfpretrain; this one reads {SCHEMA_VERSION}: "
            f"install the version that wrote it ({plain.get('versions')!r:.80})"
        )
    if version == 1 and isinstance(version, int):
        raise UserError(
            f"{source}: schema_version 1 was written by an older cfpretrain, without hashes; this one reads "
            f"{SCHEMA_VERSION}: install the version that wrote it ({plain.get('versions')!r:.80}), or choose another "
            "run.folder"
        )


def _state_problems(plain: dict[str, Any]) -> list[str]:
    hints = typing.get_type_hints(TrainingState)
    problems = [f"{key}: missing" for key in hints if key not in plain]
    if plain.get("schema_version") == 0:
        problems.append(f"schema_version: expected {SCHEMA_VERSION}, got 0")
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


# ---------------------------------------------------------------------------------------------------------------------
# One rank's part of the tensors


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


class _Snapshot:
    """What one rank writes, copied to host memory: the one extra copy of its shard."""

    def __init__(
        self, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor], rank: int, world_size: int
    ) -> None:
        bounds = [_written_range(fragment, rank, world_size) for fragment in fragments]
        self._names = [fragment.name for fragment in fragments]
        self._firsts = [f.offset + begin for f, (begin, _) in zip(fragments, bounds, strict=True)]
        self._sources = {
            content: [values.detach()[begin:end] for values, (begin, end) in zip(tensors, bounds, strict=True)]
            for content, tensors in _tensors_by_content(fragments, ema_values).items()
        }
        sizes = [end - begin for begin, end in bounds]
        self._buffers = {content: _host_buffer(sum(sizes)) for content in _CONTENTS}
        self._copies = {content: list(torch.split(buffer, sizes)) for content, buffer in self._buffers.items()}

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present values; training may go on after."""
        for content, sources in self._sources.items():
            for copy, source in zip(self._copies[content], sources, strict=True):
                copy.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def ranges(self, content: str) -> Iterator[tuple[str, int, memoryview]]:
        """Name, first flat value and bytes of each range that was taken."""
        for name, first, copy in zip(self._names, self._firsts, self._copies[content], strict=True):
            yield name, first, bytes_of(copy)


def _host_buffer(num_values: int) -> Tensor:
    """Host memory of just this size, pinned where there is a GPU."""
    # Touched at once: where memory is short the run ends before it has trained, and the first copy is no slower.
    buffer = torch.empty(num_values, dtype=torch.float32).zero_()
    if num_values and torch.cuda.is_available():
        # Memory that torch pins comes in powers of two: up to twice what is asked for.
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), VALUE_BYTES * num_values, 0))
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _write_share(
    partial: Path, shapes: Mapping[str, tuple[int, ...]], step: int, snapshot: _Snapshot, rank: int
) -> None:
    """Writes one rank's ranges and their hashes down to the disk; rank 0 writes headers and sizes too."""
    with suppress(FileExistsError):
        os.mkdir(partial)
    hashes = {}
    for content in _CONTENTS:
        first_bytes, header = make_header(shapes, content, step)
        with opened(_tensor_file(partial, content), os.O_WRONLY | os.O_CREAT) as descriptor:
            if rank == 0:
                os.ftruncate(descriptor, header.num_bytes)
                write_fully(descriptor, first_bytes, 0)
            hashes[content] = hashes_to_plain(write_ranges(descriptor, header, snapshot.ranges(content)), shapes)
            os.fsync(descriptor)
    _write_file(_part_file(partial, rank), json.dumps(hashes).encode())


def _merge_hashes(partial: Path, world_size: int) -> bytes:
    """The hashes of all ranks as the text of `ranges.json`, once every value of every file has one."""
    deadline = time.monotonic() + _MAX_PART_WAIT_SECONDS
    parts = []
    for rank in range(world_size):
        # Our own part is visible at once, or the folder has vanished.
        parts.append(_read_part(_part_file(partial, rank), deadline if rank else 0.0))
    merged = {}
    for content in _CONTENTS:
        file = _tensor_file(partial, content)
        header = read_header(file)
        ranges = [place for part in parts for place in hashes_from_plain(part.get(content), file)]
        check_cover(ranges, header.shapes, header, file)
        merged[content] = hashes_to_plain(ranges, header.shapes)
    return json.dumps(merged, separators=(",", ":")).encode()


def _read_part(file: Path, deadline: float) -> dict[str, Any]:
    """What a rank left; network file systems may show it late, or half of it."""
    while True:
        try:
            plain: dict[str, Any] = json.loads(_read_text(file))
            return plain
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise
        except ValueError as error:
            if time.monotonic() >= deadline:
                raise DamagedCheckpointError(f"{file}: expected JSON, got {error}") from error
        time.sleep(_POLL_SECONDS)


def _read_ranges(folder: Path, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> None:
    """Fills one rank's fragments and averages from the files."""
    for content, tensors in _tensors_by_content(fragments, ema_values).items():
        file = _tensor_file(folder, content)
        header = read_header(file)
        with opened(file, os.O_RDONLY) as descriptor:
            for fragment, values in zip(fragments, tensors, strict=True):
                read_values(descriptor, header.position(fragment.name, fragment.offset), values)


def _tensor_file(folder: Path, content: str) -> Path:
    return folder / f"{content}.safetensors"


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"ranges_{rank:05d}.json"


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that survive a crash


def _write_file(file: Path, data: bytes) -> None:
    """Makes a small file, down to the disk."""
    with opened(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as descriptor:
        write_fully(descriptor, data, 0)
        os.fsync(descriptor)


def _read_text(file: Path) -> str:
    with open(file, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file_opened:
        return file_opened.read()


def _flush_folder(folder: Path) -> None:
    """Brings the names in a folder down to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep names safe by themselves and refuse the call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Deletes a folder or a file; what cannot be deleted is said, since training can go on and a later run retries."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):  # a read-only folder refuses to delete even what is not there
            path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} cannot be deleted now: {_reason(error)}")


def _move(path: Path, target: Path) -> None:
    """Renames a folder; what cannot be renamed is said."""
    try:
        os.rename(path, target)
    except OSError as error:
        say(f"{path} cannot be renamed to {target.name} now: {_reason(error)}")


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _unreadable(task: str, error: Exception, fix: str) -> UserError:
    # Where a permission is missing, an earlier checkpoint is no answer.
    kind = UserError if isinstance(error, PermissionError) else DamagedCheckpointError
    return kind(f"{task}: {_reason(error)}; {fix}")


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
        problem = _unreadable(f"checkpoint {path} cannot be read", error, fix)
    told = None if problem is None else (str(problem), isinstance(problem, DamagedCheckpointError))
    for found in runtime.gather(told):
        if found is not None:
            text, is_damaged = found
            raise DamagedCheckpointError(text) if is_damaged else UserError(text)


# ---------------------------------------------------------------------------------------------------------------------
# The store


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. All ranks call `save` and `load` together."""

    folder: Path
    keep_last: int  # newest checkpoints that stay; at least 1
    keep_every_steps: int  # and every one whose step is a multiple of this; 0 = none

    def __post_init__(self) -> None:
        assert self.keep_last >= 1
        assert self.keep_every_steps >= 0

    def save(self, state: TrainingState, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> Path:
        """Writes one checkpoint and waits for it; a run in training keeps a `CheckpointWriter` instead.

        Args:
            state: the counters; `state.step` names the folder. Rank 0's are written.
            fragments: this rank's ranges of the parameters; over all ranks they cover each parameter once.
            ema_values: the averages, 1-D fp32, aligned with the fragments.

        Returns:
            The folder of the complete checkpoint.

        Raises:
            UserError: on all ranks, when one of them cannot write; the earlier checkpoints stay as they were.
        """
        writer = CheckpointWriter(self, fragments, ema_values)
        writer.begin(state)
        outcome = writer.wait()
        assert outcome is not None
        if outcome.path is None:
            raise UserError(outcome.error)
        return outcome.path

    def latest(self) -> Path | None:
        """The first of `candidates`; None where there is none."""
        return next(iter(self.candidates()), None)

    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first: the one that `latest` names, then those before it, newest first.

        Where `latest` is missing or names one that is gone, it says so, and all complete ones are returned. It only
        reads, so every rank may call it, before the first save of a run.

        Raises:
            UserError: `latest` holds something else than the name of a checkpoint in this folder.
        """
        named = self._named_by_latest()
        complete = self._complete()
        newest_first = sorted(complete, reverse=True)
        if named is not None and named in complete:
            return [complete[step] for step in newest_first if step <= named]
        paths = [complete[step] for step in newest_first]
        if paths or named is not None:
            found = "is missing" if named is None else f"names step_{named:08d}, which is gone"
            newest = paths[0] if paths else None
            say(f"{self.folder / _LATEST_FILE} {found}; the newest complete checkpoint is {newest}")
        return paths

    @staticmethod
    def load(
        path: Path, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor], model: Mapping[str, Any]
    ) -> TrainingState:
        """Fills fragments and averages from a checkpoint, whatever ranks and ZeRO stage wrote it.

        Every byte is held against its hash before the first tensor is read; the ranks share this work. The caller
        refreshes its low-precision weights after.

        Args:
            path: the checkpoint's folder.
            fragments: this rank's ranges; values and moments are overwritten.
            ema_values: the averages, aligned with the fragments; overwritten.
            model: the model's part of the config, as plain values.

        Returns:
            The counters.

        Raises:
            DamagedCheckpointError: on all ranks: it is not what was written; an earlier one may be whole.
            UserError: on all ranks: not a complete checkpoint, of another schema or of another model.
        """
        shapes = _gather_shapes(fragments)
        with _reading_on_all_ranks(path):
            state = read_state(path)
            state.check_model(model, str(path))
            hashes = _read_hashes(path)
            contents = {content: _check_file(path, content, state.step, hashes) for content in _CONTENTS}
            for content, (header, _) in contents.items():
                _check_shapes(_tensor_file(path, content), header, shapes)
        with _reading_on_all_ranks(path):
            _verify_share(path, contents, runtime.rank(), runtime.world_size())
        with _reading_on_all_ranks(path):
            _read_ranges(path, fragments, ema_values)
        return state

    def _remove_leftovers(self) -> None:
        """Deletes what is half-written or half-deleted, while nothing is in flight."""
        for path in sorted(self.folder.iterdir()):
            match = _LEFTOVER_NAME.fullmatch(path.name)
            if match is None:
                continue
            original = path.with_name(match[1])
            if match[2] == "replaced" and not original.exists():
                _move(path, original)
            else:
                _remove(path)
        _remove(self.folder / f"{_LATEST_FILE}.partial")

    def _publish(self, partial: Path, final: Path, state_text: str, world_size: int) -> None:
        """Turns a written folder into the checkpoint to resume from; each line leaves something usable."""
        _write_file(partial / _RANGES_FILE, _merge_hashes(partial, world_size))
        for rank in range(world_size):
            os.unlink(_part_file(partial, rank))
        _write_file(partial / _STATE_FILE, state_text.encode())
        _flush_folder(partial)
        replaced = final.with_name(f"{final.name}.replaced")
        if final.exists():
            _remove(replaced)
            os.rename(final, replaced)
        os.rename(partial, final)
        _flush_folder(self.folder)
        moving = self.folder / f"{_LATEST_FILE}.partial"
        _write_file(moving, f"{final.name}\n".encode())
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
            _move(path, path.with_name(f"{path.name}.deleted"))
        self._remove_leftovers()

    def _named_by_latest(self) -> int | None:
        file = self.folder / _LATEST_FILE
        try:
            name = file.read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {_reason(error)}; mend or delete it") from error
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
            if match and not path.is_symlink() and (path / _STATE_FILE).is_file():
                complete[int(match[1])] = path
        return complete


def read_state(path: Path) -> TrainingState:
    """The counters of a complete checkpoint.

    Raises:
        DamagedCheckpointError: its state.json is not what was written.
        UserError: `path` is not the folder of a complete checkpoint, or it is of another schema.
    """
    file = path / _STATE_FILE
    try:
        text = _read_text(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path} is not a complete checkpoint: expected a folder such as checkpoints/step_00000500 "
            f"with {_STATE_FILE} in it; give the path of one"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(f"{file} cannot be read", error, remedy(file)) from error
    return TrainingState.from_json(text, file)


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
    file = _tensor_file(path, which)
    try:
        header, ranges = _check_file(path, which, state.step, _read_hashes(path))
        return read_whole(file, header, ranges)
    except OSError as error:
        raise _unreadable(f"{file} cannot be read", error, remedy(file)) from error


def _read_hashes(path: Path) -> dict[str, Any]:
    file = path / _RANGES_FILE
    try:
        plain = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{file}: expected JSON, got {error}; {remedy(file)}") from error
    if not isinstance(plain, dict) or set(plain) != set(_CONTENTS):
        raise DamagedCheckpointError(
            f"{file}: expected hashes of {', '.join(_CONTENTS)}, got {plain!r:.80}; {remedy(file)}"
        )
    return plain


def _check_file(path: Path, content: str, step: int, hashes: Mapping[str, Any]) -> tuple[Header, list[HashedRange]]:
    """The header of a tensor file and the hashes of all its values; refuses a file of another step."""
    file = _tensor_file(path, content)
    header = read_header(file)
    if header.metadata.get("step") != str(step):
        raise DamagedCheckpointError(
            f"{file}: expected step {step}, got step {header.metadata.get('step')}; {remedy(file)}"
        )
    ranges = hashes_from_plain(hashes[content], path / _RANGES_FILE)
    check_cover(ranges, hashes[content], header, path / _RANGES_FILE)
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
        verify_ranges(_tensor_file(path, content), header, mine)


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


# ---------------------------------------------------------------------------------------------------------------------
# Writing beside training


@dataclass(frozen=True)
class Outcome:
    """How the writing of a checkpoint ended.

    Attributes:
        step: of the checkpoint.
        path: of the complete checkpoint; None where it failed.
        error: what kept it from being written, the same on all ranks; None where it is complete.
    """

    step: int
    path: Path | None
    error: str | None


class _Task(threading.Thread):
    """Work beside training; what stopped it is in `error`."""

    def __init__(self, work: Callable[[], None]) -> None:
        # A process that ends does not wait: what is half-written, the next run removes.
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error


class CheckpointWriter:
    """Writes checkpoints while training goes on: at most one in flight.

    A checkpoint goes through phases in which all ranks stand together: every rank writes its ranges; rank 0 publishes
    and applies retention; where a rank failed, rank 0 removes what was written. `advance` leads from one to the next.

    All ranks construct it together, and after the run has loaded its checkpoint, since it moves and removes what a
    killed run has left. The tensors are those of the fragments and averages at the time of `begin`.

    Raises:
        UserError: on all ranks: the folder of the checkpoints cannot be made.
    """

    def __init__(self, store: CheckpointStore, fragments: Sequence["Fragment"], ema_values: Sequence[Tensor]) -> None:
        self._store = store
        self._shapes = _gather_shapes(fragments)
        self._snapshot = _Snapshot(fragments, ema_values, runtime.rank(), runtime.world_size())
        self._phase: Literal["idle", "writing", "publishing", "removing"] = "idle"
        self._task: _Task | None = None
        self._step, self._state_text = 0, ""
        self._error: str | None = None
        self._prepare_folder()

    def _prepare_folder(self) -> None:
        folder = self._store.folder
        fix = "choose another run.folder or mend this"
        # Each rank makes it: a node may show late what another has made.
        with runtime.together():
            try:
                os.makedirs(folder, exist_ok=True)
                if runtime.rank() == 0:
                    self._store._remove_leftovers()
            except OSError as error:
                raise UserError(f"checkpoint folder {folder} cannot be written: {_reason(error)}; {fix}") from error

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is in flight; equal on all ranks."""
        return self._phase != "idle"

    @property
    def is_working(self) -> bool:
        """Whether this rank's part of the present phase still runs. Ask it before `has_failed`."""
        return self._task is not None and self._task.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the present phase ended with an error."""
        return self._task is not None and not self._task.is_alive() and self._task.error is not None

    @property
    def _final(self) -> Path:
        return self._store.folder / f"step_{self._step:08d}"

    @property
    def _partial(self) -> Path:
        return self._store.folder / f"{self._final.name}.partial"

    def begin(self, state: TrainingState) -> None:
        """Copies what this rank writes and begins to write it. All ranks call it at the same step; nobody waits.

        Args:
            state: the counters; `state.step` names the folder. Rank 0's are written.
        """
        assert not self.is_busy, "one checkpoint at a time: wait for the one in flight"
        self._step, self._state_text, self._error = state.step, state.to_json(), None
        self._snapshot.take()
        self._enter("writing", self._write, all_ranks=True)

    def advance(self, any_working: bool, any_failed: bool) -> Outcome | None:
        """Leads to the next phase once no rank works on the present one. All ranks call it with the same arguments.

        It does not wait for other ranks, but where one failed: then they tell each other why.

        Args:
            any_working: whether `is_working` was true on any rank.
            any_failed: whether `has_failed` was true on any rank.

        Returns:
            What became of the checkpoint, once, when it is no longer in flight; else None.
        """
        if not self.is_busy or any_working:
            return None
        reason = self._gather_reason() if any_failed else None
        if reason is not None and self._phase != "removing":
            self._error = (
                f"checkpoint {self._final} cannot be written: {reason}; earlier checkpoints are untouched; "
                "free some space there or choose another run.folder that all nodes share"
            )
            self._enter("removing", lambda: _remove(self._partial))
            return None
        if self._phase == "writing":
            self._enter("publishing", self._publish)
            return None
        self._phase, self._task = "idle", None
        return Outcome(self._step, None if self._error else self._final, self._error)

    def wait(self) -> Outcome | None:
        """Waits until nothing is in flight. All ranks call it together.

        Returns:
            What became of the checkpoint in flight; None where there was none.
        """
        outcome = None
        while self.is_busy and outcome is None:
            if self._task is not None:
                self._task.join(_POLL_SECONDS)
            else:
                time.sleep(_POLL_SECONDS)
            runtime.tick()
            flags = torch.tensor([self.is_working, self.has_failed], dtype=torch.int64)
            num_working, num_failed = runtime.sum_over_ranks(flags).tolist()
            outcome = self.advance(num_working > 0, num_failed > 0)
        return outcome

    def _enter(
        self, phase: Literal["writing", "publishing", "removing"], work: Callable[[], None], all_ranks: bool = False
    ) -> None:
        self._phase = phase
        self._task = _Task(work) if all_ranks or runtime.rank() == 0 else None

    def _write(self) -> None:
        _write_share(self._partial, self._shapes, self._step, self._snapshot, runtime.rank())

    def _publish(self) -> None:
        self._store._publish(self._partial, self._final, self._state_text, runtime.world_size())
        self._store._delete_old(self._step)

    def _gather_reason(self) -> str:
        """Why the first rank that failed did so; an error that is no one's but ours is raised on its rank."""
        error = self._task.error if self._task is not None else None
        reasons = runtime.gather(None if error is None else _reason(error) or repr(error))
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
        first: str = next(reason for reason in reasons if reason is not None)
        return first

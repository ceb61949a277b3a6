"""Checkpoints written while training goes on: each rank copies what it writes, and threads do the rest.

In the partial folder each rank leaves the hashes of its ranges (`ranges_00003.json`), from which rank 0 makes
`ranges.json` at the end. Each rank makes what is missing there, so none waits for another before it writes.
"""

import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.background import Task
from cfpretrain.base.console import UserError, reason_of
from cfpretrain.base.files import read_json
from cfpretrain.run.checkpoint import (
    CONTENTS,
    RANGES_FILE,
    CheckpointStore,
    gather_shapes,
    remove,
    tensor_file,
    tensors_by_content,
    written_range,
)
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import (
    VALUE_BYTES,
    DamagedCheckpointError,
    Fragment,
    bytes_of,
    check_cover,
    hashes_from_plain,
    hashes_to_plain,
    make_header,
    read_header,
    write_ranges,
)

_MAX_PART_WAIT_SECONDS = 60.0  # for a network file system to show what another node has written
_POLL_SECONDS = 0.01


# ---------------------------------------------------------------------------------------------------------------------
# One rank's part


class _Snapshot:
    """What one rank writes, copied to host memory: the one extra copy of its shard."""

    def __init__(self, fragments: Sequence[Fragment], ema_values: Sequence[Tensor], rank: int, world_size: int) -> None:
        bounds = [written_range(fragment, rank, world_size) for fragment in fragments]
        self._names = [fragment.name for fragment in fragments]
        self._firsts = [f.offset + begin for f, (begin, _) in zip(fragments, bounds, strict=True)]
        self._sources = {
            content: [values.detach()[begin:end] for values, (begin, end) in zip(tensors, bounds, strict=True)]
            for content, tensors in tensors_by_content(fragments, ema_values).items()
        }
        sizes = [end - begin for begin, end in bounds]
        self._buffers = {content: _host_buffer(sum(sizes)) for content in CONTENTS}
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
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), VALUE_BYTES * num_values, 0))
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr())
    return buffer


def _write_share(
    partial: Path,
    shapes: Mapping[str, tuple[int, ...]],
    step: int,
    snapshot: _Snapshot,
    rank: int,
    on_progress: Callable[[], None],
) -> None:
    """Writes one rank's ranges and their hashes down to the disk; rank 0 writes headers and sizes too."""
    files.make_folder(partial, parents=False)  # a run folder that is gone is not made again
    hashes = {}
    for content in CONTENTS:
        first_bytes, header = make_header(shapes, content, step)
        with files.opened(tensor_file(partial, content), os.O_WRONLY | os.O_CREAT) as descriptor:
            if rank == 0:
                os.ftruncate(descriptor, header.num_bytes)
                files.write_fully(descriptor, first_bytes, 0)
            written = write_ranges(descriptor, header, snapshot.ranges(content), on_progress)
            hashes[content] = hashes_to_plain(written, shapes)
            os.fsync(descriptor)
        on_progress()
    files.replace(_part_file(partial, rank), json.dumps(hashes))


def _merge_hashes(partial: Path, world_size: int) -> bytes:
    """The hashes of all ranks as the text of `ranges.json`, once every value of every file has one."""
    deadline = time.monotonic() + _MAX_PART_WAIT_SECONDS
    parts = []
    for rank in range(world_size):
        # Our own part is visible at once, or the folder has vanished.
        parts.append(_read_part(_part_file(partial, rank), deadline if rank else 0.0))
    merged = {}
    for content in CONTENTS:
        file = tensor_file(partial, content)
        header = read_header(file)
        ranges = [place for part in parts for place in hashes_from_plain(part.get(content), file)]
        check_cover(ranges, header.shapes, header, file)
        merged[content] = hashes_to_plain(ranges, header.shapes)
    return json.dumps(merged, separators=(",", ":")).encode()


def _join_parts(partial: Path, world_size: int) -> None:
    """Makes `ranges.json` of what the ranks left."""
    files.replace(partial / RANGES_FILE, _merge_hashes(partial, world_size))
    for rank in range(world_size):
        files.remove(_part_file(partial, rank))


def _read_part(file: Path, deadline: float) -> dict[str, Any]:
    """What a rank left; network file systems may show it late, or half of it."""
    while True:
        try:
            plain: dict[str, Any] = read_json(file, follow=False)
            return plain
        except FileNotFoundError:
            if time.monotonic() >= deadline:
                raise
        except ValueError as error:
            if time.monotonic() >= deadline:
                raise DamagedCheckpointError(f"{file}: expected JSON, got {error}") from error
        time.sleep(_POLL_SECONDS)


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"ranges_{rank:05d}.json"


# ---------------------------------------------------------------------------------------------------------------------
# All ranks together


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


class CheckpointWriter:
    """Writes checkpoints while training goes on: at most one in flight.

    A checkpoint goes through phases in which all ranks stand together: every rank writes its ranges; rank 0 publishes
    and applies retention; where a rank failed, rank 0 removes what was written. `advance` leads from one to the next.

    All ranks construct it together, and after the run has loaded its checkpoint, since it moves and removes what a
    killed run has left. The tensors are those of the fragments and averages at the time of `begin`.

    Raises:
        UserError: on all ranks: the folder of the checkpoints cannot be made.
    """

    def __init__(self, store: CheckpointStore, fragments: Sequence[Fragment], ema_values: Sequence[Tensor]) -> None:
        self._store = store
        self._shapes = gather_shapes(fragments)
        self._snapshot = _Snapshot(fragments, ema_values, runtime.rank(), runtime.world_size())
        self._phase: Literal["idle", "writing", "publishing", "removing"] = "idle"
        self._task: Task | None = None
        self._step, self._state_text = 0, ""
        self._error: str | None = None
        self._progress = 0  # whatever moves on this rank: a chunk, a file, a phase
        self._prepare_folder()

    def _prepare_folder(self) -> None:
        folder = self._store.folder
        fix = "choose another run.folder or mend this"
        # Each rank makes it: a node may show late what another has made.
        with runtime.together():
            try:
                files.make_folder(folder)
                if runtime.rank() == 0:
                    self._store.remove_leftovers()
            except OSError as error:
                raise UserError(f"checkpoint folder {folder} cannot be written: {reason_of(error)}; {fix}") from error

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
        if self.is_busy:
            raise RuntimeError("one checkpoint at a time: wait for the one in flight")
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
            self._enter("removing", lambda: remove(self._partial))
            return None
        if self._phase == "writing":
            self._enter("publishing", self._publish)
            return None
        self._phase, self._task = "idle", None
        return Outcome(self._step, None if self._error else self._final, self._error)

    def wait(self) -> Outcome | None:
        """Waits until nothing is in flight. All ranks call it together.

        As long as a rank gets on, all tick (`runtime.tick`): who watches over the ranks takes a slow write for a slow
        write and a hung one for a hung one.

        Returns:
            What became of the checkpoint in flight; None where there was none.
        """
        outcome, progress = None, self._progress
        while self.is_busy and outcome is None:
            if self._task is not None:
                self._task.join(_POLL_SECONDS)
            else:
                time.sleep(_POLL_SECONDS)
            progress, before = self._progress, progress
            flags = torch.tensor([self.is_working, self.has_failed, progress != before], dtype=torch.int64)
            is_working, has_failed, has_moved = (runtime.sum_over_ranks(flags) > 0).tolist()
            if has_moved:  # anywhere: a rank that ticks less than the others counts as late
                runtime.tick()
            outcome = self.advance(is_working, has_failed)
        return outcome

    def _enter(
        self, phase: Literal["writing", "publishing", "removing"], work: Callable[[], None], all_ranks: bool = False
    ) -> None:
        self._phase = phase
        self._note_progress()
        # Where a process ends, what is half-written is removed by the next run.
        self._task = Task(work, "checkpoint") if all_ranks or runtime.rank() == 0 else None

    def _note_progress(self) -> None:
        self._progress += 1

    def _write(self) -> None:
        rank = runtime.rank()
        _write_share(self._partial, self._shapes, self._step, self._snapshot, rank, self._note_progress)

    def _publish(self) -> None:
        _join_parts(self._partial, runtime.world_size())
        self._store.publish(self._partial, self._final, self._state_text)
        self._store.apply_retention(self._step)

    def _gather_reason(self) -> str:
        """Why the first rank that failed did so; an error that is no one's but ours is raised on its rank."""
        error = self._task.error if self._task is not None else None
        reasons = runtime.gather(None if error is None else reason_of(error) or repr(error))
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
        first: str = next(reason for reason in reasons if reason is not None)
        return first


def save(
    store: CheckpointStore, state: TrainingState, fragments: Sequence[Fragment], ema_values: Sequence[Tensor]
) -> Path:
    """Writes one checkpoint and waits for it; a run in training keeps a `CheckpointWriter` instead.

    Args:
        store: where.
        state: the counters; `state.step` names the folder. Rank 0's are written.
        fragments: this rank's ranges of the parameters; over all ranks they cover each parameter once.
        ema_values: the averages, 1-D fp32, aligned with the fragments.

    Returns:
        The folder of the complete checkpoint.

    Raises:
        UserError: on all ranks, when one of them cannot write; the earlier checkpoints stay as they were.
    """
    writer = CheckpointWriter(store, fragments, ema_values)
    writer.begin(state)
    outcome = writer.wait()
    assert outcome is not None
    if outcome.path is None:
        raise UserError(outcome.error)
    return outcome.path

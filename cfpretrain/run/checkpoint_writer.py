"""Checkpoints written while training goes on: each rank copies what it writes, and threads do the rest.

Each rank makes missing files in the partial folder, so none waits for another before it writes. The hashes of what it
wrote travel between the ranks, not over the disk: a network file system may show late what another node has written.
"""

import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.background import Task
from cfpretrain.base.console import UserError, explaining, reason_of
from cfpretrain.run.checkpoint import gather_shapes, held_tensors, tensor_file
from cfpretrain.run.checkpoint_store import CheckpointStore, remove
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import VALUE_BYTES, Fragment, PlainHashes, Shapes, bytes_of, write_ranges

_POLL_SECONDS = 0.01


def _host_buffer(num_values: int) -> Tensor:
    """Host memory of just this size, pinned where there is a GPU."""
    # Touched at once: where memory is short the run ends before it has trained, and the first copy is no slower.
    buffer = torch.empty(num_values, dtype=torch.float32).zero_()
    if num_values and torch.cuda.is_available():
        # Memory that torch pins comes in powers of two: up to twice the size asked for.
        cudart: Any = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(buffer.data_ptr(), VALUE_BYTES * num_values, 0))
        weakref.finalize(buffer, cudart.cudaHostUnregister, buffer.data_ptr())
    return buffer


class RankPart:
    """What one rank writes of the checkpoints of a run, and its copy in host memory: the one extra copy of its shard.

    Args:
        fragments: this rank's.
        ema_values: the averages, aligned with the fragments.
        shapes: of all ranks together, by content.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        ema_values: Sequence[Tensor],
        shapes: Mapping[str, Shapes],
        rank: int,
        world_size: int,
    ) -> None:
        self._shapes, self._rank = shapes, rank
        # By content: name and first flat value of each range, its values in the engine, and their copy.
        self._ranges: dict[str, list[tuple[str, int, Tensor, Tensor]]] = {}
        self._buffers: list[Tensor] = []  # pinned as long as they are here
        for content in shapes:
            ranges = []
            for fragment, values in held_tensors(content, fragments, ema_values):
                begin, end = 0, fragment.values.numel()
                if fragment.replicated:  # an equal share of what every rank holds
                    begin, end = end * rank // world_size, end * (rank + 1) // world_size
                ranges.append((fragment.name, fragment.offset + begin, values.detach()[begin:end]))
            sizes = [source.numel() for *_, source in ranges]
            self._buffers.append(_host_buffer(sum(sizes)))
            copies = torch.split(self._buffers[-1], sizes)
            self._ranges[content] = [(*one, copy) for one, copy in zip(ranges, copies, strict=True)]

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present values; training may go on after."""
        for ranges in self._ranges.values():
            for _, _, source, copy in ranges:
                copy.copy_(source, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def write(self, partial: Path, step: int, on_progress: Callable[[], None]) -> dict[str, PlainHashes]:
        """Writes what was taken into a folder, down to the disk; returns the hashes by content."""
        files.make_folder(partial, parents=False)  # a run folder that is gone is not made again
        hashes = {}
        for content, ranges in self._ranges.items():
            data = ((name, first, bytes_of(copy)) for name, first, _, copy in ranges)
            hashes[content] = write_ranges(
                tensor_file(partial, content), self._shapes[content], step, data, self._rank == 0, on_progress
            )
        return hashes


@dataclass(frozen=True)
class Outcome:
    """How the writing of a checkpoint ended."""

    step: int
    path: Path | None  # of the complete checkpoint; None where it failed
    error: str | None  # what kept it from being written, the same on all ranks; None where it is complete


class CheckpointWriter:
    """Writes checkpoints while training goes on: at most one in flight.

    A checkpoint goes through phases in which all ranks stand together: every rank writes its ranges; rank 0 publishes
    and applies retention; where a rank failed, rank 0 removes what was written. `advance` leads from one to the next.

    All ranks construct it together, and after the run has loaded its checkpoint, since it moves and removes what a
    killed run has left. The tensors are those of the fragments and averages at the time of `begin`.
    """

    def __init__(self, store: CheckpointStore, fragments: Sequence[Fragment], ema_values: Sequence[Tensor]) -> None:
        self._store = store
        self._part = RankPart(fragments, ema_values, gather_shapes(fragments), runtime.rank(), runtime.world_size())
        self._phase: Literal["idle", "writing", "publishing", "removing"] = "idle"
        self._task: Task | None = None
        self._step, self._state_text, self._hashes_text = 0, "", ""
        self._error: str | None = None
        self._progress = 0  # whatever moves on this rank: a chunk, a file, a phase
        # Each rank makes the folder: a node may show late what another has made.
        unwritable = (
            f"checkpoint folder {store.folder} cannot be written: {{reason}}; choose another run.folder or fix this"
        )
        with runtime.together(), explaining(unwritable):
            files.make_folder(store.folder)
            if runtime.rank() == 0:
                store.remove_leftovers()

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

    def begin(self, state: TrainingState) -> None:
        """Copies what this rank writes and begins to write it. All ranks call it at the same step; none waits.

        `state.step` names the folder; rank 0's state is written.
        """
        if self.is_busy:
            raise RuntimeError("one checkpoint at a time: wait for the one in flight")
        self._step, self._state_text, self._error = state.step, state.to_json(), None
        self._part.take()
        self._enter("writing", self._write, all_ranks=True)

    def advance(self, any_working: bool, any_failed: bool) -> Outcome | None:
        """Leads to the next phase once no rank works on the present one. All ranks call it with the same arguments.

        It waits for other ranks only to exchange hashes, or the reason where one failed.

        Args:
            any_working: whether `is_working` was true on any rank.
            any_failed: whether `has_failed` was true on any rank.

        Returns:
            What became of the checkpoint, once, when it is no longer in flight; else None.
        """
        if not self.is_busy or any_working:
            return None
        reason = self._gather_reason() if any_failed else None
        final, partial = self._store.path(self._step), self._store.path(self._step, ".partial")
        if reason is not None and self._phase != "removing":
            self._error = (
                f"checkpoint {final} cannot be written: {reason}; earlier checkpoints are untouched; "
                "free some space there or choose another run.folder that all nodes share"
            )
            self._enter("removing", lambda: remove(partial))
            return None
        if self._phase == "writing":
            texts = runtime.gather(self._hashes_text)
            self._enter("publishing", lambda: self._publish(texts))
            return None
        self._phase, self._task = "idle", None
        return Outcome(self._step, None if self._error else final, self._error)

    def wait(self) -> Outcome | None:
        """Waits until nothing is in flight, and says what became of it, as `advance`. All ranks call it together.

        As long as a rank makes progress, all tick (`runtime.tick`), so that the watchdog does not take a slow write
        for a hung one.
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
        # Where a process ends, the next run removes the half-written checkpoint.
        self._task = Task(work, "checkpoint") if all_ranks or runtime.rank() == 0 else None

    def _note_progress(self) -> None:
        self._progress += 1

    def _write(self) -> None:
        partial = self._store.path(self._step, ".partial")
        self._hashes_text = json.dumps(self._part.write(partial, self._step, self._note_progress))

    def _publish(self, hashes_texts: Sequence[str]) -> None:
        self._store.publish(self._step, [json.loads(text) for text in hashes_texts], self._state_text)
        self._store.apply_retention(self._step)

    def _gather_reason(self) -> str:
        """Why the first rank that failed did so; an error that is no one's but ours is raised on its rank."""
        error = self._task.error if self._task is not None else None
        reasons = runtime.gather(None if error is None else reason_of(error) or repr(error))
        if error is not None and not isinstance(error, OSError | UserError):
            raise error
        first: str = next(reason for reason in reasons if reason is not None)
        return first

"""Numbers a person will plot: one JSON line a step, windows summed over ranks, and FLOPs."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import files, runtime
from cfpretrain.base.config import ModelConfig
from cfpretrain.base.console import UserError, say
from cfpretrain.base.files import open_to_read, parse_json

_MAX_BYTES, _MAX_LINE_BYTES = 2**32, 2**24  # of a metrics file
# Dense bf16 rate of one GPU, in FLOP/s, by a part of its name (the makers' data sheets, without sparsity).
_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


# ---------------------------------------------------------------------------
# FLOPs


def training_flops(model: ModelConfig, num_sequences: int, num_tokens: int, num_visible: int) -> float:
    """FLOPs of forward and backward over some sequences; of attention, visible pairs alone count.

    Embeddings of classes and timesteps, norms and pointwise operations are left out (under 1 %).

    Args:
        model: sizes.
        num_sequences: sequences, one image each.
        num_tokens: their tokens, all together.
        num_visible: visible pairs of query and key, all together.
    """
    D, L = model.width, model.num_tokens
    blocks = model.depth * (24 * D**2 * num_tokens + 4 * D * num_visible)
    image_tokens = num_tokens - model.num_cond_tokens * num_sequences
    ends = 2 * model.patch_values * D * (image_tokens + L * num_sequences)
    return 3.0 * (blocks + ends)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense bf16 rate in FLOP/s; None where it is not known to us."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def peak_memory_gb(device: torch.device) -> tuple[float, ...]:
    """The most memory of this process, in 1e9 bytes; it waits for no device.

    Returns:
        On a GPU, what tensors held there since the last call, and what torch had reserved for them: where the second is
        near the GPU's memory and the first is not, memory is fragmented. On a CPU, what the process has ever held.
    """
    if device.type != "cuda":
        return (runtime.peak_rss_mb() / 1e3,)
    found = torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return found


# ---------------------------------------------------------------------------
# Steps and windows


@dataclass
class StepRecord:
    """One step.

    Attributes:
        row: values that are equal on all ranks: step, loss, learning_rate, grad_norm, ...
        flops: the step's FLOPs over all ranks.
        sample_ids: of this rank; None where they are not logged.
    """

    row: dict[str, Any]
    flops: float
    sample_ids: list[int] | None = None


@dataclass
class Window:
    """The steps since the last line."""

    records: list[StepRecord] = field(default_factory=list)

    def close(self, seconds: Sequence[float]) -> tuple[list[dict[str, Any]], float, list[float]]:
        """Empties the window; all ranks call it.

        Returns:
            The rows, the window's FLOPs over all ranks, and rank 0's `seconds`.
        """
        # Rank 0's clock decides for all, so that all ranks stop at the same step.
        clocks = [s if runtime.rank() == 0 else 0.0 for s in seconds]
        agreed = runtime.sum_over_ranks(torch.tensor(clocks, dtype=torch.float64)).tolist()
        self._gather_sample_ids()
        rows, flops = [r.row for r in self.records], sum(r.flops for r in self.records)
        self.records = []
        return rows, flops, agreed

    def _gather_sample_ids(self) -> None:
        if not any(record.sample_ids for record in self.records):
            return
        of_ranks = runtime.gather([record.sample_ids for record in self.records])
        for record, parts in zip(self.records, zip(*of_ranks, strict=True), strict=True):
            record.row["sample_ids"] = sorted(i for part in parts for i in part)


def finite_or_none(value: float) -> float | None:
    """What JSON, which has no NaN, can hold of a number."""
    return value if math.isfinite(value) else None


class MetricsFile:
    """`metrics.jsonl`: a row for each step and one for each score, by rank 0. A disk that is full does not end the run.

    All ranks construct it together.

    Args:
        path: the file.
        resume_step: rows after this step are of work that a kill lost; they are dropped.

    Raises:
        UserError: on all ranks: the file cannot be written at all.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._num_bytes = 0  # of the rows on disk
        self._pending: list[str] = []
        with runtime.together():
            if runtime.rank() == 0:
                try:
                    self._begin(resume_step)
                except OSError as error:
                    raise UserError(
                        f"{path} cannot be written: {error.strerror or error}; free some space there or choose "
                        "another run.folder"
                    ) from error

    def _begin(self, resume_step: int) -> None:
        path = self._path
        kept: list[dict[str, Any]] = []
        if path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= resume_step]
            if _read_rows(path)[1]:
                files.move(path, path.with_name(f"{path.name}.damaged"))
        data = "".join(map(_to_line, kept)).encode()
        files.replace(path, data)
        self._num_bytes = len(data)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, on disk on return; where they cannot be written they wait in memory for the next call.

        Args:
            rows: none tries again to write those that wait.
        """
        if runtime.rank() != 0:
            return
        num_waiting = len(self._pending)
        self._pending += map(_to_line, rows)
        if not self._pending:
            return
        try:
            self._write("".join(self._pending).encode())
        except OSError as error:
            if not num_waiting:
                reason = error.strerror or error
                say(f"WARNING: {self._path} cannot be written now: {reason}; its rows are kept in memory until it can")
            return
        if num_waiting:
            say(f"{self._path} can be written again: {num_waiting} rows that waited are on disk")
        self._pending = []

    def _write(self, data: bytes) -> None:
        if os.lstat(self._path).st_nlink > 1:  # a copy of the run by hard links keeps what it has
            files.replace(self._path, files.read_bytes(self._path, _MAX_BYTES, follow=False)[: self._num_bytes])
        with files.opened(self._path, os.O_WRONLY) as descriptor:
            try:
                # What an earlier attempt wrote in part goes first.
                os.ftruncate(descriptor, self._num_bytes)
                files.write_fully(descriptor, data, self._num_bytes)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, self._num_bytes)
                raise
        self._num_bytes += len(data)


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """A row for each step of a metrics file, with the scores at that step, which the file has on lines of their own.

    A last line that a kill cut short is left out; damaged ones are too, and are said.
    """
    rows, num_damaged = _read_rows(path)
    if num_damaged:
        say(f"WARNING: {path}: {num_damaged} damaged lines are left out")
    by_step: dict[int, dict[str, Any]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).update(row)
    return list(by_step.values())


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many lines before the last are none."""
    try:
        with open_to_read(path, _MAX_BYTES) as file:
            found = [_to_row(line) for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b"")]
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); restore or remove it") from error
    return [row for row in found if row is not None], sum(row is None for row in found[:-1])


def _to_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:  # not UTF-8, or not JSON
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None

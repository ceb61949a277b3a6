"""Numbers a person will plot: one JSON line a step, FLOPs, memory."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import files, runtime
from cfpretrain.base.config import ModelConfig
from cfpretrain.base.console import explaining, say
from cfpretrain.base.files import open_to_read, parse_json
from cfpretrain.core.work import Work

_MAX_BYTES, _MAX_LINE_BYTES = 2**32, 2**24  # of a metrics file
# Dense bf16 rate of one GPU, in FLOP/s, by a part of its name (the makers' data sheets, without sparsity).
_PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}


# ---------------------------------------------------------------------------
# FLOPs


def training_flops(model: ModelConfig, work: Work, frozen: Collection[str] = ()) -> float:
    """FLOPs of forward and backward; of attention, visible pairs alone count.

    Of a matrix product, the backward makes two more, and one where the matrix is frozen (`train.freeze`). Embeddings of
    classes and timesteps, norms, rotations and pointwise operations are left out (under 1 %). `work`
    holds the tokens and visible pairs of the sequences, counted by their layouts.
    """
    design, of_texts = model.design, 3.0 - ("text" in frozen)
    num_frozen = work.text_tokens if design.separate_image_weights else work.tokens
    num_products = 3.0 * work.tokens - num_frozen * ("trunk" in frozen)
    blocks = 2 * design.matrix_values * num_products + 3 * 4 * design.attended_width * work.visible
    ends = 3 * model.patch_values * work.projections["image"] + of_texts * model.vocabulary * work.projections["text"]
    return model.depth * blocks + 2 * model.width * ends


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense bf16 rate in FLOP/s; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def peak_memory_gb(device: torch.device) -> tuple[float, ...]:
    """The most memory of this process, in 1e9 bytes; it waits for no device.

    On a GPU two numbers: held by tensors since the last call, and reserved by torch for them. Where the second is near
    the GPU's memory and the first is not, memory is fragmented. On a CPU, what the process has ever held.
    """
    if device.type != "cuda":
        return (runtime.peak_rss_mb() / 1e3,)
    found = torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return found


def finite_or_none(value: float) -> float | None:
    """The number; None in place of one that JSON cannot hold."""
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------
# The file


class MetricsFile:
    """`metrics.jsonl`: a row for each step and one for each score, by rank 0. A full disk does not end the run.

    All ranks construct it together; UserError on all where it cannot be written at all. Rows after `resume_step` are of
    work that a kill has lost, and dropped.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._num_bytes = 0  # of the rows on disk
        self._pending: list[str] = []
        fix = "free some space there or choose another run.folder"
        with runtime.together(), explaining(f"{path} cannot be written: {{reason}}; {fix}"):
            if runtime.rank() == 0:
                self._begin(resume_step)

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
        """Adds rows, on disk on return; where they cannot be written they wait in memory for the next call."""
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

    A last line that a kill cut short is left out; damaged lines are left out with a warning.
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
    with (
        explaining(f"{path} cannot be read ({{reason}}); restore or remove it"),
        open_to_read(path, _MAX_BYTES) as file,
    ):
        found = [_to_row(line) for line in iter(lambda: file.readline(_MAX_LINE_BYTES), b"")]
    return [row for row in found if row is not None], sum(row is None for row in found[:-1])


def _to_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:  # not UTF-8, or not JSON
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None

"""The rows of a run: a row a step and a row a score, to metrics.jsonl, to wandb and to the person in front of it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import Progress, count, say
from cfpretrain.run.metrics import MetricsFile, finite_or_none, peak_flops, peak_memory_gb
from cfpretrain.run.tracker import Tracker
from cfpretrain.training.step import Counters, StepResult

_LONG_WAIT_SHARE = 0.05  # of a step's time: the loader is worth a look


@dataclass
class Log:
    """Collects the rows of steps, and writes them together with their speed: a window."""

    config: Config
    device: torch.device
    metrics: MetricsFile
    tracker: Tracker

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []  # of the window, equal on all ranks
        self._sample_ids: list[list[int]] = []  # of this rank, for each row
        self._flops = 0.0
        self._begin, self._aside = time.perf_counter(), 0.0
        self._waited_before = 0.0
        self._progress: Progress | None = None

    def start_clock(self) -> None:
        """Begins the time of the first window."""
        self._begin, self._aside = time.perf_counter(), 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work (a checkpoint, samples, a score) that is not part of the steps' time."""
        begin = time.perf_counter()
        yield
        self._aside += time.perf_counter() - begin

    def add(self, at: Counters, result: StepResult, epoch: int) -> dict[str, Any]:
        """Adds a step; returns its row."""
        row: dict[str, Any] = {
            "step": at.step,
            "loss": finite_or_none(result.loss),
            "grad_norm": finite_or_none(result.grad_norm),
            "learning_rate": result.learning_rate,
            "epoch": epoch,
            "num_ranks": runtime.world_size(),
            "zero_stage": self.config.engine.zero_stage,
        }
        if len(result.by_kind) > 1:
            for kind, (loss, num_values) in result.by_kind.items():
                row |= {f"loss_{kind}": finite_or_none(loss), f"num_{kind}_values": num_values}
        if result.problem is not None:
            row["skipped"] = result.problem
            say(f"step {at.step} is skipped: {result.problem}")
        if result.bad_images:
            row["bad_images"] = result.bad_images
            say(f"step {at.step}: {count(len(result.bad_images), 'image')} skipped: {result.bad_images[0]}")
        row |= {"num_skipped_steps": at.num_skipped, "num_rewinds": at.num_rewinds}
        self.rows.append(row)
        self._flops += result.flops
        if result.sample_ids is not None:
            self._sample_ids.append(result.sample_ids)
        return row

    def is_due(self, step: int) -> bool:
        """Whether a window ends with this step."""
        # A checkpoint's metrics are on disk before it, so that a resume finds all rows up to its step; and wandb takes
        # no row once it has a picture of a later step.
        config = self.config
        events = (config.checkpoint, config.sample, config.evaluation)
        every = [config.metrics.log_every_steps, config.train.num_steps, *(event.every_steps for event in events)]
        return any(n and step % n == 0 for n in every)

    def close_window(self, at: Counters, waited_seconds: float) -> None:
        """Sums the window over ranks, adds its time to the run's, and writes and shows it; all ranks call it.

        `waited_seconds` is how long this rank has waited for data since it was started.
        """
        now = time.perf_counter()
        clock = now - self._begin - self._aside, self._aside
        costs = waited_seconds - self._waited_before, *peak_memory_gb(self.device)
        clocks, all_costs, all_ids = zip(*runtime.gather((clock, costs, self._sample_ids)), strict=True)
        # Rank 0's clock decides for all, so that all ranks stop at the same step. One slow rank keeps all waiting, and
        # one without memory ends all.
        seconds, seconds_aside = clocks[0]
        waited, *peaks = map(max, zip(*all_costs, strict=True))
        at.train_seconds += seconds + seconds_aside
        for row, parts in zip(self.rows, zip(*all_ids, strict=True), strict=False):
            row["sample_ids"] = sorted(i for part in parts for i in part)
        peak = peak_flops(self.device, self.config.engine.precision)
        rows, flops_per_second = self.rows, self._flops / seconds
        rows[-1] |= {
            "images_per_second": len(rows) * self.config.train.global_batch_size / seconds,
            "tflops_per_second": flops_per_second / 1e12,
            "mfu": flops_per_second / (peak * runtime.world_size()) if peak else None,
            "data_wait_share": waited / seconds,
            **dict(zip(("peak_memory_gb", "peak_reserved_gb"), peaks, strict=False)),
            "train_seconds": at.train_seconds,
        }
        self.rows, self._sample_ids, self._flops = [], [], 0.0
        self._begin, self._aside, self._waited_before = now, 0.0, waited_seconds
        self.write(rows)
        self._show(at, rows[-1], seconds / len(rows))

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Writes rows at once; none: those that a full disk has kept waiting."""
        self.metrics.append(rows)
        for row in rows:
            self.tracker.log(row)

    def _show(self, at: Counters, row: dict[str, Any], step_seconds: float) -> None:
        train = self.config.train
        seconds_left = (train.num_steps - at.step) * step_seconds
        if train.max_train_seconds:
            seconds_left = min(seconds_left, max(0.0, train.max_train_seconds - at.train_seconds))
        text = f"{describe_loss(row)}  {row['images_per_second']:.0f} images/s  {row['peak_memory_gb']:.1f} GB"
        if at.num_skipped:
            text += f"  skipped {at.num_skipped}"
        if row["data_wait_share"] > _LONG_WAIT_SHARE:
            # Without workers, what takes the time is making the batches.
            doing = "waiting for data" if self.config.data.num_workers else "making batches"
            text += f"  {row['data_wait_share']:.0%} {doing}"
        self._progress = self._progress or Progress(train.num_steps, at.step)
        self._progress.show(at.step, text, seconds_left)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._progress is not None:
            self._progress.close()


def describe_loss(row: Mapping[str, Any]) -> str:
    """The loss of a step, and that of each kind of token where there are several."""

    def shown(value: float | None, num_values: int = 1) -> str:
        if num_values == 0:
            return "none"
        return "not finite" if value is None else f"{value:.4f}"

    kinds = [key.removeprefix("loss_") for key in row if key.startswith("loss_")]
    by_kind = [f"{kind} {shown(row[f'loss_{kind}'], row[f'num_{kind}_values'])}" for kind in kinds]
    return f"loss {shown(row['loss'])}" + (f" ({', '.join(by_kind)})" if by_kind else "")

"""What kills cost a run: its samples, losses, tensors and seconds beside those of a run left alone."""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.compare_runs import Row, loss_errors

# Summation order alone changes losses by as much within the first steps, in fp32.
_RELATIVE_ERROR = 1e-5


class CampaignError(Exception):
    """The run did something that ends the campaign."""


@dataclass
class Attempt:
    """One start of the command, to its end; times are of `time.monotonic`."""

    num_ranks: int
    began: float
    built: float | None = None  # the model is there and its weights are about to be filled; the loader comes next
    trained: float | None = None  # it entered the loop, at step `from_step`
    from_step: int | None = None
    first_step: float | None = None  # the first new row of metrics was on disk
    last_row: float | None = None
    last_step: int = 0
    killed: float | None = None
    kill: tuple[str, str] | None = None  # moment, target
    ended: float = math.nan
    code: int | None = None
    sampling_seconds: list[float] = field(default_factory=list)


def report(out: Path, attempts: list[Attempt], planned: int, controls: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The last line, and whether all is well.

    Args:
        out: holds the runs `killed`, `alone` and those named in `controls`.
        attempts: of the run `killed`.
        planned: kills.
        controls: runs left alone on other numbers of ranks; with none, all must be equal bit for bit.
    """
    from cfpretrain.base import config

    batch_size = config.load(out / "alone" / "config.yaml").train.global_batch_size
    rows, left_alone = read_rows(out / "killed"), read_rows(out / "alone")
    lost, doubled = account_samples(rows, left_alone)
    errors = loss_errors(rows, left_alone)
    tensors = equal_tensors(out / "killed", out / "alone")
    loss_equal = numbers(rows) == numbers(left_alone)
    seconds = attempts[-1].ended - attempts[0].began
    where = account_time(attempts, rows, batch_size)
    kills = [attempt.kill for attempt in attempts if attempt.kill is not None]
    restarts = [a.first_step - a.began for a in attempts[1:] if a.from_step and a.first_step]
    found: dict[str, Any] = {
        "kills": len(kills),
        "restarts": len(attempts) - 1,
        "lost": lost,
        "doubled": doubled,
        "loss_equal": loss_equal,
        "weights_equal": tensors["weights"],
        "ema_equal": tensors["ema"],
        "moments_equal": all(equal for content, equal in tensors.items() if content not in ("weights", "ema")),
        "max_relative_loss_error": max(errors, default=math.inf),
        "seconds": round(seconds, 1),
        "goodput": round(where["steps"] / seconds, 4),
        "where": {name: round(value, 1) for name, value in where.items()},
        "restart_seconds": round(statistics.median(restarts), 1) if restarts else None,
        "restart_seconds_max": round(max(restarts), 1) if restarts else None,
        "unplanned_ends": len(attempts) - 1 - len(kills),
        "moments": dict(Counter(moment for moment, _ in kills)),
        "targets": dict(Counter(target for _, target in kills)),
        "num_steps": len(rows),
    }
    steps_right = [row["step"] for row in rows] == [row["step"] for row in left_alone]
    good = lost == doubled == 0 and steps_right and len(kills) == planned
    if not controls:
        return found, good and loss_equal and all(tensors.values())
    drifts = [loss_errors(read_rows(out / name), left_alone) for name in controls]
    allowed = [max(_RELATIVE_ERROR, 2 * max(step)) for step in zip(*drifts, strict=True)]
    found["control_relative_loss_error"] = max(drift[-1] for drift in drifts)
    found["within_drift"] = len(errors) == len(allowed) and all(
        error <= most for error, most in zip(errors, allowed, strict=True)
    )
    return found, good and found["within_drift"]


def read_rows(folder: Path) -> list[Row]:
    """All rows of a complete run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def account_samples(rows: list[Row], left_alone: list[Row]) -> tuple[int, int]:
    """Samples that an interrupted run lost, and those it was trained on more than once in an epoch.

    The last samples of an epoch, which fill no batch, are lost in neither run: what counts is what the run left alone
    was trained on. CampaignError where that one was trained on a sample twice in an epoch.
    """
    wanted, found = _samples_by_epoch(left_alone), _samples_by_epoch(rows)
    for epoch, counts in wanted.items():
        twice = [sample for sample, count in counts.items() if count > 1]
        if twice:
            raise CampaignError(f"the run left alone was trained on samples {twice[:5]} twice in epoch {epoch}")
    lost = sum((counts - found[epoch]).total() for epoch, counts in wanted.items())
    doubled = sum(count - 1 for counts in found.values() for count in counts.values())
    return lost, doubled


def _samples_by_epoch(rows: list[Row]) -> dict[int, Counter[int]]:
    found: dict[int, Counter[int]] = defaultdict(Counter)
    epoch = 0
    for row in rows:
        found[epoch].update(row["sample_ids"])
        epoch = row["epoch"]  # where the step's batch ended, so that of the next one
    return found


def numbers(rows: list[Row]) -> list[tuple[Any, ...]]:
    """What must repeat bit by bit: JSON keeps every bit of a double."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "num_skipped_steps", "sample_ids")
    return [tuple(row[key] for key in keys) for row in rows]


def equal_tensors(ours: Path, theirs: Path) -> dict[str, bool]:
    """Whether two runs' last checkpoints hold the same bits, for each of their files."""
    from safetensors.numpy import load_file

    folders = [run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip() for run in (ours, theirs)]
    contents = [{file.stem for file in folder.glob("*.safetensors")} for folder in folders]
    equal = dict.fromkeys(contents[0] ^ contents[1], False)
    for content in contents[0] & contents[1]:
        a, b = (load_file(folder / f"{content}.safetensors") for folder in folders)
        equal[content] = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    return equal


def step_seconds(rows: list[Row], batch_size: int) -> float:
    """Seconds of all steps without what happens between them (checkpoints, samples)."""
    seconds, count = 0.0, 0
    for row in rows:
        count += 1
        if "images_per_second" in row:
            seconds += count * batch_size / row["images_per_second"]
            count = 0
    return seconds


def account_time(attempts: list[Attempt], rows: list[Row], batch_size: int) -> dict[str, float]:
    """What the seconds of a run went into; their sum is the time from the first start to the last end."""
    steps, in_loop = step_seconds(rows, batch_size), rows[-1]["train_seconds"]
    where = dict.fromkeys(("steps", "checkpoints_and_samples", "redone", "start", "stop", "close", "between"), 0.0)
    where["steps"], where["checkpoints_and_samples"] = steps, in_loop - steps
    where["redone"] = -in_loop  # all that passed in the loop, but for what the finished run counts as its own
    for attempt in attempts:
        stopped = attempt.killed or attempt.ended
        where["start"] += (attempt.trained or stopped) - attempt.began
        where["stop"] += attempt.ended - stopped
        if attempt.trained is not None:
            left_loop = stopped if attempt is not attempts[-1] else attempt.last_row or attempt.trained
            where["redone"] += max(0.0, left_loop - attempt.trained)
            where["close"] += max(0.0, stopped - left_loop)
    where["between"] = sum(after.began - before.ended for before, after in pairwise(attempts))
    return where

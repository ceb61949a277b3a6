"""Compares two runs step by step: their losses, their speed, and how long they waited for data.

    python tools/compare_runs.py runs/demo runs/demo-images
    python tools/compare_runs.py runs/a runs/b --steps 100 --tolerance 1e-3

Of metrics.jsonl, the steps that both runs have are compared. Runs of the same numbers on the same kind of machine have
losses that are equal bit by bit. Where only the order of a summation differs (other ranks, another machine), the
difference is near 1e-7 at first and grows from step to step: --steps has the first ones judged alone. Speeds are the
medians of the windows of `metrics.log_every_steps`.

Exit code 0: no loss differs by more than --tolerance; 1: one does; 2: a mistake.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools share code

from cfpretrain.base.command_line import Parser, check_range, positive
from cfpretrain.base.console import UserError, ending_in_one_line, masked, path_argument, phase, printable

_EXIT_DIFFERENT = 1
# Of the last row of a window.
_SPEEDS = {"images/s": ("images_per_second", ".0f"), "wait for data": ("data_wait_share", ".2%")}

Row = dict[str, Any]  # of metrics.jsonl


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=path_argument, help="a run folder, e.g. runs/demo")
    add("other", type=path_argument, help="the run folder to hold against it")
    add("--steps", type=positive, help="judge the losses of so many first steps (default: of all that both have)")
    add("--tolerance", type=float, default=0.0, help="largest relative difference of a loss (default 0: bit by bit)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        agree = run(arguments)
    sys.exit(0 if agree else _EXIT_DIFFERENT)


def run(arguments: argparse.Namespace) -> bool:
    """Prints the comparison; whether the losses agree."""
    check_range("--tolerance", arguments.tolerance, 0)
    folders = (arguments.run, arguments.other)
    with phase("loading torch"):
        from cfpretrain.base.config import to_plain
        from cfpretrain.run.build import METRICS_FILE, load_run_config
        from cfpretrain.run.metrics import read_metrics
        from cfpretrain.run.state import changes
    configs = [load_run_config(folder) for folder in folders]
    shards = [" ".join(config.data.shards) for config in configs]
    # Scores alone may have a row of their own.
    steps = [{row["step"]: row for row in read_metrics(f / METRICS_FILE) if "loss" in row} for f in folders]
    common = sorted(steps[0].keys() & steps[1].keys())
    if not common:
        raise UserError(f"RUN, OTHER: expected runs with steps in common, got none in {folders[0]} and {folders[1]}")
    both = [[of_run[step] for step in common] for of_run in steps]
    speeds = {name: [_median(rows, key) for rows in both] for name, (key, _) in _SPEEDS.items()}
    width = max(24, *(len(text) + 2 for text in (*map(str, folders), *shards)))
    ranks = [sorted({row["num_ranks"] for row in rows if "num_ranks" in row}) for rows in both]
    table: dict[str, Sequence[object]] = {"": folders, "shards": shards, "steps": [len(of_run) for of_run in steps]}
    table["ranks"] = [", ".join(map(str, of_run)) for of_run in ranks]
    for name, (_, form) in _SPEEDS.items():
        table[name] = ["-" if value is None else format(value, form) for value in speeds[name]]
    for name, values in table.items():
        print(printable(f"{name:>14}" + "".join(f"{value!s:>{width}}" for value in values)))
    for key, (value, other_value) in changes(*map(to_plain, configs)).items():
        if key != "data.shards":
            print(printable(masked(f"{'differs':>14}  {key}: {value} and {other_value}")))
    here, other = speeds["images/s"]
    if here and other:
        print(f"{'':>14}{arguments.other} makes {other / here:.3f} times the images/s of {arguments.run}")
    return _compare_losses(both, arguments.steps, arguments.tolerance)


def _median(rows: Sequence[Row], key: str) -> float | None:
    """Over windows; None where there is none."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def _compare_losses(both: Sequence[Sequence[Row]], num_judged: int | None, tolerance: float) -> bool:
    """Says where the losses of the same steps differ; whether those of the first steps agree."""
    steps = [row["step"] for row in both[0]]
    largest = loss_errors(*both)  # up to each step
    said = f"{'losses':>14}  of the {len(steps)} steps that both have, {steps[0]} to {steps[-1]}, "
    if not largest[-1]:
        print(f"{said}are equal, bit by bit")
        return True
    first = next(i for i, error in enumerate(largest) if error)
    print(f"{said}differ first at step {steps[first]}: {' and '.join(str(rows[first]['loss']) for rows in both)}")
    judged = largest[:num_judged]
    for up_to in dict.fromkeys((len(judged), len(largest))):
        print(f"{'':>14}  largest relative difference up to step {steps[up_to - 1]}: {largest[up_to - 1]:.2g}")
    agrees = judged[-1] <= tolerance
    verdict = "within" if agrees else "MORE than"
    print(f"{'':>14}  {verdict} the tolerance of {tolerance:g} up to step {steps[len(judged) - 1]}")
    return agrees


def loss_errors(rows: Sequence[Row], others: Sequence[Row]) -> list[float]:
    """The largest relative error of the loss up to each step that both runs have; a loss that one lacks is infinite."""
    wanted = {row["step"]: row["loss"] for row in others}
    errors, largest = [], 0.0
    for row in rows:
        ours, theirs = row["loss"], wanted.get(row["step"])
        if ours is not None and theirs is not None:
            largest = max(largest, abs(ours - theirs) / abs(theirs))
        elif ours is not theirs:
            largest = math.inf
        errors.append(largest)
    return errors


if __name__ == "__main__":
    main()

"""Runs that turn bad: skipped steps, rewinds, and the end of a run that does not recover; on real ranks."""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.stopping import StopRequest
from cfpretrain.core.objective import Batch
from tests import folders
from tests.digits import small_config
from tests.processes import run_in_processes

# A window that can judge after 8 steps.
GUARD = ("guard.window_steps=32", "guard.max_skips_in_row=3", "metrics.log_sample_ids=true", "train.decay_steps=0")


class FaultyLoss:
    """The objective, with its total multiplied by what `factors` says of the step; steps count from 1.

    Args:
        loss: the objective.
        factors: by step; 1 where it is missing.
        rank: the one that is faulty; None: all.
        gradients: multiplies the gradients where they arise instead: the loss stays what it is.
    """

    def __init__(self, loss: Any, factors: dict[int, float], rank: int | None, gradients: bool) -> None:
        self._loss, self._factors, self._rank, self._gradients = loss, factors, rank, gradients
        self.total, self.weights = loss.total, loss.weights

    def __call__(self, model: Any, batch: Batch) -> Any:
        terms = self._loss(model, batch)
        of_image = terms["image"]
        factor = self._factors.get(batch.step + 1, 1.0) if self._rank in (None, runtime.rank()) else 1.0
        if self._gradients:
            of_image.total.register_hook(lambda gradient: gradient * factor)
            return terms
        return {"image": dataclasses.replace(of_image, total=of_image.total * factor)}


def hash_of_state(trainer: Any) -> str:
    """Of this rank's weights, moments and averages."""
    digest = hashlib.sha256()
    for fragment, average in zip(trainer.engine.fragments(), trainer.ema.values, strict=True):
        for values in (fragment.values, *fragment.state.values(), average):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def train(
    shards: Path,
    folder: Path,
    overrides: tuple[str, ...],
    factors: dict[int, float],
    rank: int | None = None,
    spoil_gradients: bool = False,
) -> str | None:
    """A run whose loss, or whose gradients alone, are spoilt; the error's text where it ends with one."""
    from cfpretrain.base.console import SickRunError
    from cfpretrain.training import step, trainer

    config = small_config(shards, folder, *GUARD, *overrides)
    device, stop = torch.device("cpu"), StopRequest()
    runtime.start(device)

    class Noted(trainer.Trainer):
        """Leaves a hash of the state after each step."""

        def train_step(self) -> Any:
            agreed = super().train_step()
            with (folder / f"hashes_{runtime.rank()}").open("a") as file:
                file.write(f"{hash_of_state(self)}\n")
            return agreed

    trainer.Trainer = Noted  # type: ignore[misc]
    make = step.make_loss
    step.make_loss = lambda config: FaultyLoss(make(config), factors, rank, spoil_gradients)  # type: ignore[assignment]
    try:
        assert trainer.run(config, device, stop)
    except SickRunError as error:
        return str(error)
    return None


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    found = folders.rows(folder)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return {row["step"]: row for row in found}


def tensors(folder: Path, step: int, content: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{content}.safetensors")


def assert_still(folder: Path, skipped: int) -> None:
    """Neither weights nor averages nor moments moved in this step, on any rank, and in all others they did."""
    for file in folder.glob("hashes_*"):
        hashes = file.read_text().splitlines()
        assert [i for i in range(2, len(hashes) + 1) if hashes[i - 1] == hashes[i - 2]] == [skipped]


def test_a_nan_on_one_rank_skips_the_step_on_all(shards: Path, tmp_path: Path) -> None:
    run_in_processes(train, 2, shards, tmp_path, (), {3: math.nan}, 1)
    found = rows(tmp_path)
    assert found[3]["skipped"] == "the loss is nan"
    assert found[3]["loss"] is None
    assert [step for step in found if "skipped" in found[step]] == [3]
    assert_still(tmp_path, 3)
    assert found[4]["learning_rate"] == found[3]["learning_rate"] > found[2]["learning_rate"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_skipped_steps"], summary["skipped_steps"], summary["num_rewinds"]) == (1, [3], 0)


@pytest.mark.parametrize(
    "zero_stage", [3, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2]
)
def test_nan_gradients_under_a_good_loss_skip_the_step(shards: Path, tmp_path: Path, zero_stage: int) -> None:
    overrides = (f"engine.zero_stage={zero_stage}", "train.num_steps=5")
    run_in_processes(train, 2, shards, tmp_path, overrides, {3: math.nan}, 0, True)
    found = rows(tmp_path)
    assert found[3]["skipped"] == "the gradient norm is inf"
    assert found[3]["loss"] is not None
    assert_still(tmp_path, 3)
    assert "skipped" not in found[4]


@pytest.mark.parametrize(("gradients", "what"), [(False, "loss"), (True, "gradient norm")])
def test_a_spike_skips_the_step(shards: Path, tmp_path: Path, gradients: bool, what: str) -> None:
    overrides = ("train.num_steps=14", "engine.zero_stage=1")
    run_in_processes(train, 1, shards, tmp_path, overrides, {11: 1000.0 if gradients else 100.0}, None, gradients)
    found = rows(tmp_path)
    assert [step for step in found if "skipped" in found[step]] == [11]
    assert found[11]["skipped"].startswith(f"the {what} ")
    assert "deviations above" in found[11]["skipped"]
    assert_still(tmp_path, 11)


def test_spikes_are_applied_where_the_guard_is_off(shards: Path, tmp_path: Path) -> None:
    overrides = ("guard.spike_deviations=0", "train.num_steps=12", "engine.zero_stage=1")
    run_in_processes(train, 1, shards, tmp_path, overrides, {11: 100.0})
    assert not any("skipped" in row for row in rows(tmp_path).values())


def test_skips_in_a_row_rewind_and_go_past_their_data(shards: Path, tmp_path: Path) -> None:
    """Checkpoints at 4 and 8, bad steps 10 to 12: back to the weights of 8, on with the data of step 13."""
    overrides = ("train.num_steps=16", "checkpoint.keep_last=100", "engine.zero_stage=1")
    factors = dict.fromkeys((10, 11, 12), math.inf)
    run_in_processes(train, 1, shards, tmp_path / "whole", overrides, factors)
    found = rows(tmp_path / "whole")
    assert found[12]["rewound_to_step"] == 8
    # Step 9 was applied and is not any more: four steps of which the weights know nothing.
    assert (found[11]["num_skipped_steps"], found[12]["num_skipped_steps"], found[12]["num_rewinds"]) == (2, 4, 1)
    assert "skipped" not in found[13]
    saved = json.loads((tmp_path / "whole" / "checkpoints" / "step_00000016" / "state.json").read_text())
    assert (saved["step"], saved["optimizer_step"], saved["num_skipped"], saved["num_rewinds"]) == (16, 12, 4, 1)
    # The data went on: as in a run to which nothing happened.
    run_in_processes(train, 1, shards, tmp_path / "healthy", overrides, {})
    healthy = rows(tmp_path / "healthy")
    assert all(found[step]["sample_ids"] == healthy[step]["sample_ids"] for step in found)
    assert all(found[step]["loss"] == healthy[step]["loss"] for step in range(1, 10))
    assert found[13]["loss"] != healthy[13]["loss"]

    # A kill after the rewind, before the next checkpoint: the same command comes to the same numbers.
    again = tmp_path / "whole"
    (again / "checkpoints" / "latest").write_text("step_00000008\n")
    (again / "summary.json").unlink()
    weights = tensors(again, 16, "weights")
    run_in_processes(train, 1, shards, again, overrides, factors)
    timeless = ("step", "loss", "grad_norm", "learning_rate", "sample_ids", "num_skipped_steps", "num_rewinds")
    repeated = rows(again)
    assert [[row[key] for key in timeless] for row in repeated.values()] == [
        [row[key] for key in timeless] for row in found.values()
    ]
    assert all(torch.equal(value, tensors(again, 16, "weights")[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("first_bad", "message"),
    [
        (1, r"3 steps in a row were skipped, the last one 3: the loss is nan; and there is no checkpoint"),
        (6, r"3 steps in a row were skipped, the last one 14: the loss is nan; after 2 rewinds \(guard.max_rewinds\)"),
    ],
)
def test_a_run_that_skips_everything_stops(shards: Path, tmp_path: Path, first_bad: int, message: str) -> None:
    factors = dict.fromkeys(range(first_bad, 100), math.nan)
    overrides = ("train.num_steps=100", "guard.max_rewinds=2", "engine.zero_stage=1")
    [error] = run_in_processes(train, 1, shards, tmp_path, overrides, factors)
    assert error is not None
    assert re.search(message, error), error
    assert all("skipped" in row for step, row in rows(tmp_path).items() if step >= first_bad)
    assert not (tmp_path / "requeue").exists()
    assert not (tmp_path / "summary.json").exists()

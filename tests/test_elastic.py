"""A checkpoint goes on with any number of ranks and at any ZeRO stage: the same state bit for bit, the same losses.

The run that it comes from has 2 ranks at stage 3.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfpretrain.base import runtime
from tests.digits import small_config
from tests.folders import rows
from tests.processes import run_in_processes

_AT, _NUM_STEPS = 12, 32  # the checkpoint, and the end of the run
_NUM_LATE_STEPS = 100
_STATE = ("weights", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_in_processes(go_on, 2, shards, folder, "engine.zero_stage=3")
    return folder


def go_on(shards: Path, folder: Path, *overrides: str) -> list[float]:
    """Goes on with a run to its end, after a look at the state of the resume; returns the losses of this rank's run."""
    from cfpretrain.training import trainer

    config = small_config(
        shards,
        folder,
        f"train.num_steps={_NUM_STEPS}",
        "train.decay_steps=0",
        f"checkpoint.every_steps={_AT}",
        "checkpoint.keep_last=100",
        *overrides,
    )
    device = torch.device("cpu")
    runtime.start(device)
    trainer.prepare_folder(config, device)
    resumed = trainer.Trainer(config, device)
    checkpoints = resumed.checkpoints.store.candidates()
    if checkpoints:
        assert_state_is_of(checkpoints[0], resumed)
    runtime.barrier()
    assert resumed.train()
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(1, config.train.num_steps + 1))
    return [row["loss"] for row in found]


def assert_state_is_of(checkpoint: Path, resumed) -> None:
    """Every value and counter that decides what comes next is the checkpoint's."""
    files = {content: load_file(checkpoint / f"{content}.safetensors") for content in _STATE}
    held = dict.fromkeys(files["weights"], 0)
    for fragment, average in zip(resumed.engine.fragments(), resumed.ema.values, strict=True):
        ours = {"weights": fragment.values, "ema": average, **fragment.state}
        begin, end = fragment.offset, fragment.offset + fragment.values.numel()
        assert ours.keys() == files.keys()
        for content, values in ours.items():
            theirs = files[content][fragment.name].flatten()[begin:end]
            # Bits, so that -0.0 is not 0.0.
            assert torch.equal(values.view(torch.int32), theirs.view(torch.int32)), (content, fragment.name)
        held[fragment.name] += len(average)
    # Together the ranks hold everything.
    of_ranks = runtime.gather(held)
    assert all(sum(of[name] for of in of_ranks) >= tensor.numel() for name, tensor in files["weights"].items())
    state = json.loads((checkpoint / "state.json").read_text())
    at, position = resumed.at, resumed.loader.position
    counters = {
        "step": at.step,
        "num_skipped": at.num_skipped,
        "num_rewinds": at.num_rewinds,
        "train_seconds": at.train_seconds,
        "optimizer_step": resumed.engine.optimizer_step,
        "epoch": position.epoch,
        "samples_in_epoch": position.samples_in_epoch,
        "guard": resumed.guard.to_plain(),
    }
    assert counters == {name: state[name] for name in counters}


def copy_at(whole_run: Path, folder: Path) -> Path:
    """The run as it was when its first checkpoint was complete."""
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").glob("step_*"):
        if path.name != f"step_{_AT:08d}":
            shutil.rmtree(path)
    (folder / "checkpoints" / "latest").write_text(f"step_{_AT:08d}\n")
    return folder


def logged_losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


# Two cases in every test run: more ranks, and fewer, at the stages that keep most and least apart.
_FAST = [(4, 2), (1, 0)]
_CASES = [
    pytest.param(world_size, stage, marks=[] if (world_size, stage) in _FAST else pytest.mark.slow)
    for world_size in (1, 2, 4)
    for stage in (0, 1, 2, 3)
]


@pytest.mark.parametrize(("world_size", "zero_stage"), _CASES)
def test_resume_elsewhere(shards: Path, whole_run: Path, tmp_path: Path, world_size: int, zero_stage: int) -> None:
    folder = copy_at(whole_run, tmp_path / "run")
    ours, *_ = run_in_processes(go_on, world_size, shards, folder, f"engine.zero_stage={zero_stage}")
    theirs = logged_losses(whole_run)
    assert ours[:_AT] == theirs[:_AT]
    if (world_size, zero_stage) == (2, 3):
        assert ours == theirs
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


def drift(ours: list[float], theirs: list[float]) -> float:
    """The largest relative distance of the losses after the checkpoint."""
    return max(abs(a / b - 1) for a, b in zip(ours[_AT:], theirs[_AT:], strict=True))


_LONGER = f"train.num_steps={_AT + _NUM_LATE_STEPS}"


@pytest.fixture(scope="module")
def rounding(
    shards: Path, whole_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], list[float]]:
    """Losses of a longer run, and the drifts from it where the order of summation alone is another."""
    folder = tmp_path_factory.mktemp("controls")
    reference, *_ = run_in_processes(go_on, 2, shards, copy_at(whole_run, folder / "same"), _LONGER)
    drifts = []
    for size in (2, 8):
        run = copy_at(whole_run, folder / f"micro_batch_{size}")
        losses, *_ = run_in_processes(go_on, 2, shards, run, _LONGER, f"train.micro_batch_size={size}")
        drifts.append(drift(losses, reference))
    return reference, drifts


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 0), (1, 3), (4, 1), (4, 3)])
def test_late_drift_is_that_of_rounding(
    shards: Path,
    whole_run: Path,
    rounding: tuple[list[float], list[float]],
    tmp_path: Path,
    world_size: int,
    zero_stage: int,
) -> None:
    """Within twice what the same ranks and stage do with micro-batches of other sizes."""
    reference, controls = rounding
    folder = copy_at(whole_run, tmp_path / "run")
    ours, *_ = run_in_processes(go_on, world_size, shards, folder, _LONGER, f"engine.zero_stage={zero_stage}")
    print(f"drift {drift(ours, reference):.2e}, of rounding {controls}")
    assert 0 < drift(ours, reference) <= 2 * max(controls), (drift(ours, reference), controls)

"""A checkout that is not installed: the command and the tools run from it, and without metadata of ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfpretrain import __version__
from tests.digits import small_run
from tests.processes import REPOSITORY


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all that is installed beside torch, without cfpretrain."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(torch.__file__).parents[1].iterdir():
        if "cfpretrain" not in path.name:
            (folder / path.name).symlink_to(path)
    return folder


def run_uninstalled(packages: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a script; python's -S leaves installed packages, and so an editable cfpretrain, out of its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(packages), "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-S", *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_an_uninstalled_checkout_trains_and_samples(packages: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("train.num_steps=1", "train.warmup_steps=1", "train.decay_steps=0", "sample.num_ar_steps=[1]")
    # From another folder: neither python nor the command finds our modules in the present one.
    trained = run_uninstalled(
        packages, tmp_path, str(REPOSITORY / "cfpretrain" / "train.py"), *small_run(shards, run, *overrides)
    )
    assert trained.returncode == 0, trained.stderr
    assert "done: step 1" in trained.stdout
    [state] = run.glob("checkpoints/step_*/state.json")
    assert f'"cfpretrain": "{__version__}"' in state.read_text()

    sample = ("--classes", "3", "--num-per-class", "1", "--num-denoising-steps", "2", "--out", "three.png")
    sampled = run_uninstalled(packages, tmp_path, str(REPOSITORY / "tools" / "sample.py"), str(run), *sample)
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "three.png").exists()

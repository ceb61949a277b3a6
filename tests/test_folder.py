"""The run folder around training: whose wandb run a moved or a copied folder logs to, and what is cleared in it."""

import shutil
from pathlib import Path

import pytest
import torch

from cfpretrain.base import files
from cfpretrain.base.config import to_plain
from cfpretrain.run.state import TrainingState, read_state
from cfpretrain.training.folder import prepare_folder, tracker_run_id
from tests.digits import small_config
from tests.runs import write_run


@pytest.fixture
def run(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in `runs/one`, which logs to wandb run abc; it was trained in `tmp_path`, under a relative path."""
    monkeypatch.chdir(tmp_path)
    config = to_plain(small_config(shards, Path("runs/one")))
    return write_run(Path("runs/one"), shards, config=config, wandb_run_id="abc")


def state_of(folder: Path) -> TrainingState:
    return read_state(folder / "checkpoints" / "step_00000007")


def test_a_run_goes_on_in_its_wandb_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracker_run_id(None, run) is None
    assert tracker_run_id(state_of(run), run) == "abc"
    (tmp_path / "link").symlink_to(run.absolute())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in (tmp_path / "runs" / "one", Path("../runs/one"), tmp_path / "link"):
        assert tracker_run_id(state_of(name), name) == "abc"


def test_a_moved_run_keeps_its_wandb_run(
    run: Path, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.rename("moved")
    assert tracker_run_id(state_of(Path("moved")), Path("moved")) == "abc"
    # Another run that began in its place meanwhile.
    write_run(run, shards, wandb_run_id="xyz")
    assert tracker_run_id(state_of(Path("moved")), Path("moved")) == "abc"
    (run / "checkpoints" / "latest").write_text("no checkpoint")
    assert tracker_run_id(state_of(Path("moved")), Path("moved")) == "abc"
    assert "copy" not in capsys.readouterr().out


def test_a_copied_run_begins_a_wandb_run_of_its_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, "copy")
    assert tracker_run_id(state_of(Path(copy)), Path(copy)) is None
    assert "copy is a copy of " in (said := capsys.readouterr().out)
    assert "runs/one, to which wandb run abc belongs: it begins one of its own" in said
    assert tracker_run_id(state_of(run), run) == "abc"


def test_what_killed_writers_left_in_a_run_goes(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    for file in (folder / "requeue", folder / "samples" / "step_00000004_ar_steps_0001.png"):
        files.hidden_beside(file).write_text("half")
    prepare_folder(small_config(shards, folder), torch.device("cpu"))
    assert not list(folder.rglob(".writing.*"))

"""Scores during training: of the EMA weights, on real ranks, beside a training that they leave alone."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfpretrain.base.config import load
from cfpretrain.base.console import EXIT_REQUEUE, UserError
from cfpretrain.evaluation.evaluator import Evaluator
from cfpretrain.evaluation.references import STATISTICS_FILE
from cfpretrain.run import build, checkpoint
from cfpretrain.run.metrics import read_metrics
from tests.digits import small_config, small_run
from tests.image_files import digits, write_folder
from tests.processes import run_in_processes, run_script, start_script, wait_until

TRAIN = "cfpretrain/train.py"
CPU = torch.device("cpu")
SCORES = ["fd_small", "fd_small_spatial", "inception_score_of_fd_small", "inception_score_std_of_fd_small"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 real digits; tests read it only."""
    return write_folder(tmp_path_factory.mktemp("real") / "images", digits(0, 60))


def scored(real: Path, *overrides: str) -> tuple[str, ...]:
    return (
        "evaluation.every_steps=4",
        f"evaluation.reference={real}",
        "evaluation.features=tests.small_features:make",
        "evaluation.num_images=30",
        "evaluation.num_denoising_steps=2",
        "evaluation.num_ar_steps=2",
        "checkpoint.keep_last=1",
        "checkpoint.every_steps=5",
        *overrides,
    )


@pytest.fixture(scope="module")
def run(shards: Path, real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on 2 ranks, scored at 4, 8 and 12; tests read it only."""
    folder = tmp_path_factory.mktemp("runs") / "scored"
    for ended in run_script(TRAIN, small_run(shards, folder, *scored(real)), 2):
        assert ended.code == 0, ended.err
        if ended.out:
            assert ended.out.count("scoring 30 images at step") == 3
            assert "(floor " in ended.out
    return folder


def scores_of(folder: Path) -> dict[int, float]:
    return {row["step"]: row["fd_small"] for row in read_metrics(folder / "metrics.jsonl") if "fd_small" in row}


def test_scores_are_kept_with_the_best_checkpoint(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if set(SCORES) <= row.keys()] == [4, 8, 12]
    scores = scores_of(run)
    step = min(scores, key=lambda step: scores[step])
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert (best["step"], best["score"], best["checkpoint"]) == (step, scores[step], f"step_{step:08d}")
    assert (run / "checkpoints" / f"step_{step:08d}" / "state.json").is_file()
    assert json.loads((run / "summary.json").read_text())["num_steps"] == 12


def test_training_is_the_same_bit_by_bit_without_scores(whole_run: Path, run: Path) -> None:
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (run, whole_run))
    for key in ("step", "loss", "grad_norm", "learning_rate", "epoch"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    for which in ("weights", "ema"):
        ours, theirs = (
            checkpoint.open_weights(path / "checkpoints" / "step_00000012", which).read_all()
            for path in (run, whole_run)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_score_is_that_of_the_checkpoints_average_on_one_rank(run: Path) -> None:
    """2 ranks at ZeRO-3 with their shards against a whole model with the EMA of step 12."""
    found = build.find_checkpoint(run)
    config, model, step = found.config, found.load_model(), found.state.step
    evaluator = Evaluator(config, CPU)
    scores = evaluator(model, build.make_autoencoder(config, CPU).decode)
    row = next(row for row in read_metrics(run / "metrics.jsonl") if row["step"] == step)
    # Pixels are rounded to 8 bits: where the last bit of a float differs, one of them may.
    assert [scores[name] for name in SCORES] == pytest.approx([row[name] for name in SCORES], rel=1e-3)
    trained = build.find_checkpoint(run).load_model("raw")
    others = evaluator(trained, build.make_autoencoder(config, CPU).decode)
    assert others["fd_small"] != pytest.approx(row["fd_small"], rel=1e-2), "the average, not the weights"


def test_a_stop_ends_a_score_at_once_and_the_next_start_makes_up_for_it(
    shards: Path, real: Path, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    # It would go on for an hour.
    endless = scored(real, "evaluation.num_images=20000", "evaluation.num_denoising_steps=1000")
    ranks = start_script(TRAIN, small_run(shards, folder, *endless), 2)
    wait_until(lambda: "scoring 20000 images at step 4" in ranks[0].said(), 240, ranks)
    assert (folder / "checkpoints" / "step_00000004" / "state.json").is_file(), "a kill would cost nothing"
    ranks[1].send_signal(signal.SIGUSR1)
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [EXIT_REQUEUE] * 2, said
    assert "stopped at step 4 with a checkpoint (SIGUSR1)" in said[0]
    assert scores_of(folder) == {}
    assert not (folder / "checkpoints" / "best.json").exists()

    (folder / "metrics.jsonl").unlink()  # then step 4 has a score and no loss
    first, second = run_script(TRAIN, small_run(shards, folder, *scored(real)), 2)
    assert (first.code, second.code) == (0, 0), first.err
    assert first.out.index("training from step 4") < first.out.index("scoring 30 images at step 4")
    assert scores_of(folder) == scores_of(run)
    losses, undisturbed = (
        {row["step"]: row["loss"] for row in read_metrics(where / "metrics.jsonl") if "loss" in row}
        for where in (folder, run)
    )
    assert losses == {step: loss for step, loss in undisturbed.items() if step > 4}


def test_the_best_of_before_stays_in_a_run_that_goes_on(shards: Path, real: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    [ended] = run_script(TRAIN, small_run(shards, folder, *scored(real, "train.num_steps=4")))
    assert ended.code == 0, ended.err
    note = folder / "checkpoints" / "best.json"
    unbeaten = json.loads(note.read_text()) | {"score": 0.0}
    note.write_text(json.dumps(unbeaten))
    [ended] = run_script(TRAIN, small_run(shards, folder, *scored(real)))
    assert ended.code == 0, ended.err
    assert ended.out.count("scoring 30 images at step") == 2, "step 4 has its score"
    assert "the best so far" not in ended.out
    assert json.loads(note.read_text()) == unbeaten
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.json", "latest", "step_00000004", "step_00000012"]


def test_a_score_that_was_measured_otherwise_is_none(shards: Path, real: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for num_images, num_steps in ((30, 4), (20, 8)):
        overrides = scored(real, f"train.num_steps={num_steps}", f"evaluation.num_images={num_images}")
        [ended] = run_script(TRAIN, small_run(shards, folder, *overrides))
        assert ended.code == 0, ended.err
    assert "step 4: fd_small" in ended.out


def test_mistakes_are_named_by_their_keys(shards: Path, real: Path, tmp_path: Path) -> None:
    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            Evaluator(small_config(shards, tmp_path / "run", *scored(real), *overrides), CPU)
        assert "\n" not in str(caught.value)
        assert "--" not in str(caught.value)
        return str(caught.value)

    assert refused("evaluation.reference=nowhere").startswith("evaluation.reference: expected a folder of images")
    assert refused("evaluation.features=incption").startswith("evaluation.features: expected inception, effnet_lite0")
    assert refused("evaluation.features=inception").startswith("evaluation.feature_weights: expected the file")
    label = refused("evaluation.feature_label=mine")
    assert label.startswith("evaluation.feature_label: expected with evaluation.features inception alone")
    assert refused("model.latent_channels=4").startswith("data.autoencoder: expected the folder of the autoencoder")


def test_statistics_that_are_there_are_a_reference(shards: Path, real: Path, run: Path, tmp_path: Path) -> None:
    [statistics] = run.glob(f"references/*/{STATISTICS_FILE}")
    config = load(run / "config.yaml", [f"evaluation.reference={statistics}", f"run.folder={tmp_path}"])
    evaluator = Evaluator(config, CPU)
    assert evaluator.floor is None
    assert not (tmp_path / "references").exists()
    model = build.find_checkpoint(run).load_model()
    scores = evaluator(model, build.make_autoencoder(config, CPU).decode)
    assert scores["fd_small"] == pytest.approx(scores_of(run)[12], rel=1e-3)


def train_where_side_work_fails(shards: Path, folder: Path, real: Path) -> tuple[bool, str]:
    """Pictures, curves and scores fail on rank 0, each in a way of its own."""
    import contextlib
    import io

    from cfpretrain.base import runtime
    from cfpretrain.base.stopping import StopRequest
    from cfpretrain.evaluation import evaluator, figures
    from cfpretrain.training import events, trainer

    def fail(error: Exception) -> Callable[..., None]:
        def function(*_: object, **__: object) -> None:
            raise error

        return function

    events.pictures.sample_grid = fail(ZeroDivisionError("no width"))
    figures.curves = fail(MemoryError("no room"))
    evaluator.compare = fail(torch.linalg.LinAlgError("no eigenvalues"))
    runtime.start(CPU)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        config = small_config(shards, folder, *scored(real), "train.num_steps=4", "sample.every_steps=4")
        return trainer.run(config, CPU, StopRequest()), said.getvalue()


def test_pictures_and_scores_that_fail_do_not_end_a_run(shards: Path, real: Path, tmp_path: Path) -> None:
    (done, said), other = run_in_processes(train_where_side_work_fails, 2, shards, tmp_path / "run", real)
    assert (done, other) == (True, (True, "")), said
    assert "WARNING: drawing samples failed, and the run goes on: no width" in said
    assert said.count("[cfpretrain] sampling") == 1  # those of the last step and those of the end are the same
    assert "WARNING: drawing curves failed, and the run goes on: no room" in said
    assert "WARNING: scoring failed, and the run goes on: scores cannot be computed: no eigenvalues" in said
    assert scores_of(tmp_path / "run") == {}
    assert (tmp_path / "run" / "summary.json").exists()

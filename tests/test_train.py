"""Whole runs of `cfpretrain/train.py` on real ranks: resume, world sizes, and mistakes."""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cfpretrain import train
from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from cfpretrain.data.loader import Loader
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.run import build
from cfpretrain.run.state import read_state
from cfpretrain.training.folder import check_moved, prepare_folder
from tests.digits import digits_info, small_config, small_run, write_digits, write_latents
from tests.folders import rows
from tests.image_files import digits as image_digits
from tests.image_files import encoded, write_images
from tests.image_files import write_digits as write_image_digits
from tests.processes import REPOSITORY, Ended, run_alone, run_script, start_script, wait_until
from tests.runs import as_older
from tests.test_latent_shards import write_autoencoder

TRAIN = "cfpretrain/train.py"


def numbers(folder: Path) -> list[tuple[object, ...]]:
    """What must repeat bit by bit: not the times."""
    return [tuple(row[key] for key in ("step", "loss", "grad_norm", "learning_rate", "epoch")) for row in rows(folder)]


def checkpoint(folder: Path, content: str, step: int = 12) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / f"{content}.safetensors")


def test_a_run_leaves_what_it_promises(whole_run: Path) -> None:
    assert [row[0] for row in numbers(whole_run)] == list(range(1, 13))
    losses = [row[1] for row in numbers(whole_run)]
    assert losses[-1] < losses[0]
    assert configs.load(whole_run / "config.yaml").train.num_steps == 12
    assert (whole_run / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    # keep_last = 2
    names = sorted(p.name for p in (whole_run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000008", "step_00000012"]
    assert (whole_run / "curves.png").stat().st_size > 1000
    pictures = sorted(p.name for p in (whole_run / "samples").iterdir())
    assert pictures == ["step_00000012_ar_steps_0001.png", "step_00000012_ar_steps_0002.png"]
    summary = json.loads((whole_run / "summary.json").read_text())
    assert (summary["world_size"], summary["zero_stage"], summary["num_steps"]) == (2, 3, 12)
    assert summary["loss_first"] == losses[0]
    peaks = [row["peak_memory_gb"] for row in rows(whole_run)]  # a window a step; without a GPU, of the process
    assert peaks == sorted(peaks)
    assert 0.05 < peaks[0] <= peaks[-1] <= summary["peak_rss_mb"] / 1e3


def test_learning_rate_warms_up_stays_and_falls(whole_run: Path) -> None:
    rates = [row[3] for row in numbers(whole_run)]
    assert rates == pytest.approx([1e-3 * min(1.0, i / 4, (13 - i) / 3) for i in range(1, 13)])


def test_a_killed_run_goes_on_bit_by_bit(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then the same command: losses, weights and EMA of the uninterrupted run."""
    folder = tmp_path / "killed"
    # It would train on for long: the kill comes while it does.
    ranks = start_script(TRAIN, small_run(shards, folder, "train.num_steps=5000", "checkpoint.keep_last=1000"), 2)
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 6, 240, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    # The machine may have been fast: go back to step 4, as if the kill had come right after its checkpoint.
    (folder / "checkpoints" / "latest").write_text("step_00000004\n")

    for ended in run_script(TRAIN, small_run(shards, folder, "checkpoint.keep_last=1000"), 2):
        assert ended.code == 0, ended.err
        if ended.out:
            assert "resuming from" in ended.out
            assert "training from step 4 to 12" in ended.out
    assert numbers(folder) == numbers(whole_run)
    for content in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = checkpoint(folder, content), checkpoint(whole_run, content)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), content
    # The averages are averages: a resume that copied the weights over them would be noticed.
    weights, ema = checkpoint(folder, "weights"), checkpoint(folder, "ema")
    assert not any(torch.equal(weights[name], ema[name]) for name in weights if weights[name].std() > 0)


def contents(folder: Path) -> dict[Path, bytes]:
    """All files of a run but the lock, which names the last process that looked at it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_complete_run_says_so(shards: Path, whole_run: Path) -> None:
    """Nothing is trained, and so nothing is written, whatever the command says."""
    before = contents(whole_run)
    for overrides in ([], ["train.learning_rate=0.5", "order.ar_step_decay=0.5"], ["sample.guidance=3"]):
        [ended] = run_script(TRAIN, small_run(shards, whole_run, *overrides))
        assert ended.code == 0
        assert f"nothing to do: {whole_run} is complete at step 12; raise train.num_steps" in ended.out
        assert contents(whole_run) == before


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("noise.beta_last=0.5", "noise.beta_last is 0.02 there and 0.5 in the config"),
        ("noise.num_timesteps=900", "noise.num_timesteps is 1000 there and 900 in the config"),
        ("model.position_embedding=sincos", "model.position_embedding is learnable there and sincos in the config"),
    ],
)
def test_what_the_past_training_means_may_not_change(shards: Path, whole_run: Path, override: str, said: str) -> None:
    before = contents(whole_run)
    overrides = [override, "train.learning_rate=0.5", "train.num_steps=13"]
    for dry_run in ([], ["--dry-run"]):
        [ended] = run_script(TRAIN, [*small_run(shards, whole_run, *overrides), *dry_run])
        if not dry_run:
            assert_refused([ended], "step_00000012 is of another model: ", said)
        assert contents(whole_run) == before


def test_one_rank_trains_on_the_same_numbers(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """1 rank with 4 micro-batches against 2 ranks with 2: equal up to the order of summation, stage 1 against 3."""
    folder = tmp_path / "one"
    [ended] = run_script(TRAIN, small_run(shards, folder, "engine.zero_stage=1"))
    assert ended.code == 0, ended.err
    ours = torch.tensor([row[1] for row in numbers(folder)])
    theirs = torch.tensor([row[1] for row in numbers(whole_run)])
    # Measured: 5e-7 after 12 steps.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def test_another_number_of_ranks_and_stage_goes_on(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """2 ranks at stage 3 until step 8, then 1 rank at stage 1: the uninterrupted run's losses up to summation order."""
    folder = tmp_path / "moved"
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000008\n")
    [ended] = run_script(TRAIN, small_run(shards, folder, "engine.zero_stage=1"))
    assert ended.code == 0, ended.err
    assert "training from step 8 to 12" in ended.out
    ours, theirs = numbers(folder), numbers(whole_run)
    assert ours[:8] == theirs[:8]
    torch.testing.assert_close([row[1] for row in ours], [row[1] for row in theirs], rtol=1e-5, atol=0)


def test_draws_are_equal_on_1_2_and_4_ranks(shards: Path, tmp_path: Path) -> None:
    """Number by number, over more than an epoch: samples, orders, splits, t, noise, label drops."""
    from cfpretrain.run.build import make_prepare

    shared = ("intervals_BMI", "0.steps_BL")

    def draws_of(world_size: int) -> list[dict[int, tuple[list[float], ...]]]:
        config = small_config(shards, tmp_path, "train.label_drop_prob=0.5", "data.mirror_prob=0.5")
        loaders = [Loader(config, make_prepare(config), rank, world_size) for rank in range(world_size)]
        steps: list[dict[int, tuple[list[float], ...]]] = []
        for step in range(8):
            found: dict[int, tuple[list[float], ...]] = {}
            for loader in loaders:
                for batch in next(loader):
                    assert batch.step == step
                    of_samples = [value for name, value in batch.tensors().items() if name not in shared]
                    for i, sample in enumerate(batch.ids_B.tolist()):
                        assert sample not in found
                        found[sample] = tuple(value[i].flatten().tolist() for value in of_samples)
            steps.append(found)
        for loader in loaders:
            loader.close()
        return steps

    one = draws_of(1)
    assert all(len(found) == 16 for found in one)
    assert draws_of(2) == one
    assert draws_of(4) == one


# ---------------------------------------------------------------------------
# Mistakes


def assert_refused(ranks: list[Ended], *parts: str) -> None:
    """Exit code 2 on every rank, one line from rank 0 that names what is wrong, no traceback."""
    assert [ended.code for ended in ranks] == [2] * len(ranks), ranks
    lines = [line for line in ranks[0].err.splitlines() if "[cfpretrain] error: " in line]
    assert len(lines) == 1, ranks[0].err
    for part in parts:
        assert part in lines[0]
    assert all("[cfpretrain]" not in ended.out + ended.err for ended in ranks[1:])
    assert not any("Traceback" in ended.err for ended in ranks)


def test_mistakes_end_all_ranks_with_one_line(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    run = small_run(shards, tmp_path / "run")
    stray = [*run, "train.num_stepz=3", "train.depth=many"]
    assert_refused(run_script(TRAIN, stray, 2), "2 problems", "train.num_stepz: unknown key", "train.num_steps?")
    assert_refused(
        run_script(TRAIN, small_run(shards, whole_run, "model.depth=3")), "of another model: model.depth is 2"
    )
    missing = small_run(tmp_path / "nowhere", tmp_path / "run")
    assert_refused(run_script(TRAIN, missing, 2), "data.shards", "nowhere does not exist", "tools/make_shards.py")
    assert not (tmp_path / "run").exists()


def refuse(config: configs.Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_folder(config, torch.device("cpu"))


def test_shard_mistakes(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    refuse(small_config(tmp_path / "empty", run), "data.shards: .*empty has no cfpretrain.json; make shards with")
    other = small_config(shards, run, "model.latent_size=16", "data.latent_scale=1.0")
    refuse(other, r"model.latent_size: expected 8.*data.latent_scale: expected \[2.0\]")
    refuse(small_config(shards, run, "train.global_batch_size=128"), "train.global_batch_size: expected at most 100")
    assert not run.exists()


def test_run_folder_mistakes(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    refuse(small_config(shards, tmp_path / "file" / "run"), "run.folder: .* cannot be written")
    before = (whole_run / "config.yaml").read_bytes()
    refuse(
        small_config(shards, whole_run, "model.depth=3"), "another model: model.depth is 2 there and 3 in the config"
    )
    refuse(small_config(shards, whole_run, "run.seed=1"), "run.seed: expected 0, the seed of checkpoint .*, got 1")
    refuse(small_config(shards, whole_run, "data.num_canonical_nodes=2"), "with other .*data.num_canonical_nodes")
    fewer = write_digits(tmp_path / "fewer", 90)
    refuse(small_config(fewer, whole_run), "data.shards: checkpoint .* was trained on other shards")
    assert (whole_run / "config.yaml").read_bytes() == before


def test_dry_run_prints_config_arithmetic_and_parameters(shards: Path, tmp_path: Path) -> None:
    [ended] = run_script(TRAIN, [*small_run(shards, tmp_path / "run"), "--dry-run", "--num-ranks", "2"])
    assert ended.code == 0, ended.err
    assert "global batch: 16 = 4 a micro-batch x 2 micro-batches x 2 ranks" in ended.out
    assert "parameters: 37,028" in ended.out
    assert "num_steps: 12" in ended.out
    assert "shards: 100 latents, which fit the config" in ended.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_ranks", ["0", "-2"])
def test_a_dry_run_assumes_at_least_a_rank(num_ranks, shards: Path, tmp_path: Path) -> None:
    command = [*small_run(shards, tmp_path / "run"), "--dry-run", "--num-ranks", num_ranks]
    assert_refused(run_script(TRAIN, command), f"--num-ranks: expected at least 1, got {num_ranks}")


def test_a_dry_run_holds_the_autoencoder_against_the_shards(tmp_path: Path) -> None:
    """Where both lie on this machine; elsewhere it says what it has not looked at."""
    right = write_autoencoder(tmp_path / "right")
    found = KLAutoencoder.load(right, "cpu")
    wrong = write_autoencoder(tmp_path / "wrong", scaling_factor=0.25)
    info = dataclasses.replace(
        digits_info(100),
        autoencoder=found.fingerprint,
        latent_shape=(4, 8, 8),
        latent_shift=tuple(found.shift),
        latent_scale=tuple(found.scale),
    )
    shards = write_latents(tmp_path / "latents", info, ((i, i % 10, np.zeros((4, 8, 8))) for i in range(100)))
    latents = [
        "model.latent_channels=4",
        f"data.latent_shift={list(info.latent_shift)}",
        f"data.latent_scale={list(info.latent_scale)}",
    ]

    def dry_run(shards: Path, autoencoder: str | Path) -> list[Ended]:
        command = [*small_run(shards, tmp_path / "run"), *latents, f"data.autoencoder={autoencoder}", "--dry-run"]
        return run_script(TRAIN, command)

    assert f"autoencoder: {right}, which made the latents" in dry_run(shards, right)[0].out
    assert_refused(dry_run(shards, "FOLDER"), "data.autoencoder: FOLDER does not exist")
    assert_refused(dry_run(shards, wrong), "data.autoencoder: expected the autoencoder that made the latents")
    assert f"autoencoder: {right}, which can be read" in dry_run(tmp_path / "elsewhere", right)[0].out
    assert "autoencoder: not looked at, since FOLDER is no" in dry_run(tmp_path / "elsewhere", "FOLDER")[0].out


def test_a_dry_run_says_what_encoding_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of image shards; the autoencoder's weights are read once."""
    autoencoder = write_autoencoder(tmp_path / "autoencoder")
    found = KLAutoencoder.load(autoencoder, "cpu")
    side = 8 * found.stride
    images = write_images(tmp_path / "images", [[encoded(image) for image in image_digits(0, 32, side)]], side)
    loaded: list[Path] = []
    load = KLAutoencoder.load
    monkeypatch.setattr(KLAutoencoder, "load", lambda folder, *how: loaded.append(folder) or load(folder, *how))
    overrides = [
        *("model.latent_channels=4", "model.num_classes=2", "engine.precision=bf16", "engine.zero_stage=1"),
        *(f"data.latent_shift={list(found.shift)}", f"data.latent_scale={list(found.scale)}"),
        f"data.autoencoder={autoencoder}",
    ]

    def dry_run(*others: str) -> str:
        _, path, *rest = small_run(images, tmp_path / "run", *overrides, *others)
        given = {"num_ranks": 1, "allow_env": False, "allow_code": False}
        train.dry_run(argparse.Namespace(config=[path], overrides=rest, **given))
        return capsys.readouterr().out

    said = dry_run("data.encode_batch_size=2")
    assert loaded == [str(autoencoder)]
    assert "shards: 32 images, which fit the config" in said
    line = f"images: encoded during training, by {autoencoder} in bf16 (on a CPU fp32), 2 at once, adm crop: "
    costs = re.search(
        rf"^{re.escape(line)}(\S+) FLOPs an image, (\S+)% of the model's training FLOPs, which come to it$",
        said,
        re.MULTILINE,
    )
    of_training = re.search(r"^training FLOPs: (\S+) an image", said, re.MULTILINE)
    assert costs is not None
    assert of_training is not None
    assert float(costs[2]) == pytest.approx(100 * float(costs[1]) / float(of_training[1]), rel=2e-3)
    assert "is padded" not in said
    assert "a micro-batch of 4 is padded to 6, which takes 1.50 times the FLOPs" in dry_run("data.encode_batch_size=3")


NO_MEMORY = """
import torch
from cfpretrain import train
from cfpretrain.training import trainer

def fail(run):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

trainer.Trainer.train = fail
train.main()
"""


@pytest.mark.parametrize("is_of_images", [True, False])
def test_who_runs_out_of_memory_is_told_of_the_autoencoder(is_of_images: bool, tmp_path: Path) -> None:
    data = write_image_digits(tmp_path / "data", 0, 20) if is_of_images else write_digits(tmp_path / "data")
    ended = run_alone(NO_MEMORY, small_run(data, tmp_path / "run", "data.encode_batch_size=4"))
    assert ended.code == 2, ended.err
    assert "no memory left on rank 0 (CUDA out of memory" in ended.err
    assert ("GB to encode images)" in ended.err) == is_of_images
    assert ("data.encode_batch_size=2" in ended.err) == is_of_images


def test_a_dry_run_says_where_values_come_from(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {{shards: {shards}}}\ntrain: {{num_steps: 2e3}}")
    mine = ["--config", str(tmp_path / "mine.yaml"), "train.num_steps='3000'", "--dry-run"]
    [ended] = run_script(TRAIN, ["--config", "configs/tiny.yaml", *mine])
    assert ended.code == 0, ended.err
    assert re.search(r"^set by configs/tiny.yaml: run.folder, .*data.mirror_prob", ended.out, re.MULTILINE)
    assert f"\nset by {tmp_path / 'mine.yaml'}: data.shards\n" in ended.out
    assert "\nset by command line: train.num_steps\n" in ended.out
    assert "WARNING: data.mirror_prob: 0 in configs/tiny.yaml also holds for data.shards of" in ended.out


@pytest.mark.slow
def test_under_the_deepspeed_launcher(shards: Path, tmp_path: Path) -> None:
    """The real launcher: a run of 12 steps, and a mistake that ends it with exit code 2."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", TRAIN]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def launch(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [*launcher, *small_run(shards, tmp_path / "run", *overrides)]
        return subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240, check=False
        )

    wrong = launch("train.num_stepz=3")
    assert wrong.returncode == 2
    assert wrong.stderr.count("[cfpretrain] error: ") == 1
    ended = launch()
    assert ended.returncode == 0, ended.stderr
    assert "done: step 12" in ended.stdout
    assert [row[0] for row in numbers(tmp_path / "run")] == list(range(1, 13))


# ---------------------------------------------------------------------------
# Damaged checkpoints, and what must not be in a run folder


def test_a_damaged_newest_checkpoint_falls_back_loudly(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """A byte flipped in an optimizer range of the newest: the one before it goes on to the uninterrupted numbers."""
    folder = tmp_path / "damaged"
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    with (folder / "checkpoints" / "step_00000012" / "exp_avg_sq.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    first, second = run_script(TRAIN, small_run(shards, folder), 2)
    assert (first.code, second.code) == (0, 0), first.err
    assert "WARNING: " in first.out
    assert "step_00000012 is damaged and left out" in first.out
    assert "exp_avg_sq.safetensors" in first.out
    assert "training from step 8 to 12" in first.out
    assert numbers(folder) == numbers(whole_run)
    for content in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = checkpoint(folder, content), checkpoint(whole_run, content)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), content


def test_no_whole_checkpoint_is_an_error(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(whole_run, folder)
    (folder / "summary.json").unlink()
    for path in (folder / "checkpoints").glob("step_*/weights.safetensors"):
        os.truncate(path, path.stat().st_size - 1)
    assert_refused(run_script(TRAIN, small_run(shards, folder), 2), "none of the 2 checkpoints", "is whole")


def test_changed_knobs_are_named(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(whole_run, folder)
    [ended] = run_script(TRAIN, small_run(shards, folder, "train.num_steps=13", "order.ar_step_decay=0.8"))
    assert ended.code == 0, ended.err
    assert "changed since step 12: order.ar_step_decay from 0.9 to 0.8" in ended.out
    assert "changed since step 12: train.num_steps from 12 to 13" in ended.out
    assert "run.folder" not in ended.out


def test_each_checkpoint_says_what_it_was_trained_with(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """Two changes on the way, one of them by a start that is killed: only what was trained is in the record."""
    folder = tmp_path / "changed"
    shutil.copytree(whole_run, folder)
    for ended in run_script(TRAIN, small_run(shards, folder, "train.num_steps=13", "train.learning_rate=0.5"), 2):
        assert ended.code == 0, ended.err
    # This one gets no checkpoint.
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "config.yaml").write_text(configs.to_yaml(small_config(shards, folder, "train.learning_rate=7")))
    last = small_run(shards, folder, "train.num_steps=15", "train.learning_rate=0.25", "checkpoint.every_steps=1")
    for ended in run_script(TRAIN, last, 2):
        assert ended.code == 0, ended.err
    state = read_state(folder / "checkpoints" / "step_00000015")
    changed = [(resume["step"], resume["changed"]["train.learning_rate"]) for resume in state.history]
    assert changed == [(12, (0.001, 0.5)), (13, (0.5, 0.25))]
    assert state.history[0]["changed"].keys() == {"train.num_steps", "train.learning_rate"}
    assert state.class_names == list("0123456789")
    assert state.autoencoder == "identity"
    for step, learning_rate in ((1, 1e-3), (12, 1e-3), (13, 0.5), (14, 0.25), (15, 0.25)):
        assert build.config_at(folder, step).train.learning_rate == learning_rate
        if step > 12:
            logged = rows(folder)[step - 1]["learning_rate"]
            fall = min(1.0, ({13: 13}.get(step, 15) - step + 1) / 3)
            assert logged == pytest.approx(learning_rate * fall)
    assert build.find_checkpoint(folder, 14).config.train.learning_rate == 0.25
    export(tmp_path / "copy", tmp_path / "exported", ExportSettings())
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "learning rate 0.5," in card
    assert r"train.learning\_rate 0.001 up to step 12, then 0.5" in card
    assert r"train.num\_steps 12 up to step 12, then 13" in card


def test_the_config_of_a_copied_run_does_not_train_the_original(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    before = contents(whole_run)
    copy = shutil.copytree(whole_run, tmp_path / "copy")
    command = ["--config", str(copy / "config.yaml"), "train.num_steps=13", "train.decay_steps=3"]
    assert_refused(run_script(TRAIN, command, 2), f"moved or copied, and says {whole_run} in ", f"run.folder={copy} to")
    config = configs.load(copy / "config.yaml")
    check_moved([str(whole_run / "config.yaml")], config)
    for folder in (copy, tmp_path / "new"):
        moved = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder)))
        check_moved([str(copy / "config.yaml")], moved)
    assert contents(whole_run) == before


def test_an_older_checkpoint_goes_on(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    """Its record begins where it goes on; to the same numbers, bit by bit."""
    folder = as_older(shutil.copytree(whole_run, tmp_path / "older"))
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000008\n")
    refuse(small_config(shards, folder, "model.depth=3"), "another model: model.depth is 2 there and 3 in the config")
    ended, _ = run_script(TRAIN, small_run(shards, folder), 2)
    assert ended.code == 0, ended.err
    assert "training from step 8 to 12" in ended.out
    assert "changed since" not in ended.out
    assert numbers(folder) == numbers(whole_run)
    state = read_state(folder / "checkpoints" / "step_00000012")
    assert (state.schema_version, state.history, state.class_names) == (3, [], list("0123456789"))
    assert state.config["noise"]["beta_last"] == 0.02


def test_relative_paths_say_what_they_are_relative_to(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"data.shards: data/mine does not exist in {tmp_path}, the working directory"
    refuse(small_config(Path("data/mine"), tmp_path / "run"), message)
    scored = small_config(shards, tmp_path / "run", "evaluation.every_steps=4", "evaluation.reference=real")
    refuse(scored, f"evaluation.reference: real does not exist in {tmp_path}, the working directory")
    assert not (tmp_path / "run").exists()


def test_secrets_stay_out_of_the_run_folder(shards: Path, tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "AWS_SECRET_ACCESS_KEY": "planted/secret+value"}
    arguments = small_run(shards, tmp_path / "run", "metrics.wandb=offline", "train.num_steps=4")
    ended = run_alone(TRAIN, arguments, environment=secrets)
    assert ended.code == 0, ended.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for value in secrets.values():
        assert value not in ended.out + ended.err
        assert not [path for path in files if value.encode() in path.read_bytes()]


def test_latest_set_back_by_hand_is_obeyed(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "back"
    shutil.copytree(whole_run, folder)
    (folder / "checkpoints" / "latest").write_text("step_00000008\n")
    (folder / "metrics.jsonl").write_bytes(
        (folder / "metrics.jsonl").read_bytes().replace(b'{"step": 3,', b"\xff\n", 1)
    )
    [ended] = run_script(TRAIN, small_run(shards, folder))
    assert ended.code == 0, ended.err
    assert "training from step 8 to 12" in ended.out
    assert (folder / "checkpoints" / "step_00000012.abandoned").is_dir()
    assert "damaged lines are left out" in ended.out
    assert (folder / "metrics.jsonl.damaged").is_file()


def test_a_mistake_takes_the_word_of_requeue_back(shards: Path, whole_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "requeued"
    shutil.copytree(whole_run, folder)
    (folder / "requeue").write_text("SIGUSR1\n")
    assert_refused(run_script(TRAIN, small_run(shards, folder, "run.seed=7")), "run.seed: expected 0")
    assert not (folder / "requeue").exists()

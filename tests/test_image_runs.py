"""Whole runs that train straight from image shards, on real ranks: against latents, kills, bad images, mistakes."""

import re
import shutil
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base.config import Config, TrainConfig
from cfpretrain.base.console import EXIT_REQUEUE
from cfpretrain.run.state import read_state
from cfpretrain.training.step import LostDataError, StepResult, TrainingStep
from tests.digits import small_run
from tests.folders import rows
from tests.image_files import digits, encoded, write_images
from tests.processes import Rank, free_port, launcher_environment, run_script, start_script, wait_until
from tests.test_latent_shards import encoding_of, write, write_autoencoder
from tests.test_stopping import SOON_SAID, assert_nothing_is_lost, latest_step
from tests.test_train import assert_refused, numbers, refuse
from tests.test_watchdog import LONG, TRAIN, end, wait_for_steps

SIZE, NUM_IMAGES, BATCH = 16, 100, 8
CLASSES = tuple("0123456789")


def write_shards(folder: Path, bad: Sequence[int] = (), **description: object) -> Path:
    """Digits as RGB in shards of 34, those at some places no images; an image's id is its place."""
    files = list(map(encoded, digits(0, NUM_IMAGES, SIZE)))
    for place in bad:
        files[place] = b"no image"
    shards = [files[begin : begin + 34] for begin in range(0, NUM_IMAGES, 34)]
    labels = [place % 10 for place in range(NUM_IMAGES)]
    ids = range(NUM_IMAGES)
    return write_images(folder, shards, SIZE, ids=ids, labels=labels, class_names=CLASSES, **description)


@dataclass(frozen=True)
class Data:
    images: Path
    latents: Path
    autoencoder: Path

    def run(self, shards: Path, folder: Path, *overrides: str) -> list[str]:
        """Arguments of `train.py`: 12 steps of 16 images, over two epochs of 6 steps and a tail."""
        found = KLAutoencoder.load(self.autoencoder, "cpu")
        return small_run(
            shards,
            folder,
            "model.latent_channels=4",
            f"data.autoencoder={self.autoencoder}",
            f"data.latent_shift={list(found.shift)}",
            f"data.latent_scale={list(found.scale)}",
            "data.mirror_prob=0.5",
            f"data.encode_batch_size={BATCH}",
            *overrides,
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Images, a small autoencoder, and the latents that encode_latents makes with it; tests read them only."""
    root = tmp_path_factory.mktemp("data")
    images, autoencoder = write_shards(root / "images"), write_autoencoder(root / "autoencoder")
    encoding = encoding_of(images, KLAutoencoder.load(autoencoder, "cpu"), batch_size=BATCH)
    return Data(images, write(encoding, root / "latents", parts=((0, 1, 2),), num_threads=1), autoencoder)


def train(arguments: Sequence[str], world_size: int = 2) -> str:
    """Runs to the end; what rank 0 says."""
    ended = run_script(TRAIN, arguments, world_size)
    assert [rank.code for rank in ended] == [0] * world_size, ended
    return ended[0].out


@pytest.fixture(scope="module")
def trained(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from images on 2 ranks; tests read it only."""
    folder = tmp_path_factory.mktemp("runs") / "images"
    train(data.run(data.images, folder, "data.num_workers=1", "checkpoint.keep_last=1000"))
    return folder


def tensors(folder: Path, step: int = 12) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    return {
        f"{content}.{name}": tensor
        for content in ("weights", "ema", "exp_avg", "exp_avg_sq")
        for name, tensor in load_file(checkpoint / f"{content}.safetensors").items()
    }


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    found, expected = tensors(ours), tensors(theirs)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


# ---------------------------------------------------------------------------------------------------------------------
# Against latents


def test_a_run_from_images_is_the_run_from_latents(data: Data, trained: Path, tmp_path: Path) -> None:
    """Loss by loss and weight by weight; what they trained on stands in their checkpoints."""
    folder = tmp_path / "latents"
    train(data.run(data.latents, folder))
    assert numbers(folder) == numbers(trained)
    assert_same_tensors(folder, trained)
    kinds = [read_state(run / "checkpoints" / "step_00000012").data_kind for run in (folder, trained)]
    assert kinds == ["latents", "images"]
    assert not any("bad_images" in row for row in rows(trained))


def resume(data: Data, trained: Path, folder: Path, world_size: int) -> list[float]:
    """The losses of a copy of the run that goes on after its step 4, in the middle of an epoch."""
    shutil.copytree(trained, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000004\n")
    said = train(data.run(data.images, folder, "checkpoint.keep_last=1000"), world_size)
    assert "training from step 4 to 12" in said
    return [row["loss"] for row in rows(folder)]


@pytest.mark.parametrize(
    "world_size", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_resume_on_any_number_of_ranks(data: Data, trained: Path, tmp_path: Path, world_size: int) -> None:
    ours = resume(data, trained, tmp_path / "run", world_size)
    theirs = [row["loss"] for row in rows(trained)]
    if world_size == 2:
        assert_same_tensors(tmp_path / "run", trained)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_killed_run_goes_on_bit_by_bit(data: Data, trained: Path, tmp_path: Path, world_size: int) -> None:
    folder, alone = tmp_path / "killed", trained
    keeps = ("checkpoint.keep_last=1000", "data.num_workers=1")
    if world_size != 2:
        alone = tmp_path / "alone"
        train(data.run(data.images, alone, *keeps), world_size)
    ranks = start_script(TRAIN, data.run(data.images, folder, "train.num_steps=5000", *keeps), world_size)
    wait_for_steps(folder, 6, ranks)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    (folder / "checkpoints" / "latest").write_text("step_00000004\n")
    train(data.run(data.images, folder, *keeps), world_size)
    assert numbers(folder) == numbers(alone)
    assert_same_tensors(folder, alone)


# ---------------------------------------------------------------------------------------------------------------------
# Bad images


def test_a_bad_image_stops_all_ranks_with_one_line(data: Data, tmp_path: Path) -> None:
    """After a checkpoint of the steps before it."""
    shards, folder = write_shards(tmp_path / "images", bad=[41]), tmp_path / "run"
    ended = run_script(TRAIN, data.run(shards, folder, "data.num_workers=1", "train.num_steps=6"), 2)
    assert_refused(ended, f"data.shards: {shards}: image of id 41: it is no image", "data.on_bad_image=skip")
    found = rows(folder) if (folder / "metrics.jsonl").exists() else []
    assert (latest_step(folder) if found else 0) == len(found) < 6
    assert not (folder / "requeue").exists()


def test_bad_images_are_skipped_alike_on_any_ranks(data: Data, trained: Path, tmp_path: Path) -> None:
    """And after a resume over them."""
    bad, folder = [7, 41, 90], tmp_path / "run"
    shards = write_shards(tmp_path / "images", bad)
    skipping = ("data.on_bad_image=skip", "train.num_steps=6", "train.decay_steps=0")
    skipping += ("checkpoint.every_steps=2", "checkpoint.keep_last=3")
    said = train(data.run(shards, folder, *skipping))
    assert "step 4: 2 images skipped: data.shards: " in said
    before = rows(folder)
    named = [row.get("bad_images", []) for row in before]
    places = [
        [int(re.match(rf"data\.shards: {shards}: image of id (\d+): it is no image", one)[1]) for one in of_step]
        for of_step in named
    ]
    assert places == [[7], [], [], [41, 90], [], []]
    losses = [row["loss"] for row in before]
    assert None not in losses
    assert losses[0] != rows(trained)[0]["loss"]

    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "latest").write_text("step_00000002\n")
    said = train(data.run(shards, folder, *skipping), 1)
    assert "training from step 2 to 6" in said
    assert "step 4: 2 images skipped: data.shards: " in said
    after = rows(folder)
    assert [row["num_ranks"] for row in after] == [2, 2, 1, 1, 1, 1]
    assert [row.get("bad_images", []) for row in after] == named
    assert [row["loss"] for row in after] == pytest.approx(losses, rel=1e-5)


def test_a_run_of_bad_images_ends_with_a_checkpoint(data: Data, tmp_path: Path) -> None:
    """Of the step that was mostly bad, which has its row too."""
    shards, folder = write_shards(tmp_path / "images", range(0, NUM_IMAGES - 5)), tmp_path / "run"
    ended = run_script(TRAIN, data.run(shards, folder, "data.on_bad_image=skip"), 2)
    said = "data.on_bad_image: expected most images of a step to be good, got "
    assert_refused(ended, said, " bad ones of 16; the first is data.shards: ", "make the image shards again")
    [row] = rows(folder)
    assert 8 < len(row["bad_images"]) <= 16
    assert latest_step(folder) == row["step"] == 1
    assert not (folder / "requeue").exists()


@pytest.mark.parametrize(("size", "most"), [(1, 1), (2, 1), (3, 1), (16, 8)])
def test_more_than_half_of_a_step_may_not_be_bad(size: int, most: int) -> None:
    """But the only image of a step may."""
    step = SimpleNamespace(config=Config(train=TrainConfig(global_batch_size=size)))
    for num_bad in range(size + 1):
        result = StepResult(
            1.0, {}, 1.0, 1.0, None, False, False, False, False, num_bad, bad_images=["it is torn"] * num_bad
        )
        with pytest.raises(LostDataError, match=f"{num_bad} bad ones of {size}") if num_bad > most else nullcontext():
            TrainingStep.refuse_bad_images(step, result)


# ---------------------------------------------------------------------------------------------------------------------
# Stops


HANGING = """
import pathlib, runpy, sys, time
from cfpretrain.autoencoder import KLAutoencoder
encode, num_calls = KLAutoencoder.encode, 0
def encode_until_it_hangs(self, images_BCYX):
    global num_calls
    num_calls += 1
    while num_calls > 20:
        time.sleep(0.1)
    return encode(self, images_BCYX)
KLAutoencoder.encode = encode_until_it_hangs
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_request_to_stop_while_an_image_is_encoded(data: Data, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [TRAIN, *data.run(data.images, folder, *LONG, "data.num_workers=1")]
    soon = SOON_SAID | {"data.online._CLOSE_SECONDS": 1.0}
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    rank = Rank(HANGING, arguments, launcher_environment(0, 1, free_port()) | environment, constants=soon)
    wait_for_steps(folder, 3, [rank])
    wait_until(lambda: "still waiting for data" in rank.said(), 60, [rank])
    rank.send_signal(signal.SIGTERM)
    [(code, said)] = end([rank])
    assert code == EXIT_REQUEUE, said
    assert_nothing_is_lost(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
def test_an_autoencoder_that_was_exchanged_is_refused(data: Data, trained: Path, tmp_path: Path) -> None:
    other = write_autoencoder(tmp_path / "other", layers_per_block=2)
    _, path, *overrides = data.run(data.images, trained, f"data.autoencoder={other}")
    before, after = (KLAutoencoder.load(folder, "cpu").fingerprint for folder in (data.autoencoder, other))
    refuse(
        configs.load(path, overrides),
        f"^data.autoencoder: expected latents of the autoencoder {before}, as checkpoint .*/step_00000012 was trained "
        f"on, got those of {after}; set data.autoencoder as it was or choose another run.folder$",
    )


def test_latents_do_not_go_on_where_images_were(data: Data, trained: Path) -> None:
    """Their places in the data are those of other shards."""
    _, path, *overrides = data.run(data.latents, trained)
    refuse(configs.load(path, overrides), "data.shards: checkpoint .* was trained on other shards than ")


def test_a_dry_run_says_what_the_shards_hold(data: Data, tmp_path: Path) -> None:
    [ended] = run_script(TRAIN, [*data.run(data.images, tmp_path / "run"), "--dry-run"])
    assert ended.code == 0, ended.err
    assert "shards: 100 images, which fit the config" in ended.out
    wrong = [*data.run(data.images, tmp_path / "run", "data.latent_scale=1.0", "data.crop=rnd"), "--dry-run"]
    assert_refused(run_script(TRAIN, wrong), "data.crop: expected one of adm, random")
    assert not (tmp_path / "run").exists()

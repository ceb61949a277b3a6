"""tools/report.py: what it refuses before it takes any time, and a small run scored whole."""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cfpretrain import build
from cfpretrain import config as configs
from cfpretrain.console import UserError
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import ImagesInfo, image_columns
from tests.processes import run_script
from tests.runs import write_run
from tests.test_config import TINY
from tools import report


def refused(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    override: str,
    images: Path = Path(),
    held_out: Path = Path(),
    guidance: float = 2.0,
) -> str:
    config = configs.load(TINY, [override])
    monkeypatch.setattr(build, "load_run", lambda folder, device: (config, None, 100))
    arguments = argparse.Namespace(
        run=run,
        images=images,
        held_out=held_out,
        num_images=100,
        num_ar_steps=[1],
        num_denoising_steps=10,
        batch_size=10,
        guidance=guidance,
    )
    with pytest.raises(UserError) as raised:
        report.run(arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_latents_are_not_scored_in_false_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = refused(monkeypatch, tmp_path, "model.latent_channels=16")
    assert "expected a run that names its autoencoder (data.autoencoder)" in message


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -1.0])
def test_no_scale_to_guide_by_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guidance) -> None:
    message = refused(monkeypatch, tmp_path, "run.seed=0", guidance=guidance)
    assert message == f"--guidance: expected 0 to 1000 (1: none), got {guidance}"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_damaged_report_is_none(tmp_path: Path, text) -> None:
    (tmp_path / "report.json").write_text(text)
    assert report._read_report(tmp_path) == {}


def write_images(folder: Path, image_size: int, class_names: tuple[str, ...]) -> Path:
    writer = ShardWriter(folder, image_columns(), {})
    writer.begin()
    writer.write(0, [{"id": 0, "label": 0, "caption": "", "image": b""}])
    writer.finish(ImagesInfo(class_names, 1, 0, "lossless", image_size, 1, "a test"), 1)
    return folder


def test_images_of_another_size_or_other_classes_are_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before sampling, which takes minutes."""
    names = tuple(map(str, range(10)))
    fitting = write_images(tmp_path / "fitting", 8, names)
    large = write_images(tmp_path / "large", 16, names)
    other = write_images(tmp_path / "other", 8, (*names[:9], "ten"))
    source = f"data.shards={shards}"
    message = refused(monkeypatch, tmp_path, source, large, fitting)
    assert message == f"--images: expected image_size 8 as of {shards}, got 16"
    message = refused(monkeypatch, tmp_path, source, fitting, other)
    assert message.startswith(f"--held-out: expected class_names {names} as of {shards}, got ('0', ")
    message = refused(monkeypatch, tmp_path, source, fitting, shards)
    assert message.startswith("--held-out: expected shards of images, got latents in")


def write_digits(folder: Path, first: int, count: int) -> Path:
    """Real digits, grey as the demo's, as image shards."""
    data, labels = load_digits(return_X_y=True)
    rows = []
    for i in range(first, first + count):
        file = io.BytesIO()
        Image.fromarray((data[i].reshape(8, 8) * 15.9).astype(np.uint8)).save(file, "PNG")
        rows.append({"id": i, "label": int(labels[i]), "caption": "", "image": file.getvalue()})
    writer = ShardWriter(folder, image_columns(), {})
    writer.begin()
    writer.write(0, rows)
    writer.finish(ImagesInfo(tuple(map(str, range(10))), count, 0, "lossless", 8, 1, "a test"), 1)
    return folder


@pytest.mark.slow
def test_a_run_is_scored_beside_floor_cheat_and_an_untrained_model(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards)
    images, held_out = write_digits(tmp_path / "images", 0, 500), write_digits(tmp_path / "held_out", 500, 200)
    options = ["--num-images", "100", "--num-ar-steps", "1", "2"]
    options += ["--num-denoising-steps", "3", "--batch-size", "50"]
    arguments = [str(run), "--images", str(images), "--held-out", str(held_out), *options]
    first, second = run_script("tools/report.py", arguments, 2)
    assert (first.code, second.code) == (0, 0), first.err
    report = json.loads((run / "report.json").read_text())
    embedded = report["fd_effnet_lite0"]
    # Neither of these models has learned anything.
    assert 0 < embedded["real_against_real"] < min(embedded["value"], embedded["untrained"]) / 2
    assert report["num_embedded"] == 100
    assert f"{embedded['untrained']:.3f}" in first.out
    [again] = run_script("tools/report.py", arguments)
    assert "nothing to do" in again.out
    assert f"{embedded['untrained']:.3f}" in again.out

"""tools/report.py: what it refuses before it takes any time. (`make demo` runs it whole.)"""

import argparse
from pathlib import Path

import pytest

from cfpretrain import build
from cfpretrain import config as configs
from cfpretrain.console import UserError
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import ImagesInfo, image_columns
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

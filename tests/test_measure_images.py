"""tools/measure.py data images: training from image shards beside latent shards of the same images."""

import json
from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.training.encoding_cost import encoding_cost
from tests.image_files import digits, encoded, write_images
from tests.processes import REPOSITORY
from tools import measure as command

AUTOENCODER = REPOSITORY / "configs" / "autoencoders" / "digits"
SIDES = ["loader, from images", "loader, from latents", "decoding alone", "encoding alone"]


def test_digits_and_their_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every rate has its unit, and FLOPs are those of the demo's images."""
    grey = [encoded(image[..., 0]) for image in digits(0, 24, 32)]
    images = write_images(tmp_path / "images", [grey[:16], grey[16:]], 32, channels=1)
    options = ["--shards", images, "--autoencoder", AUTOENCODER, "--no-mirror", "--images", 16, "--batch-size", 8]
    command.main(["data", "images", *map(str, options), "--workers", "0", "--pairs", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert list(found["rates"]) == SIDES
    for name in SIDES:
        assert len(found["rates"][name]) == 2
        assert min(found["rates"][name]) > 0
        [line] = [line for line in lines if line.startswith(f"{name} ")]
        assert " images/s (" in line
    demo = configs.load([str(REPOSITORY / "configs" / "demo.yaml")], [f"data.autoencoder={AUTOENCODER}"])
    assert found["encoding_flops"] == encoding_cost(demo, on_gpu=False).flops
    assert any(line.startswith("encoding, in fp32, 8 at once: ") and "FLOPs an image" in line for line in lines)
    described = {name: found[name] for name in ("store", "image_size", "latent_shape", "precision")}
    assert described == {"store": "lossless", "image_size": 32, "latent_shape": [4, 4, 4], "precision": "fp32"}


def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_images(tmp_path / "images", [[encoded(image[..., 0]) for image in digits(0, 4, 32)]], 32, channels=1)
    options = ["--shards", images, "--autoencoder", AUTOENCODER, "--images", 16, "--batch-size", 8]
    with pytest.raises(SystemExit, match="2"):
        command.main(["data", "images", *map(str, options)])
    assert "--batch-size: expected 1 to 4, got 8" in capsys.readouterr().err


def test_latents_are_no_images(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["data", "images", "--shards", str(shards), "--autoencoder", str(AUTOENCODER)])
    assert f"--shards: expected image shards, got latents in {shards}" in capsys.readouterr().err

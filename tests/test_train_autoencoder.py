"""tools/train_autoencoder.py, on small real digits; and the autoencoder that the demo uses."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import ImagesInfo, image_columns
from cfpretrain.evaluation.reconstruction import reconstruction_error
from cfpretrain.model.autoencoder import WEIGHTS_FILE, KLAutoencoder
from tests.processes import REPOSITORY
from tools import example_images, train_autoencoder

STEPS = ["--channels", "8", "16", "--num-steps", "60", "--batch-size", "32", "--learning-rate", "0.004"]


def write_images(folder: Path, begin: int, num: int, size: int = 8) -> Path:
    """Real 8x8 digits as lossless image shards."""
    pixels, labels = load_digits(return_X_y=True)
    writer = ShardWriter(folder, image_columns(), {})
    writer.begin()
    samples = []
    for i in range(begin, begin + num):
        image = Image.fromarray((pixels[i].reshape(8, 8) * 255 / 16).astype(np.uint8)).resize((size, size))
        file = io.BytesIO()
        image.save(file, "PNG")
        samples.append({"id": i, "label": int(labels[i]), "caption": "", "image": file.getvalue()})
    writer.write(0, samples)
    writer.finish(ImagesInfo(tuple("0123456789"), num, 0, "lossless", size, 1, "scikit-learn"), 1)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training and held-out images, as arguments; tests read them only."""
    folder = tmp_path_factory.mktemp("images")
    return [str(write_images(folder / "train", 0, 400)), "--held-out", str(write_images(folder / "held-out", 400, 100))]


def train(monkeypatch: pytest.MonkeyPatch, out: Path, arguments: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", str(out), *arguments])
    # The first positional argument is the images.
    sys.argv[1], sys.argv[2] = sys.argv[2], sys.argv[1]
    train_autoencoder.main()


def test_it_learns_says_its_error_and_writes_what_it_measured(images, tmp_path, monkeypatch, capsys) -> None:
    train(monkeypatch, tmp_path / "out", [*images, *STEPS])
    said = capsys.readouterr().out
    error = float(re.search(r"held-out images on \[-1, 1\]: ([0-9.]+)", said)[1])
    pixels = torch.from_numpy(load_digits().images[400:500, None]).float() / 16 * 2 - 1
    assert error < 0.5 * float(pixels.var())
    autoencoder = KLAutoencoder.load(tmp_path / "out", "cpu")
    assert f"fingerprint {autoencoder.fingerprint}" in said
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS_FILE).values()} == {torch.float16}
    # Scaled latents have mean 0 and deviation 1, posterior samples of the training set that is.
    digits = torch.from_numpy(load_digits().images[:400, None] * 255 / 16).to(torch.uint8).float() / 255
    mean, log_variance = autoencoder.encode(digits)
    sampled = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    shift, scale = (torch.tensor(values).reshape(-1, 1, 1) for values in (autoencoder.shift, autoencoder.scale))
    seen = (sampled - shift) * scale
    assert seen.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (seen.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    # The error that was printed, from what was written.
    repeated = 2 * (autoencoder.decode((autoencoder.encode(pixels / 2 + 0.5)[0] - shift) * scale) - pixels / 2 - 0.5)
    assert abs(float(repeated.square().mean()) - error) < 0.02 * error
    # The config's lines are those of the folder.
    assert f"data.latent_shift=[{','.join(f'{value:.9g}' for value in autoencoder.shift)}]" in said


def test_the_same_seed_gives_the_same_weights(images, tmp_path, monkeypatch) -> None:
    short = [*images, "--channels", "8", "8", "--num-steps", "3"]
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        train(monkeypatch, tmp_path / name, [*short, "--seed", seed])
    a, b, c = (KLAutoencoder.load(tmp_path / name, "cpu").fingerprint for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / WEIGHTS_FILE).read_bytes() == (tmp_path / "b" / WEIGHTS_FILE).read_bytes()


def test_it_goes_on_from_an_autoencoder(images, tmp_path, monkeypatch, capsys) -> None:
    errors = []
    for name, options in (("a", STEPS), ("b", ["--init", str(tmp_path / "a"), "--num-steps", "20"])):
        train(monkeypatch, tmp_path / name, [*images, *options])
        errors.append(float(re.search(r"held-out images on \[-1, 1\]: ([0-9.]+)", capsys.readouterr().out)[1]))
    a, b = (KLAutoencoder.load(tmp_path / name, "cpu") for name in "ab")
    assert a.fingerprint != b.fingerprint
    assert a.latent_shape((1, 8, 8)) == b.latent_shape((1, 8, 8))
    assert errors[1] < 1.1 * errors[0]  # 20 steps from random weights would be far above


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "no-such-folder"], "--init: "),
        (["--channels", "8", "12"], "--channels: expected multiples of 8"),
        (["--channels", "8", "8", "8", "8", "8"], "--channels: expected levels that halve images of 8 pixels"),
        (["--num-steps", "0"], "--num-steps: expected at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--kl-weight", "nan"], "--kl-weight: expected at least 0, got nan"),
        (["--learning-rate", "0"], "--learning-rate: expected a number between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(images, tmp_path, monkeypatch, capsys, options, message) -> None:
    with pytest.raises(SystemExit) as ended:
        train(monkeypatch, tmp_path / "out", [*images, *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_held_out_images_of_another_size_are_refused(images, tmp_path, monkeypatch, capsys) -> None:
    other = write_images(tmp_path / "other", 0, 3, size=16)
    with pytest.raises(SystemExit):
        train(monkeypatch, tmp_path / "out", [images[0], "--held-out", str(other)])
    assert "--held-out: expected images of shape [1, 8, 8]" in capsys.readouterr().err


def test_the_demo_s_autoencoder_is_small_and_makes_digits_again() -> None:
    """Of digits that it has not seen; the figures are those of its README."""
    folder = REPOSITORY / "configs" / "autoencoders" / "digits"
    assert (folder / WEIGHTS_FILE).stat().st_size < 1_000_000
    autoencoder = KLAutoencoder.load(folder, "cpu")
    assert autoencoder.latent_shape((1, 32, 32)) == (4, 4, 4)
    assert autoencoder.fingerprint in (folder / "README.md").read_text()
    pixels_BYX, labels_B = example_images.read_mnist()
    held_out = example_images.split(labels_B.tolist(), 500 / 5000)
    error = reconstruction_error(autoencoder, torch.from_numpy(pixels_BYX[held_out][:, None]), torch.device("cpu"))
    assert error == pytest.approx(0.0085, abs=2e-4)


def test_help_is_quick_and_clear(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        train_autoencoder.main()
    assert ended.value.code == 0
    assert "image shards" in capsys.readouterr().out

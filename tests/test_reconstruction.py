"""What an autoencoder loses of images: held against errors that are known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder, make_network
from cfpretrain.core.latents import LatentScaling
from cfpretrain.evaluation.pictures import grid_layout
from examples.digits.reconstruction import draw_reconstructions, reconstruction_error
from tests.test_autoencoder import SMALL

CPU = torch.device("cpu")


@pytest.fixture
def images() -> torch.Tensor:
    """More than are encoded at once, and no multiple of that."""
    return torch.randint(256, (130, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_pixels_lose_nothing(images: torch.Tensor) -> None:
    assert reconstruction_error(IdentityAutoencoder(LatentScaling([0.5], [2.0])), images, CPU) < 1e-12


def test_an_autoencoder_that_decodes_all_to_one_grey(images: torch.Tensor) -> None:
    """Its error is the images' mean square around that grey, on [-1, 1]."""
    network = make_network(SMALL, "test")
    last = network.decoder.conv_out
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 0.25)
    found = reconstruction_error(KLAutoencoder(network, "", "test"), images, CPU)
    assert found == pytest.approx(float((images.double() / 127.5 - 1 - 0.25).square().mean()), rel=1e-6)


def test_latents_are_decoded_as_they_were_encoded(images: torch.Tensor) -> None:
    """Shift and scale cancel; what is decoded is the mean of the posterior."""
    torch.manual_seed(0)
    network = make_network(SMALL | {"latents_mean": [1.0, -2.0], "latents_std": [0.5, 4.0]}, "test")
    pixels_BCYX = images.float() / 127.5 - 1
    with torch.no_grad():
        decoded_BCYX = network.decode(network.encode(pixels_BCYX).latent_dist.mean).sample
    expected = float((decoded_BCYX - pixels_BCYX).double().square().mean())
    assert expected > 0.01
    found = reconstruction_error(KLAutoencoder(network, "", "test"), images, CPU)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("num", "num_columns", "num_rows"), [(1, 1, 1), (7, 7, 1), (17, 8, 2)])
def test_originals_stand_above_what_is_made_of_them(
    images: torch.Tensor, num, num_columns, num_rows, tmp_path: Path
) -> None:
    """Crisp: each pixel of an image is a square of picture pixels."""
    network = make_network(SMALL, "test")
    torch.nn.init.zeros_(network.decoder.conv_out.weight)
    torch.nn.init.zeros_(network.decoder.conv_out.bias)
    file = tmp_path / "picture.png"
    draw_reconstructions(file, KLAutoencoder(network, "", "test"), images[:num], CPU, "A title")
    picture = np.asarray(Image.open(file))
    names = ["original", "reconstruction"] * num_rows
    layout = grid_layout(2 * num_rows * num_columns, 8, 8, names, 128, "A title\nand a line")
    assert layout.zoom == 16
    for place in range(num_rows * num_columns):
        row, column = divmod(place, num_columns)
        y, x = layout.corner(2 * row, column)
        expected = images[place, 0].numpy().repeat(16, 0).repeat(16, 1)[..., None].repeat(3, 2)
        assert (picture[y : y + 128, x : x + 128] == expected).all()
        y, x = layout.corner(2 * row + 1, column)
        assert (picture[y : y + 128, x : x + 128] == 128).all()

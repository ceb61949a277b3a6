"""The loss over noise level and AR position."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.core.process import make_process
from cfpretrain.data.online import open_training_data
from examples.digits.loss_map import draw_loss_map, measure_loss_map, read_means
from tests.image_files import encoded, write_images
from tests.latent_shards import config_for
from tests.test_latent_shards import encoding_of, write_autoencoder
from tests.test_latent_shards import write as write_shard
from tests.test_model import small_model
from tests.test_objective import LOSS
from tests.test_pictures import num_near, pixels

LATENTS = seeds.normal(seeds.fold(seeds.key(0, "latents"), torch.arange(40)), (1, 6, 6))
LABELS = torch.arange(40) % 5


@pytest.mark.parametrize(
    ("process", "expected"), [(make_process(), 1), (make_process("flow", flow_times="uniform"), 2)], ids=str
)
def test_a_model_that_predicts_nothing_has_the_same_loss_everywhere(process, expected) -> None:
    model, loss = small_model(random_head=False), dataclasses.replace(LOSS, process=process)
    errors, timestep_edges, position_edges = measure_loss_map(model, loss, LATENTS, LABELS, num_bins=4, passes=50)
    assert errors.shape == (4, 9)
    assert timestep_edges == [0.0, 250.0, 500.0, 750.0, 1000.0]
    assert position_edges == list(range(10))
    # The error of predicting 0 is the square of standard normal noise; of a velocity, of noise and as much image.
    assert np.nanmax(abs(errors / expected - 1)) < 0.5
    assert abs(np.nanmean(errors) / expected - 1) < 0.05


def test_cells_without_samples_are_nan() -> None:
    errors, *_ = measure_loss_map(small_model(), LOSS, LATENTS[:2], LABELS[:2], num_bins=50, passes=1)
    assert np.isnan(errors).any()
    assert np.isfinite(errors).any()


def test_loss_map_shows_each_cell_on_its_side(tmp_path: Path) -> None:
    # Noise to the right, AR position upward: only the cell of high noise and first position is large.
    loss_TS = np.full((4, 2), 1.0)
    loss_TS[3, 0] = 2.0
    draw_loss_map(tmp_path / "map.png", loss_TS, [0, 250, 500, 750, 1000], [0, 8, 16], "A title")
    shown = pixels(tmp_path / "map.png")
    yellow = (np.abs(shown - np.array([253, 231, 37])).max(-1) < 10).nonzero()
    in_map = yellow[1] < 0.87 * shown.shape[1]  # the colour bar is right of it
    assert in_map.sum() > 5000
    assert yellow[0][in_map].min() > 0.4 * shown.shape[0]
    assert yellow[1][in_map].min() > 0.6 * shown.shape[1]


@pytest.mark.parametrize("spread", [1.5, 1000.0])
def test_loss_map_of_small_and_large_ranges_with_gaps(tmp_path: Path, spread: float) -> None:
    loss_TS = np.geomspace(1.0, spread, 60).reshape(10, 6)
    loss_TS[0, 0] = math.nan
    draw_loss_map(tmp_path / "map.png", loss_TS, list(range(11)), list(range(7)), "A title")
    # Values that rise evenly, or by an even factor, spread evenly over the colours only on the fitting scale: on a
    # linear one half of the large range would share the darkest purple.
    shown = pixels(tmp_path / "map.png")
    in_map = shown[:, : int(0.87 * shown.shape[1])]
    dark = (np.abs(in_map - np.array([68, 1, 84])).max(-1) < 24).mean()
    assert 0.01 < dark < 0.15


def test_loss_map_without_any_loss(tmp_path: Path) -> None:
    draw_loss_map(tmp_path / "map.png", np.full((2, 2), math.nan), [0, 1, 2], [0, 1, 2], "A title")
    assert num_near(tmp_path / "map.png", (236, 239, 243)) > 100_000


def test_loss_map_of_one_constant_value(tmp_path: Path) -> None:
    draw_loss_map(tmp_path / "map.png", np.full((1, 1), 0.5), [0, 1], [0, 1], "A title")
    assert pixels(tmp_path / "map.png").shape[1] > 800


def test_latents_of_images_are_those_that_their_latent_shards_hold(tmp_path: Path) -> None:
    """But of a bad image, which training skips too."""
    rng = np.random.default_rng(0)
    photos = [encoded(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)) for _ in range(10)]
    images = write_images(tmp_path / "images", [photos], 16)
    folder = write_autoencoder(tmp_path / "autoencoder")
    latents = write_shard(encoding_of(images, KLAutoencoder.load(folder, "cpu")), tmp_path / "latents", [[0]])
    bad = write_images(tmp_path / "bad", [[*photos[:2], photos[2][:60], *photos[3:]]], 16)

    def means_of(shards: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        config = config_for(shards, autoencoder=str(folder), encode_batch_size=4, **settings)
        return read_means(open_training_data(config), config, 10)

    expected, labels = means_of(latents)
    found, labels_of_images = means_of(images, mirror_prob=0.5)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert expected.std() > 0.01
    assert labels_of_images.tolist() == labels.tolist()
    found, labels_of_images = means_of(bad, on_bad_image="skip")
    good = [0, 1, *range(3, 10)]
    torch.testing.assert_close(found, expected[good], rtol=2e-3, atol=2e-4)
    assert labels_of_images.tolist() == labels[good].tolist()
    with pytest.raises(UserError, match="bad: image of id 6: DALI cannot decode it"):
        means_of(bad)

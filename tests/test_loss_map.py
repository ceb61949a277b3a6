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
from examples.digits.loss_map import draw_loss_map, measure_loss_map, measure_text_losses, read_means
from tests.image_files import encoded, write_images
from tests.latent_shards import config_for
from tests.test_latent_shards import encoding_of, write_autoencoder
from tests.test_latent_shards import write as write_shard
from tests.test_model import small_model
from tests.test_objective import LOSS
from tests.test_pictures import num_near, pixels
from tests.test_tasks import MIXED, text_model, with_tasks

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


def test_a_model_that_knows_nothing_has_the_same_text_loss_everywhere() -> None:
    """And the map of its images, which captions are before or behind, is there as without texts."""
    loss, model, texts = with_tasks(), text_model().float(), [[4 + i % 7] * (i % 5) for i in range(40)]
    with torch.no_grad():
        model.text_head.linear.weight.zero_()
        model.noise_head.linear.weight.zero_()
        model.noise_head.linear.bias.zero_()
    text_loss_T = measure_text_losses(model, loss, LATENTS, LABELS, texts)
    assert len(text_loss_T) == max(map(len, texts)) + 1  # each token, and the end
    assert text_loss_T == pytest.approx([math.log(11)] * 5, rel=1e-5)
    errors, *_ = measure_loss_map(model, loss, LATENTS, LABELS, 2, 20, texts)
    assert abs(np.nanmean(errors) - 1) < 0.05


def test_text_losses_are_those_of_training_by_place() -> None:
    loss, model, texts = with_tasks(), text_model(), [[4 + i % 7] * (1 + i % 5) for i in range(40)]
    text_loss_T = measure_text_losses(model, loss, LATENTS.double(), LABELS, texts)
    behind = dataclasses.replace(MIXED, weights={"image_to_text": 1.0}, image_drop_prob=0.0)
    objective = dataclasses.replace(loss, tasks=behind)
    draws = objective.draw(0, 0, torch.arange(40), LABELS, 9, 4)
    with torch.no_grad():
        terms = objective(model, objective.prepare(LATENTS.double(), draws, (), texts))["text"]
    counts_T = np.array([sum(len(text) + 1 > place for text in texts) for place in range(6)])
    assert (text_loss_T * counts_T).sum() == pytest.approx(float(terms.total), rel=1e-5)
    assert counts_T.sum() == terms.count
    assert text_loss_T.std() > 0.01


def test_loss_map_has_the_losses_of_texts_below(tmp_path: Path) -> None:
    given = np.ones((4, 2)), [0, 250, 500, 750, 1000], [0, 8, 16], "A title"
    draw_loss_map(tmp_path / "map.png", *given)
    draw_loss_map(tmp_path / "both.png", *given, np.array([2.0, 1.0, 0.5]))
    assert len(pixels(tmp_path / "both.png")) > 1.4 * len(pixels(tmp_path / "map.png"))
    blue = (np.abs(pixels(tmp_path / "both.png") - np.array([37, 99, 168])).max(-1) < 10).nonzero()
    assert len(blue[0]) > 5000
    assert blue[0].min() > 0.6 * len(pixels(tmp_path / "both.png"))


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

    def means_of(shards: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        config = config_for(shards, autoencoder=str(folder), encode_batch_size=4, **settings)
        return read_means(open_training_data(config), config, 10)

    expected, labels, captions = means_of(latents)
    found, labels_of_images, captions_of_images = means_of(images, mirror_prob=0.5)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
    assert expected.std() > 0.01
    assert labels_of_images.tolist() == labels.tolist()
    assert captions_of_images == captions
    assert len(set(captions)) == 10
    found, labels_of_images, captions_of_images = means_of(bad, on_bad_image="skip")
    good = [0, 1, *range(3, 10)]
    torch.testing.assert_close(found, expected[good], rtol=2e-3, atol=2e-4)
    assert labels_of_images.tolist() == labels[good].tolist()
    assert captions_of_images == [captions[place] for place in good]
    with pytest.raises(UserError, match="bad: image of id 6: DALI cannot decode it"):
        means_of(bad)

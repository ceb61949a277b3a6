import json
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from examples.digits.summary import LabelledImages, _balanced_order, _halves, summarise


@pytest.fixture(scope="module")
def real() -> tuple[LabelledImages, LabelledImages]:
    """Digits as the demo splits them: the first 1500 to train on, 297 of other writers held out."""
    loaded = load_digits()
    images, labels = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(loaded.target)
    return LabelledImages(images[:1500], labels[:1500]), LabelledImages(images[1500:], labels[1500:])


def noisy(real: LabelledImages, strength: float) -> LabelledImages:
    noise = torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
    return LabelledImages(real.images + strength * noise, real.labels_N)


def test_places_a_generator_between_the_real_images_and_the_cheat(real: tuple[LabelledImages, LabelledImages]) -> None:
    train, held_out = real
    wrong = LabelledImages(train.images, (train.labels_N + 1) % 10)
    report = summarise(train, held_out, {1: train, 4: wrong}, {4: wrong, 1: noisy(train, 0.15)}, num_splits=2)

    assert report["class_accuracy"]["1"] > 0.99
    assert report["class_accuracy"]["4"] < 0.01
    assert list(report["class_accuracy_unguided"]) == ["1", "4"]
    assert 0.94 < report["classifier_accuracy_on_real"] < 1.0
    assert report["num_scored"] == 1500
    assert report["num_compared"] <= 1797 // 2
    frechet, recall = report["frechet_pixel"], report["recall"]
    assert frechet["real_against_real"] < frechet["value"] < frechet["cheat"]
    assert recall["cheat"] < recall["value"]
    assert json.loads(json.dumps(report)) == report


def test_values_of_real_digits_and_cheat_are_those_of_this_protocol(
    real: tuple[LabelledImages, LabelledImages],
) -> None:
    train, held_out = real
    report = summarise(train, held_out, {1: train}, {1: train})
    assert report["frechet_pixel"]["real_against_real"] == pytest.approx(0.25, abs=0.04)
    assert report["frechet_pixel"]["cheat"] == pytest.approx(3.45, abs=0.15)
    assert report["precision"]["real_against_real"] == pytest.approx(0.9, abs=0.03)
    assert report["recall"]["real_against_real"] == pytest.approx(0.9, abs=0.03)
    assert report["recall"]["cheat"] < 0.25


def test_every_set_compared_has_the_same_number_of_images(real: tuple[LabelledImages, LabelledImages]) -> None:
    train, held_out = real
    few = LabelledImages(train.images[:200], train.labels_N[:200])
    report = summarise(train, held_out, {}, {1: few}, num_splits=1)
    assert report["class_accuracy"] == {}
    assert report["num_compared"] == report["num_scored"] == 200
    # With 200 images the bias of the sample size is the larger part of real against real.
    assert report["frechet_pixel"]["real_against_real"] > 0.5


def test_seed_repeats(real: tuple[LabelledImages, LabelledImages]) -> None:
    train, held_out = real
    one, same, other = (summarise(train, held_out, {}, {1: train}, seed, num_splits=1) for seed in (3, 3, 4))
    assert one == same
    assert one["frechet_pixel"] != other["frechet_pixel"]


def test_halves_share_each_class_and_cover_everything() -> None:
    labels = torch.tensor([0] * 7 + [1] * 4 + [5] * 10)
    first, second = _halves(labels, seeds.key(0, "test"))
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(21))
    assert labels[first].bincount().tolist() == [4, 2, 0, 0, 0, 5]
    assert labels[second].bincount().tolist() == [3, 2, 0, 0, 0, 5]


def test_any_beginning_of_a_balanced_order_is_balanced() -> None:
    labels: Tensor = torch.arange(30) // 10
    order, turns = _balanced_order(labels, seeds.key(1, "test"))
    for end in range(1, 31):
        counts = labels[order[:end]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert turns.tolist() == [i // 3 for i in range(30)]


def test_bad_input_is_refused(real: tuple[LabelledImages, LabelledImages]) -> None:
    train, held_out = real
    with pytest.raises(UserError, match="got 3 labels for 4 images"):
        LabelledImages(torch.rand(4, 1, 8, 8), torch.arange(3))
    with pytest.raises(UserError, match="unguided samples"):
        summarise(train, held_out, {1: train}, {})
    broken = LabelledImages(train.images.clone(), train.labels_N)
    broken.images[7, 0, 3, 3] = math.nan
    with pytest.raises(UserError, match="1 of 1500"):
        summarise(train, held_out, {}, {1: broken})

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from cfpretrain.base.console import UserError
from examples.digits import classifier


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(loaded.target)


@pytest.fixture(scope="module")
def judge(digits: tuple[Tensor, Tensor]) -> classifier.Classifier:
    images, labels = digits
    return classifier.fit(images[:1500], labels[:1500])


def test_knows_held_out_digits(judge: classifier.Classifier, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    assert judge.accuracy(images[1500:], labels[1500:]) > 0.94


def test_accuracy_is_the_share_of_labels_met(judge: classifier.Classifier, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits[0][:100], digits[1][:100].clone()
    assert judge.accuracy(images, labels) == 1.0
    labels[:25] = (labels[:25] + 1) % 10
    assert judge.accuracy(images, labels) == 0.75
    assert judge.predict(images).shape == (100,)


def test_noise_is_not_taken_for_the_class_asked_for(judge: classifier.Classifier) -> None:
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert judge.accuracy(noise, torch.arange(500) % 10) < 0.2


def test_scale_of_the_pixels_does_not_matter(judge: classifier.Classifier, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    other = classifier.fit((images[:1500] + 1) * 8, labels[:1500])
    assert (other.predict((images[1500:] + 1) * 8) == judge.predict(images[1500:])).mean() > 0.99


def test_bad_input_is_refused(judge: classifier.Classifier) -> None:
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        classifier.fit(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="got 3 for 4"):
        classifier.fit(torch.rand(4, 1, 8, 8), torch.arange(3))
    with pytest.raises(UserError, match="64 values"):
        judge.predict(torch.rand(2, 1, 4, 4))
    with pytest.raises(UserError, match="at least one"):
        judge.accuracy(torch.rand(0, 1, 8, 8), torch.zeros(0))
    with pytest.raises(UserError, match="1 of 2"):
        judge.predict(torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), math.nan)]))

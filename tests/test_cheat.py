import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, moments_of
from examples.digits.cheat import best_cheat, class_means
from examples.digits.pixels import pixel_features


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    loaded = load_digits()
    return torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(loaded.target)


def gaussian(images: Tensor) -> Gaussian:
    return gaussian_of(moments_of(pixel_features(images, "images")))


def test_is_far_worse_than_real_digits_and_the_best_of_its_kind(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    reference, other = gaussian(images[0::2]), gaussian(images[1::2])
    cheat = best_cheat(images, labels, reference, count=898)
    assert cheat.distance > 5 * frechet_distance(reference, other)
    assert cheat.distance == pytest.approx(frechet_distance(reference, gaussian(cheat.images)))
    for strength in (0.05, 0.15, 0.45, 1.0):
        assert best_cheat(images, labels, reference, 898, strengths=[strength]).distance > cheat.distance
    assert 0.2 <= cheat.strength <= 0.35


def test_images_are_class_means_with_noise_of_the_strength(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    cheat = best_cheat(images, labels, gaussian(images), count=1000, strengths=[0.3])
    assert cheat.images.shape == (1000, 1, 8, 8)
    assert cheat.labels_G.bincount().tolist() == [100] * 10
    _, means = class_means(images, labels)
    torch.testing.assert_close(means[7], images[labels == 7].double().mean(0))
    noise = (cheat.images - means[cheat.labels_G]) / 0.3
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1.0, abs=0.02)


def test_is_a_function_of_the_seed_and_of_each_images_index(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    reference = gaussian(images)

    def made(count: int, seed: int) -> Tensor:
        return best_cheat(images, labels, reference, count, seed, strengths=[0.2]).images

    assert torch.equal(made(50, 1), made(80, 1)[:50])
    assert not torch.equal(made(50, 1), made(50, 2))


def test_classes_need_not_be_numbered_without_gaps() -> None:
    images = torch.tensor([[0.0, 0.0], [2.0, 2.0], [5.0, 7.0]])
    classes, means = class_means(images, torch.tensor([4, 4, 9]))
    assert classes.tolist() == [4, 9]
    assert means.tolist() == [[1.0, 1.0], [5.0, 7.0]]


def test_bad_input_is_refused(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    with pytest.raises(UserError, match="got 0 images"):
        class_means(images[:0], labels[:0])
    with pytest.raises(UserError, match="5 images and 4 labels"):
        class_means(images[:5], labels[:4])
    with pytest.raises(UserError, match="at least one noise strength"):
        best_cheat(images, labels, gaussian(images), 10, strengths=[])
    with pytest.raises(UserError, match="at least 2 images"):
        best_cheat(images, labels, gaussian(images), 1)

"""The cheat: what a score must beat before it says anything.

Each class's mean training image plus white noise is no model of images, yet it has the right means and classes.
With its noise tuned to please the Frechet distance it is a harder baseline than an untrained network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance
from examples.digits.pixels import gaussian_of_pixels

# In units of the pixels: nothing in [-1, 1] has a larger standard deviation than 1. 0 would make copies of the means.
STRENGTHS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)


@dataclass(frozen=True)
class Cheat:
    """The best cheat found: its images and labels, its noise's standard deviation, its Frechet distance."""

    images: Tensor
    labels_G: Tensor
    strength: float
    distance: float


def class_means(images: Tensor, labels_R: Tensor) -> tuple[Tensor, Tensor]:
    """The classes of training images, int64 in rising order, and the mean image of each, float64 [classes, ...]."""
    if len(images) == 0 or len(images) != len(labels_R):
        raise UserError(
            f"cheat: expected at least one training image and a label for each, "
            f"got {len(images)} images and {len(labels_R)} labels"
        )
    classes = sorted(set(labels_R.tolist()))
    means = torch.stack([images[labels_R == number].double().mean(0) for number in classes])
    return torch.tensor(classes), means


def best_cheat(
    train_images: Tensor,
    train_labels_R: Tensor,
    reference: Gaussian,
    count: int,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Cheat:
    """The cheat whose noise strength has the smallest pixel-space Frechet distance to `reference`.

    The strength is tuned on the very reference that the cheat is then judged by: it gets every advantage. Classes
    follow each other in turn. The noise is not clamped to the range of the pixels.

    Args:
        train_images: [R, ...] real images whose class means it uses; pixels in [-1, 1] for the default strengths.
        train_labels_R: int64 [R].
        reference: pixels of the real images to please, as a Gaussian.
        count: images to make, at least 2.
        seed: image i is a function of (seed, i, strength).
        strengths: standard deviations to try, in units of the pixels.
    """
    if not strengths:
        raise UserError("cheat: expected at least one noise strength to try, got none")
    classes, means = class_means(train_images, train_labels_R)
    index_G = torch.arange(count)
    which_G = index_G % len(classes)
    noise = seeds.normal(seeds.fold(seeds.key(seed, "cheat"), index_G), tuple(means.shape[1:])).double()

    def made(strength: float) -> Tensor:
        return means[which_G] + strength * noise

    distances = [frechet_distance(reference, gaussian_of_pixels(made(s), "cheat")) for s in strengths]
    best = min(range(len(strengths)), key=distances.__getitem__)
    return Cheat(made(strengths[best]), classes[which_G], strengths[best], distances[best])

"""Images compared by their pixels: what small ones, such as digits, have for features."""

import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, moments_of


def pixel_features(images: Tensor, name: str) -> Tensor:
    """The pixels of each image as its features, float64 [N, F] on the CPU.

    Args:
        images: [N, ...], any real dtype; the scale of the pixels is the scale of the features.
        name: what the images are, for the message.
    """
    features_NF = images.detach().to("cpu", torch.float64).flatten(1)
    num_broken = int((~features_NF.isfinite().all(dim=1)).sum())
    if num_broken:
        raise UserError(
            f"{name}: expected finite numbers, got NaN or infinity in {num_broken} of {len(features_NF)} images; "
            "the model that made them has diverged, or they were read wrongly"
        )
    return features_NF


def gaussian_of_pixels(images: Tensor, name: str) -> Gaussian:
    """The Gaussian that the Frechet distance compares; arguments as for `pixel_features`."""
    return gaussian_of(moments_of(pixel_features(images, name)))


def frechet_between(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of two sets of images, by their pixels."""
    sets = (("first", first), ("second", second))
    return frechet_distance(*(gaussian_of_pixels(images, f"{name} set of images") for name, images in sets))

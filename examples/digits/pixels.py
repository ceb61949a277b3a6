"""Images compared by their pixels: what small ones, such as digits, have for features."""

import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.frechet import Moments, frechet_distance


def pixel_features(images: Tensor, name: str) -> Tensor:
    """The pixels of each image as its features.

    Args:
        images: [N, ...], any real dtype; the scale of the pixels is the scale of the features.
        name: what the images are, for the message.

    Returns:
        float64 [N, F] on the CPU.

    Raises:
        UserError: a value is NaN or infinite.
    """
    features_NF = images.detach().to("cpu", torch.float64).flatten(1)
    num_broken = int((~features_NF.isfinite().all(dim=1)).sum())
    if num_broken:
        raise UserError(
            f"{name}: expected finite numbers, got NaN or infinity in {num_broken} of {len(features_NF)} images; "
            "the model that made them has diverged, or they were read wrongly"
        )
    return features_NF


def frechet_between(first: Tensor, second: Tensor) -> float:
    """`frechet_distance` between two sets of images, by their pixels; arguments as for `pixel_features`."""
    return frechet_distance(
        Moments.of(pixel_features(first, "first set of images")).gaussian,
        Moments.of(pixel_features(second, "second set of images")).gaussian,
    )

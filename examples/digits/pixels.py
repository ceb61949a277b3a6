"""Small images, such as digits: read whole into memory, and compared by their pixels."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.data.images import read_image
from cfpretrain.data.interleaved import refuse_interleaved
from cfpretrain.data.shards import ImagesInfo, Shards
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, moments_of


def read_all_images(folder: str | Path, key: str) -> tuple[Tensor, Tensor]:
    """Reads a whole folder of lossless image shards into memory: images_BCYX uint8, labels_B int64.

    Args:
        folder: of image shards.
        key: config key or option that gave it, for messages.
    """
    shards = Shards(folder, key)
    info = shards.info
    if not isinstance(info, ImagesInfo) or info.store != "lossless":
        got = f"images stored as {info.store}" if isinstance(info, ImagesInfo) else "latents"
        raise UserError(
            f"{key}: expected shards of images, written by tools/make_shards.py with --store lossless, got {got} in "
            f"{folder}"
        )
    refuse_interleaved(info.most_segments, f"{key}: {folder}")
    images_BCYX = np.empty((len(shards), info.channels, info.image_size, info.image_size), np.uint8)
    labels_B = np.empty(len(shards), np.int64)
    for i in range(len(shards)):
        sample = shards.sample(i)
        pixels = np.asarray(read_image(sample["image"], info.channels == 1))
        images_BCYX[i] = pixels.reshape(info.image_size, info.image_size, info.channels).transpose(2, 0, 1)
        labels_B[i] = sample["label"]
    return torch.from_numpy(images_BCYX), torch.from_numpy(labels_B)


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

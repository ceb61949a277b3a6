"""Image and mask files -> tokens and regions, for editing, captions and samples that go on."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, say
from cfpretrain.core.latents import patchify
from cfpretrain.core.regions import mask_region, parse_region
from cfpretrain.data.images import (
    BLACK,
    WHITE,
    Colour,
    RejectedImageError,
    centre_crop,
    describe_changes,
    read_file,
    read_image,
)
from cfpretrain.run.build import Autoencoder, make_scaling

_WHITE = 128  # of 255; from here on a mask's pixel is taken for white


def read_crop(
    path: Path, image_size: int, is_grey: bool, background: Colour = WHITE, option: str = "--image"
) -> tuple[Tensor, tuple[int, int]]:
    """ADM's centre crop of an image file as viewers show it, turned upright by its EXIF; says what it loses.

    Args:
        path: of any kind and size that shards are made of.
        image_size: pixels a side of the crop.
        is_grey: of one channel instead of RGB.
        background: behind transparent pixels.
        option: that gave it, for messages.

    Returns:
        float32 [1, C, Y, X] in [0, 1], and (width, height) of the file.
    """
    try:
        changes: Counter[str] = Counter()
        image = read_image(read_file(path), is_grey, background, is_upright=True, changes=changes)
        for line in describe_changes(changes, background, image_size):
            say(f"{option}: {line}")
        pixels = np.asarray(centre_crop(image, image_size), np.float32) / 255
    except RejectedImageError as error:
        raise UserError(f"{option}: {path}: {error}; give an image file such as PNG or JPEG") from error
    return torch.from_numpy(pixels.reshape(1, image_size, image_size, -1)).permute(0, 3, 1, 2), image.size


def image_channels(config: Config, autoencoder: Autoencoder) -> int:
    """Of the images that become a model's latents."""
    if isinstance(autoencoder, KLAutoencoder):
        return autoencoder.image_channels
    return config.model.latent_channels


def read_tokens(
    paths: Sequence[Path],
    config: Config,
    autoencoder: Autoencoder,
    device: torch.device,
    background: Colour = WHITE,
    option: str = "--image",
) -> tuple[Tensor, Tensor]:
    """Image files -> crops as of `read_crop` [B, C, Y, X], and their tokens as of `encode_tokens` [B, L, P]."""
    size, is_grey = config.model.latent_size * autoencoder.stride, image_channels(config, autoencoder) == 1
    crops_BCYX = torch.cat([read_crop(path, size, is_grey, background, option)[0] for path in paths])
    return crops_BCYX, encode_tokens(config, autoencoder, crops_BCYX.to(device))


def encode_tokens(config: Config, autoencoder: Autoencoder, images_BCYX: Tensor) -> Tensor:
    """Images in [0, 1] -> tokens as the model sees them, of the posterior's mean: float32 [B, L, P]."""
    mean_BCYX, _ = autoencoder.encode(images_BCYX)
    return patchify(make_scaling(config).to_model(mean_BCYX), config.model.patch_size)


def read_region(text: str, grid: int, image_size: int, file_size: tuple[int, int] | None) -> Tensor:
    """The region that an option gives: bool [L].

    Args:
        text: as for `regions.parse_region`, or "mask:FILE", a picture that is white where the image is generated again.
        grid: rows = columns of the token grid.
        image_size: pixels a side of the image that is edited.
        file_size: (width, height) of the file it was cropped from; a mask of that size is cropped too. None: no file.
    """
    try:
        if not text.startswith("mask:"):
            return parse_region(text, grid)
        return mask_region(
            _read_mask(Path(text.removeprefix("mask:")).expanduser(), image_size, file_size), grid, image_size
        )
    except ValueError as error:
        other = "" if text.startswith("mask:") else "; a mask is given as mask:FILE"
        raise UserError(f"--region: {error}{other}") from error


def _read_mask(path: Path, image_size: int, file_size: tuple[int, int] | None) -> Tensor:
    """bool [Y, X]."""
    try:
        # What is transparent stays as it is, whatever colour an editor keeps below.
        mask = read_image(read_file(path), is_grey=True, background=BLACK, is_upright=True)
        if mask.size == file_size:
            mask = centre_crop(mask, image_size)
    except RejectedImageError as error:
        raise ValueError(f"{path}: {error}; give a mask as a PNG, white where the image is generated again") from error
    return torch.from_numpy(np.asarray(mask) >= _WHITE)

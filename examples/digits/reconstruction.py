"""What an autoencoder alone loses of an image: the floor below the errors of everything that is decoded with it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cfpretrain.autoencoder import PIXELS_AT_ONCE
from cfpretrain.core.latents import LatentScaling
from cfpretrain.evaluation import pictures
from cfpretrain.run.build import Autoencoder

_BATCH = 100
_MOST_COLUMNS = 8
_CELL_SIZE = 128  # picture pixels a side, about


def reconstruction_error(
    autoencoder: Autoencoder,
    images_BCYX: Tensor,
    device: torch.device,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean squared error on [-1, 1] of uint8 images decoded from the means of their posteriors.

    `on_batch` is called before each batch; an error that it raises ends the measurement.
    """
    total = 0.0
    for begin in range(0, len(images_BCYX), _BATCH):
        on_batch()
        pixels_BCYX = images_BCYX[begin : begin + _BATCH].to(device).float() / 255
        decoded_BCYX = reconstruct(autoencoder, pixels_BCYX)
        total += float((2 * (decoded_BCYX - pixels_BCYX)).double().square().sum())
    return total / images_BCYX.numel()


def reconstruct(autoencoder: Autoencoder, images_BCYX: Tensor) -> Tensor:
    """Images in [0, 1] decoded from the means of their posteriors, not clamped; on the autoencoder's device."""
    num_at_once = max(1, PIXELS_AT_ONCE // (images_BCYX.shape[-2] * images_BCYX.shape[-1]))
    mean_BCYX = torch.cat([autoencoder.encode(part_BCYX)[0] for part_BCYX in images_BCYX.split(num_at_once)])
    return autoencoder.decode(LatentScaling(autoencoder.shift, autoencoder.scale).to_model(mean_BCYX))


def draw_reconstructions(
    file: Path, autoencoder: Autoencoder, images_BCYX: Tensor, device: torch.device, title: str
) -> None:
    """Writes rows of originals, each above their reconstructions, as PNG; their mean squared error follows the title.

    Args:
        file: the PNG.
        images_BCYX: uint8, at least one; those that do not fill rows of 8 are left out.
    """
    num_columns = min(len(images_BCYX), _MOST_COLUMNS)
    num_rows = len(images_BCYX) // num_columns
    pixels_BCYX = images_BCYX[: num_rows * num_columns].to(device).float() / 255
    made_BCYX = reconstruct(autoencoder, pixels_BCYX)
    error = float((2 * (made_BCYX - pixels_BCYX)).double().square().mean())
    pairs = [rows.split(num_columns) for rows in (pixels_BCYX, made_BCYX)]
    pictures.sample_grid(
        file,
        torch.cat([row for pair in zip(*pairs, strict=True) for row in pair]),
        ["original", "reconstruction"] * num_rows,
        f"{title}\nmean squared error of these on [-1, 1]: {error:.5f}",
        (0.0, 1.0),
        _CELL_SIZE,
    )

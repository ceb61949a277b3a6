"""What an autoencoder alone loses of an image: the floor below the errors of everything that is decoded with it."""

import torch
from torch import Tensor

from cfpretrain.build import Autoencoder
from cfpretrain.model.autoencoder import LatentScaling

_BATCH = 100


def reconstruction_error(autoencoder: Autoencoder, images_BCYX: Tensor, device: torch.device) -> float:
    """Mean squared error on [-1, 1] of images decoded from the means of their posteriors.

    Args:
        autoencoder: on `device`.
        images_BCYX: uint8.
        device: where to compute.
    """
    scaling, total = LatentScaling(autoencoder.shift, autoencoder.scale), 0.0
    for begin in range(0, len(images_BCYX), _BATCH):
        pixels_BCYX = images_BCYX[begin : begin + _BATCH].to(device).float() / 255
        mean_BCYX, _ = autoencoder.encode(pixels_BCYX)
        decoded_BCYX = autoencoder.decode(scaling.to_model(mean_BCYX))
        total += float((2 * (decoded_BCYX - pixels_BCYX)).double().square().sum())
    return total / images_BCYX.numel()

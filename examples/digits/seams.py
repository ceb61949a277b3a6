"""Whether an edit shows a seam."""

import math

import torch
from torch import Tensor


def pixels_of(region_L: Tensor, images_BCYX: Tensor) -> Tensor:
    """The pixels of such images that a region's tokens stand for: bool [Y, X]."""
    grid, (Y, X) = math.isqrt(len(region_L)), images_BCYX.shape[2:]
    return region_L.unflatten(0, (grid, grid)).repeat_interleave(Y // grid, 0).repeat_interleave(X // grid, 1)


def seam_steps(images_BCYX: Tensor, region_L: Tensor) -> Tensor:
    """The mean absolute step between two pixels that touch across the border of a region: float32 [B].

    Where it is as large as at the same places of unedited images, there is no seam to see.

    Args:
        images_BCYX: float.
        region_L: bool, some tokens but not all.
    """
    mask_1YX = pixels_of(region_L, images_BCYX)[None].int()
    down, right = (images_BCYX.diff(dim=dim).abs().mean(1)[:, mask_1YX.diff(dim=dim - 1)[0] != 0] for dim in (2, 3))
    return torch.cat([down, right], 1).float().mean(1)

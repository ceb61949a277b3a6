"""Latents as tokens, and their scale.

L patches of a latent grid are the tokens of an image, in raster order until `take_tokens` orders them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class LatentScaling:
    """z = (raw - shift) * scale between raw latents and those that the transformer sees, each one value or C."""

    def __init__(self, shift: Sequence[float], scale: Sequence[float]) -> None:
        self.shift, self.scale = tuple(shift), tuple(scale)
        self._shift_C11 = torch.tensor(shift, dtype=torch.float32).reshape(-1, 1, 1)
        self._scale_C11 = torch.tensor(scale, dtype=torch.float32).reshape(-1, 1, 1)

    def to_model(self, raw_BCYX: Tensor) -> Tensor:
        """Raw latents -> what the transformer sees, float32."""
        device = raw_BCYX.device
        return (raw_BCYX.float() - self._shift_C11.to(device)) * self._scale_C11.to(device)

    def from_model(self, latents_BCYX: Tensor) -> Tensor:
        """What the transformer makes -> raw latents, float32."""
        device = latents_BCYX.device
        return latents_BCYX.float() / self._scale_C11.to(device) + self._shift_C11.to(device)


def patchify(latents_BCYX: Tensor, patch_size: int) -> Tensor:
    """Latents -> tokens in raster order, each flattened as (row in patch, column in patch, channel): [B, L, P]."""
    B, C, Y, X = latents_BCYX.shape
    p = patch_size
    patches = latents_BCYX.reshape(B, C, Y // p, p, X // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, (Y // p) * (X // p), p * p * C)


def unpatchify(tokens_BLP: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` on a square grid: [B, C, Y, X]."""
    B, L, P = tokens_BLP.shape
    p, grid = patch_size, math.isqrt(L)
    patches = tokens_BLP.reshape(B, grid, grid, p, p, P // (p * p))
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, grid * p, grid * p)


def take_tokens(tokens_BLP: Tensor, index_BN: Tensor) -> Tensor:
    """The tokens at the given indices: [B, N, P]."""
    return tokens_BLP.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, tokens_BLP.shape[2]))

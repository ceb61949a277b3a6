"""Pixels <-> latents. The shift and scale of latents are applied here and nowhere else.

Raw latents are what an autoencoder makes and what shards hold; the transformer sees (raw - shift) * scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cfpretrain.console import UserError


class LatentScaling:
    """The shift and scale, per channel, between raw latents and those that the transformer sees.

    Args:
        shift: one value, or one for each latent channel.
        scale: likewise; not zero.
    """

    def __init__(self, shift: Sequence[float], scale: Sequence[float]) -> None:
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


def are_pixels(num_channels: int) -> bool:
    """Whether latents of so many channels are taken for pixels; others are those of an autoencoder."""
    return num_channels in (1, 3)


class IdentityAutoencoder:
    """Pixels as latents: raw latents are pixel values in [0, 1]."""

    def __init__(self, scaling: LatentScaling) -> None:
        self._scaling = scaling

    def decode(self, latents_BCYX: Tensor) -> Tensor:
        """Latents of the transformer -> images, 0 black and 1 white, not clamped: float32 [B, 1 or 3, Y, X].

        Raises:
            UserError: the latents are no pixels (`are_pixels`).
        """
        num_channels = latents_BCYX.shape[1]
        if not are_pixels(num_channels):
            raise UserError(
                f"model.latent_channels: expected 1 or 3 where latents are pixels, got {num_channels}, the latents of "
                "an autoencoder that is not at hand; decode them to images with that autoencoder"
            )
        return self._scaling.from_model(latents_BCYX)

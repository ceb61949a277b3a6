"""The one place of shift and scale."""

import pytest
import torch

from cfpretrain.console import UserError
from cfpretrain.model.autoencoder import IdentityAutoencoder, LatentScaling


def test_shift_and_scale_per_channel_and_back() -> None:
    scaling = LatentScaling([1.0, -2.0], [0.5, 4.0])
    raw = torch.tensor([[[[3.0]], [[-1.0]]]])
    assert scaling.to_model(raw).flatten().tolist() == [1.0, 4.0]
    assert torch.equal(scaling.from_model(scaling.to_model(raw)), raw)


def test_one_value_serves_all_channels() -> None:
    raw = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(LatentScaling([0.0], [0.2325]).to_model(raw), raw * 0.2325)


def test_identity_decodes_to_pixels() -> None:
    autoencoder = IdentityAutoencoder(LatentScaling([0.5], [2.0]))
    latents = torch.tensor([[[[-1.0, 0.0, 1.0, 2.0]]]])
    assert autoencoder.decode(latents).flatten().tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("num_channels", [2, 4, 16])
def test_latents_of_another_autoencoder_are_refused(num_channels) -> None:
    """Nothing else may be scored in silence."""
    autoencoder = IdentityAutoencoder(LatentScaling([0.0], [0.2325]))
    with pytest.raises(UserError, match=rf"model\.latent_channels: expected 1 or 3 .*got {num_channels}"):
        autoencoder.decode(torch.zeros(2, num_channels, 4, 4))

"""The one place of shift and scale."""

import torch

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


def test_latents_of_another_autoencoder_become_false_colours() -> None:
    latents = torch.zeros(2, 16, 4, 4)
    latents[0, 1] = 3.0
    latents[0, 5] = 99.0
    images = IdentityAutoencoder(LatentScaling([0.0], [0.2325])).decode(latents)
    assert images.shape == (2, 3, 4, 4)
    assert images[0, :, 0, 0].tolist() == [0.5, 1.0, 0.5]
    assert (images[1] == 0.5).all()

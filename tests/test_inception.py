"""The Inception network against torch-fidelity's, on the same random weights and real photographs."""

from pathlib import Path

import pytest
import torch
from skimage import data
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from cfpretrain.evaluation.inception import Inception, resize_like_tensorflow_1
from tests.closeness import disagreement


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights under which activations neither vanish nor grow, by the network's names."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in Inception().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("conv.weight"):
            value = noise * (2 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            value = 1 + 0.1 * noise.abs()
        elif value.is_floating_point():
            value = 0.1 * noise
        weights[name] = value
    return weights


def photographs(size: int) -> Tensor:
    """Real ones, uint8 [2, 3, size, size]."""
    crops = [torch.from_numpy(image[:size, :size].copy()) for image in (data.astronaut(), data.chelsea())]
    return torch.stack(crops).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("size", [32, 256])
def test_features_equal_torch_fidelitys(tmp_path: Path, size: int) -> None:
    weights, file = random_weights(), tmp_path / "weights.pth"
    torch.save(weights, file)
    theirs = FeatureExtractorInceptionV3("ours", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    blocks = {}
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda *call: blocks.update(spatial=call[2]))
    ours = Inception()
    ours.load_state_dict(weights)
    images = photographs(size)
    expected_pooled, expected_logits = theirs(images)
    pooled, spatial, logits = ours(images)

    assert disagreement(pooled, expected_pooled) < 1e-5
    assert disagreement(logits, expected_logits) < 1e-5
    assert spatial.shape == (2, 2023)
    by_place = blocks["spatial"][:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    assert disagreement(spatial, by_place) < 1e-5
    assert float(pooled.std()) > 0.01, "the comparison would say nothing of features that are all alike"


def test_the_resize_reads_pixels_where_tensorflow_1_did() -> None:
    row = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
    # Output i of 8 is read at i / 2; behind the last pixel, the last pixel counts.
    assert resize_like_tensorflow_1(row, 8)[0, 0, 0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert resize_like_tensorflow_1(row, 2)[0, 0, 0].tolist() == [0, 20]

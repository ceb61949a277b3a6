"""The Inception network against a golden: features of real photographs under random weights.

The golden was made by an implementation of our own, which agreed with torch-fidelity's to 1e-5.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from skimage import data
from torch import Tensor

from cfpretrain.evaluation.inception import Inception
from tests.closeness import disagreement

GOLDEN = Path(__file__).with_name("golden") / "inception.safetensors"


def random_weights(seed: int = 0) -> dict[str, Tensor]:
    """Weights under which activations neither vanish nor grow, by the network's names."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in sorted(Inception().state_dict().items()):
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


@pytest.mark.parametrize("size", [32, 288])
def test_features_equal_the_golden(size: int) -> None:
    expected = load_file(GOLDEN)
    network = Inception()
    network.load_state_dict(random_weights())
    for name, found in zip(("pooled", "spatial", "logits"), network(photographs(size)), strict=True):
        assert disagreement(found, expected[f"{size}/{name}"]) < 1e-5, name
    pooled = expected[f"{size}/pooled"]
    assert float(pooled.std()) > 0.01, "the comparison would say nothing of features that are all alike"

"""What encoding images costs: equal to what real encoding takes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cfpretrain.autoencoder import KLAutoencoder, make_network, write_folder
from cfpretrain.base.config import Config, DataConfig, EngineConfig, ModelConfig
from cfpretrain.base.console import UserError
from cfpretrain.training.encoding_cost import MemoryTracker, encoding_cost

# With attention where latents are, and between.
ATTENTIVE = {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
IMAGE_SIZE, BATCH_SIZE = 64, 3


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "attentive"
    write_folder(folder, make_network(ATTENTIVE, "the test"))
    return folder


def encoding_config(autoencoder: Path | str, precision: str, channels: int = 4) -> Config:
    return Config(
        model=ModelConfig(latent_size=IMAGE_SIZE // 4, latent_channels=channels),
        data=DataConfig(autoencoder=str(autoencoder), encode_batch_size=BATCH_SIZE),
        engine=EngineConfig(precision=precision),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cost_of_encoding_is_that_of_real_encoding(autoencoder: Path, precision: str) -> None:
    """FLOPs are equal, memory is within 1 %: what operations allocate inside themselves counts on neither side."""
    cost = encoding_cost(encoding_config(autoencoder, precision), on_gpu=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    real = KLAutoencoder.load(autoencoder, "cpu", dtype)
    assert cost.weights == sum(parameter.nbytes for parameter in real.network.parameters())
    pixels_BYXC = torch.zeros(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    flops = 0

    def count_convolution(module: nn.Conv2d, _: object, result: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * result[0].numel() * module.weight[0].numel()

    def count_attention(module: nn.Module, given: tuple[torch.Tensor], _: object) -> None:
        """Queries, keys, values and the result: four square matrices; and two products of all pairs of places."""
        nonlocal flops
        _, width, height, columns = given[0].shape
        places = height * columns
        flops += 4 * 2 * places * width**2 + 2 * 2 * places**2 * width

    for module in real.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count_convolution)
        if type(module).__name__ == "Attention":
            module.register_forward_hook(count_attention)
    with MemoryTracker() as tracker:
        images_BCYX = pixels_BYXC.permute(0, 3, 1, 2).contiguous().float() / 255
        held = tracker.held
        real.encode(images_BCYX)
        weights = tracker.held - held
    assert cost.flops == flops
    assert cost.working == pytest.approx(tracker.peak - weights, rel=0.01)
    assert cost.num_bytes == cost.weights + cost.working


def test_a_cpu_encodes_in_fp32(autoencoder: Path) -> None:
    config = encoding_config(autoencoder, "bf16")
    on_cpu, on_gpu = (encoding_cost(config, on_gpu=on) for on in (False, True))
    assert on_cpu.flops == on_gpu.flops
    assert on_cpu.weights == 2 * on_gpu.weights
    assert on_cpu == encoding_cost(encoding_config(autoencoder, "fp32"), on_gpu=True)


def test_pixels_as_latents_cost_no_flops() -> None:
    """They are floats in several steps, beside the bytes that were decoded."""
    cost = encoding_cost(encoding_config("", "bf16", channels=3), on_gpu=True)
    assert (cost.flops, cost.weights) == (0, 0)
    assert cost.working == 17 * BATCH_SIZE * 3 * (IMAGE_SIZE // 4) ** 2


def test_an_autoencoder_for_other_images_has_no_cost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.autoencoder: expected an autoencoder's folder"):
        encoding_cost(encoding_config(tmp_path, "bf16"), on_gpu=True)


def test_the_tracker_counts_live_storages_once() -> None:
    with MemoryTracker() as tracker:
        first = torch.zeros(1000)
        views = first[10:].view(-1, 2), first.detach()
        assert tracker.held == 4000
        second = first + 1
        assert tracker.held == tracker.peak == 8000
        del first, views
        assert tracker.held == 4000
        tracker.peak = tracker.held
        second = second * 2
        assert (tracker.held, tracker.peak) == (4000, 8000)
    assert len(second) == 1000

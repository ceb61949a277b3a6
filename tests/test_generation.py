"""Images made by all ranks together: the same on any number of ranks, surplus images masked."""

import pytest
import torch
from torch import Tensor

from cfpretrain import config as configs
from cfpretrain import noise, runtime
from cfpretrain.console import UserError
from cfpretrain.evaluation.generation import (
    GenerationSettings,
    decode_to_look_at,
    generate_for,
    generate_images,
    grid_title,
)
from tests.processes import run_in_processes
from tests.test_config import TINY
from tests.test_transformer import small_model

LABELS = [0, 1, 2, 3, 4, 0, 1]


def make(settings: GenerationSettings) -> Tensor:
    schedule = noise.linear_schedule()
    return generate_images(small_model(), lambda x: x / 2 + 0.5, LABELS, settings, schedule, 9, 2, torch.device("cpu"))


def make_on_ranks(settings: GenerationSettings) -> tuple[list[list[float]], int]:
    torch.set_num_threads(1)
    runtime.start(torch.device("cpu"))
    calls: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if type(module).__name__ == "CausalFusion" else None
    )
    images = make(settings)
    handle.remove()
    runtime.stop()
    return images.flatten(1).tolist(), len(calls)


@pytest.mark.parametrize("num_ar_steps", [3])
def test_images_are_equal_on_any_number_of_ranks(num_ar_steps) -> None:
    settings = GenerationSettings(num_ar_steps, num_denoising_steps=3, guidance=2.0, batch_size=2, seed=5)
    by_world = [run_in_processes(make_on_ranks, world_size, settings) for world_size in (1, 2, 3)]
    one = by_world[0][0][0]
    assert len(one) == len(LABELS)
    for ranks in by_world:
        images, calls = zip(*ranks, strict=True)
        assert all(made == one for made in images)
        # Under ZeRO-3 every rank must run as many forwards as any other.
        assert len(set(calls)) == 1


def test_batch_size_changes_rounding_only() -> None:
    one, other = (make(GenerationSettings(2, 3, 1.0, batch_size, 5)) for batch_size in (1, 7))
    assert one.shape == (7, 1, 6, 6)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_order_of_tokens_is_the_models() -> None:
    """Of three AR steps in raster order, the first makes the first row of tokens, from the noise of the same tokens."""
    settings = GenerationSettings(3, num_denoising_steps=3, guidance=1.0, batch_size=7, seed=5)
    seen: list[Tensor] = []

    def spy(model, parts, intervals=None, cache=None):
        seen.extend(part.noised_positions_BN for part in parts if hasattr(part, "noised_positions_BN"))

    model = small_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: spy(module, *args, **kwargs), with_kwargs=True)
    schedule = noise.linear_schedule()
    generate_images(model, lambda x: x, LABELS, settings, schedule, 9, 2, torch.device("cpu"), "raster")
    made = [positions[0].tolist() for positions in seen if positions.shape[1]]
    assert made == [row for row in ([0, 1, 2], [3, 4, 5], [6, 7, 8]) for _ in range(3)]


@pytest.mark.parametrize(("num_channels", "note"), [(1, ""), (3, ""), (16, "false colours")])
def test_a_picture_says_whether_its_colours_are_true(num_channels, note) -> None:
    config = configs.load(TINY, [f"model.latent_channels={num_channels}"])
    decode, said = decode_to_look_at(config, torch.device("cpu"))
    assert said == note
    assert decode(torch.zeros(2, num_channels, 8, 8)).shape == (2, 3 if num_channels > 1 else 1, 8, 8)
    settings = GenerationSettings(4, 25, 2.0, 2, 5)
    assert (f"denoising steps 25, {note}" if note else "denoising steps 25") in grid_title(3, settings, said)


def test_images_for_scores_are_decoded_or_refused() -> None:
    config = configs.load(TINY, ["model.latent_channels=4", "model.latent_size=3", "model.patch_size=1"])
    settings, cpu = GenerationSettings(1, 2, 1.0, 2, 5), torch.device("cpu")
    with pytest.raises(UserError, match=r"model\.latent_channels"):
        generate_for(config, small_model(), [0], settings, cpu)
    decode, _ = decode_to_look_at(config, cpu)
    assert generate_for(config, small_model(), [0], settings, cpu, decode).shape == (1, 3, 3, 3)

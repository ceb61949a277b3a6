"""Images made by all ranks together: the same on any number of ranks, surplus images masked; edits; trajectories."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.regions import parse_region
from cfpretrain.core.sampler import Guidance
from cfpretrain.evaluation.generation import (
    GenerationSettings,
    ImageGenerator,
    decode_to_look_at,
    grid_title,
)
from tests.closeness import disagreement
from tests.processes import run_in_processes
from tests.test_config import TINY
from tests.test_model import small_model

LABELS = [0, 1, 2, 3, 4, 0, 1]
CPU = torch.device("cpu")


def small_config(*overrides: str) -> Config:
    """Of `small_model`: 9 tokens of 2 x 2 pixels."""
    return configs.load(TINY, ["model.latent_size=6", "model.num_classes=5", *overrides])


def settings_of(num_ar_steps: int = 2, batch_size: int = 2, guidance: float = 1.0, **others) -> GenerationSettings:
    return GenerationSettings(equal_sizes(9, num_ar_steps), 3, Guidance(guidance), batch_size, seed=5, **others)


def make(settings: GenerationSettings) -> Tensor:
    return ImageGenerator(small_config(), small_model(), settings, CPU).images(LABELS)


def make_on_ranks(settings: GenerationSettings) -> tuple[list[list[float]], int, list[list[int]]]:
    """The images, the forwards of this rank, and the ids that it gives out."""
    torch.set_num_threads(1)
    runtime.start(CPU)
    calls: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(1) if type(module).__name__ == "CausalFusion" else None
    )
    images = make(settings)
    handle.remove()
    generator = ImageGenerator(small_config(), small_model(), settings, CPU)
    ids = [ids.tolist() for ids, _ in generator.batches(LABELS)]
    runtime.stop()
    return images.flatten(1).tolist(), len(calls), ids


@pytest.mark.parametrize("num_ar_steps", [3])
def test_images_are_equal_on_any_number_of_ranks(num_ar_steps) -> None:
    settings = settings_of(num_ar_steps, guidance=2.0)
    by_world = [run_in_processes(make_on_ranks, world_size, settings) for world_size in (1, 2, 3)]
    one = by_world[0][0][0]
    assert len(one) == len(LABELS)
    for ranks in by_world:
        images, calls, ids = zip(*ranks, strict=True)
        assert all(made == one for made in images)
        # Under ZeRO-3 every rank must run as many forwards as any other.
        assert len(set(calls)) == 1
        # Each image is given out once, and no surplus.
        assert sorted(i for of_rank in ids for batch in of_rank for i in batch) == list(range(len(LABELS)))


def test_batch_size_changes_rounding_only() -> None:
    one, other = (make(settings_of(batch_size=batch_size)) for batch_size in (1, 7))
    assert one.shape == (7, 1, 6, 6)
    assert disagreement(one, other) < 1e-5


def test_batches_can_be_made_alone() -> None:
    """What is made again after a kill is bit by bit what would have been."""
    settings = settings_of(batch_size=3)
    whole, generator = make(settings), ImageGenerator(small_config(), small_model(), settings, CPU)
    again = list(generator.batches(LABELS, numbers=[2, 0]))
    assert [ids.tolist() for ids, _ in again] == [[6], [0, 1, 2]]
    for ids, images in again:
        assert torch.equal(images, whole[ids])
    assert list(generator.batches(LABELS, numbers=[])) == []


def test_every_denoising_step_is_said() -> None:
    settings, before, steps = settings_of(3, batch_size=4), runtime.num_ticks(), []
    ImageGenerator(small_config(), small_model(), settings, CPU).images(LABELS, on_step=lambda: steps.append(1))
    assert len(steps) == runtime.num_ticks() - before == 2 * 3 * 3  # batches, AR steps, denoising steps


def test_the_order_of_tokens_is_the_models() -> None:
    """Of three AR steps in raster order, the first makes the first row of tokens, from the noise of the same tokens."""
    settings = settings_of(3, batch_size=7)
    seen: list[Tensor] = []

    def spy(model, segments, *_):
        seen.extend(one.positions_BL for one in segments if one.noised is not None)

    model = small_model()
    model.register_forward_pre_hook(lambda module, args, kwargs: spy(module, *args, **kwargs), with_kwargs=True)
    ImageGenerator(small_config("order.token_order=raster"), model, settings, CPU).images(LABELS)
    made = [positions[0].tolist() for positions in seen if positions.shape[1]]
    assert made == [row for row in ([0, 1, 2], [3, 4, 5], [6, 7, 8]) for _ in range(3)]


def test_sizes_solver_and_spacing_reach_the_sampler() -> None:
    plain = make(settings_of(2, 7))
    for change in (
        {"ar_step_sizes": [1, 8]},
        {"solver": "ddim"},
        {"solver": "dpm++"},
        {"spacing": "log_snr"},
        {"seed": 6},
        {"token_order": "raster"},
        {"token_order": "dilated", "block_size": 3},
        {"guidance": Guidance(3.0)},
        {"guidance": Guidance(3.0, "linear")},
        {"guidance": Guidance(3.0, last_timestep=500)},
    ):
        other = make(dataclasses.replace(settings_of(2, 7), **change))
        assert disagreement(other, plain) > 1e-4, change


@pytest.mark.parametrize(("num_channels", "note"), [(1, ""), (3, ""), (16, "false colours")])
def test_a_picture_says_whether_its_colours_are_true(num_channels, note) -> None:
    config = configs.load(TINY, [f"model.latent_channels={num_channels}"])
    decode, said = decode_to_look_at(config, CPU)
    assert said == note
    assert decode(torch.zeros(2, num_channels, 8, 8)).shape == (2, 3 if num_channels > 1 else 1, 8, 8)
    title = grid_title("step 3", settings_of(4), said)
    assert title == f"step 3, guidance 1\nAR steps 4, denoising steps 3 (ddpm){', ' + note if note else ''}"
    title = grid_title("step 3", settings_of(4, solver="dpm++", token_order="raster"), said)
    assert title.splitlines()[1].startswith("AR steps 4, denoising steps 3 (dpm++), order raster")


def test_images_for_scores_are_decoded_or_refused() -> None:
    config = configs.load(TINY, ["model.latent_channels=4", "model.latent_size=3", "model.patch_size=1"])
    generator = ImageGenerator(config, small_model(), settings_of(1), CPU)
    with pytest.raises(UserError, match=r"model\.latent_channels"):
        generator.images([0])
    assert generator.images([0], decode_to_look_at(config, CPU)[0]).shape == (1, 3, 3, 3)


# ---------------------------------------------------------------------------
# Edits


def test_edits_keep_what_is_outside_of_the_region_bit_for_bit() -> None:
    region = parse_region("tokens:0,2,5", 3)
    tokens = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    settings = GenerationSettings([1, 2], 3, Guidance(2.0), batch_size=2, seed=5)
    edit = ImageGenerator(small_config(), small_model(), settings, CPU).edit
    edited = edit(tokens, region, [1, 4, 4])
    assert torch.equal(edited[:, ~region], tokens[:, ~region])
    assert (edited[:, region] != tokens[:, region]).all()
    # What was kept is seen, and so is the class.
    other = edit(tokens + 1, region, [1, 4, 4])
    assert disagreement(other[:, region], edited[:, region]) > 1e-4
    other = edit(tokens, region, [0, 0, 0])
    assert disagreement(other[:, region], edited[:, region]) > 1e-4
    # An edit depends on its id, not on its place in the batch.
    alone = edit(tokens[2:], region, [4], first_id=2)
    assert disagreement(alone, edited[2:]) < 1e-5


def test_editing_everything_is_generating() -> None:
    config, settings = small_config(), settings_of(3, batch_size=7, guidance=2.0)
    generator = ImageGenerator(config, small_model(), settings, CPU)
    region, tokens = torch.ones(9, dtype=torch.bool), torch.zeros(7, 9, 4)
    edited, images = generator.edit(tokens, region, LABELS), generator.images(LABELS)
    decode, _ = decode_to_look_at(config, CPU)
    from cfpretrain.core.latents import unpatchify

    assert torch.equal(decode(unpatchify(edited, 2)), images)


# ---------------------------------------------------------------------------
# Trajectories


def test_a_trajectory_ends_at_the_image_and_shows_what_is_made() -> None:
    config = small_config()
    generator = ImageGenerator(config, small_model(), settings_of(3, batch_size=1), CPU)
    way = generator.follow(3)
    assert (way.ar_steps, way.timesteps) == ([1, 2, 3], [999, 500, 0, None])
    assert way.states.shape == (3, 4, 9, 4)
    assert way.is_made.sum(1).tolist() == [3, 6, 9]
    (image,) = generator.images([3])
    from cfpretrain.core.latents import unpatchify

    decode, _ = decode_to_look_at(config, CPU)
    assert torch.equal(decode(unpatchify(way.states[-1, -1][None], 2))[0], image)
    # Tokens of earlier AR steps stay as they are, those of later ones are not there yet.
    for row in range(3):
        made = way.is_made[row]
        assert (way.states[row][:, ~made] == 0).all()
        if row:
            before = way.is_made[row - 1]
            assert (way.states[row][:, before] == way.states[row - 1, -1][before]).all()
            assert not torch.equal(way.states[row, 0][made & ~before], way.states[row, -1][made & ~before])


def test_a_long_trajectory_is_thinned() -> None:
    settings = GenerationSettings([1] * 9, 30, Guidance(), 1, 0)
    way = ImageGenerator(small_config(), small_model(), settings, CPU).follow(3, num_rows=4, num_columns=5)
    assert (way.ar_steps[0], way.ar_steps[-1], len(way.ar_steps)) == (1, 9, 4)
    assert (way.timesteps[0], way.timesteps[-1], len(way.timesteps)) == (999, None, 5)
    assert way.states.shape[:2] == (4, 5)

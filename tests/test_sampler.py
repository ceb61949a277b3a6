"""Generation: the cache against full recomputation, guidance, and independence of the batch."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cfpretrain.core import ar as order
from cfpretrain.core import sampler
from cfpretrain.core.design import TRUNKS
from cfpretrain.core.latents import take_tokens
from cfpretrain.core.modalities import IMAGE, class_segment, image_segment
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.process import make_process
from cfpretrain.core.segments import build_layout, with_rotary_positions
from cfpretrain.core.solvers import Solver
from tests.closeness import disagreement
from tests.test_model import image_of, small_model

SOLVER = Solver(make_process(), 4)
PLAIN = sampler.Guidance()
LABELS, IDS = torch.tensor([0, 3, 4]), torch.tensor([10, 11, 12])


def generate(model: CausalFusion, sizes: Sequence[int], guidance: float, ids: Tensor = IDS, labels: Tensor = LABELS):
    orders = sampler.sampling_orders(0, ids, model.grid**2)
    draw = sampler.noise_by_image(0, ids, model.patch_values)
    return sampler.generate(model, labels, orders, sizes, SOLVER, sampler.Guidance(guidance), draw)


@torch.no_grad()
def generate_without_cache(model: CausalFusion, sizes: Sequence[int], guidance: float) -> Tensor:
    """Every denoising step recomputes the whole training sequence, of which only the current AR step is read."""
    orders = sampler.sampling_orders(0, IDS, model.grid**2)
    draw = sampler.noise_by_image(0, IDS, model.patch_values)
    in_steps = [class_segment(2), image_segment(order.steps_from_sizes(sizes)[None])]
    layout = build_layout(in_steps)
    of_class, of_image = (one.rotary_BL for one in with_rotary_positions(in_steps))
    num_clean = layout.num_clean[1]
    clean = torch.zeros(3, model.grid**2, model.patch_values)
    begin = 0
    for size in sizes:
        now = slice(begin, begin + size)
        x = draw(0, orders[:, now])
        for k in range(1, 5):
            left = 5 - k
            noised = torch.zeros_like(clean)
            noised[:, now] = x
            t = SOLVER.levels.times_T[left - 1].expand(3)
            image = replace(image_of(clean[:, :num_clean], noised, orders, t), rotary_BL=of_image)
            null = torch.full_like(LABELS, model.null_class)
            cond, uncond = (
                model([replace(class_segment(2, labels), rotary_BL=of_class), image], layout.intervals_BMI)[IMAGE][
                    :, now
                ]
                for labels in (LABELS, null)
            )
            epsilon = uncond + guidance * (cond - uncond)
            alpha, sigma = float(SOLVER.levels.alphas_T[left - 1]), float(SOLVER.levels.sigmas_T[left - 1])
            predicted = SOLVER.process.split(x, epsilon, alpha, sigma)
            x = SOLVER.step(left, x, *predicted, drawn=draw(k, orders[:, now]) if left > 1 else None)
        clean[:, now] = x
        begin += size
    return take_tokens(clean, orders.argsort(1))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [2, 1, 3, 3], [1] * 9])
def test_cache_equals_full_recomputation(sizes, guidance) -> None:
    model = small_model()
    cached, plain = generate(model, sizes, guidance), generate_without_cache(model, sizes, guidance)
    assert disagreement(cached, plain) < 1e-5


def test_no_mask_is_made() -> None:
    """Behind a class every token sees all that there is, so that the fastest attention computes it."""
    model, seen = small_model(), []
    model.trunk.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    generate(model, [4, 5], guidance=2.5)
    assert len(seen) == 1 + 4 + 1 + 4  # the class, and of two AR steps the denoising steps and what is made
    assert all(intervals is None for intervals in seen)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_cache_equals_full_recomputation_in_every_trunk(trunk) -> None:
    model = small_model(trunk=trunk, num_heads=4, num_kv_heads=2, head_width=6)
    cached, plain = generate(model, [2, 1, 3, 3], 2.5), generate_without_cache(model, [2, 1, 3, 3], 2.5)
    assert disagreement(cached, plain) < 1e-5


@pytest.mark.parametrize("sizes", ["equal", "cosine"])
@pytest.mark.parametrize("num_ar_steps", [1, 2, 4, 16, 25])
def test_cache_equals_full_recomputation_over_the_whole_range(num_ar_steps, sizes) -> None:
    """From diffusion to pure autoregression, each image in a random order of its own."""
    model = small_model(grid=5)
    chosen = order.choose_sizes(25, num_ar_steps, sizes)
    cached, plain = generate(model, chosen, 2.5), generate_without_cache(model, chosen, 2.5)
    assert disagreement(cached, plain) < 1e-5


def test_what_is_watched_is_the_way_of_the_tokens() -> None:
    model = small_model()
    orders, draw = sampler.sampling_orders(0, IDS, 9), sampler.noise_by_image(0, IDS, model.patch_values)
    seen: list[tuple[int, int]] = []
    made = torch.zeros(3, 9, model.patch_values)

    def watch(ar_step: int, num_left: int, positions: Tensor, tokens: Tensor) -> None:
        seen.append((ar_step, num_left))
        if num_left == len(SOLVER.levels):
            assert torch.equal(tokens, draw(0, positions))
        if num_left == 0:
            made.scatter_(1, positions[..., None].expand_as(tokens), tokens)

    given = torch.ones(3, 2, model.patch_values)
    images = sampler.generate(model, LABELS, orders, [4, 3], SOLVER, PLAIN, draw, given_BKP=given, watch=watch)
    assert seen == [(ar_step, left) for ar_step in (0, 1) for left in range(len(SOLVER.levels), -1, -1)]
    assert torch.equal(take_tokens(made, orders[:, 2:]), take_tokens(images, orders[:, 2:]))


def test_an_image_is_the_same_in_any_batch() -> None:
    model = small_model()
    together = generate(model, [4, 5], 2.0)
    alone = torch.cat([generate(model, [4, 5], 2.0, IDS[i : i + 1], LABELS[i : i + 1]) for i in range(3)])
    assert disagreement(together, alone) < 1e-5


def test_image_ids_and_seed_make_different_images() -> None:
    model = small_model()
    same_label = torch.tensor([1, 1, 1])
    images = generate(model, [9], 1.0, labels=same_label)
    assert disagreement(images[0], images[1]) > 1e-4
    draw = sampler.noise_by_image(1, IDS, model.patch_values)
    other = sampler.generate(model, same_label, sampler.sampling_orders(0, IDS, 9), [9], SOLVER, PLAIN, draw)
    assert disagreement(images, other) > 1e-4


def test_start_noise_does_not_depend_on_ar_steps_or_order() -> None:
    draw = sampler.noise_by_image(0, IDS, 4)
    whole = draw(0, torch.arange(9).expand(3, -1))
    assert torch.equal(draw(0, torch.tensor([[7, 2]] * 3)), whole[:, [7, 2]])
    assert not torch.equal(draw(1, torch.arange(9).expand(3, -1)), whole)


def test_null_class_follows_the_number_of_classes() -> None:
    """Guidance uses the table's last row whatever the number of classes; at scale 0 the label cannot matter."""
    model = small_model()
    assert model.null_class == 5
    one = generate(model, [4, 5], 0.0)
    assert torch.equal(one, generate(model, [4, 5], 0.0, labels=torch.tensor([1, 1, 1])))
    null = generate(model, [4, 5], 1.0, labels=torch.full((3,), 5))
    assert disagreement(one, null) < 1e-5


def test_every_call_has_the_same_number_of_forwards() -> None:
    """Ranks that hold different images must run as many forwards, or ZeRO-3 hangs."""
    model = small_model()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, [4, 5], 2.0)
    want = len(calls)
    calls.clear()
    generate(model, [4, 5], 2.0, IDS[:1], LABELS[:1])
    assert len(calls) == want == 1 + 2 * len(SOLVER.levels) + 1


# ---------------------------------------------------------------------------
# Guidance along the two axes


def test_guidance_acts_within_its_interval_and_along_the_ar_axis() -> None:
    guidance = sampler.Guidance(3.0, "linear", first_timestep=100, last_timestep=500)
    assert guidance.at(0.5, 99) == guidance.at(1.0, 501) == 1.0
    assert guidance.at(0.5, 100) == guidance.at(0.5, 500) == 2.0
    assert guidance.at(1.0, 300) == 3.0
    assert sampler.Guidance(3.0).at(0.1, 999) == 3.0


def test_the_branch_without_a_class_is_computed_only_where_it_counts() -> None:
    """Outside of the interval the numbers are those without guidance, and half of the batch is not computed."""
    model = small_model()
    batches: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0][0].noised))
                                    if inputs[0][0].noised is not None else None)  # fmt: skip
    never = sampler.Guidance(4.0, first_timestep=2000)
    orders, draw = sampler.sampling_orders(0, IDS, 9), sampler.noise_by_image(0, IDS, model.patch_values)
    images = sampler.generate(model, LABELS, orders, [4, 5], SOLVER, never, draw)
    assert disagreement(images, generate(model, [4, 5], 1.0)) < 1e-5
    batches.clear()
    middle = sampler.Guidance(4.0, first_timestep=300, last_timestep=700)
    halfway = sampler.generate(model, LABELS, orders, [9], SOLVER, middle, draw)
    assert batches == [3, 6, 6, 3]  # timesteps 999, 666, 333, 0
    assert disagreement(halfway, generate(model, [9], 4.0)) > 1e-4
    assert disagreement(halfway, generate(model, [9], 1.0)) > 1e-4


# ---------------------------------------------------------------------------
# Given tokens


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1] * 5])
def test_given_tokens_come_back_and_are_seen(sizes) -> None:
    """What is generated behind given tokens is what would have been, had they been made in a first AR step."""
    model = small_model()
    orders, draw = sampler.sampling_orders(0, IDS, 9), sampler.noise_by_image(0, IDS, model.patch_values)
    guidance = sampler.Guidance(2.0)
    whole = sampler.generate(model, LABELS, orders, [4, *sizes], SOLVER, guidance, draw)
    given = take_tokens(whole, orders[:, :4])
    again = sampler.generate(model, LABELS, orders, sizes, SOLVER, guidance, draw, given_BKP=given)
    assert disagreement(again, whole) < 1e-5
    assert torch.equal(take_tokens(again, orders[:, :4]), given)
    other = sampler.generate(model, LABELS, orders, sizes, SOLVER, guidance, draw, given_BKP=given + 1)
    assert torch.equal(take_tokens(other, orders[:, :4]), given + 1)
    assert disagreement(take_tokens(other, orders[:, 4:]), take_tokens(whole, orders[:, 4:])) > 1e-4


def test_all_tokens_may_be_given() -> None:
    model = small_model()
    orders, draw = sampler.sampling_orders(0, IDS, 9), sampler.noise_by_image(0, IDS, model.patch_values)
    given = torch.randn(3, 9, model.patch_values)
    made = sampler.generate(model, LABELS, orders, [], SOLVER, PLAIN, draw, given_BKP=given)
    assert torch.equal(take_tokens(made, orders), given)

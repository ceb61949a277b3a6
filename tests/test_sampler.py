"""Generation: the cache against full recomputation, guidance, and independence of the batch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cfpretrain import noise, order, sampler
from cfpretrain.model.transformer import CausalFusion, ClassPart, ImagePart, take_tokens
from tests.test_transformer import small_model

SCHEDULE = noise.respace(noise.linear_schedule(), 4)
LABELS, IDS = torch.tensor([0, 3, 4]), torch.tensor([10, 11, 12])


def generate(model: CausalFusion, sizes: Sequence[int], guidance: float, ids: Tensor = IDS, labels: Tensor = LABELS):
    orders = sampler.sampling_orders(0, ids, 9)
    draw = sampler.noise_by_image(0, ids, model.patch_values)
    return sampler.generate(model, labels, orders, sizes, SCHEDULE, guidance, draw)


@torch.no_grad()
def generate_without_cache(model: CausalFusion, sizes: Sequence[int], guidance: float) -> Tensor:
    """Every denoising step recomputes the whole training sequence, of which only the current AR step is read."""
    orders = sampler.sampling_orders(0, IDS, 9)
    draw = sampler.noise_by_image(0, IDS, model.patch_values)
    layout = order.build_layout([order.Condition(2), order.Image(order.steps_from_sizes(sizes)[None])])
    num_clean = layout.num_clean_image_tokens[0]
    clean = torch.zeros(3, 9, model.patch_values)
    begin = 0
    for size in sizes:
        now = slice(begin, begin + size)
        x = draw(0, orders[:, now])
        for k, level in enumerate(reversed(range(len(SCHEDULE))), start=1):
            noised = torch.zeros_like(clean)
            noised[:, now] = x
            t = SCHEDULE.timesteps_T[level].expand(3)
            image = ImagePart(clean[:, :num_clean], orders[:, :num_clean], noised, orders, t)
            null = torch.full_like(LABELS, model.null_class)
            cond, uncond = (
                model([ClassPart(labels), image], layout.intervals_BMI)[:, now] for labels in (LABELS, null)
            )
            epsilon = uncond + guidance * (cond - uncond)
            x = noise.ddpm_update(SCHEDULE, level, x, epsilon, draw(k, orders[:, now]))
        clean[:, now] = x
        begin += size
    return take_tokens(clean, orders.argsort(1))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [2, 1, 3, 3], [1] * 9])
def test_cache_equals_full_recomputation(sizes, guidance) -> None:
    model = small_model()
    cached, plain = generate(model, sizes, guidance), generate_without_cache(model, sizes, guidance)
    assert float((cached - plain).abs().max() / plain.abs().max()) < 1e-5


def test_an_image_is_the_same_in_any_batch() -> None:
    model = small_model()
    together = generate(model, [4, 5], 2.0)
    alone = torch.cat([generate(model, [4, 5], 2.0, IDS[i : i + 1], LABELS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_image_ids_and_seed_make_different_images() -> None:
    model = small_model()
    same_label = torch.tensor([1, 1, 1])
    images = generate(model, [9], 1.0, labels=same_label)
    assert not torch.allclose(images[0], images[1])
    draw = sampler.noise_by_image(1, IDS, model.patch_values)
    other = sampler.generate(model, same_label, sampler.sampling_orders(0, IDS, 9), [9], SCHEDULE, 1.0, draw)
    assert not torch.allclose(images, other)


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
    torch.testing.assert_close(one, null, rtol=1e-4, atol=1e-5)


def test_every_call_has_the_same_number_of_forwards() -> None:
    """Ranks that hold different images must run as many forwards, or ZeRO-3 hangs."""
    model = small_model()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, [4, 5], 2.0)
    want = len(calls)
    calls.clear()
    generate(model, [4, 5], 2.0, IDS[:1], LABELS[:1])
    assert len(calls) == want == 1 + 2 * len(SCHEDULE) + 1

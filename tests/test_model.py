"""The network: tokens, initial weights, invariances that the sequence's layout promises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.core import ar as order
from cfpretrain.core import attention, seeds
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.latents import patchify, unpatchify
from cfpretrain.core.modalities import IMAGE, ImageEmbedder, class_segment, image_segment, sincos_positions
from cfpretrain.core.model import CausalFusion, initialise, write_initial_values
from cfpretrain.core.segments import Segment, build_layout, with_rotary_positions
from tests.closeness import disagreement


def small_model(
    learnable_positions: bool = True,
    random_head: bool = True,
    blocks: BlockSettings | None = None,
    grid: int = 3,
    num_heads: int = 2,
    trunk: str = "causalfusion",
    **changes: Any,
) -> CausalFusion:
    model = CausalFusion(
        grid=grid,
        patch_values=4,
        width=16,
        depth=2,
        num_heads=num_heads,
        num_cond_tokens=2,
        num_classes=5,
        learnable_positions=learnable_positions,
        trunk_kind=trunk,
        block_changes=changes,
        blocks=blocks,
    )
    initialise(model, seed=0)
    if random_head:
        with torch.no_grad():
            model.noise_head.linear.weight.copy_(seeds.normal(seeds.key(0, "head"), (4, 16)))
    return model.eval()


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_patchify_round_trip(batch, grid, patch, channels) -> None:
    latents = torch.arange(batch * channels * (grid * patch) ** 2).reshape(batch, channels, grid * patch, grid * patch)
    tokens = patchify(latents, patch)
    assert tokens.shape == (batch, grid**2, patch**2 * channels)
    assert torch.equal(unpatchify(tokens, patch), latents)


def test_a_patch_is_flattened_as_row_column_channel() -> None:
    latents = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    # The patch in grid row 1, column 0 has index 2.
    want = [int(latents[0, c, 2 + y, x]) for y in range(2) for x in range(2) for c in range(2)]
    assert patchify(latents, 2)[0, 2].tolist() == want


def test_sincos_positions_spelled_out() -> None:
    table = sincos_positions(grid=3, width=8)
    # Index 7 is row 2, column 1; two frequencies, 1 and 1/100.
    column = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    row = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    torch.testing.assert_close(table[7], torch.tensor(column + row))


def test_initial_weights_follow_the_recipe() -> None:
    model = small_model(random_head=False)
    for name, parameter in model.state_dict().items():
        if name.endswith("bias") or name == "noise_head.linear.weight":
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif name == "image_embedder.pos_embed":
            assert torch.equal(parameter[0], sincos_positions(3, 16))
        elif "embed" in name and "t_embedder" not in name and "x_proj" not in name:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.35), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert bound * 0.9 < float(parameter.abs().max()) <= bound, name


def initial_values(seed: int, name: str, shape: tuple[int, ...], offset: int, count: int) -> torch.Tensor:
    values = torch.full((count,), torch.nan)
    write_initial_values(seed, 3, name, shape, offset, values)
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learnable", [True, False])
def test_positions_are_looked_up_as_if_by_index(learnable, dtype) -> None:
    """Values and gradients, bit for bit; a place occurs in many samples, clean and noised."""
    embedder = ImageEmbedder(3, 4, 16, learnable).to(dtype)
    key = seeds.key(0, "positions")
    with torch.no_grad():
        for i, parameter in enumerate(embedder.parameters()):
            parameter.copy_(seeds.normal(seeds.fold(key, i), parameter.shape))
    clean, noised = seeds.normal(seeds.fold(key, torch.tensor([100, 101])), (6, 9, 4))
    places_BL = seeds.permutation(seeds.fold(key, torch.arange(6)), 9)
    given = Segment(IMAGE, clean=clean, positions_BL=places_BL)
    learned = Segment(IMAGE, noised=noised, positions_BL=places_BL.flip(1), times_B=torch.arange(6))
    out = torch.cat(embedder([given, learned]), 1)
    direction = seeds.normal(seeds.fold(key, 200), out.shape).to(dtype)

    values, places = torch.cat([clean, noised], 1).to(dtype), torch.cat([places_BL, places_BL.flip(1)], 1)
    table = embedder.pos_embed[0] if learnable else sincos_positions(3, 16).to(dtype)
    tokens = embedder.x_proj(values) + table[places]
    expected = torch.cat([tokens[:, :9], tokens[:, 9:] + embedder.t_embedder(torch.arange(6))[:, None]], 1)
    assert torch.equal(out, expected)
    for got, want in zip(
        torch.autograd.grad(out, list(embedder.parameters()), direction),
        torch.autograd.grad(expected, list(embedder.parameters()), direction),
        strict=True,
    ):
        assert torch.equal(got, want)


@given(st.integers(0, 600), st.integers(0, 300))
def test_initial_values_of_a_range_are_a_slice_of_the_whole(offset, count) -> None:
    for name, shape in (("trunk.blocks.0.mlp.fc1.weight", (64, 16)), ("class_embedder.cond_pos_embed", (1, 8, 128))):
        whole = initial_values(1, name, shape, 0, 1024)
        count = min(count, 1024 - offset)
        assert torch.equal(initial_values(1, name, shape, offset, count), whole[offset : offset + count])


def test_different_parameters_and_seeds_begin_differently() -> None:
    def draw(seed: int, name: str) -> list[float]:
        return initial_values(seed, name, (8, 8), 0, 64).tolist()

    names = ["trunk.blocks.0.mlp.fc1.weight", "trunk.blocks.1.mlp.fc1.weight"]
    assert draw(0, names[0]) != draw(0, names[1])
    assert draw(0, names[0]) != draw(1, names[0])


def image_of(clean: torch.Tensor, noised: torch.Tensor, positions: torch.Tensor, times: torch.Tensor) -> Segment:
    return Segment(IMAGE, clean=clean, noised=noised, positions_BL=positions, times_B=times)


def forward(model: CausalFusion, steps: torch.Tensor, clean: torch.Tensor, noised: torch.Tensor, label: int = 1):
    """The training forward of one sample in raster order."""
    layout = build_layout([class_segment(2), image_segment(steps[None])])
    image = image_of(clean[None, : layout.num_clean[1]], noised[None], torch.arange(9)[None], torch.tensor([500]))
    return model([class_segment(2, torch.tensor([label])), image], layout.intervals_BMI)[IMAGE][0]


@given(st.integers(0, 8), st.integers(0, 8), st.booleans())
def test_information_flows_only_where_the_rule_lets_it(source, target, change_noised) -> None:
    model = small_model()
    steps = order.steps_from_sizes([2, 3, 1, 3])
    clean, noised = seeds.normal(seeds.fold(seeds.key(0, "t"), torch.arange(2)), (9, 4))
    before = forward(model, steps, clean, noised)[target]
    changed = (noised if change_noised else clean).clone()
    changed[source] += 1.0
    after = forward(model, steps, *((clean, changed) if change_noised else (changed, noised)))[target]
    flows = steps[source] == steps[target] if change_noised else steps[source] < steps[target]
    assert (not torch.equal(before, after)) == bool(flows)


def test_class_reaches_every_token() -> None:
    model = small_model()
    clean, noised = seeds.normal(seeds.fold(seeds.key(0, "t"), torch.arange(2)), (9, 4))
    steps = order.steps_from_sizes([4, 5])
    one, other = (forward(model, steps, clean, noised, label) for label in (1, 2))
    assert (one != other).any(-1).all()


def test_several_segments_in_one_sequence() -> None:
    """Two classes with an image each: the second image sees the first one's clean tokens, not the other way."""
    model = small_model()
    steps = image_segment(order.steps_from_sizes([4, 5])[None])
    layout = build_layout([class_segment(2), steps, class_segment(2), steps])
    positions, t = torch.arange(9)[None], torch.tensor([500])
    first_clean, first_noised, last_clean, last_noised = seeds.normal(
        seeds.fold(seeds.key(0, "t"), torch.arange(4)), (1, 9, 4)
    )

    def predict(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [
            class_segment(2, torch.tensor([1])),
            image_of(first, first_noised, positions, t),
            class_segment(2, torch.tensor([2])),
            image_of(last[:, :4], last_noised, positions, t),
        ]
        one, two = model(parts, layout.intervals_BMI)[IMAGE].split(9, 1)
        return one, two

    one, two = predict(first_clean, last_clean)
    one_again, two_again = predict(first_clean + 1, last_clean)
    assert torch.equal(one[:, :4], one_again[:, :4])
    assert (two != two_again).any(-1).all()
    one_again, _ = predict(first_clean, last_clean + 1)
    assert torch.equal(one, one_again)
    # Alone, the first image is predicted as in company.
    alone = forward(model, steps.steps_BL[0], first_clean[0], first_noised[0])
    assert disagreement(one[0], alone) < 1e-5


def test_fixed_positions_are_no_parameter_and_equal_learnable_ones_at_the_start() -> None:
    fixed, learned = small_model(learnable_positions=False), small_model()
    assert "image_embedder.pos_embed" not in dict(fixed.named_parameters())
    clean, noised = seeds.normal(seeds.fold(seeds.key(0, "t"), torch.arange(2)), (9, 4))
    steps = order.steps_from_sizes([4, 5])
    assert torch.equal(forward(fixed, steps, clean, noised), forward(learned, steps, clean, noised))


# ---------------------------------------------------------------------------
# Ways to compute the blocks


def training_pass(model: CausalFusion, number: int, sizes: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Prediction and gradients for a batch of two with random orders and AR steps of the given sizes."""
    key = seeds.fold(seeds.key(0, "training pass"), number)
    order_BL = seeds.permutation(seeds.fold(key, torch.arange(2)), 9)
    in_steps = [class_segment(2), image_segment(order.steps_from_sizes(sizes)[None])]
    layout = build_layout(in_steps)
    clean, noised, direction = seeds.normal(seeds.fold(key, torch.arange(3)), (2, 9, 4))
    labels, timesteps = torch.tensor([1, 4]), torch.tensor([3, 700])
    image = image_of(clean[:, : layout.num_clean[1]], noised, order_BL, timesteps)
    model.zero_grad()
    rotary = [one.rotary_BL for one in with_rotary_positions(in_steps)]
    segments = [class_segment(2, labels), image]
    placed = [replace(one, rotary_BL=rotary_BL) for one, rotary_BL in zip(segments, rotary, strict=True)]
    prediction = model(placed, layout.intervals_BMI)[IMAGE]
    (prediction * direction).sum().backward()
    return prediction.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_recomputed_activations_change_no_bit() -> None:
    plain, recomputed = small_model(), small_model(blocks=BlockSettings(checkpoint_activations=True))
    calls = []
    recomputed.trunk.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    want, want_gradients = training_pass(plain, 0, [4, 3, 2])
    got, gradients = training_pass(recomputed, 0, [4, 3, 2])
    assert torch.equal(got, want)
    assert all(torch.equal(gradients[name], want_gradients[name]) for name in want_gradients)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("checkpoint_activations", "trunk"), [(False, "causalfusion"), (True, "causalfusion"), (False, "qwen3")]
)
def test_compiled_blocks_share_a_graph_a_length(checkpoint_activations, trunk) -> None:
    """Splits, orders, weights and blocks change; only another length makes another graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = BlockSettings(compile=True, checkpoint_activations=checkpoint_activations)
    of_trunk = {"trunk": trunk, "num_kv_heads": 2 if trunk == "causalfusion" else 1}
    plain, compiled = small_model(**of_trunk), small_model(blocks=settings, **of_trunk)
    for number, sizes in enumerate([[4, 3, 2], [1, 6, 2], [7, 2], [4, 5], [1, 1, 1, 1, 5], [3, 4, 2]]):
        want, want_gradients = training_pass(plain, number, sizes)
        got, gradients = training_pass(compiled, number, sizes)
        assert disagreement(got, want) < 1e-5
        for name, gradient in want_gradients.items():
            if name.endswith("k_norm.bias"):
                # Softmax ignores it: its gradient is rounding, of terms as large as those of the weight's.
                scale = want_gradients[name.replace("bias", "weight")].abs().max()
                assert gradients[name].abs().max() < 1e-5 * scale, name
            else:
                assert disagreement(gradients[name], gradient) < 1e-5, name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_forwards_without_gradients_compile_nothing() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model(blocks=BlockSettings(compile=True))
    with torch.no_grad():
        model([class_segment(2, torch.tensor([1]))])
    assert not torch._dynamo.utils.counters["stats"]


def test_too_many_lengths_are_an_error_not_silence(monkeypatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "_MOST_GRAPHS", 2)
    compiled = attention.compile_by_shape(lambda x: x + 1)
    compiled(torch.zeros(2))
    compiled(torch.zeros(3))
    try:
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            compiled(torch.zeros(4))
    finally:
        torch._dynamo.config.recompile_limit = 64

"""The AR axis: laws of the drawn splits, layouts against the plain rule of visibility, AR weights."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain import order, seeds

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@st.composite
def images(draw):
    """An image of one to three samples with splits of their own, whose last steps have equal sizes."""
    last = draw(st.integers(1, 4))
    rest = draw(st.integers(0, 8))
    samples = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.sets(st.integers(1, max(rest - 1, 1)), max_size=rest))
        edges = [0, *sorted(c for c in cuts if c < rest), rest] if rest else []
        parts = [b - a for a, b in itertools.pairwise(edges)]
        samples.append(order.steps_from_sizes([*parts, last]))
    return order.Image(torch.stack(samples))


segment_lists = st.lists(
    st.one_of(
        st.integers(1, 4).map(order.Condition),
        st.integers(1, 4).map(order.Text),
        sizes.map(lambda s: order.Image(order.steps_from_sizes(s)[None])),
    ),
    min_size=1,
    max_size=4,
)


def by_the_rule(step: list[int], clean: list[bool]) -> list[list[bool]]:
    """The rule of visibility, token by token."""
    return [
        [(clean[k] and step[k] < step[q]) or (step[k] == step[q] and clean[k] == clean[q]) for k in range(len(step))]
        for q in range(len(step))
    ]


def plain_tokens(segments: list[order.Segment], sample: int) -> tuple[list[int], list[bool]]:
    """Steps and kinds of the sequence's tokens, written down segment by segment."""
    clean_steps, noised_steps, step = [], [], 0
    for i, segment in enumerate(segments):
        if isinstance(segment, order.Condition):
            clean_steps += [step] * segment.num_tokens
            step += 1
        elif isinstance(segment, order.Text):
            clean_steps += range(step, step + segment.num_tokens)
            step += segment.num_tokens
        else:
            own = [step + s for s in segment.steps_BL[sample % len(segment.steps_BL)].tolist()]
            noised_steps += own
            clean_steps += own if i < len(segments) - 1 else [s for s in own if s < own[-1]]
            step = own[-1] + 1
    return clean_steps + noised_steps, [True] * len(clean_steps) + [False] * len(noised_steps)


def assert_follows_the_rule(segments: list[order.Segment]) -> None:
    layout = order.build_layout(segments)
    mask = order.may_attend(layout.intervals_BMI, layout.step_BM.shape[1])
    for sample in range(len(layout.step_BM)):
        step, clean = plain_tokens(segments, sample)
        assert layout.is_clean_M.tolist() == clean
        assert mask[sample].tolist() == by_the_rule(step, clean)
    # No key counts twice, and no row is blind.
    assert torch.equal(order.count_visible(layout.intervals_BMI), mask.sum((1, 2)))
    assert mask.any(-1).all()


@given(segment_lists)
def test_layout_follows_the_rule_for_any_segments(segments) -> None:
    assert_follows_the_rule(segments)


@given(images(), st.booleans(), st.booleans())
def test_layout_follows_the_rule_for_splits_of_their_own(image, condition_first, text_after) -> None:
    if text_after and len(image.steps_BL) > 1:
        text_after = len({int(s[-1]) for s in image.steps_BL}) == 1
    before = [order.Condition(2)] if condition_first else []
    assert_follows_the_rule([*before, image, *([order.Text(2)] if text_after else [])])


def test_two_images_and_a_caption_spelled_out() -> None:
    image = order.Image(order.steps_from_sizes([1, 1])[None])
    layout = order.build_layout([order.Condition(1), image, order.Text(1), image])
    # clean: condition, both tokens of image 1, the word, the first token of image 2; noised: 2 + 2
    assert layout.step_BM.tolist() == [[0, 1, 2, 3, 4, 1, 2, 4, 5]]
    assert layout.num_clean_image_tokens == (2, 1)
    assert layout.intervals_BMI[0].tolist() == [
        [0, 1, 0, 0],
        [0, 2, 0, 0],
        [0, 3, 0, 0],
        [0, 4, 0, 0],
        [0, 5, 0, 0],
        [0, 1, 5, 6],
        [0, 2, 6, 7],
        [0, 4, 7, 8],
        [0, 5, 8, 9],
    ]


def test_unequal_last_steps_are_refused() -> None:
    image = order.Image(torch.tensor([[0, 0, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="equal sizes"):
        order.build_layout([order.Condition(1), image])
    # What follows the image sees all of it: lengths are equal again.
    assert order.build_layout([image, order.Condition(1)]).step_BM.shape == (2, 7)


@pytest.mark.parametrize("segments", [[], [order.Condition(0)], [order.Text(0)]])
def test_empty_sequences_are_refused(segments) -> None:
    with pytest.raises(ValueError, match="at least one"):
        order.build_layout(segments)


@given(sizes)
def test_steps_begin_and_end_where_sizes_say(parts) -> None:
    steps = order.steps_from_sizes(parts)[None]
    edges = [0, *torch.tensor(parts).cumsum(0).tolist()]
    assert order.step_begin(steps)[0].tolist() == [a for a, n in zip(edges, parts, strict=False) for _ in range(n)]
    assert order.step_end(steps)[0].tolist() == [b for b, n in zip(edges[1:], parts, strict=True) for _ in range(n)]


@given(st.integers(1, 300), st.integers(1, 300))
def test_equal_sizes(num_tokens, num_steps) -> None:
    if num_steps > num_tokens:
        with pytest.raises(ValueError, match="num_ar_steps"):
            order.equal_sizes(num_tokens, num_steps)
        return
    parts = order.equal_sizes(num_tokens, num_steps)
    assert (len(parts), sum(parts)) == (num_steps, num_tokens)
    assert max(parts) - min(parts) <= 1


def test_ar_weights_fall_from_first_to_last() -> None:
    steps = order.steps_from_sizes([2, 1, 1])[None]
    assert order.ar_weights(steps, 2.0, 1.0, "linear")[0].tolist() == [2.0, 2.0, 1.5, 1.25]
    cosine = order.ar_weights(steps, 3.0, 1.0, "cosine")[0]
    want = [math.cos(math.pi * x / 4) + 2 for x in (0, 0, 2, 3)]
    torch.testing.assert_close(cosine, torch.tensor(want))


@pytest.mark.parametrize(("num_tokens", "decay"), [(1, 0.9), (2, 1.0), (5, 0.9), (16, 0.8), (64, 1.0), (256, 0.9)])
def test_law_of_the_last_size(num_tokens, decay) -> None:
    table = order.last_size_table(num_tokens, decay)
    torch.testing.assert_close(table.sum(0), order.step_count_probabilities(num_tokens, decay), rtol=1e-9, atol=1e-14)
    # Expected size of any step given S is L / S, the last one's too.
    last = torch.arange(1, num_tokens + 1, dtype=torch.float64)
    mean_given_steps = (last[:, None] * table).sum(0) / table.sum(0)
    torch.testing.assert_close(mean_given_steps, num_tokens / last, rtol=1e-6, atol=0)


def test_expected_sequence_length_as_published() -> None:
    for num_tokens, want in ((256, 510.5), (1024, 1850.0)):
        marginal = order.last_size_table(num_tokens, 0.9).sum(1)
        last = torch.arange(1, num_tokens + 1)
        assert float((marginal * (64 + 2 * num_tokens - last)).sum()) == pytest.approx(want, abs=1.0)


def frequencies(steps_BL: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Share of each split among the samples, as sizes of AR steps."""
    splits, counts = steps_BL.unique(dim=0, return_counts=True)
    total = len(steps_BL)
    return {
        tuple(split.unique(return_counts=True)[1].tolist()): int(n) / total
        for split, n in zip(splits, counts, strict=True)
    }


def split_probabilities(num_tokens: int, decay: float) -> dict[tuple[int, ...], float]:
    """P(split): S from its law, then each subset of cut points alike."""
    law = order.step_count_probabilities(num_tokens, decay)
    chances = {}
    for cuts in range(2 ** (num_tokens - 1)):
        edges = [0, *(i + 1 for i in range(num_tokens - 1) if cuts >> i & 1), num_tokens]
        parts = tuple(b - a for a, b in itertools.pairwise(edges))
        chances[parts] = float(law[len(parts) - 1]) / math.comb(num_tokens - 1, len(parts) - 1)
    return chances


@pytest.mark.parametrize("split", ["sample", "batch"])
@pytest.mark.parametrize("decay", [1.0, 0.7])
def test_every_split_has_its_probability(split, decay) -> None:
    num_tokens, num_draws = 5, 6000
    root = seeds.key(3, "test")
    if split == "batch":
        drawn = [order.draw_shared_steps(seeds.fold(root, i), 1, num_tokens, decay) for i in range(num_draws)]
    else:
        drawn = [
            order.draw_steps(seeds.fold(root, i), seeds.fold(seeds.fold(root, i), torch.tensor([7])), num_tokens, decay)
            for i in range(num_draws)
        ]
    seen, want = frequencies(torch.cat(drawn)), split_probabilities(num_tokens, decay)
    assert seen.keys() <= want.keys()
    chi_square = sum(num_draws * (seen.get(parts, 0.0) - p) ** 2 / p for parts, p in want.items())
    # 15 degrees of freedom: 37.7 is exceeded with probability 0.001, and the seed is fixed.
    assert len(want) == 16
    assert chi_square < 37.7


@given(st.integers(0, 2**31), st.integers(1, 40), st.sampled_from([1.0, 0.9, 0.5]))
def test_splits_of_a_batch_share_their_last_size(seed, num_tokens, decay) -> None:
    root = seeds.key(seed, "test")
    steps = order.draw_steps(root, seeds.fold(root, torch.arange(6)), num_tokens, decay)
    assert steps.shape == (6, num_tokens)
    assert (steps[:, 0] == 0).all()
    assert ((steps.diff(dim=1) == 0) | (steps.diff(dim=1) == 1)).all()
    assert order.step_begin(steps)[:, -1].unique().numel() == 1


def test_a_sample_keeps_its_split_in_another_batch() -> None:
    root = seeds.key(0, "test")
    keys = seeds.fold(root, torch.arange(8))
    whole = order.draw_steps(root, keys, 16, 0.9)
    assert torch.equal(torch.cat([order.draw_steps(root, half, 16, 0.9) for half in keys.chunk(2)]), whole)
    shared = order.draw_shared_steps(root, 8, 16, 0.9)
    assert torch.equal(shared[:3], order.draw_shared_steps(root, 3, 16, 0.9))

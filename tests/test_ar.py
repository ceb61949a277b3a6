"""The AR axis: laws of the drawn splits, layouts against the plain rule of visibility, AR weights."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from cfpretrain.core import ar as order
from cfpretrain.core import seeds
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import Segment, build_layout, may_attend, visible_keys
from cfpretrain.core.work import count_work, expected_work, sequence_lengths


def text(num_tokens: int) -> Segment:
    """Words: each a clean AR step."""
    return Segment("text", torch.arange(num_tokens)[None])


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
    return image_segment(torch.stack(samples))


segment_lists = st.lists(
    st.one_of(
        st.integers(1, 4).map(class_segment),
        st.integers(1, 4).map(text),
        sizes.map(lambda s: image_segment(order.steps_from_sizes(s)[None])),
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


def plain_tokens(segments: list[Segment], sample: int, clean_multiple: int) -> tuple[list[int], list[bool], list[bool]]:
    """Steps, kinds and uses of the sequence's tokens, written down segment by segment."""
    clean_steps, noised_steps, step, num_padding = [], [], 0, 0
    for i, segment in enumerate(segments):
        if segment.kind == "class":
            clean_steps += [step] * segment.steps_BL.shape[1]
            step += 1
        elif segment.kind == "text":
            clean_steps += range(step, step + segment.steps_BL.shape[1])
            step += segment.steps_BL.shape[1]
        else:
            own = [step + s for s in segment.steps_BL[sample % len(segment.steps_BL)].tolist()]
            noised_steps += own
            num_before = len(own) if i < len(segments) - 1 else sum(s < own[-1] for s in own)
            num_clean = min(math.ceil(num_before / clean_multiple) * clean_multiple, len(own))
            num_padding = num_clean - num_before
            clean_steps += own[:num_clean]
            step = own[-1] + 1
    clean = [True] * len(clean_steps) + [False] * len(noised_steps)
    if segments[-1].kind != "image":
        num_padding = 0
    padding = [len(clean_steps) - num_padding <= i < len(clean_steps) for i in range(len(clean))]
    return clean_steps + noised_steps, clean, padding


def assert_follows_the_rule(segments: list[Segment], clean_multiple: int) -> None:
    layout = build_layout(segments, clean_multiple)
    mask = may_attend(layout.intervals_BMI, layout.step_BM.shape[1])
    num_tokens = num_visible = 0
    for sample in range(len(layout.step_BM)):
        step, clean, padding = plain_tokens(segments, sample, clean_multiple)
        assert sum(layout.num_clean) == sum(clean)
        assert layout.is_padding_BM[sample].tolist() == padding
        assert mask[sample].tolist() == by_the_rule(step, clean)
        useful = ~layout.is_padding_BM[sample]
        # Nobody sees the padding but itself; what is left counts as without it.
        assert not mask[sample][useful][:, ~useful].any()
        num_tokens, num_visible = num_tokens + int(useful.sum()), num_visible + int(mask[sample][useful].sum())
    num_rows = len(layout.step_BM)
    assert count_work(segments, layout, num_rows)[:2] == (num_tokens, num_visible)
    # No key counts twice, and no row is blind.
    assert torch.equal(visible_keys(layout.intervals_BMI), mask.sum(2))
    assert mask.any(-1).all()


@given(segment_lists, st.integers(1, 6))
def test_layout_follows_the_rule_for_any_segments(segments, clean_multiple) -> None:
    assert_follows_the_rule(segments, clean_multiple)


@given(images(), st.booleans(), st.booleans(), st.integers(1, 6))
def test_layout_follows_the_rule_for_splits_of_their_own(image, condition_first, text_after, clean_multiple) -> None:
    if text_after and len(image.steps_BL) > 1:
        text_after = len({int(s[-1]) for s in image.steps_BL}) == 1
    before = [class_segment(2)] if condition_first else []
    assert_follows_the_rule([*before, image, *([text(2)] if text_after else [])], clean_multiple)


def test_two_images_and_a_caption_spelled_out() -> None:
    image = image_segment(order.steps_from_sizes([1, 1])[None])
    layout = build_layout([class_segment(1), image, text(1), image])
    # clean: condition, both tokens of image 1, the word, the first token of image 2; noised: 2 + 2
    assert layout.step_BM.tolist() == [[0, 1, 2, 3, 4, 1, 2, 4, 5]]
    assert layout.num_clean == (1, 2, 1, 1)
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
    image = image_segment(torch.tensor([[0, 0, 1], [0, 1, 1]]))
    with pytest.raises(ValueError, match="equal sizes"):
        build_layout([class_segment(1), image])
    # What follows the image sees all of it: lengths are equal again.
    assert build_layout([image, class_segment(1)]).step_BM.shape == (2, 7)


def test_samples_need_only_agree_on_the_padded_length() -> None:
    segments = [class_segment(1), image_segment(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 2, 2]]))]
    with pytest.raises(ValueError, match="equal sizes"):
        build_layout(segments, 3)
    assert build_layout(segments, 2).num_clean == (1, 4)
    assert count_work(segments, build_layout(segments, 2), 2).tokens == 10 + 11
    assert_follows_the_rule(segments, 2)
    with pytest.raises(ValueError, match="clean_multiple: expected at least 1, got 0"):
        build_layout(segments, 0)


@pytest.mark.parametrize(("num_tokens", "clean_multiple", "most"), [(256, 64, 5), (256, 100, 4), (64, 1, 64)])
def test_a_run_has_few_lengths(num_tokens, clean_multiple, most) -> None:
    assert most <= math.ceil(num_tokens / clean_multiple) + 1
    lengths = set()
    for i in range(400):
        key = seeds.fold(seeds.key(5, "test"), i)
        image = image_segment(order.draw_steps(key, seeds.fold(key, torch.arange(2)), num_tokens, 0.9))
        layout = build_layout([class_segment(4), image], clean_multiple)
        num_clean = layout.num_clean[1]
        assert num_clean % clean_multiple == 0 or num_clean == num_tokens
        lengths.add(layout.step_BM.shape[1])
    assert lengths <= {4 + num_tokens + min(i * clean_multiple, num_tokens) for i in range(most)}
    assert len(lengths) > 2


@pytest.mark.parametrize("segments", [[], [class_segment(0)], [text(0)]])
def test_empty_sequences_are_refused(segments) -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_layout(segments)


@given(sizes)
def test_steps_begin_where_sizes_say(parts) -> None:
    steps = order.steps_from_sizes(parts)[None]
    edges = [0, *torch.tensor(parts).cumsum(0).tolist()]
    assert order.step_begin(steps)[0].tolist() == [a for a, n in zip(edges, parts, strict=False) for _ in range(n)]


@given(st.integers(1, 300), st.integers(1, 300))
def test_equal_sizes(num_tokens, num_steps) -> None:
    if num_steps > num_tokens:
        with pytest.raises(ValueError, match="num_ar_steps"):
            order.equal_sizes(num_tokens, num_steps)
        return
    parts = order.equal_sizes(num_tokens, num_steps)
    assert (len(parts), sum(parts)) == (num_steps, num_tokens)
    assert max(parts) - min(parts) <= 1


@given(st.integers(1, 300), st.integers(1, 300))
def test_cosine_sizes(num_tokens, num_steps) -> None:
    if num_steps > num_tokens:
        with pytest.raises(ValueError, match="num_ar_steps"):
            order.cosine_sizes(num_tokens, num_steps)
        return
    parts = order.cosine_sizes(num_tokens, num_steps)
    assert (len(parts), sum(parts), min(parts) >= 1) == (num_steps, num_tokens, True)
    if num_tokens >= num_steps**2:  # where the rule of at least one token does not bend the curve
        assert all(a <= b + 1 for a, b in itertools.pairwise(parts)), parts


def test_chosen_sizes() -> None:
    assert order.choose_sizes(16, 4, "equal") == [4, 4, 4, 4]
    assert order.choose_sizes(16, 4, "cosine") == [1, 4, 5, 6]
    assert order.choose_sizes(16, 3, [1, 10, 5]) == [1, 10, 5]
    for num_steps, given_sizes in ((2, [16]), (2, [8, 9]), (2, [0, 16]), (0, [])):
        with pytest.raises(ValueError, match=f"expected {num_steps} numbers of at least 1 that add up to 16"):
            order.choose_sizes(16, num_steps, given_sizes)


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


def split_probabilities(num_tokens: int, decay: float, num_ar_steps: int) -> dict[tuple[int, ...], float]:
    """P(split): S from its law or fixed, then each subset of cut points alike."""
    law = [decay**s for s in range(num_tokens)]
    law = [p / sum(law) if not num_ar_steps else float(s + 1 == num_ar_steps) for s, p in enumerate(law)]
    chances = {}
    for cuts in range(2 ** (num_tokens - 1)):
        edges = [0, *(i + 1 for i in range(num_tokens - 1) if cuts >> i & 1), num_tokens]
        parts = tuple(b - a for a, b in itertools.pairwise(edges))
        if law[len(parts) - 1]:
            chances[parts] = law[len(parts) - 1] / math.comb(num_tokens - 1, len(parts) - 1)
    return chances


def draw_one(split: str, key: torch.Tensor, num_tokens: int, decay: float, num_ar_steps: int = 0) -> torch.Tensor:
    if split == "batch":
        return order.draw_shared_steps(key, 1, num_tokens, decay, num_ar_steps)
    return order.draw_steps(key, seeds.fold(key, torch.tensor([7])), num_tokens, decay, num_ar_steps)


@pytest.mark.parametrize("split", ["sample", "batch"])
@pytest.mark.parametrize(("num_tokens", "decay", "num_ar_steps"), [(5, 1.0, 0), (5, 0.7, 0), (7, 0.9, 3)])
def test_every_split_has_its_probability(split, num_tokens, decay, num_ar_steps) -> None:
    num_draws, root = 2500, seeds.key(3, "test")
    drawn = [draw_one(split, seeds.fold(root, i), num_tokens, decay, num_ar_steps) for i in range(num_draws)]
    seen, want = frequencies(torch.cat(drawn)), split_probabilities(num_tokens, decay, num_ar_steps)
    assert len(want) == (math.comb(num_tokens - 1, num_ar_steps - 1) if num_ar_steps else 2 ** (num_tokens - 1))
    assert seen.keys() <= want.keys()
    chi_square = sum(num_draws * (seen.get(parts, 0.0) - p) ** 2 / p for parts, p in want.items())
    # Exceeded with probability 0.001, and the seed is fixed.
    assert chi_square < chi2.isf(0.001, len(want) - 1)


def official_sizes(num_draws: int, num_tokens: int, decay: float) -> list[list[int]]:
    """Splits as the official sampler draws them: S by its weights, then a uniform set of cut points."""
    draw = random.Random(0)
    num_steps = draw.choices(range(1, num_tokens + 1), [decay**s for s in range(num_tokens)], k=num_draws)
    cuts = [sorted(draw.sample(range(1, num_tokens), s - 1)) for s in num_steps]
    return [[b - a for a, b in itertools.pairwise([0, *c, num_tokens])] for c in cuts]


def chi_square_of_two_samples(ours: list[int], theirs: list[int]) -> tuple[float, int]:
    """Whether two samples have one law: the statistic and its degrees of freedom, over bins of 30 values or more."""
    count_ours, count_theirs = Counter(ours), Counter(theirs)
    bins, a, b = [], 0, 0
    for value in sorted(count_ours | count_theirs):
        a, b = a + count_ours[value], b + count_theirs[value]
        if a + b >= 30:
            bins.append((a, b))
            a, b = 0, 0
    bins.append((a, b))
    ratio = math.sqrt(len(ours) / len(theirs))
    return sum((x / ratio - y * ratio) ** 2 / (x + y) for x, y in bins if x + y), len(bins) - 1


def test_marginals_at_full_size_are_the_official_samplers() -> None:
    """Splits of their own with a shared last size: S and the sizes at the ends and in the middle, at 256 tokens."""
    num_tokens, decay, root = 256, 0.9, seeds.key(11, "test")
    ours = [draw_one("sample", seeds.fold(root, i), num_tokens, decay)[0].bincount().tolist() for i in range(5_000)]
    theirs = official_sizes(50_000, num_tokens, decay)
    assert all(sum(split) == num_tokens and min(split) >= 1 for split in ours)
    marginals = {
        "S": len,
        "first": lambda split: split[0],
        "middle": lambda split: split[len(split) // 2],
        "last": lambda split: split[-1],
        "largest": max,
    }
    for name, value in marginals.items():
        chi_square, freedom = chi_square_of_two_samples([value(s) for s in ours], [value(s) for s in theirs])
        assert freedom > 12, name
        assert chi_square < chi2.isf(0.001, freedom), name


@pytest.mark.parametrize(("num_tokens", "decay", "num_ar_steps"), [(5, 0.9, 0), (9, 1.0, 0), (8, 0.9, 3), (6, 0.9, 1)])
def test_expected_work_is_the_mean_over_all_splits(num_tokens, decay, num_ar_steps) -> None:
    """Of an image at the end, and of one that another image follows."""
    whole = image_segment(order.steps_from_sizes([num_tokens])[None])
    splits = split_probabilities(num_tokens, decay, num_ar_steps)
    for num_images in (1, 2):
        mean = [0.0, 0.0, 0.0]
        for several in itertools.product(splits.items(), repeat=num_images):
            segments = [class_segment(3), *(image_segment(order.steps_from_sizes(parts)[None]) for parts, _ in several)]
            work = count_work(segments, build_layout(segments, 4))
            assert work.projections["class"] == 0
            counts = (work.tokens, work.visible, work.projections["image"])
            p = math.prod(p for _, p in several)
            mean = [a + p * b for a, b in zip(mean, counts, strict=True)]
        got = expected_work([class_segment(3), *[whole] * num_images], order.ARSettings(num_ar_steps, decay))
        assert (got.tokens, got.visible, got.projections["image"]) == pytest.approx(tuple(mean))


@pytest.mark.parametrize("clean_multiple", [1, 3, 4, 20])
@pytest.mark.parametrize(("num_tokens", "decay", "num_ar_steps"), [(8, 0.5, 0), (9, 0.9, 3), (9, 1.0, 9), (5, 0.9, 1)])
def test_lengths_have_the_probabilities_of_their_splits(num_tokens, decay, num_ar_steps, clean_multiple) -> None:
    """Of an image at the end; one that a text follows is clean as a whole, and lengths are equal."""
    expected: dict[int, float] = {}
    settings = order.ARSettings(num_ar_steps, decay)
    for parts, p in split_probabilities(num_tokens, decay, num_ar_steps).items():
        image = image_segment(order.steps_from_sizes(parts)[None])
        length = build_layout([class_segment(3), image], clean_multiple).step_BM.shape[1]
        expected[length] = expected.get(length, 0.0) + p
        before_text = build_layout([class_segment(3), image, text(2)], clean_multiple).step_BM.shape[1]
        assert sequence_lengths([class_segment(3), image, text(2)], settings, clean_multiple) == {before_text: 1.0}
    got = sequence_lengths([class_segment(3), image], settings, clean_multiple)
    assert got == pytest.approx(expected)
    assert list(got) == sorted(expected)


def test_equal_steps_have_one_length() -> None:
    """The last of four steps of 64 tokens is never clean: 4 + 192 + 256."""
    four = order.ARSettings(4, ar_step_sizes="equal")
    segments = [class_segment(4), image_segment(order.steps_from_sizes([256])[None])]
    assert sequence_lengths(segments, four, 64) == {452: 1.0}
    assert sequence_lengths(segments, four, 128) == {516: 1.0}


@given(st.integers(1, 30), st.data())
def test_work_of_equal_sizes(num_tokens, data) -> None:
    num_ar_steps = data.draw(st.integers(1, num_tokens))
    parts = order.equal_sizes(num_tokens, num_ar_steps)
    segments = [class_segment(2), image_segment(order.steps_from_sizes(parts)[None])]
    want, equal = count_work(segments, build_layout(segments)), order.ARSettings(num_ar_steps, ar_step_sizes="equal")
    whole = image_segment(order.steps_from_sizes([num_tokens])[None])
    assert expected_work([class_segment(2), whole], equal) == want
    assert order.last_size_probabilities(num_tokens, 0.9, num_ar_steps, "equal").nonzero().tolist() == [[parts[-1] - 1]]


@given(st.integers(0, 2**31), st.integers(1, 40), st.data())
def test_a_fixed_number_of_steps(seed, num_tokens, data) -> None:
    num_ar_steps = data.draw(st.integers(1, num_tokens))
    root = seeds.key(seed, "test")
    own = order.draw_steps(root, seeds.fold(root, torch.arange(6)), num_tokens, 0.9, num_ar_steps)
    shared = order.draw_shared_steps(root, 2, num_tokens, 0.9, num_ar_steps)
    assert (own[:, -1] == num_ar_steps - 1).all()
    assert (shared[:, -1] == num_ar_steps - 1).all()
    assert order.step_begin(own)[:, -1].unique().numel() == 1


def test_more_steps_than_tokens_are_refused() -> None:
    root = seeds.key(0, "test")
    with pytest.raises(ValueError, match="num_ar_steps: expected 1 to 4"):
        order.draw_steps(root, root[None], 4, 0.9, 5)


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


def test_fixed_orders_spelled_out() -> None:
    assert order.fixed_order(3, "raster", 4).tolist() == list(range(9))
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert order.fixed_order(4, "block_raster", 2).tolist() == sum(blocks, [])
    strides = [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
    assert order.fixed_order(4, "dilated", 2).tolist() == sum(strides, [])
    with pytest.raises(ValueError, match="block_size: expected a divisor of the token grid's 4 rows, got 3"):
        order.fixed_order(4, "dilated", 3)


@pytest.mark.parametrize("token_order", ["random", "raster", "block_raster", "dilated"])
def test_orders_are_permutations(token_order) -> None:
    keys = seeds.fold(seeds.key(0, "test"), torch.arange(3))
    orders = order.draw_orders(keys, 144, token_order, 4)
    assert torch.equal(orders.sort(1).values, torch.arange(144).expand(3, -1))
    assert torch.equal(order.draw_orders(keys[1:2], 144, token_order, 4), orders[1:2])
    assert torch.equal(orders[0], orders[1]) == (token_order != "random")

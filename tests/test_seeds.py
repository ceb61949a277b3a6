"""Stateless randomness: quality, independence of batching, and bits that never change."""

import functools
import math
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.core import seeds
from tests import plain_seeds


def test_uniform_and_normal_have_their_moments() -> None:
    keys = seeds.fold(seeds.key(0, "moments"), torch.arange(200))
    uniform = seeds.uniform(keys, (1000,))
    assert 0 < float(uniform.min()) < 1e-4
    assert 1 - 1e-4 < float(uniform.max()) < 1
    # Five standard errors of 200,000 draws.
    assert float(uniform.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 2e5) ** 0.5)
    normal = seeds.normal(keys, (1000,)).double()
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((normal**power).mean()) == pytest.approx(want, abs=5 * (variance / 2e5) ** 0.5)


def test_neighbouring_keys_and_elements_are_uncorrelated() -> None:
    drawn = seeds.normal(seeds.fold(seeds.key(1, "x"), torch.arange(300)), (300,)).double()
    across_keys = float((drawn[1:] * drawn[:-1]).mean())
    across_elements = float((drawn[:, 1:] * drawn[:, :-1]).mean())
    diagonal = float((drawn[1:, :-1] * drawn[:-1, 1:]).mean())
    assert max(abs(across_keys), abs(across_elements), abs(diagonal)) < 5 / 9e4**0.5


def test_permutations_are_uniform() -> None:
    drawn = seeds.permutation(seeds.fold(seeds.key(2, "p"), torch.arange(24_000)), 4)
    counts = drawn.unique(dim=0, return_counts=True)[1].double()
    assert len(counts) == 24
    # 23 degrees of freedom: 49.7 is exceeded with probability 0.001, and the seed is fixed.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 49.7


def test_integers_cover_their_range() -> None:
    drawn = seeds.integers(seeds.fold(seeds.key(0, "t"), torch.arange(5000)), 10)
    assert drawn.unique().tolist() == list(range(10))


@given(st.integers(0, 2**63 - 1), st.integers(0, 50), st.integers(1, 50))
def test_a_slice_of_a_draw_can_be_made_alone(seed, first, count) -> None:
    key = seeds.key(seed, "slice")
    assert torch.equal(seeds.normal(key, (100,))[first : first + count], seeds.normal(key, (count,), first=first))


def test_draws_do_not_depend_on_the_batch() -> None:
    ids = torch.tensor([5, 900, 17])
    together = seeds.normal(seeds.fold(seeds.key(0, "n"), ids), (4, 2))
    alone = [seeds.normal(seeds.fold(seeds.key(0, "n"), i), (4, 2)) for i in (5, 900, 17)]
    assert torch.equal(together, torch.stack(alone))


def test_seed_purpose_and_index_all_matter() -> None:
    keys = [
        seeds.fold(seeds.key(0, "a"), 0),
        seeds.fold(seeds.key(1, "a"), 0),
        seeds.fold(seeds.key(0, "b"), 0),
        seeds.fold(seeds.key(0, "a"), 1),
        seeds.fold(seeds.fold(seeds.key(0, "a"), 0), 0),
    ]
    assert len({int(k) for k in keys}) == len(keys)


def test_bits_never_change() -> None:
    # A run resumed under a newer version must draw the same numbers.
    keys = seeds.fold(seeds.key(7, "golden"), torch.tensor([0, 1, 2**40]))
    assert seeds.bits(keys, (2,)).tolist() == GOLDEN_BITS


@given(
    st.integers(0, 2**20),
    st.lists(st.integers(0, 7), max_size=2),
    st.lists(st.integers(0, 9), max_size=2),
    st.integers(0, 100) | st.just(2**62),
    st.integers(1, 40),
)
def test_numbers_do_not_depend_on_how_they_are_cut_into_chunks(seed, batch, shape, first, chunk) -> None:
    """Bit for bit what the formulas give over the whole tensor at once."""
    keys = plain_seeds.mix(seed + torch.arange(math.prod(batch)).reshape(batch))
    with patch.object(seeds, "_CPU_CHUNK", chunk):
        for ours, plain in ((seeds.bits, plain_seeds.bits), (seeds.uniform, plain_seeds.uniform)):
            drawn = ours(keys, shape)
            assert drawn.is_contiguous()
            assert torch.equal(drawn, plain(keys, shape))
        expected = torch.empty([*batch, *shape])
        for ours, plain in (
            (seeds.normal, plain_seeds.normal),
            (functools.partial(seeds.uniform_within, 0.3), functools.partial(plain_seeds.uniform_within, 0.3)),
        ):
            plain(keys, shape, first, expected)
            out = torch.full_like(expected, torch.nan)
            assert ours(keys, shape, first, out) is out
            assert torch.equal(out, expected)
            assert torch.equal(ours(keys, shape, first), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_large_draws_are_those_of_the_formulas(num_threads, mode) -> None:
    key, count, threads = seeds.key(3, "large"), 3 * 2**16 + 5, torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with mode():
            normal, uniform = seeds.normal(key, (count,)), seeds.uniform_within(0.02, key, (count,))
            # What comes out is of the mode's kind.
            assert torch.equal(normal.mul_(1), normal)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(normal, plain_seeds.normal(key, (count,), 0, torch.empty(count)))
    assert torch.equal(uniform, plain_seeds.uniform_within(0.02, key, (count,), 0, torch.empty(count)))


def test_folds_are_those_of_the_formula() -> None:
    parents = torch.tensor([[5], [-(2**63)]])
    index = torch.tensor([0, 7, 2**63 - 1])
    mixed = plain_seeds.mix(parents)
    assert torch.equal(seeds.fold(parents, index), plain_seeds.mix(mixed + (index + 1) * GAMMA))
    for i in index.tolist():
        assert torch.equal(seeds.fold(parents, i), plain_seeds.mix(mixed + (torch.tensor(i) + 1) * GAMMA))
    assert parents.tolist() == [[5], [-(2**63)]]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def growth_of_a_large_draw() -> tuple[int, int]:
    """Bytes that a draw needs beside its result, and those of the result as 64-bit numbers."""
    key, out = seeds.key(0, "large"), torch.full((1 << 24,), torch.nan)
    seeds.normal(key, (1 << 16,))
    before = peak_bytes()
    seeds.normal(key, out.shape, out=out)
    growth = peak_bytes() - before
    assert not out.isnan().any()
    return growth, 8 * out.numel()


def test_a_large_draw_takes_little_memory_beside_its_result() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        growth, whole = pool.submit(growth_of_a_large_draw).result(timeout=120)
    assert growth < whole / 16


GAMMA = 0x9E3779B97F4A7C15 - 2**64
GOLDEN_BITS = [
    [-240596360036047365, 6081685146771228271],
    [7357054676109527850, -25755839938347048],
    [1906637690329402847, 1001663739445710292],
]

"""The AR axis: AR steps, token orders and AR weights (section 3 of arXiv 2412.12095).

The L tokens of an image are put in an order and cut into S AR steps kappa_1 .. kappa_S. The model factorises along both
axes: each AR step is a diffusion (`process.py`) that is given the clean tokens of the AR steps before it,

    p(x_0) = prod_s p(x_{0,kappa_s} | c_s),   c_s = x_{0,kappa_1..s-1}                                 AR axis
    p(x_{0..T,kappa_s} | c_s) = p(x_{T,kappa_s}) prod_t p(x_{t-1,kappa_s} | x_{t,kappa_s}, c_s)        noise axis

so that S = 1 is a diffusion transformer and S = L pure autoregression. Training draws

    P(S) = gamma^(S-1) / sum_{i=1..L} gamma^(i-1)   AR step decay: late AR steps are easy, most of the image is given
    cut points | S  uniform among the (S-1)-subsets of {1..L-1}
    order           a uniform permutation of the tokens

and weighs the loss of a step by w(x), which falls along the axis for the same reason (`ar_weights`).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core import seeds

# ---------------------------------------------------------------------------
# AR steps: how L ordered tokens are cut


def step_count_probabilities(num_tokens: int, decay: float, num_ar_steps: int = 0) -> Tensor:
    """P(S) = decay^(S-1) / sum_i decay^(i-1) for S = 1..L, float64 [L]; `num_ar_steps` other than 0 has all of it."""
    if num_ar_steps:
        _check_num_ar_steps(num_tokens, num_ar_steps)
        return F.one_hot(torch.tensor(num_ar_steps - 1), num_tokens).double()
    weight = torch.tensor(decay, dtype=torch.float64) ** torch.arange(num_tokens)
    return weight / weight.sum()


def _check_num_ar_steps(num_tokens: int, num_ar_steps: int) -> None:
    if not 1 <= num_ar_steps <= num_tokens:
        raise ValueError(f"num_ar_steps: expected 1 to {num_tokens} (the tokens of an image), got {num_ar_steps}")


@functools.lru_cache(maxsize=8)
def last_size_table(num_tokens: int, decay: float, num_ar_steps: int = 0) -> Tensor:
    """The joint law of S and the size l of the last AR step: float64 [L, L], entry [l-1, S-1] is P(l, S).

    The last cut is at L - l, the S - 2 others before it, of C(L-1, S-1) equally probable ways to choose all:
    P(l | S) = C(L-l-1, S-2) / C(L-1, S-1) for S >= 2, and l = L iff S = 1.
    """
    L = num_tokens
    last = torch.arange(1, L + 1, dtype=torch.float64)[:, None]
    steps = torch.arange(1, L + 1, dtype=torch.float64)[None, :]
    log_given_steps = _log_choose(L - last - 1, steps - 2) - _log_choose(torch.full_like(last, L - 1), steps - 1)
    possible = (steps >= 2) & (last + steps <= L + 1)
    table = torch.where(possible, log_given_steps.exp(), 0.0)
    table[L - 1, 0] = 1.0
    return table * step_count_probabilities(L, decay, num_ar_steps)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    n, k = torch.broadcast_tensors(n, k)
    inside = (k >= 0) & (n >= k)
    n, k = torch.where(inside, n, 1.0), torch.where(inside, k, 0.0)
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def draw_shared_steps(
    shared_key: Tensor, batch_size: int, num_tokens: int, decay: float, num_ar_steps: int = 0
) -> Tensor:
    """One split for the whole batch, as the official training draws it: int64 [B, L], each position's 0-based AR step.

    `shared_key`, an int64 scalar, is equal on all ranks and micro-batches of an optimizer step; `decay` and
    `num_ar_steps` are those of `step_count_probabilities`.
    """
    num_steps = _draw_index(step_count_probabilities(num_tokens, decay, num_ar_steps), shared_key) + 1
    cuts_BL = _cut_uniformly(seeds.fold(shared_key, 0)[None], num_steps[None], num_tokens, torch.tensor([num_tokens]))
    return cuts_BL.cumsum(1).expand(batch_size, -1)


def draw_steps(
    shared_key: Tensor, sample_keys_B: Tensor, num_tokens: int, decay: float, num_ar_steps: int = 0
) -> Tensor:
    """A split for each sample, all with a last AR step of the same size: int64 [B, L].

    A sequence's length, Q + 2L - l, depends on the size l of its last step only. So l ~ P(l) is drawn once, with
    `shared_key`, then for each sample S ~ P(S | l) and S - 2 cut points below L - l: lengths are equal, and every
    sample's split has the law of `draw_shared_steps`.
    """
    table = last_size_table(num_tokens, decay, num_ar_steps)
    last = _draw_index(last_size_probabilities(num_tokens, decay, num_ar_steps, "random"), shared_key)
    num_steps_B = _draw_index(table[last], sample_keys_B) + 1
    begin_of_last = torch.full_like(num_steps_B, num_tokens - 1) - last
    cuts_BL = _cut_uniformly(seeds.fold(sample_keys_B, 0), num_steps_B - 1, num_tokens, begin_of_last)
    # The cut before the last step is given, not drawn (S = 1 has none).
    has_last_B = num_steps_B > 1
    cuts_BL[has_last_B, begin_of_last[has_last_B]] = 1
    return cuts_BL.cumsum(1)


def _draw_index(weight: Tensor, keys: Tensor) -> Tensor:
    """An index drawn with probability proportional to `weight` [..], by inversion, for each key."""
    cumulated = weight.cumsum(0)
    point = seeds.uniform(keys) * cumulated[-1]
    return torch.searchsorted(cumulated, point.reshape(-1), right=True).reshape(point.shape).clamp_(max=len(weight) - 1)


def _cut_uniformly(keys_B: Tensor, num_pieces_B: Tensor, num_tokens: int, end_B: Tensor) -> Tensor:
    """Cuts [0, end) into pieces at a uniform subset of {1..end-1}: int64 [B, L], 1 where a piece begins (but at 0)."""
    bits_BL = seeds.bits(keys_B, (num_tokens,))
    position = torch.arange(num_tokens)
    allowed_BL = (position >= 1) & (position < end_B[:, None])
    rank_BL = torch.where(allowed_BL, bits_BL, torch.iinfo(torch.int64).max).argsort(1).argsort(1)
    return ((rank_BL < num_pieces_B[:, None] - 1) & allowed_BL).long()


def equal_sizes(num_tokens: int, num_ar_steps: int) -> list[int]:
    """Sizes of AR steps as equal as can be, the larger ones last."""
    _check_num_ar_steps(num_tokens, num_ar_steps)
    return [(i + 1) * num_tokens // num_ar_steps - i * num_tokens // num_ar_steps for i in range(num_ar_steps)]


def cosine_sizes(num_tokens: int, num_ar_steps: int) -> list[int]:
    """Sizes of AR steps that grow as the cosine falls: few tokens while little is known (MaskGIT, arXiv 2202.04200)."""
    _check_num_ar_steps(num_tokens, num_ar_steps)
    left = [math.cos(math.pi / 2 * (i + 1) / num_ar_steps) * num_tokens for i in range(num_ar_steps)]
    # At least one token a step, and enough left for the steps to come.
    ends = increasing([0, *(round(num_tokens - tokens) for tokens in left)], num_tokens)
    return [end - begin for begin, end in itertools.pairwise(ends)]


def increasing(numbers: Sequence[int], last: int) -> list[int]:
    """Ascending numbers, each moved up where two would be one, and then down so that none is above `last`."""
    found = list(numbers)
    for i in range(1, len(found)):
        found[i] = max(found[i], found[i - 1] + 1)
    return [min(number, last - len(found) + 1 + i) for i, number in enumerate(found)]


def choose_sizes(num_tokens: int, num_ar_steps: int, sizes: str | Sequence[int]) -> list[int]:
    """Sizes of AR steps as a person asks for them: "equal", "cosine", or the sizes themselves.

    Raises:
        ValueError: sizes that are not `num_ar_steps` numbers from 1 on with the sum `num_tokens`.
    """
    if isinstance(sizes, str):
        return {"equal": equal_sizes, "cosine": cosine_sizes}[sizes](num_tokens, num_ar_steps)
    if min(sizes, default=0) < 1 or sum(sizes) != num_tokens or len(sizes) != num_ar_steps:
        raise ValueError(
            f"sizes of AR steps: expected {num_ar_steps} numbers of at least 1 that add up to {num_tokens}, the tokens "
            f"to make, got {len(sizes)} that add up to {sum(sizes)}"
        )
    return list(sizes)


def steps_from_sizes(sizes: Sequence[int] | Tensor) -> Tensor:
    """The AR step of each position for steps of the given sizes: int64 [L]."""
    return torch.arange(len(sizes)).repeat_interleave(torch.as_tensor(sizes))


def step_begin(steps_BL: Tensor) -> Tensor:
    """The position at which each position's AR step begins: int64 [B, L]."""
    position_L = torch.arange(steps_BL.shape[1], device=steps_BL.device)
    begins_BL = F.pad(steps_BL[:, 1:] != steps_BL[:, :-1], (1, 0), value=True)
    return torch.where(begins_BL, position_L, 0).cummax(1).values


def ar_weights(steps_BL: Tensor, first: float, last: float, schedule: str) -> Tensor:
    """The loss weight w(x) of each token, by the position x at which its AR step begins: float32 [B, L].

    It leads from w_first at x = 0 to w_last at x = L:

        linear   w(x) = w_first - (w_first - w_last) x / L
        cosine   w(x) = (w_first - w_last) / 2 cos(pi x / L) + (w_first + w_last) / 2
    """
    share_BL = step_begin(steps_BL).float() / steps_BL.shape[1]
    if schedule == "cosine":
        return (first - last) / 2 * torch.cos(math.pi * share_BL) + (first + last) / 2
    assert schedule == "linear", schedule
    return first - (first - last) * share_BL


@functools.lru_cache(maxsize=8)
def last_size_probabilities(num_tokens: int, decay: float, num_ar_steps: int, ar_step_sizes: str) -> Tensor:
    """P(l), l = 1..L, of the last AR step's size, which alone decides a sequence's length: float64 [L]."""
    if ar_step_sizes == "equal":
        return F.one_hot(torch.tensor(equal_sizes(num_tokens, num_ar_steps)[-1] - 1), num_tokens).double()
    return last_size_table(num_tokens, decay, num_ar_steps).sum(1)


# ---------------------------------------------------------------------------
# Orders: which token of the grid stands at each position


def draw_orders(sample_keys_B: Tensor, num_tokens: int, token_order: str, block_size: int) -> Tensor:
    """The order of each sample's tokens, int64 [B, L]: "random" for a permutation by its key, else `fixed_order`'s."""
    if token_order == "random":
        return seeds.permutation(sample_keys_B, num_tokens)
    return fixed_order(math.isqrt(num_tokens), token_order, block_size).expand(len(sample_keys_B), -1)


def fixed_order(grid: int, token_order: str, block_size: int) -> Tensor:
    """An order that all images share: int64 [L], entry i the token (row * grid + column) at position i.

    "raster": row by row. "block_raster": blocks of s x s tokens row by row, and the tokens of each block row by row.
    "dilated": the tokens with (row % s, column % s) = (0, 0), row by row, then those with (0, 1), and so on to
    (s - 1, s - 1). The block size or stride s = block_size must divide the grid, or a ValueError says so.
    """
    tokens_L = torch.arange(grid**2)
    if token_order == "raster":
        return tokens_L
    if block_size < 1 or grid % block_size:
        raise ValueError(f"block_size: expected a divisor of the token grid's {grid} rows, got {block_size}")
    blocks = tokens_L.reshape(grid // block_size, block_size, grid // block_size, block_size)
    if token_order == "block_raster":
        return blocks.permute(0, 2, 1, 3).flatten()
    assert token_order == "dilated", token_order
    return blocks.permute(1, 3, 0, 2).flatten()


# ---------------------------------------------------------------------------
# The AR axis of training


@dataclass(frozen=True)
class ARSettings:
    """AR steps, orders and weights in training; section `order` of a config has the same keys."""

    num_ar_steps: int = 0  # S of every split; 0 draws it
    ar_step_decay: float = 0.9  # gamma: P(S) is proportional to gamma^(S-1)
    ar_step_sizes: str = "random"  # cut points, or "equal" sizes of `num_ar_steps` steps
    ar_split: str = "sample"  # a split for each sample (equal last sizes), or one for the whole "batch"
    ar_weight_first: float = 2.0  # w(0), see `ar_weights`
    ar_weight_last: float = 1.0  # w(L)
    ar_weight_schedule: str = "linear"
    token_order: str = "random"  # see `draw_orders`
    block_size: int = 4  # of the orders "block_raster" and "dilated"

    @property
    def shares_split(self) -> bool:
        """Whether all samples of an optimizer step are cut alike, so that one row of a layout serves them."""
        return self.ar_split == "batch" or self.ar_step_sizes == "equal" or self.num_ar_steps == 1

    def draw_steps(self, shared_key: Tensor, sample_keys_B: Tensor, num_tokens: int) -> Tensor:
        """The AR step of each position, int64 [B, L]; arguments as for the function `draw_steps`."""
        batch_size = len(sample_keys_B)
        if self.ar_step_sizes == "equal":
            return steps_from_sizes(equal_sizes(num_tokens, self.num_ar_steps)).expand(batch_size, -1)
        if self.ar_split == "batch":
            return draw_shared_steps(shared_key, batch_size, num_tokens, self.ar_step_decay, self.num_ar_steps)
        return draw_steps(shared_key, sample_keys_B, num_tokens, self.ar_step_decay, self.num_ar_steps)

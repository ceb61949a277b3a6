"""Flash attention under the row intervals of `order.Layout`, forward and backward, as Triton kernels.

What a query row sees is two intervals of keys, its prefix and its own (`order.py`), so a tile of rows loops over two
ranges of keys, and a tile of keys over two ranges of rows. No mask, no index list and no atomic exists, and results do
not depend on the order of execution:

    keys ->      clean              noised                 keys ->      clean              noised
    rows   +-----------------+-----------------+           rows   +-----------------+-----------------+
    clean  | ##              |                 |           clean  |       ##        |                 |
           | #####           |                 |                  |       ##        |                 |  without own
           | ########        |                 |                  |       ##        |                 |
           +-----------------+-----------------+                  +-----------------+-----------------+
    noised |                 | ###             |           noised |                 |                 |
           | =====           |   ======        |                  |       ##        |                 |  with own
           | ########        |         ####    |                  |       ##        |                 |
           +-----------------+-----------------+                  +-----------------+-----------------+
    forward, dQ: a tile of rows (=) meets the hull of its         dK, dV: a tile of keys (#) meets, of the rows without
    prefixes, then the hull of its own intervals                  an own interval and of those with one, a range each

Each loop is cut in two: tiles that are visible as a whole need no mask, and run first; the others are masked by the
intervals, element by element. So any intervals are computed right, packed samples and padding among them; those of
`order.py` are computed fast.
"""

# Triton's functions take what Triton gives them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for some platforms comes without it; `is_available` says so
    triton, tl = None, SimpleNamespace(constexpr=int)

HEAD_WIDTHS = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY_TILE = 64  # keys of a program of dK and dV, unless `make_tiles` is told another number


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        rows: rows of a tile.
        keys: keys of a tile; dK and dV take those of `Tiles`.
        num_warps: warps of a program.
        num_stages: tiles of the loop in flight.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# By kernel, head width and bytes of a value. Those marked H200 are from a sweep of rows, keys, warps and stages in bf16
# on an H200 with torch 2.11 and Triton 3.6: 20 heads, 576 tokens at a batch of 16 and 2112 at a batch of 4. The others
# are not measured, but chosen to fit the registers.
LAUNCHES: dict[tuple[str, int, int], Launch] = {
    ("forward", 32, 2): Launch(64, 64, 4, 3),
    ("forward", 64, 2): Launch(64, 64, 4, 3),  # H200: the fastest at 2112; at 576, (64, 32, 4, 4) is 2 % faster
    ("forward", 128, 2): Launch(64, 32, 4, 3),  # H200: the fastest at 576; at 2112 it is (64, 64, 4, 3)
    ("forward", 32, 4): Launch(64, 32, 4, 2),
    ("forward", 64, 4): Launch(32, 32, 4, 2),
    ("forward", 128, 4): Launch(32, 32, 8, 1),
    ("backward_q", 32, 2): Launch(64, 64, 4, 3),
    ("backward_q", 64, 2): Launch(64, 32, 4, 3),  # H200: the fastest at 576; at 2112, as fast as any
    ("backward_q", 128, 2): Launch(64, 64, 4, 2),
    ("backward_q", 32, 4): Launch(64, 32, 4, 2),
    ("backward_q", 64, 4): Launch(32, 32, 8, 2),
    ("backward_q", 128, 4): Launch(32, 32, 16, 1),
    ("backward_kv", 32, 2): Launch(64, 0, 4, 3),
    ("backward_kv", 64, 2): Launch(128, 0, 4, 2),  # H200: the whole backward in 0.82 and 0.91 of (64, 0, 4, 3)'s time
    ("backward_kv", 128, 2): Launch(32, 0, 4, 3),
    ("backward_kv", 32, 4): Launch(16, 0, 8, 2),
    ("backward_kv", 64, 4): Launch(16, 0, 8, 2),
    ("backward_kv", 128, 4): Launch(16, 0, 16, 1),
}


def is_available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


# ---------------------------------------------------------------------------
# Which rows see a tile of keys


class Tiles(NamedTuple):
    """Who sees whom, made once for a forward of the network and shared by its blocks.

    Attributes:
        intervals_BMI: int32 [B or 1, M, 4], contiguous.
        row_ranges_BT4: int32 [B or 1, key tiles, 4]: (begin, end) of a range of rows without an own interval and of one
            of rows with an own interval: no row outside sees the tile, and the two do not overlap.
        whole_ranges_BT4: int32 [B or 1, key tiles, 4]: of each of the two, the part that sees the tile as a whole.
        key_tile: keys of a tile.
    """

    intervals_BMI: Tensor
    row_ranges_BT4: Tensor
    whole_ranges_BT4: Tensor
    key_tile: int


def make_tiles(intervals_BMI: Tensor, num_keys: int, key_tile: int | None = None) -> Tiles:
    """The tiles of a layout.

    Args:
        intervals_BMI: int32 [B or 1, M, 4], what each row sees (`order.Layout`); samples may be packed in one row.
        num_keys: K.
        key_tile: keys of a tile, a power of two from 16 on; None: `KEY_TILE`.
    """
    key_tile = KEY_TILE if key_tile is None else key_tile
    intervals_BMI = intervals_BMI.to(torch.int32).contiguous()
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.clamp(0, num_keys).unsqueeze(1).unbind(-1)
    first_T1 = torch.arange(0, num_keys, key_tile, dtype=torch.int32, device=intervals_BMI.device)[:, None]
    end_T1 = (first_T1 + key_tile).clamp(max=num_keys)

    def sees(begin: Tensor, end: Tensor) -> Tensor:
        return torch.maximum(begin, first_T1) < torch.minimum(end, end_T1)

    def sees_whole(begin: Tensor, end: Tensor) -> Tensor:
        return (begin <= first_T1) & (end_T1 <= end)

    sees_BTM = sees(prefix_begin, prefix_end) | sees(own_begin, own_end)
    whole_BTM = sees_whole(prefix_begin, prefix_end) | sees_whole(own_begin, own_end)
    has_own_B1M = own_begin < own_end
    ranges = _disjoint(*_hull(sees_BTM & ~has_own_B1M), *_hull(sees_BTM & has_own_B1M))
    whole = [bound for i in (0, 2) for bound in _first_run(whole_BTM, ranges[i], ranges[i + 1])]
    return Tiles(intervals_BMI, torch.stack(ranges, -1), torch.stack(whole, -1), key_tile)


def _rows(mask_BTM: Tensor) -> Tensor:
    return torch.arange(mask_BTM.shape[-1], dtype=torch.int32, device=mask_BTM.device)


def _hull(mask_BTM: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest range that holds all true rows; (0, 0) where none is."""
    row_M, num_rows = _rows(mask_BTM), mask_BTM.shape[-1]
    end_BT = torch.where(mask_BTM, row_M + 1, 0).amax(-1)
    begin_BT = torch.where(mask_BTM, row_M, num_rows).amin(-1)
    return torch.minimum(begin_BT, end_BT), end_BT


def _disjoint(begin_0: Tensor, end_0: Tensor, begin_1: Tensor, end_1: Tensor) -> list[Tensor]:
    """Two ranges that overlap become their hull and an empty one, so that no row counts twice."""
    overlap = torch.maximum(begin_0, begin_1) < torch.minimum(end_0, end_1)
    return [
        torch.where(overlap, torch.minimum(begin_0, begin_1), begin_0),
        torch.where(overlap, torch.maximum(end_0, end_1), end_0),
        torch.where(overlap, 0, begin_1),
        torch.where(overlap, 0, end_1),
    ]


def _first_run(mask_BTM: Tensor, begin_BT: Tensor, end_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The first run of true rows inside a range; (end, end) where none is."""
    row_M = _rows(mask_BTM)
    end_BT1 = end_BT.unsqueeze(-1)
    inside_BTM = mask_BTM & (begin_BT.unsqueeze(-1) <= row_M) & (row_M < end_BT1)
    first_BT = torch.where(inside_BTM, row_M, end_BT1).amin(-1)
    after_BTM = ~inside_BTM & (row_M >= first_BT.unsqueeze(-1))
    return first_BT, torch.minimum(torch.where(after_BTM, row_M, mask_BTM.shape[-1]).amin(-1), end_BT)


# ---------------------------------------------------------------------------
# Kernels: parts they share


def _plain(function: Callable[..., Any]) -> Any:
    return function


_jit: Any = _plain if triton is None else triton.jit
# What changes with the length and the batch. Triton would compile once more for each mix of those that 16 divides.
_LENGTHS = ("num_rows", "num_keys", "stride_ib", "stride_rb")
_jit_for_all_lengths: Any = _plain if triton is None else triton.jit(do_not_specialize=_LENGTHS)
_IS_INTERPRETED = triton is not None and not isinstance(_jit(_plain), triton.runtime.JITFunction)
if triton is not None:
    _UPCAST = tl.constexpr(_IS_INTERPRETED)
    _LOG2E = tl.constexpr(1.4426950408889634)
    _FAR = tl.constexpr(2**30)


@_jit
def _dot(a, b):
    # Triton 3.9's interpreter multiplies bf16 wrongly.
    if _UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@_jit
def _is_inside(index, begin, length):
    # A negative offset is huge as an unsigned number: one comparison for two.
    return (index - begin).to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True)


@_jit
def _load_intervals(intervals, row_M, num_keys):
    """The rows' intervals, cut to the keys there are; an empty one ends where it begins."""
    prefix_begin = tl.maximum(tl.load(intervals + row_M * 4), 0)
    prefix_end = tl.maximum(tl.minimum(tl.load(intervals + row_M * 4 + 1), num_keys), prefix_begin)
    own_begin = tl.maximum(tl.load(intervals + row_M * 4 + 2), 0)
    own_end = tl.maximum(tl.minimum(tl.load(intervals + row_M * 4 + 3), num_keys), own_begin)
    return prefix_begin, prefix_end, own_begin, own_end


@_jit
def _key_range(begin_M, end_M, TILE: tl.constexpr):
    """The hull of the rows' intervals, and how many of its first tiles every row sees as a whole."""
    has = begin_M < end_M
    end = tl.max(tl.where(has, end_M, 0))
    begin = tl.min(tl.where(has, begin_M, _FAR))
    whole = tl.where(tl.max(begin_M) == begin, tl.maximum(tl.min(end_M) - begin, 0) // TILE, 0)
    return tl.minimum(begin, end), end, whole


@_jit
def _place(pid, num_tiles, num_heads):
    """The tile, the sample and the head of a program; those of one head are neighbours and share its keys in cache."""
    head = pid // num_tiles
    return pid % num_tiles, (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)


# ---------------------------------------------------------------------------
# Forward


@_jit
def _attend_tile(
    q_ME, acc_ME, sum_M, max_M, k, v, stride_k, stride_v, start, begin_M, length_M, num_keys, scale,
    E: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax."""
    key_N, e = start + tl.arange(0, N), tl.arange(0, E)
    if MASKED:
        k_NE = tl.load(k + key_N[:, None] * stride_k + e[None, :], mask=(key_N < num_keys)[:, None], other=0.0)
        score_MN = _dot(q_ME, tl.trans(k_NE))
        score_MN = tl.where(_is_inside(key_N[None, :], begin_M[:, None], length_M[:, None]), score_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * scale)
        # A row that has seen nothing yet: -inf minus -inf is no number.
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    else:
        k_NE = tl.load(k + key_N[:, None] * stride_k + e[None, :])
        score_MN = _dot(q_ME, tl.trans(k_NE))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1) * scale)
        base_M = new_max_M
    p_MN = tl.exp2(score_MN * scale - base_M[:, None])
    kept_M = tl.exp2(max_M - base_M)
    if MASKED:
        v_NE = tl.load(v + key_N[:, None] * stride_v + e[None, :], mask=(key_N < num_keys)[:, None], other=0.0)
    else:
        v_NE = tl.load(v + key_N[:, None] * stride_v + e[None, :])
    acc_ME = acc_ME * kept_M[:, None] + _dot(p_MN.to(v_NE.dtype), v_NE)
    return acc_ME, sum_M * kept_M + tl.sum(p_MN, 1), new_max_M


@_jit_for_all_lengths
def _forward_kernel(
    q, k, v, intervals, out, lse,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_om, stride_ib, num_heads, num_rows, num_keys, scale,
    E: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of rows: out, and log2 of the sum of exp2 of the scores (+inf for a row that sees nothing)."""
    tile, b, h = _place(tl.program_id(0), tl.cdiv(num_rows, ROWS), num_heads)
    k, v = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    row_M, e = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    exists_M = row_M < num_rows
    # Rows past the end compute the last row again: they widen no range.
    loaded_M = tl.minimum(row_M, num_rows - 1)
    q_ME = tl.load(q + b * stride_qb + h * stride_qh + loaded_M[:, None] * stride_qm + e[None, :])
    prefix_begin, prefix_end, own_begin, own_end = _load_intervals(intervals + b * stride_ib, loaded_M, num_keys)
    prefix, end_prefix, whole_prefix = _key_range(prefix_begin, prefix_end, KEYS)
    own, end_own, whole_own = _key_range(own_begin, own_end, KEYS)
    acc_ME = tl.zeros([ROWS, E], tl.float32)
    sum_M = tl.zeros([ROWS], tl.float32)
    max_M = tl.full([ROWS], float("-inf"), tl.float32)
    scale = scale * _LOG2E

    for i in range(whole_prefix + whole_own):
        start = tl.where(i < whole_prefix, prefix + i * KEYS, own + (i - whole_prefix) * KEYS)
        acc_ME, sum_M, max_M = _attend_tile(
            q_ME, acc_ME, sum_M, max_M, k, v, stride_km, stride_vm, start, row_M, row_M, num_keys, scale, E, KEYS, False
        )  # fmt: skip
    prefix, own = prefix + whole_prefix * KEYS, own + whole_own * KEYS
    in_prefix = tl.cdiv(end_prefix - prefix, KEYS)
    for i in range(in_prefix + tl.cdiv(end_own - own, KEYS)):
        start = tl.where(i < in_prefix, prefix + i * KEYS, own + (i - in_prefix) * KEYS)
        begin_M = tl.where(i < in_prefix, prefix_begin, own_begin)
        length_M = tl.where(i < in_prefix, prefix_end, own_end) - begin_M
        acc_ME, sum_M, max_M = _attend_tile(
            q_ME, acc_ME, sum_M, max_M, k, v, stride_km, stride_vm, start, begin_M, length_M, num_keys, scale,
            E, KEYS, True,
        )  # fmt: skip

    sees_M = sum_M > 0
    out_ME = acc_ME / tl.where(sees_M, sum_M, 1.0)[:, None]
    # +inf makes the probabilities of the backward 0.
    lse_M = tl.where(sees_M, max_M + tl.log2(tl.where(sees_M, sum_M, 1.0)), float("inf"))
    out = out + b * stride_ob + h * stride_oh + row_M[:, None] * stride_om + e[None, :]
    tl.store(out, out_ME.to(out.dtype.element_ty), mask=exists_M[:, None])
    tl.store(lse + (b * num_heads + h) * num_rows + row_M, lse_M, mask=exists_M)


# ---------------------------------------------------------------------------
# Backward


@_jit
def _grad_q_tile(
    q_ME, grad_ME, lse_M, delta_M, dq_ME, k, v, stride_k, stride_v, start, begin_M, length_M, num_keys, scale,
    E: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    key_N, e = start + tl.arange(0, N), tl.arange(0, E)
    if MASKED:
        k_NE = tl.load(k + key_N[:, None] * stride_k + e[None, :], mask=(key_N < num_keys)[:, None], other=0.0)
        v_NE = tl.load(v + key_N[:, None] * stride_v + e[None, :], mask=(key_N < num_keys)[:, None], other=0.0)
    else:
        k_NE = tl.load(k + key_N[:, None] * stride_k + e[None, :])
        v_NE = tl.load(v + key_N[:, None] * stride_v + e[None, :])
    p_MN = tl.exp2(_dot(q_ME, tl.trans(k_NE)) * scale - lse_M[:, None])
    if MASKED:
        p_MN = tl.where(_is_inside(key_N[None, :], begin_M[:, None], length_M[:, None]), p_MN, 0.0)
    dscore_MN = p_MN * (_dot(grad_ME, tl.trans(v_NE)) - delta_M[:, None])
    return dq_ME + _dot(dscore_MN.to(k_NE.dtype), k_NE)


@_jit_for_all_lengths
def _backward_q_kernel(
    q, k, v, intervals, out, lse, grad, delta, dq,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, stride_db, stride_dh, stride_dm,
    stride_ib, num_heads, num_rows, num_keys, scale,
    E: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of rows, over the keys of the forward: dQ, and delta = sum of grad * out, which dK and dV need."""
    tile, b, h = _place(tl.program_id(0), tl.cdiv(num_rows, ROWS), num_heads)
    k, v = k + b * stride_kb + h * stride_kh, v + b * stride_vb + h * stride_vh
    row_M, e = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
    exists_M = row_M < num_rows
    loaded_M = tl.minimum(row_M, num_rows - 1)
    line = (b * num_heads + h) * num_rows
    q_ME = tl.load(q + b * stride_qb + h * stride_qh + loaded_M[:, None] * stride_qm + e[None, :])
    grad_ME = tl.load(grad + b * stride_gb + h * stride_gh + loaded_M[:, None] * stride_gm + e[None, :])
    out_ME = tl.load(out + b * stride_ob + h * stride_oh + loaded_M[:, None] * stride_om + e[None, :])
    delta_M = tl.sum(grad_ME.to(tl.float32) * out_ME.to(tl.float32), 1)
    tl.store(delta + line + row_M, delta_M, mask=exists_M)
    lse_M = tl.load(lse + line + loaded_M)
    prefix_begin, prefix_end, own_begin, own_end = _load_intervals(intervals + b * stride_ib, loaded_M, num_keys)
    prefix, end_prefix, whole_prefix = _key_range(prefix_begin, prefix_end, KEYS)
    own, end_own, whole_own = _key_range(own_begin, own_end, KEYS)
    dq_ME = tl.zeros([ROWS, E], tl.float32)
    scale_2 = scale * _LOG2E

    for i in range(whole_prefix + whole_own):
        start = tl.where(i < whole_prefix, prefix + i * KEYS, own + (i - whole_prefix) * KEYS)
        dq_ME = _grad_q_tile(
            q_ME, grad_ME, lse_M, delta_M, dq_ME, k, v, stride_km, stride_vm, start, row_M, row_M, num_keys, scale_2,
            E, KEYS, False,
        )  # fmt: skip
    prefix, own = prefix + whole_prefix * KEYS, own + whole_own * KEYS
    in_prefix = tl.cdiv(end_prefix - prefix, KEYS)
    for i in range(in_prefix + tl.cdiv(end_own - own, KEYS)):
        start = tl.where(i < in_prefix, prefix + i * KEYS, own + (i - in_prefix) * KEYS)
        begin_M = tl.where(i < in_prefix, prefix_begin, own_begin)
        length_M = tl.where(i < in_prefix, prefix_end, own_end) - begin_M
        dq_ME = _grad_q_tile(
            q_ME, grad_ME, lse_M, delta_M, dq_ME, k, v, stride_km, stride_vm, start, begin_M, length_M, num_keys,
            scale_2, E, KEYS, True,
        )  # fmt: skip

    dq = dq + b * stride_db + h * stride_dh + row_M[:, None] * stride_dm + e[None, :]
    tl.store(dq, (dq_ME * scale).to(dq.dtype.element_ty), mask=exists_M[:, None])


@_jit
def _grad_kv_tile(
    k_NE, v_NE, dk_NE, dv_NE, key_N, q, grad, lse, delta, intervals, stride_q, stride_g, start, end, num_keys, scale,
    E: tl.constexpr, M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row_M, e = start + tl.arange(0, M), tl.arange(0, E)
    if MASKED:
        in_range_M = row_M < end
        q_ME = tl.load(q + row_M[:, None] * stride_q + e[None, :], mask=in_range_M[:, None], other=0.0)
        grad_ME = tl.load(grad + row_M[:, None] * stride_g + e[None, :], mask=in_range_M[:, None], other=0.0)
        # +inf: a row outside of the range has the probability 0.
        lse_M = tl.load(lse + row_M, mask=in_range_M, other=float("inf"))
        delta_M = tl.load(delta + row_M, mask=in_range_M, other=0.0)
    else:
        q_ME = tl.load(q + row_M[:, None] * stride_q + e[None, :])
        grad_ME = tl.load(grad + row_M[:, None] * stride_g + e[None, :])
        lse_M, delta_M = tl.load(lse + row_M), tl.load(delta + row_M)
    p_NM = tl.exp2(_dot(k_NE, tl.trans(q_ME)) * scale - lse_M[None, :])
    if MASKED:
        prefix_begin, prefix_end, own_begin, own_end = _load_intervals(intervals, tl.minimum(row_M, end - 1), num_keys)
        in_prefix = _is_inside(key_N[:, None], prefix_begin[None, :], (prefix_end - prefix_begin)[None, :])
        in_own = _is_inside(key_N[:, None], own_begin[None, :], (own_end - own_begin)[None, :])
        p_NM = tl.where(in_prefix | in_own, p_NM, 0.0)
    dv_NE += _dot(p_NM.to(grad_ME.dtype), grad_ME)
    dscore_NM = p_NM * (_dot(v_NE, tl.trans(grad_ME)) - delta_M[None, :])
    dk_NE += _dot(dscore_NM.to(q_ME.dtype), q_ME)
    return dk_NE, dv_NE


@_jit
def _row_range(ranges, whole_ranges, which: tl.constexpr, ROWS: tl.constexpr):
    """A range of rows (begin, end) and, inside it, whole tiles that see all keys of the tile (begin, end)."""
    begin, end = tl.load(ranges + 2 * which), tl.load(ranges + 2 * which + 1)
    whole_begin, whole_end = tl.load(whole_ranges + 2 * which), tl.load(whole_ranges + 2 * which + 1)
    # What is left over goes in front, where masked tiles are in most ranges.
    return begin, end, whole_end - (whole_end - whole_begin) // ROWS * ROWS, whole_end


@_jit_for_all_lengths
def _backward_kv_kernel(
    q, k, v, intervals, row_ranges, whole_ranges, lse, grad, delta, dk, dv,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_km, stride_vb, stride_vh, stride_vm,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkm, stride_dvb, stride_dvh, stride_dvm,
    stride_ib, stride_rb, num_heads, num_rows, num_keys, scale,
    E: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A tile of keys, over its two ranges of rows: dK and dV."""
    tile, b, h = _place(tl.program_id(0), tl.cdiv(num_keys, KEYS), num_heads)
    q, grad = q + b * stride_qb + h * stride_qh, grad + b * stride_gb + h * stride_gh
    line = (b * num_heads + h) * num_rows
    lse, delta, intervals = lse + line, delta + line, intervals + b * stride_ib
    key_N, e = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, E)
    exists_N1 = (key_N < num_keys)[:, None]
    k_NE = tl.load(k + b * stride_kb + h * stride_kh + key_N[:, None] * stride_km + e[None, :], exists_N1, 0.0)
    v_NE = tl.load(v + b * stride_vb + h * stride_vh + key_N[:, None] * stride_vm + e[None, :], exists_N1, 0.0)
    row_ranges, whole_ranges = row_ranges + b * stride_rb + tile * 4, whole_ranges + b * stride_rb + tile * 4
    begin_0, end_0, whole_0, after_0 = _row_range(row_ranges, whole_ranges, 0, ROWS)
    begin_1, end_1, whole_1, after_1 = _row_range(row_ranges, whole_ranges, 1, ROWS)
    dk_NE = tl.zeros([KEYS, E], tl.float32)
    dv_NE = tl.zeros([KEYS, E], tl.float32)
    scale_2 = scale * _LOG2E

    num_0 = (after_0 - whole_0) // ROWS
    for i in range(num_0 + (after_1 - whole_1) // ROWS):
        start = tl.where(i < num_0, whole_0 + i * ROWS, whole_1 + (i - num_0) * ROWS)
        dk_NE, dv_NE = _grad_kv_tile(
            k_NE, v_NE, dk_NE, dv_NE, key_N, q, grad, lse, delta, intervals, stride_qm, stride_gm, start, start,
            num_keys, scale_2, E, ROWS, False,
        )  # fmt: skip
    # Before and after the whole tiles of the first range, then of the second.
    num_0 = tl.cdiv(whole_0 - begin_0, ROWS)
    num_1 = num_0 + tl.cdiv(end_0 - after_0, ROWS)
    num_2 = num_1 + tl.cdiv(whole_1 - begin_1, ROWS)
    for i in range(num_2 + tl.cdiv(end_1 - after_1, ROWS)):
        in_0 = tl.where(i < num_0, begin_0 + i * ROWS, after_0 + (i - num_0) * ROWS)
        in_1 = tl.where(i < num_2, begin_1 + (i - num_1) * ROWS, after_1 + (i - num_2) * ROWS)
        end = tl.where(i < num_1, tl.where(i < num_0, whole_0, end_0), tl.where(i < num_2, whole_1, end_1))
        dk_NE, dv_NE = _grad_kv_tile(
            k_NE, v_NE, dk_NE, dv_NE, key_N, q, grad, lse, delta, intervals, stride_qm, stride_gm,
            tl.where(i < num_1, in_0, in_1), end, num_keys, scale_2, E, ROWS, True,
        )  # fmt: skip

    dk = dk + b * stride_dkb + h * stride_dkh + key_N[:, None] * stride_dkm + e[None, :]
    dv = dv + b * stride_dvb + h * stride_dvh + key_N[:, None] * stride_dvm + e[None, :]
    tl.store(dk, (dk_NE * scale).to(dk.dtype.element_ty), mask=exists_N1)
    tl.store(dv, dv_NE.to(dv.dtype.element_ty), mask=exists_N1)


# ---------------------------------------------------------------------------
# Operators: opaque to torch.compile, so that a compiled block stays one graph


def _allocate(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _allocate_heads(like_BHME: Tensor) -> Tensor:
    """[B, H, M, E] that lies in memory as [B, M, H, E], which is what the projections before and after work on."""
    B, H, M, E = like_BHME.shape
    return _allocate((B, M, H, E), like_BHME).transpose(1, 2)


def _with_dense_rows(x_BHME: Tensor) -> Tensor:
    return x_BHME if x_BHME.stride(-1) == 1 else x_BHME.contiguous()


def _batch_stride(x: Tensor) -> int:
    """0 where one row of the batch serves all samples."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def _launch(kernel: Any, name: str, q_BHME: Tensor, per: str, num: int, keys: int, *arguments: Any) -> None:
    """Runs a kernel with one program a tile of `per` ("rows" or "keys"), sample and head."""
    B, H, _, E = q_BHME.shape
    launch = LAUNCHES[name, E, q_BHME.element_size()]
    keys = keys or launch.keys
    num_tiles = triton.cdiv(num, launch.rows if per == "rows" else keys)
    kernel[(num_tiles * B * H,)](
        *arguments,
        E=E,
        ROWS=launch.rows,
        KEYS=keys,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=True,
    )


@torch.library.custom_op("cfpretrain::block_causal_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, row_ranges: Tensor, whole_ranges: Tensor, key_tile: int
) -> tuple[Tensor, Tensor]:
    q, k, v = (_with_dense_rows(x) for x in (q, k, v))
    out, lse = _allocate_heads(q), _allocate(q.shape[:3], q, torch.float32)
    _launch(
        _forward_kernel, "forward", q, "rows", q.shape[2], 0,
        q, k, v, intervals, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        _batch_stride(intervals), q.shape[1], q.shape[2], k.shape[2], q.shape[3] ** -0.5,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _allocate_heads(q), _allocate(q.shape[:3], q, torch.float32)


@torch.library.custom_op("cfpretrain::block_causal_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    intervals: Tensor,
    row_ranges: Tensor,
    whole_ranges: Tensor,
    key_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = (_with_dense_rows(x) for x in (grad, q, k, v))
    dq, dk, dv = _allocate_heads(q), _allocate_heads(k), _allocate_heads(v)
    delta = _allocate(q.shape[:3], q, torch.float32)
    sizes = q.shape[1], q.shape[2], k.shape[2], q.shape[3] ** -0.5
    _launch(
        _backward_q_kernel, "backward_q", q, "rows", q.shape[2], 0,
        q, k, v, intervals, out, lse, grad, delta, dq, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], _batch_stride(intervals), *sizes,
    )  # fmt: skip
    _launch(
        _backward_kv_kernel, "backward_kv", q, "keys", k.shape[2], key_tile,
        q, k, v, intervals, row_ranges, whole_ranges, lse, grad, delta, dk, dv, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], _batch_stride(intervals),
        _batch_stride(row_ranges), *sizes,
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_heads(q), _allocate_heads(k), _allocate_heads(v)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *visibility, ctx.key_tile = inputs
    ctx.save_for_backward(q, k, v, *output, *visibility)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    dq, dk, dv = _backward(grad, *ctx.saved_tensors, ctx.key_tile)
    return dq, dk, dv, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)


def block_causal_attention(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, tiles: Tiles) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys; differentiable in q, k and v.

    Args:
        q_BHME: fp32, bf16 or fp16, head width 32, 64 or 128, any strides; k and v alike.
        tiles: of a layout with M rows and K keys.

    Returns:
        [B, H, M, E], which lies in memory as [B, M, H, E]; 0 for rows that see nothing.

    Raises:
        ValueError: what came is not supported.
    """
    _check(q_BHME, k_BHKE, v_BHKE, tiles)
    out_BHME, _ = _forward(q_BHME, k_BHKE, v_BHKE, *tiles)
    return out_BHME


def _check(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> None:
    if not q.is_cuda and not _IS_INTERPRETED:
        raise ValueError(f"the triton attention runs on a GPU, got tensors on the {q.device.type}; use sdpa there")
    if q.shape[-1] not in HEAD_WIDTHS:
        raise ValueError(f"the triton attention has head widths {', '.join(map(str, HEAD_WIDTHS))}, got {q.shape[-1]}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "the triton attention takes q, k and v of one dtype, fp32, bf16 or fp16, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if not k.shape == v.shape == (*q.shape[:2], k.shape[2], q.shape[3]):
        raise ValueError(f"q, k, v: expected [B, H, M, E] and twice [B, H, K, E], got {q.shape}, {k.shape}, {v.shape}")
    batch, num_rows, _ = tiles.intervals_BMI.shape
    num_tiles = -(-k.shape[2] // tiles.key_tile)
    if batch not in (1, q.shape[0]) or num_rows != q.shape[2] or tiles.row_ranges_BT4.shape[1] != num_tiles:
        raise ValueError(
            f"tiles: expected intervals of {q.shape[0]} samples or 1 and {q.shape[2]} rows and {num_tiles} key tiles, "
            f"got {batch}, {num_rows} and {tiles.row_ranges_BT4.shape[1]}"
        )

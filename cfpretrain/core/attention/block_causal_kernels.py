"""The Triton kernels of `block_causal.py`: forward, and the backward to q and to k and v.

See there what a tile meets. Here each loop over tiles is cut in two: tiles that are visible as a whole need no mask and
run first; the others are masked by the intervals, element by element, so that any intervals are computed right.
"""

# Triton's functions take what Triton gives them.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for some platforms comes without it; `is_available` says so
    triton, tl = None, SimpleNamespace(constexpr=int)


def is_available() -> bool:
    """Whether Triton is installed; torch compiles FlexAttention with it too."""
    return triton is not None


# ---------------------------------------------------------------------------
# Kernels: parts they share


def _plain(function: Callable[..., Any]) -> Any:
    return function


_jit: Any = _plain if triton is None else triton.jit
# What changes with the length and the batch. Triton would compile once more for each mix of those that 16 divides.
_LENGTHS = ("num_rows", "num_keys", "stride_ib", "stride_rb")
_jit_for_all_lengths: Any = _plain if triton is None else triton.jit(do_not_specialize=_LENGTHS)
IS_INTERPRETED = triton is not None and not isinstance(_jit(_plain), triton.runtime.JITFunction)
if triton is not None:
    _UPCAST = tl.constexpr(IS_INTERPRETED)
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
def forward_kernel(
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
def backward_q_kernel(
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
def backward_kv_kernel(
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

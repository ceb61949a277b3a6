"""Flash attention under the row intervals of `segments.Layout`, forward and backward, as Triton kernels.

What a query row sees is two intervals of keys, its prefix and its own (`segments.py`), so a tile of rows loops over two
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

Any intervals are computed right, packed samples and padding among them; those of `segments.py` are computed fast.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfpretrain.core.attention import BACKENDS
from cfpretrain.core.attention.block_causal_kernels import (
    IS_INTERPRETED,
    backward_kv_kernel,
    backward_q_kernel,
    forward_kernel,
    is_available,
)

_HEAD_WIDTHS = BACKENDS["triton"].head_widths
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY_TILE = 64  # keys of a program of dK and dV, unless `prepare` is told another number


class Launch(NamedTuple):
    """How a kernel is launched."""

    rows: int  # of a tile
    keys: int  # of a tile; dK and dV take those of `Tiles`
    num_warps: int  # of a program
    num_stages: int  # tiles of the loop in flight


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


def can_run(device_type: str, precision: str) -> str:
    """What this device lacks."""
    return "" if device_type == "cuda" else f"a GPU, and this run computes on the {device_type}"


def missing_package() -> str:
    """What must be installed."""
    return "" if is_available() else "the package triton, which is not installed (pip install triton)"


# ---------------------------------------------------------------------------
# Which rows see a tile of keys


class Tiles(NamedTuple):
    """Who sees whom, made once for a forward of the network and shared by its blocks."""

    intervals_BMI: Tensor  # int32 [B or 1, M, 4], contiguous
    # Int32 [B or 1, key tiles, 4]: (begin, end) of a range of rows without an own interval and of one of rows with an
    # own interval: no row outside sees the tile, and the two do not overlap.
    row_ranges_BT4: Tensor
    whole_ranges_BT4: Tensor  # of each of the two, the part that sees the tile as a whole
    key_tile: int  # keys of a tile


def prepare(intervals_BMI: Tensor, num_keys: int, key_tile: int | None = None) -> Tiles:
    """The tiles of a layout; `key_tile` is a power of two from 16 on, without it `KEY_TILE`."""
    key_tile = KEY_TILE if key_tile is None else key_tile
    intervals_BMI = intervals_BMI.to(torch.int32).contiguous()
    sees_BTM, whole_BTM = (tiles_BMT.transpose(1, 2) for tiles_BMT in tiles_seen(intervals_BMI, num_keys, key_tile))
    _, _, own_begin, own_end = intervals_BMI.clamp(0, num_keys).unsqueeze(1).unbind(-1)
    has_own_B1M = own_begin < own_end
    ranges = _disjoint(*_hull(sees_BTM & ~has_own_B1M), *_hull(sees_BTM & has_own_B1M))
    whole = [bound for i in (0, 2) for bound in _first_run(whole_BTM, ranges[i], ranges[i + 1])]
    return Tiles(intervals_BMI, torch.stack(ranges, -1), torch.stack(whole, -1), key_tile)


def tiles_seen(intervals_BMI: Tensor, num_keys: int, tile: int) -> tuple[Tensor, Tensor]:
    """Which tiles of so many keys each row sees at all, and which as a whole: two bool [B, M, T]."""
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.clamp(0, num_keys).unsqueeze(2).unbind(-1)
    first_T = torch.arange(0, num_keys, tile, dtype=intervals_BMI.dtype, device=intervals_BMI.device)
    end_T = (first_T + tile).clamp(max=num_keys)

    def sees(begin: Tensor, end: Tensor) -> Tensor:
        return torch.maximum(begin, first_T) < torch.minimum(end, end_T)

    def sees_whole(begin: Tensor, end: Tensor) -> Tensor:
        return (begin <= first_T) & (end_T <= end)

    return (
        sees(prefix_begin, prefix_end) | sees(own_begin, own_end),
        sees_whole(prefix_begin, prefix_end) | sees_whole(own_begin, own_end),
    )


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
    num_tiles = -(-num // (launch.rows if per == "rows" else keys))
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
        forward_kernel, "forward", q, "rows", q.shape[2], 0,
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
        backward_q_kernel, "backward_q", q, "rows", q.shape[2], 0,
        q, k, v, intervals, out, lse, grad, delta, dq, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], _batch_stride(intervals), *sizes,
    )  # fmt: skip
    _launch(
        backward_kv_kernel, "backward_kv", q, "keys", k.shape[2], key_tile,
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


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, tiles: Tiles) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, [B, H, M, E] in memory as [B, M, H, E]; differentiable.

    Fp32, bf16 or fp16 in any strides, other tensors a ValueError; a row that sees nothing has 0.
    """
    _check(q_BHME, k_BHKE, v_BHKE, tiles)
    out_BHME, _ = _forward(q_BHME, k_BHKE, v_BHKE, *tiles)
    return out_BHME


def _check(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> None:
    if not q.is_cuda and not IS_INTERPRETED:
        raise ValueError(f"the triton attention runs on a GPU, got tensors on the {q.device.type}; use sdpa there")
    if q.shape[-1] not in _HEAD_WIDTHS:
        raise ValueError(f"the triton attention has head widths {', '.join(map(str, _HEAD_WIDTHS))}, got {q.shape[-1]}")
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
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

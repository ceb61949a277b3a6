"""torch's FlexAttention, compiled for each length; its tiles come from the intervals."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cfpretrain.core.attention import compile_by_shape
from cfpretrain.core.attention.block_causal import can_run, missing_package, tiles_seen

__all__ = ["attend", "can_run", "missing_package", "prepare"]  # torch compiles it with Triton too

_TILE = 128  # queries = keys of a tile


def prepare(intervals_BMI: Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's tiles, from the intervals alone: no [M, K] mask exists.

    Its shapes depend on B, M and K only, so that a compiled kernel serves all layouts of a length.
    """
    num_rows = intervals_BMI.shape[1]
    seen_BTK, whole_BTK = _tiles_seen(intervals_BMI, num_keys, _TILE)
    count, index = _as_list(seen_BTK & ~whole_BTK)
    whole_count, whole_index = _as_list(whole_BTK)
    own_sample = int(intervals_BMI.shape[0] > 1)

    def is_visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        sample = b * own_sample
        in_prefix = (intervals_BMI[sample, row, 0] <= key) & (key < intervals_BMI[sample, row, 1])
        return in_prefix | ((intervals_BMI[sample, row, 2] <= key) & (key < intervals_BMI[sample, row, 3]))

    return BlockMask.from_kv_blocks(
        count, index, whole_count, whole_index, _TILE, is_visible, seq_lengths=(num_rows, num_keys)
    )


def _tiles_seen(intervals_BMI: Tensor, num_keys: int, tile: int) -> tuple[Tensor, Tensor]:
    """Which tiles of keys each tile of rows sees at all, and which as a whole: two bool [B, row tiles, key tiles]."""
    seen_BMT, whole_BMT = tiles_seen(intervals_BMI, num_keys, tile)
    missing_rows = -intervals_BMI.shape[1] % tile
    seen_BMT = F.pad(seen_BMT, (0, 0, 0, missing_rows), value=False)
    whole_BMT = F.pad(whole_BMT, (0, 0, 0, missing_rows), value=True)
    return seen_BMT.unflatten(1, (-1, tile)).any(2), whole_BMT.unflatten(1, (-1, tile)).all(2)


def _as_list(tiles_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of rows: how many tiles of keys, and which, those first: int32 [B, 1, T] and [B, 1, T, K]."""
    index = tiles_BTK.int().argsort(dim=-1, descending=True, stable=True)
    return tiles_BTK.sum(-1, dtype=torch.int32).unsqueeze(1), index.to(torch.int32).unsqueeze(1)


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask: BlockMask) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys: [B, H, M, E]."""
    # In the graph of a compiled block it is compiled with the block.
    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return flex(q_BHME, k_BHKE, v_BHKE, block_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Not compiled, FlexAttention materialises the scores.
    return compile_by_shape(flex_attention)

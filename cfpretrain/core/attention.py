"""Attention under the row intervals of `order.Layout`: one function, its backends.

| backend | under the intervals | without (all visible) | what it is |
|---|---|---|---|
| sdpa | yes | yes | torch's scaled dot product attention, under a dense mask; the oracle, and what runs on a CPU |
| flex | on a GPU | no | torch's FlexAttention, compiled for each length; its tiles come from the intervals |
| triton | on a GPU, heads of 32, 64 or 128 | no | our kernel, driven by the intervals themselves (`block_causal.py`) |
| flash | no | on a GPU from Ampere on, in bf16 | FlashAttention 2, for sampling with a cache |
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cfpretrain.core import block_causal
from cfpretrain.core.ar import may_attend

FLEX_MIN_HEAD_WIDTH = 16
FLASH_MAX_HEAD_WIDTH = 256
_FLASH_MIN_CAPABILITY = (8, 0)
_FLEX_TILE = 128  # queries = keys of a tile of FlexAttention
_MOST_GRAPHS = 64  # of one function: shapes, with and without gradients


# ---------------------------------------------------------------------------
# Choosing a backend


def choose(name: str, device_type: str, head_width: int) -> str:
    """The backend for attention under the intervals.

    Args:
        name: "auto" or a backend.
        device_type: "cpu" or "cuda".
        head_width: E; a backend asked for by name is taken to have it.

    Raises:
        ValueError: it cannot train on this device; the message says what can.
    """
    on_gpu = device_type == "cuda"
    if name == "auto":
        # Both take Triton: torch compiles FlexAttention with it.
        if not on_gpu or not block_causal.is_available():
            return "sdpa"
        # `Config.compiles_lengths` knows where it is flex.
        if head_width in block_causal.HEAD_WIDTHS:
            return "triton"
        return "flex" if head_width >= FLEX_MIN_HEAD_WIDTH else "sdpa"
    if name in ("flex", "triton") and not on_gpu:
        raise ValueError(f"{name} trains on a GPU only, and this run computes on the {device_type}; use sdpa")
    if name in ("flex", "triton") and not block_causal.is_available():
        raise ValueError(f"{name} needs the package triton, which is not installed; pip install triton, or use sdpa")
    return name


def choose_cached(name: str, device_type: str, precision: str, head_width: int, say: Callable[[str], None]) -> str:
    """The backend for attention without intervals, as in sampling with a cache.

    "auto" says, once a process, what keeps it from flash where the run could use it.

    Args:
        name: "auto" or a backend.
        device_type: "cpu" or "cuda".
        precision: of the sampling model, "bf16" or "fp32".
        head_width: E.
        say: shows a line of text.

    Raises:
        ValueError: it cannot run here; the message says what is missing and how to get it.
    """
    if name == "sdpa":
        return name
    missing = [
        reason
        for reason, absent in (
            ("a GPU from Ampere on (compute capability 8.0)", not _has_flash_gpu(device_type)),
            ("engine.precision=bf16", precision != "bf16"),
            (f"heads of width {FLASH_MAX_HEAD_WIDTH} at most", head_width > FLASH_MAX_HEAD_WIDTH),
        )
        if absent
    ]
    if name == "auto" and missing:
        return "sdpa"
    # Imported now: a package that does not fit torch fails here, and not at the first sample, thousands of steps later.
    _, problem = _load_flash()
    if not missing and not problem:
        return "flash"
    if name == "auto":
        _say_once(say, f"sampling attends by torch's sdpa, not by flash, which needs {problem}")
        return "sdpa"
    raise ValueError(f"flash needs {' and '.join([*missing, *filter(None, [problem])])}; or use sdpa")


@functools.cache
def _load_flash() -> tuple[Callable[..., Any] | None, str]:
    """FlashAttention's function and an empty text, or None and what it takes to have it."""
    install = "pip install 'flash-attn>=2.8', which builds with nvcc"
    if importlib.util.find_spec("flash_attn") is None:
        return None, f"the package ({install})"
    try:
        from flash_attn import flash_attn_func
    except Exception as error:  # whatever code built for another torch or GPU raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return None, f"a package flash-attn that can be imported, got {reason:.200} ({install})"
    return flash_attn_func, ""


@functools.cache
def _say_once(say: Callable[[str], None], text: str) -> None:
    say(text)


def _has_flash_gpu(device_type: str) -> bool:
    if device_type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= _FLASH_MIN_CAPABILITY


# ---------------------------------------------------------------------------
# Who sees whom, in the form that a backend takes


class Visibility(NamedTuple):
    """Who sees whom, made once for a forward and shared by its blocks.

    Attributes:
        backend: what computes.
        mask: what drives it: bool [B or 1, 1, M, K] for sdpa, a BlockMask for flex, Tiles for triton; None: every query
            sees every key.
    """

    backend: str
    mask: Tensor | BlockMask | block_causal.Tiles | None


def make_visibility(intervals_BMI: Tensor | None, num_keys: int, backend: str) -> Visibility:
    """The form of the row intervals that `backend` takes.

    Args:
        intervals_BMI: int32 [B or 1, M, 4]; None lets every query see every key.
        num_keys: K.
        backend: chosen by `choose`, or by `choose_cached` where there are no intervals.
    """
    if intervals_BMI is None:
        return Visibility(backend, None)
    if backend == "flex":
        return Visibility(backend, _block_mask(intervals_BMI, num_keys))
    if backend == "triton":
        return Visibility(backend, block_causal.make_tiles(intervals_BMI, num_keys))
    assert backend == "sdpa", backend
    return Visibility(backend, may_attend(intervals_BMI, num_keys).unsqueeze(1))


def _block_mask(intervals_BMI: Tensor, num_keys: int) -> BlockMask:
    """FlexAttention's tiles, from the intervals alone: no [M, K] mask exists.

    Its shapes depend on B, M and K only, so that a compiled kernel serves all layouts of a length.
    """
    num_rows = intervals_BMI.shape[1]
    seen_BTK, whole_BTK = _tiles_seen(intervals_BMI, num_keys, _FLEX_TILE)
    count, index = _as_list(seen_BTK & ~whole_BTK)
    whole_count, whole_index = _as_list(whole_BTK)
    own_sample = int(intervals_BMI.shape[0] > 1)

    def is_visible(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        sample = b * own_sample
        in_prefix = (intervals_BMI[sample, row, 0] <= key) & (key < intervals_BMI[sample, row, 1])
        return in_prefix | ((intervals_BMI[sample, row, 2] <= key) & (key < intervals_BMI[sample, row, 3]))

    return BlockMask.from_kv_blocks(
        count, index, whole_count, whole_index, _FLEX_TILE, is_visible, seq_lengths=(num_rows, num_keys)
    )


def _tiles_seen(intervals_BMI: Tensor, num_keys: int, tile: int) -> tuple[Tensor, Tensor]:
    """Which tiles of keys each tile of rows sees in part, and which as a whole: two bool [B, row tiles, key tiles]."""
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.unsqueeze(-1).unbind(2)
    first_K = torch.arange(0, num_keys, tile, device=intervals_BMI.device)
    end_K = (first_K + tile).clamp(max=num_keys)

    def meets(begin: Tensor, end: Tensor) -> Tensor:
        return (begin < end_K) & (first_K < end) & (begin < end)

    def covers(begin: Tensor, end: Tensor) -> Tensor:
        return (begin <= first_K) & (end_K <= end)

    seen_BMK = meets(prefix_begin, prefix_end) | meets(own_begin, own_end)
    whole_BMK = covers(prefix_begin, prefix_end) | covers(own_begin, own_end)
    missing_rows = -intervals_BMI.shape[1] % tile
    seen_BMK = F.pad(seen_BMK, (0, 0, 0, missing_rows), value=False)
    whole_BMK = F.pad(whole_BMK, (0, 0, 0, missing_rows), value=True)
    return seen_BMK.unflatten(1, (-1, tile)).any(2), whole_BMK.unflatten(1, (-1, tile)).all(2)


def _as_list(tiles_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of rows: how many tiles of keys, and which, those first: int32 [B, 1, T] and [B, 1, T, K]."""
    index = tiles_BTK.int().argsort(dim=-1, descending=True, stable=True)
    return tiles_BTK.sum(-1, dtype=torch.int32).unsqueeze(1), index.to(torch.int32).unsqueeze(1)


# ---------------------------------------------------------------------------
# Attention


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys.

    Args:
        visibility: from `make_visibility`.

    Returns:
        [B, H, M, E].
    """
    backend, mask = visibility
    if backend == "flex":
        assert isinstance(mask, BlockMask), "flex attends under intervals only"
        # In the graph of a compiled block it is compiled with the block.
        flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        return flex(q_BHME, k_BHKE, v_BHKE, block_mask=mask)
    if backend == "triton":
        assert isinstance(mask, block_causal.Tiles), "triton attends under intervals only"
        return block_causal.block_causal_attention(q_BHME, k_BHKE, v_BHKE, mask)
    if backend == "flash":
        assert mask is None, "flash attends without intervals only"
        flash, problem = _load_flash()
        assert flash is not None, problem
        return flash(q_BHME.transpose(1, 2), k_BHKE.transpose(1, 2), v_BHKE.transpose(1, 2)).transpose(1, 2)
    assert backend == "sdpa", backend
    assert not isinstance(mask, BlockMask | block_causal.Tiles), "sdpa attends under a dense mask"
    return F.scaled_dot_product_attention(q_BHME, k_BHKE, v_BHKE, attn_mask=mask)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Not compiled, FlexAttention materialises the scores.
    return compile_by_shape(flex_attention)


def compile_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a graph for each shape of the arguments; more than a few dozen shapes are an error."""
    # Past its limit of 8, torch would go on without compiling and only whisper.
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)

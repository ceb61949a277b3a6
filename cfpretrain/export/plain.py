"""What takes the place of `core.attention` and `core.norm` in an export: torch alone, on any device.

The package's own modules choose among kernels that an export's users need not have.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.core.segments import may_attend

STAND_INS = dict.fromkeys(("cfpretrain.core.attention", "cfpretrain.core.norm"), __name__)


class Visibility(NamedTuple):
    """Who sees whom, made once for a forward and shared by its blocks."""

    mask: Tensor | None  # bool [B or 1, 1, M, K]; None: every query sees every key


def make_visibility(intervals_BMI: Tensor | None, num_keys: int, backend: str) -> Visibility:
    """The row intervals, int32 [B or 1, M, 4], as a mask; without them every query sees every key."""
    assert backend == "sdpa", backend
    return Visibility(None if intervals_BMI is None else may_attend(intervals_BMI, num_keys).unsqueeze(1))


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, visibility: Visibility) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys: [B, H, M, E]; k and v may have fewer heads."""
    num_served = q_BHME.shape[1] // k_BHKE.shape[1]
    if num_served > 1:
        k_BHKE, v_BHKE = k_BHKE.repeat_interleave(num_served, 1), v_BHKE.repeat_interleave(num_served, 1)
    return F.scaled_dot_product_attention(q_BHME, k_BHKE, v_BHKE, attn_mask=visibility.mask)


def compile_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with a graph for each shape of the arguments."""
    return torch.compile(function, dynamic=False)


def layer_norm(width: int) -> nn.Module:
    """A LayerNorm over the last dimension, with weight and bias."""
    return make_norm("layer", width, 1e-5)


def make_norm(kind: str, width: int, eps: float, fused: bool = False) -> nn.Module:
    """A norm over the last dimension: a LayerNorm ("layer"), or an RMSNorm ("rms")."""
    assert not fused
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps=eps)

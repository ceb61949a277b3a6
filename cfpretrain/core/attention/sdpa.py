"""torch's scaled dot product attention, under a dense mask: the oracle, and what runs everywhere."""

import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core.segments import may_attend


def can_run(device_type: str, precision: str) -> str:
    """It runs everywhere."""
    return ""


def missing_package() -> str:
    """It needs torch alone."""
    return ""


def prepare(intervals_BMI: Tensor, num_keys: int) -> Tensor:
    """The intervals as a mask: bool [B or 1, 1, M, K]."""
    return may_attend(intervals_BMI, num_keys).unsqueeze(1)


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys, without a mask over all: [B, H, M, E]."""
    return F.scaled_dot_product_attention(q_BHME, k_BHKE, v_BHKE, attn_mask=mask)

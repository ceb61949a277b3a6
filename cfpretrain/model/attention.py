"""Attention under the row intervals of `order.Layout`: one function, its backends.

`sdpa` is torch's scaled dot product attention under a dense mask made from the intervals.
"""

import torch.nn.functional as F
from torch import Tensor

from cfpretrain.order import may_attend


def dense_mask(intervals_BMI: Tensor | None, num_keys: int) -> Tensor | None:
    """The mask of a whole forward, made once and shared by its blocks: bool [B, 1, M, K], true = may attend."""
    if intervals_BMI is None:
        return None
    return may_attend(intervals_BMI, num_keys).unsqueeze(1)


def attend(q_BHME: Tensor, k_BHKE: Tensor, v_BHKE: Tensor, mask_B1MK: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v over the visible keys.

    Args:
        mask_B1MK: from `dense_mask`; None lets every query see every key.

    Returns:
        [B, H, M, E].
    """
    return F.scaled_dot_product_attention(q_BHME, k_BHKE, v_BHKE, attn_mask=mask_B1MK)

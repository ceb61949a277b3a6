"""A block of the trunk: x <- x + Attention(norm1(x)), then x <- x + Mlp(norm2(x)).

The paper's (section 3 of arXiv 2412.12095) is a pre-norm decoder's without adaLN: LayerNorms, also over each head's
queries and keys, and an MLP with GELU. What other trunks have instead is said by a `BlockDesign`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.core.attention import Visibility, attend, compile_by_shape
from cfpretrain.core.design import BlockDesign
from cfpretrain.core.norm import make_norm

# A block's keys and values [B, H, M, E] -> those of its context and these.
ExtendContext = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Cosine and sine of the angles that each pair of a head's values is rotated by: two [B or 1, 1, M or 1, E / 2].
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks compute; what they compute is the same."""

    attention: str = "sdpa"  # backend where the intervals say who sees whom (`attention.choose`)
    sampling_attention: str = "sdpa"  # backend where everyone sees everything
    compile: bool = False  # torch.compile each block in training
    checkpoint_activations: bool = False  # keep only the blocks' inputs for the backward, compute the rest again
    fused_norm: bool = False  # apex's LayerNorm (`norm.has_apex`); not with `compile`


class Attention(nn.Module):
    """W_o [heads' softmax(q k^T / sqrt(E)) v] + b_o, where q and k may have a norm over the head width E."""

    def __init__(self, design: BlockDesign, fused_norm: bool) -> None:
        super().__init__()
        self.head_width = design.head_width
        self.num_heads = (design.num_heads, design.num_kv_heads, design.num_kv_heads)  # of q, k and v

        def head_norm() -> nn.Module:
            if not design.qk_norm:
                return nn.Identity()
            return make_norm(design.norm, design.head_width, design.norm_eps, fused_norm)

        self.qkv = nn.Linear(design.width, design.qkv_width, bias=design.qkv_bias)
        self.q_norm, self.k_norm = head_norm(), head_norm()
        self.proj = nn.Linear(design.attended_width, design.width, bias=design.proj_bias)

    def forward(
        self, x_BMD: Tensor, visibility: Visibility, extend: ExtendContext | None, rotation: Rotation | None
    ) -> Tensor:
        q, k, v = self.qkv(x_BMD).unflatten(-1, (-1, self.head_width)).transpose(1, 2).split(self.num_heads, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if extend is not None:
            k, v = extend(k, v)
        return self.proj(attend(q, k, v, visibility).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """W_2 gelu(W_1 x + b_1) + b_2; or W_2 (silu(W_g x + b_g) * (W_u x + b_u)) + b_2 with [W_g; W_u] in one matrix."""

    def __init__(self, design: BlockDesign) -> None:
        super().__init__()
        self.kind = design.mlp
        self.fc1 = nn.Linear(design.width, design.mlp_in_width, bias=design.mlp_bias)
        self.fc2 = nn.Linear(design.mlp_width, design.width, bias=design.mlp_bias)

    def forward(self, x_BMD: Tensor) -> Tensor:
        if self.kind == "swiglu":
            gate, up = self.fc1(x_BMD).chunk(2, -1)
            return self.fc2(F.silu(gate) * up)
        return self.fc2(F.gelu(self.fc1(x_BMD), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


class Block(nn.Module):
    """x <- x + Attention(norm1(x)), then x <- x + Mlp(norm2(x))."""

    def __init__(self, design: BlockDesign, settings: BlockSettings) -> None:
        super().__init__()
        norm = (design.norm, design.width, design.norm_eps, settings.fused_norm)
        self.norm1 = make_norm(*norm)
        self.attn = Attention(design, settings.fused_norm)
        self.norm2 = make_norm(*norm)
        self.mlp = Mlp(design)
        # One graph a length serves all blocks: they differ in their weights only.
        self._compiled = compile_by_shape(self._compute) if settings.compile else None

    def forward(
        self,
        x_BMD: Tensor,
        visibility: Visibility,
        extend: ExtendContext | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        if self._compiled is not None and torch.is_grad_enabled():
            return self._compiled(x_BMD, visibility, extend, rotation)
        # Sampling comes in too many lengths to compile.
        return self._compute(x_BMD, visibility, extend, rotation)

    def _compute(
        self, x_BMD: Tensor, visibility: Visibility, extend: ExtendContext | None, rotation: Rotation | None
    ) -> Tensor:
        x_BMD = x_BMD + self.attn(self.norm1(x_BMD), visibility, extend, rotation)
        return x_BMD + self.mlp(self.norm2(x_BMD))


# ---------------------------------------------------------------------------
# Rotary positions


def rotary_frequencies(design: BlockDesign) -> Tensor:
    """Angles of a step from one position to the next, float32 [E / 2]: base^(-2 i / E), i = 0..E/2 - 1.

    Llama 3 divides those of long wavelengths by `factor`: fully where a wavelength is in its original context less
    than `low_freq_factor` times, not at all where it is there more than `high_freq_factor` times, and in between by a
    linear mixture.
    """
    frequency_F = 1 / design.rotary_base ** (torch.arange(0, design.head_width, 2).float() / design.head_width)
    if not design.rotary_scaling:
        return frequency_F
    factor, low, high, original_length = design.rotary_scaling
    share_kept_F = ((original_length * frequency_F / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return frequency_F * (share_kept_F + (1 - share_kept_F) / factor)


def make_rotation(design: BlockDesign, positions_BM: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of tokens at these positions, int64 [B or 1, M or 1], for all blocks; the angles are in fp32."""
    angle_B1MF = positions_BM[:, None, :, None].float() * rotary_frequencies(design).to(positions_BM.device)
    return angle_B1MF.cos().to(dtype), angle_B1MF.sin().to(dtype)


def rotate(x_BHME: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the pairs (i, i + E / 2) of a head's values, as Hugging Face's checkpoints have them."""
    cos, sin = rotation
    first, second = x_BHME.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

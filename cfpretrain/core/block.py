"""A block of the trunk: x <- x + Attention(norm1(x)), then x <- x + Mlp(norm2(x)).

The paper's (section 3 of arXiv 2412.12095) is a pre-norm decoder's without adaLN: LayerNorms, also over each head's
queries and keys, and an MLP with GELU. What other trunks have instead is said by a `BlockDesign`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
        q, k, v = self._heads(self.qkv(x_BMD))
        return self.proj(self._attend(self.q_norm(q), self.k_norm(k), v, visibility, extend, rotation))

    def project(self, x_ND: Tensor) -> Tensor:
        """q, k and v of tokens, side by side, with their norms."""
        q, k, v = self.qkv(x_ND).unflatten(-1, (-1, self.head_width)).split(self.num_heads, 1)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], 1).flatten(1)

    def attend_all(
        self, qkv_BMW: Tensor, visibility: Visibility, extend: ExtendContext | None, rotation: Rotation | None
    ) -> Tensor:
        """What attention makes of what `project` gives, before W_o."""
        q, k, v = self._heads(qkv_BMW)
        return self._attend(q, k, v, visibility, extend, rotation)

    def _heads(self, qkv_BMW: Tensor) -> tuple[Tensor, ...]:
        return qkv_BMW.unflatten(-1, (-1, self.head_width)).transpose(1, 2).split(self.num_heads, 1)

    @staticmethod
    def _attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visibility: Visibility,
        extend: ExtendContext | None,
        rotation: Rotation | None,
    ) -> Tensor:
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if extend is not None:
            k, v = extend(k, v)
        return attend(q, k, v, visibility).transpose(1, 2).flatten(2)


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


class Routes(NamedTuple):
    """Which tokens of a batch's sequences [B, M], counted over all, go through the weights of images."""

    image_N: Tensor  # int64; where rows have other numbers of them, some of other kinds too, of which no one reads
    other_N: Tensor  # the same of all others
    place_N: Tensor  # of each token among those of `image_N` and then `other_N`


def make_routes(is_image_BM: Tensor, most_images: int, most_others: int) -> Routes:
    """Routes by bool [B, M]; a row has at most so many tokens of either sort, which are numbers that the host knows."""
    B, M = is_image_BM.shape
    order_BM = (~is_image_BM).int().argsort(dim=1, stable=True)
    row_B1 = torch.arange(B, device=is_image_BM.device)[:, None]
    num_images, num_others = min(most_images, M), min(most_others, M)
    image_BN, other_BN = (M * row_B1 + one_BN for one_BN in (order_BM[:, :num_images], order_BM[:, M - num_others :]))
    rank_BM = order_BM.argsort(dim=1)
    of_others_BM = B * num_images + num_others * row_B1 + rank_BM - (M - num_others)
    place_BM = torch.where(is_image_BM, num_images * row_B1 + rank_BM, of_others_BM)
    return Routes(image_BN.flatten(), other_BN.flatten(), place_BM.flatten())


def _by_route(
    x_BMD: Tensor, of_images: Callable[[Tensor], Tensor], of_others: Callable[[Tensor], Tensor], routes: Routes
) -> Tensor:
    """What two functions of single tokens make of their own ones."""
    x_ND = x_BMD.flatten(0, 1)
    made = torch.cat([of_images(x_ND.index_select(0, routes.image_N)), of_others(x_ND.index_select(0, routes.other_N))])
    return made.index_select(0, routes.place_N).unflatten(0, x_BMD.shape[:2])


class BlockWeights(nn.Module):
    """The norms and matrices of a block."""

    def __init__(self, design: BlockDesign, settings: BlockSettings) -> None:
        super().__init__()
        norm = (design.norm, design.width, design.norm_eps, settings.fused_norm)
        self.norm1 = make_norm(*norm)
        self.attn = Attention(design, settings.fused_norm)
        self.norm2 = make_norm(*norm)
        self.mlp = Mlp(design)

    def project(self, x_ND: Tensor) -> Tensor:
        """q, k and v of norm1(x), side by side."""
        return self.attn.project(self.norm1(x_ND))

    def transform(self, x_ND: Tensor) -> Tensor:
        """Mlp(norm2(x))."""
        return self.mlp(self.norm2(x_ND))


class Block(BlockWeights):
    """x <- x + Attention(norm1(x)), then x <- x + Mlp(norm2(x)); images may have weights of their own."""

    def __init__(self, design: BlockDesign, settings: BlockSettings) -> None:
        super().__init__(design, settings)
        self.image = BlockWeights(design, settings) if design.separate_image_weights else None
        # One graph a length serves all blocks: they differ in their weights only.
        self._compiled = compile_by_shape(self._compute) if settings.compile else None

    def forward(
        self,
        x_BMD: Tensor,
        visibility: Visibility,
        extend: ExtendContext | None = None,
        rotation: Rotation | None = None,
        routes: Routes | None = None,
    ) -> Tensor:
        if self._compiled is not None and torch.is_grad_enabled():
            return self._compiled(x_BMD, visibility, extend, rotation, routes)
        # Sampling comes in too many lengths to compile.
        return self._compute(x_BMD, visibility, extend, rotation, routes)

    def _compute(
        self,
        x_BMD: Tensor,
        visibility: Visibility,
        extend: ExtendContext | None,
        rotation: Rotation | None,
        routes: Routes | None = None,
    ) -> Tensor:
        if self.image is None:
            x_BMD = x_BMD + self.attn(self.norm1(x_BMD), visibility, extend, rotation)
            return x_BMD + self.mlp(self.norm2(x_BMD))
        assert routes is not None
        qkv_BMW = _by_route(x_BMD, self.image.project, self.project, routes)
        made_BMW = self.attn.attend_all(qkv_BMW, visibility, extend, rotation)
        x_BMD = x_BMD + _by_route(made_BMW, self.image.attn.proj, self.attn.proj, routes)
        return x_BMD + _by_route(x_BMD, self.image.transform, self.transform, routes)


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

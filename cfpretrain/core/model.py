"""The CausalFusion transformer: embedders and a head around a trunk that takes (tokens, intervals, cache).

A pre-norm decoder without adaLN: timesteps are added to the noised tokens, classes are condition tokens. The trunk
knows nothing of images or classes: a further kind of segment brings its own embedder and head and nothing else.

Every parameter belongs to a module whose `forward` uses it, since ZeRO-3 gathers parameters only there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cfpretrain.core import seeds
from cfpretrain.core.attention import Visibility, attend, compile_by_shape, make_visibility
from cfpretrain.core.norm import layer_norm

_NORM_EPS = 1e-5
_TIMESTEP_WIDTH = 256
_MAX_PERIOD = 10000.0
_EMBEDDING_STD = 0.02


# ---------------------------------------------------------------------------
# Tokens of an image


def patchify(latents_BCYX: Tensor, patch_size: int) -> Tensor:
    """Latents -> tokens in raster order, each flattened as (row in patch, column in patch, channel): [B, L, P]."""
    B, C, Y, X = latents_BCYX.shape
    p = patch_size
    patches = latents_BCYX.reshape(B, C, Y // p, p, X // p, p)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, (Y // p) * (X // p), p * p * C)


def unpatchify(tokens_BLP: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` on a square grid: [B, C, Y, X]."""
    B, L, P = tokens_BLP.shape
    p, grid = patch_size, math.isqrt(L)
    patches = tokens_BLP.reshape(B, grid, grid, p, p, P // (p * p))
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, grid * p, grid * p)


def take_tokens(tokens_BLP: Tensor, index_BN: Tensor) -> Tensor:
    """The tokens at the given indices: [B, N, P]."""
    return tokens_BLP.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, tokens_BLP.shape[2]))


def sincos_positions(grid: int, width: int) -> Tensor:
    """2-d sin-cos position embeddings: the first half of the width from the column, the second from the row.

    Returns:
        float32 [L, D]; each half is [sin | cos].
    """
    frequency = _MAX_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle_GF = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis_GF = torch.cat([angle_GF.sin(), angle_GF.cos()], dim=1)
    column = axis_GF[None, :, :].expand(grid, -1, -1)
    row = axis_GF[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(grid * grid, width).float()


# ---------------------------------------------------------------------------
# Inputs: one part for each segment of the sequence


@dataclass(frozen=True)
class ClassPart:
    """A condition segment.

    Attributes:
        labels_B: int64 [B]; `num_classes` is the null class.
    """

    labels_B: Tensor


@dataclass(frozen=True)
class ImagePart:
    """An image segment, or what of it enters this call.

    Attributes:
        clean_BLP: clean tokens in the order of generation; may have no tokens.
        clean_positions_BL: int64, their places on the grid (row * grid + column).
        noised_BNP: noised tokens in the order of generation; may have no tokens.
        noised_positions_BN: int64, their places.
        timesteps_B: int64, the original timestep (0..999) of the noised tokens.
    """

    clean_BLP: Tensor
    clean_positions_BL: Tensor
    noised_BNP: Tensor
    noised_positions_BN: Tensor
    timesteps_B: Tensor


Part = ClassPart | ImagePart


class KeyValueCache:
    """Keys and values of the clean context, for each block.

    Args:
        depth: blocks of the trunk.
        capacity: tokens it can hold, those of the current call included.
    """

    def __init__(self, depth: int, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._keys: list[Tensor | None] = [None] * depth
        self._values: list[Tensor | None] = [None] * depth

    def extend(self, block: int, k_BHME: Tensor, v_BHME: Tensor) -> tuple[Tensor, Tensor]:
        """Puts a call's keys and values behind the kept ones and returns all; `keep` decides whether they stay."""
        end = self.length + k_BHME.shape[2]
        assert end <= self._capacity, (end, self._capacity)
        keys, values = self._keys[block], self._values[block]
        if keys is None or values is None:
            B, H, _, E = k_BHME.shape
            keys, values = (k_BHME.new_empty(B, H, self._capacity, E) for _ in range(2))
            self._keys[block], self._values[block] = keys, values
        keys[:, :, self.length : end] = k_BHME
        values[:, :, self.length : end] = v_BHME
        return keys[:, :, :end], values[:, :, :end]

    def of_first(self, num_sequences: int) -> "KeyValueCache":
        """The cache of the first sequences of the batch, in the same memory; for calls that keep nothing."""
        view = KeyValueCache(len(self._keys), self._capacity)
        view.length = self.length
        view._keys, view._values = (
            [None if tensor is None else tensor[:num_sequences] for tensor in tensors]
            for tensors in (self._keys, self._values)
        )
        return view

    def keep(self, num_tokens: int) -> None:
        """Keeps the first `num_tokens` of the last call as context for the next ones."""
        self.length += num_tokens


# A block's keys and values [B, H, M, E] -> those of its context and these.
ExtendContext = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


# ---------------------------------------------------------------------------
# The network


class TimestepEmbedder(nn.Module):
    """Sinusoid [cos | sin] of the timestep, then a two-layer perceptron with SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIMESTEP_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps_B: Tensor) -> Tensor:
        """int64 [B] -> [B, D]."""
        half = _TIMESTEP_WIDTH // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
        angle = timesteps_B[:, None].float() * torch.exp(-math.log(_MAX_PERIOD) * exponent)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class ImageEmbedder(nn.Module):
    """Tokens of an image -> vectors: one projection for clean and noised, positions, timesteps for the noised."""

    def __init__(self, grid: int, patch_values: int, width: int, learnable_positions: bool) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.x_proj = nn.Linear(patch_values, width)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, width)) if learnable_positions else None
        self.t_embedder = TimestepEmbedder(width)

    def forward(self, part: ImagePart) -> tuple[Tensor, Tensor]:
        """Returns the clean [B, L', D] and the noised [B, N, D] vectors."""
        num_clean = part.clean_BLP.shape[1]
        values = torch.cat([part.clean_BLP, part.noised_BNP], dim=1)
        positions = torch.cat([part.clean_positions_BL, part.noised_positions_BN], dim=1)
        tokens: Tensor = self.x_proj(values.to(self.x_proj.weight.dtype))
        # Not by an index, whose gradient is slow on a GPU where places occur often.
        tokens = tokens + F.embedding(positions, self._position_table(tokens))
        clean_BLD, noised_BND = tokens[:, :num_clean], tokens[:, num_clean:]
        if noised_BND.shape[1]:
            noised_BND = noised_BND + self.t_embedder(part.timesteps_B)[:, None]
        return clean_BLD, noised_BND

    def _position_table(self, like: Tensor) -> Tensor:
        if self.pos_embed is not None:
            return self.pos_embed.squeeze(0)
        return sincos_positions(self.grid, self.width).to(like)


class ClassEmbedder(nn.Module):
    """A class -> its condition tokens; the last row of the table is the null class."""

    def __init__(self, num_classes: int, num_cond_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, num_cond_tokens * width)
        self.cond_pos_embed = nn.Parameter(torch.empty(1, num_cond_tokens, width))

    def forward(self, part: ClassPart) -> Tensor:
        """Returns [B, Q, D]."""
        tokens_BQD = self.embedding_table(part.labels_B).unflatten(1, self.cond_pos_embed.shape[1:])
        return tokens_BQD + self.cond_pos_embed


class Attention(nn.Module):
    """Multi-head attention with LayerNorm over the head width on queries and keys."""

    def __init__(self, width: int, num_heads: int, fused_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = layer_norm(width // num_heads, _NORM_EPS, fused_norm)
        self.k_norm = layer_norm(width // num_heads, _NORM_EPS, fused_norm)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BMD: Tensor, visibility: Visibility, extend: ExtendContext | None) -> Tensor:
        q, k, v = self.qkv(x_BMD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if extend is not None:
            k, v = extend(k, v)
        return self.proj(attend(q, k, v, visibility).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with tanh-approximated GELU, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BMD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BMD), approximate="tanh"))


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks compute; what they compute is the same.

    Attributes:
        attention: backend where the intervals say who sees whom (`attention.choose`).
        cached_attention: backend where everyone sees everything (`attention.choose_cached`).
        compile: torch.compile each block in training.
        checkpoint_activations: keep only the blocks' inputs for the backward and compute the rest again.
        fused_norm: apex's LayerNorm (`norm.has_apex`); not with `compile`.
    """

    attention: str = "sdpa"
    cached_attention: str = "sdpa"
    compile: bool = False
    checkpoint_activations: bool = False
    fused_norm: bool = False


class Block(nn.Module):
    """Pre-norm attention and perceptron, each with a residual."""

    def __init__(self, width: int, num_heads: int, settings: BlockSettings) -> None:
        super().__init__()
        self.norm1 = layer_norm(width, _NORM_EPS, settings.fused_norm)
        self.attn = Attention(width, num_heads, settings.fused_norm)
        self.norm2 = layer_norm(width, _NORM_EPS, settings.fused_norm)
        self.mlp = Mlp(width)
        # One graph a length serves all blocks: they differ in their weights only.
        self._compiled = compile_by_shape(self._compute) if settings.compile else None

    def forward(self, x_BMD: Tensor, visibility: Visibility, extend: ExtendContext | None = None) -> Tensor:
        if self._compiled is not None and torch.is_grad_enabled():
            return self._compiled(x_BMD, visibility, extend)
        # Sampling comes in too many lengths to compile.
        return self._compute(x_BMD, visibility, extend)

    def _compute(self, x_BMD: Tensor, visibility: Visibility, extend: ExtendContext | None) -> Tensor:
        x_BMD = x_BMD + self.attn(self.norm1(x_BMD), visibility, extend)
        return x_BMD + self.mlp(self.norm2(x_BMD))


class Trunk(nn.Module):
    """The blocks."""

    def __init__(self, width: int, depth: int, num_heads: int, settings: BlockSettings) -> None:
        super().__init__()
        self.settings = settings
        self.blocks = nn.ModuleList(Block(width, num_heads, settings) for _ in range(depth))

    def forward(self, x_BMD: Tensor, intervals_BMI: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """Tokens through all blocks.

        Args:
            intervals_BMI: what each row sees (`order.Layout`); None lets each see all tokens and the whole cache.
            cache: context of earlier calls, extended by this one's tokens; None without context.
        """
        settings = self.settings
        backend = settings.cached_attention if intervals_BMI is None else settings.attention
        visibility = make_visibility(intervals_BMI, x_BMD.shape[1], backend)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x_BMD = block(x_BMD, visibility, functools.partial(cache.extend, i))
            elif settings.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random: no state of a generator to keep.
                x_BMD = checkpoint(block, x_BMD, visibility, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BMD = block(x_BMD, visibility)
        return x_BMD


class NoiseHead(nn.Module):
    """Noised tokens' vectors -> predicted epsilon."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm = layer_norm(width, _NORM_EPS)
        self.linear = nn.Linear(width, patch_values)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.linear(self.norm(x_BND))


class CausalFusion(nn.Module):
    """CausalFusion for one kind of image and class conditions.

    Args:
        grid: rows = columns of the token grid (L = grid^2).
        patch_values: values of a token (P).
        width: D.
        depth: blocks.
        num_heads: heads; divides the width.
        num_cond_tokens: condition tokens a class (Q).
        num_classes: classes without the null class.
        learnable_positions: learned position embeddings, else fixed 2-d sin-cos.
        blocks: how the blocks compute.
    """

    def __init__(
        self,
        *,
        grid: int,
        patch_values: int,
        width: int,
        depth: int,
        num_heads: int,
        num_cond_tokens: int,
        num_classes: int,
        learnable_positions: bool = True,
        blocks: BlockSettings | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.patch_values, self.depth = grid, patch_values, depth
        self.num_cond_tokens, self.num_classes = num_cond_tokens, num_classes
        self.image_embedder = ImageEmbedder(grid, patch_values, width, learnable_positions)
        self.class_embedder = ClassEmbedder(num_classes, num_cond_tokens, width)
        self.trunk = Trunk(width, depth, num_heads, blocks or BlockSettings())
        self.noise_head = NoiseHead(width, patch_values)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"."""
        return self.num_classes

    def forward(
        self, parts: Sequence[Part], intervals_BMI: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Predicts epsilon for the noised tokens.

        Args:
            parts: one for each segment, in order; the sequence is [clean tokens of all | noised tokens of all].
            intervals_BMI: int32 [B or 1, M, 4], what each row sees (`order.Layout`); None: all, and the whole cache.
            cache: context of earlier calls. The clean tokens of this call are kept in it, the noised ones are not.

        Returns:
            [B, N, P] for the noised tokens of all parts, in order; [B, 0, P] where there are none.
        """
        clean, noised = [], []
        for part in parts:
            if isinstance(part, ClassPart):
                clean.append(self.class_embedder(part))
            else:
                clean_BLD, noised_BND = self.image_embedder(part)
                clean.append(clean_BLD)
                noised.append(noised_BND)
        num_clean = sum(tokens.shape[1] for tokens in clean)
        x_BMD = self.trunk(torch.cat(clean + noised, dim=1), intervals_BMI, cache)
        if cache is not None:
            cache.keep(num_clean)
        if x_BMD.shape[1] == num_clean:
            return x_BMD.new_empty(x_BMD.shape[0], 0, self.patch_values)
        return self.noise_head(x_BMD[:, num_clean:])


# ---------------------------------------------------------------------------
# Initial weights


# (name, shape of the whole parameter, flat offset, fp32 [numel]): writes the values from the offset on
WriteInitialValues = Callable[[str, tuple[int, ...], int, Tensor], None]


def write_initial_values(seed: int, grid: int, name: str, shape: Sequence[int], offset: int, values: Tensor) -> None:
    """Writes a range of a parameter's initial values: functions of the seed and the name, whoever holds the range.

    Linear weights are Xavier uniform and biases 0, but the noise head is 0; embeddings are N(0, 0.02); learnable
    positions begin as 2-d sin-cos. Beside `values`, it takes a bounded memory, on their device.

    Args:
        seed: the run's seed.
        grid: rows = columns of the token grid.
        name: the parameter's name in `CausalFusion`.
        shape: its full shape.
        offset: flat index of the first value.
        values: float32 [number of values], contiguous.
    """
    leaf, count = name.rsplit(".", 2), len(values)
    if leaf[-1] == "pos_embed":
        values.copy_(sincos_positions(grid, shape[-1]).flatten()[offset : offset + count])
        return
    if leaf[-1] == "bias" or name == "noise_head.linear.weight":
        values.zero_()
        return
    if leaf[-1] == "weight" and "norm" in leaf[-2]:
        values.fill_(1)
        return
    key = seeds.key(seed, f"initial/{name}").to(values.device)
    if leaf[-1] == "cond_pos_embed" or leaf[-2] == "embedding_table":
        seeds.normal(key, (count,), offset, values).mul_(_EMBEDDING_STD)
        return
    assert leaf[-1] == "weight", name
    assert len(shape) == 2, name
    seeds.uniform_within(math.sqrt(6 / (shape[0] + shape[1])), key, (count,), offset, values)


def initialise(model: CausalFusion, seed: int) -> None:
    """Gives an unsharded model its initial weights, on its device."""
    for name, parameter in model.named_parameters():
        write_initial_values(seed, model.grid, name, parameter.shape, 0, parameter.detach().view(-1))

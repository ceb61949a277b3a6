"""Modalities: what is particular to a kind of token, beside a trunk that all kinds share.

A modality embeds the segments of its kind, predicts what is to be learned of them, and says what the prediction costs.
Classes and images are two; a further kind is a file with one more, which enters itself in `MODALITIES`, and its place
in a `Network`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.core.norm import layer_norm
from cfpretrain.core.segments import Segment, tensors_of

CLASS, IMAGE = "class", "image"

_TIMESTEP_WIDTH = 256
_MAX_PERIOD = 10000.0


@dataclass(frozen=True)
class LossTerms:
    """The loss of a kind as a pair, since counts may differ between ranks."""

    total: Tensor  # scalar, the weighted errors added up
    count: int  # of the values added
    # Float32 [B, L, P], unweighted, of images in the order of generation; detached. Other kinds have none: [0].
    squared_error_BLP: Tensor


# The vectors of all clean tokens of a kind, segment by segment, and of all noised ones; None where the kind has none.
Vectors = tuple[Tensor, Tensor | None]


class Modality(ABC):
    """What is particular to a kind of token."""

    kind: str  # of the segments that are its own
    head_name = ""  # of the head's parameters in a checkpoint; those of the embedder are named `<kind>_embedder`
    projections = (0, 0)  # matrix products with each clean token and with each noised one, into the trunk and out

    def __init__(self, embedder: nn.Module, head: nn.Module | None = None) -> None:
        """Each is called at most once a forward.

        Args:
            embedder: with all segments of the kind; returns their `Vectors`.
            head: with all vectors that `read` gives, [B, N, D]; None predicts nothing.
        """
        self.embedder, self.head = embedder, head

    def num_clean(self, segment: Segment) -> int:
        """How many clean tokens of a segment are embedded."""
        return 0 if segment.clean is None else segment.clean.shape[1]

    @abstractmethod
    def empty_segment(self, given: Sequence[Segment], device: torch.device) -> Segment | None:
        """A segment of no tokens that takes those parameters of the embedder which the given ones of the kind do not.

        None where these take all. It is embedded beside them; see `Network`.
        """

    @classmethod
    def projections_of(cls, segment: Segment) -> tuple[int, int]:
        """`projections` of the tokens of a segment in training."""
        return cls.projections

    @staticmethod
    def read(clean_BLD: Tensor, noised_BND: Tensor) -> Tensor:
        """Of what the trunk makes of the tokens of the kind, that from which the head predicts."""
        raise NotImplementedError

    @staticmethod
    def loss(prediction: Tensor, segments: Sequence[Segment]) -> LossTerms:
        """What a prediction for these segments, one behind another, costs; it needs no parameters."""
        raise NotImplementedError


def loss_of(predictions: Mapping[str, Tensor], segments: Sequence[Segment]) -> dict[str, LossTerms]:
    """The losses of a batch by kind, of what is predicted."""
    terms = {}
    for kind, prediction in predictions.items():
        learned = [one for one in segments if one.kind == kind and one.targets is not None]
        if learned:
            terms[kind] = MODALITIES[kind].loss(prediction, learned)
        else:  # it is empty, and its sum 0, by which parameters have gradients of zero
            terms[kind] = LossTerms(prediction.sum(), 0, prediction.new_empty(0))
    return terms


def count_values(segments: Sequence[Segment]) -> dict[str, int]:
    """By kind, how many values the losses of a batch are the sums of; kinds of which nothing is learned have 0."""
    return {kind: sum(one.num_loss_values for one in segments if one.kind == kind) for kind in MODALITIES}


def join(parts: Sequence[Tensor]) -> Tensor:
    """Puts [B, n, ...] parts behind one another, and does not copy a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


# ---------------------------------------------------------------------------
# Classes


def class_segment(num_cond_tokens: int, labels_B: Tensor | None = None) -> Segment:
    """The condition tokens of a class: clean, in one AR step. `labels_B`: int64, for the network."""
    return Segment(CLASS, torch.zeros(1, num_cond_tokens, dtype=torch.int64), clean=labels_B)


class ClassEmbedder(nn.Module):
    """A class -> Q condition tokens: its row of a table, whose last one is the null class's, plus learned positions."""

    def __init__(self, num_classes: int, num_cond_tokens: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, num_cond_tokens * width)
        self.cond_pos_embed = nn.Parameter(torch.empty(1, num_cond_tokens, width))

    def forward(self, segments: Sequence[Segment]) -> Vectors:
        """Q clean vectors for each segment."""
        labels = torch.cat(tensors_of(segments, "clean"))
        tokens_BQD = self.embedding_table(labels).unflatten(1, self.cond_pos_embed.shape[1:]) + self.cond_pos_embed
        return join(tokens_BQD.chunk(len(segments))), None


class Classes(Modality):
    """Class conditions, of which nothing is predicted."""

    kind = CLASS

    def __init__(self, num_classes: int, num_cond_tokens: int, width: int) -> None:
        super().__init__(ClassEmbedder(num_classes, num_cond_tokens, width))
        self._num_cond_tokens = num_cond_tokens

    def num_clean(self, segment: Segment) -> int:
        """Q, which a label stands for."""
        return self._num_cond_tokens

    def empty_segment(self, given: Sequence[Segment], device: torch.device) -> Segment | None:
        """Of no samples: the tokens of a class are a fixed number."""
        return None if given else Segment(CLASS, clean=torch.zeros(0, dtype=torch.int64, device=device))


# ---------------------------------------------------------------------------
# Images


def sincos_positions(grid: int, width: int) -> Tensor:
    """2-d sin-cos position embeddings, float32 [L, D]: half of the width from the column x, half from the row y.

    Each half is [sin(x f_i) | cos(x f_i)] with f_i = 10000^(-i / (D/4)), i = 0..D/4 - 1, and with y.
    """
    frequency = _MAX_PERIOD ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle_GF = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis_GF = torch.cat([angle_GF.sin(), angle_GF.cos()], dim=1)
    column = axis_GF[None, :, :].expand(grid, -1, -1)
    row = axis_GF[:, None, :].expand(-1, grid, -1)
    return torch.cat([column, row], dim=-1).reshape(grid * grid, width).float()


class TimestepEmbedder(nn.Module):
    """W_2 silu(W_1 e(t) + b_1) + b_2 of e(t) = [cos(t f_i) | sin(t f_i)], f_i = 10000^(-i / 128), i = 0..127."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_TIMESTEP_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps_B: Tensor) -> Tensor:
        """Times as the network is told them [B] -> [B, D]."""
        half = _TIMESTEP_WIDTH // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
        angle = timesteps_B[:, None].float() * torch.exp(-math.log(_MAX_PERIOD) * exponent)
        wave = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


def image_segment(steps_BL: Tensor) -> Segment:
    """An image to be learned: its tokens clean and noised; for a layout, which needs its AR steps alone."""
    return Segment(IMAGE, steps_BL, is_noised=True)


def clean_image_segment(tokens_BLP: Tensor, ordinal_B: Tensor | None = None) -> Segment:
    """Images that are only given: tokens in raster order, float32 [B, L, P], clean and in one AR step."""
    B, L = tokens_BLP.shape[:2]
    positions_BL = torch.arange(L, device=tokens_BLP.device).expand(B, L)
    steps_BL = torch.zeros(1, L, dtype=torch.int64)
    return Segment(IMAGE, steps_BL, clean=tokens_BLP, positions_BL=positions_BL, ordinal_B=ordinal_B)


class ImageEmbedder(nn.Module):
    """Tokens x of an image -> vectors: W x + b + position for clean ones, and + TimestepEmbedder(t) for noised ones."""

    def __init__(self, grid: int, patch_values: int, width: int, learnable_positions: bool) -> None:
        super().__init__()
        self.grid, self.width = grid, width
        self.x_proj = nn.Linear(patch_values, width)
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid, width)) if learnable_positions else None
        self.t_embedder = TimestepEmbedder(width)

    def forward(self, segments: Sequence[Segment]) -> Vectors:
        """The vectors of the first positions of segments, clean, and of all, noised, as far as they enter."""
        of_clean, of_noised = ([one for one in segments if name in one.tensors()] for name in ("clean", "noised"))
        clean, noised = tensors_of(of_clean, "clean"), tensors_of(of_noised, "noised")
        positions = tensors_of([*of_clean, *of_noised], "positions_BL")
        places = [one_BL[:, : values.shape[1]] for one_BL, values in zip(positions, clean + noised, strict=True)]
        tokens: Tensor = self.x_proj(join(clean + noised).to(self.x_proj.weight.dtype))
        # Not by an index, whose gradient is slow on a GPU where places occur often.
        tokens = tokens + F.embedding(join(places), self._position_table(tokens))
        num_clean = sum(values.shape[1] for values in clean)
        clean_BLD, noised_BND = tokens[:, :num_clean], tokens[:, num_clean:]
        if noised:
            # Only noised tokens are told a time, by which the network also tells them from clean ones.
            told = self.t_embedder(torch.cat(tensors_of(of_noised, "times_B"))).unsqueeze(1).chunk(len(noised))
            pieces = take_pieces(noised_BND, [values.shape[1] for values in noised])
            noised_BND = join([piece + of_segment for piece, of_segment in zip(pieces, told, strict=True)])
        return clean_BLD, noised_BND

    def _position_table(self, like: Tensor) -> Tensor:
        if self.pos_embed is not None:
            return self.pos_embed.squeeze(0)
        return sincos_positions(self.grid, self.width).to(like)


class NoiseHead(nn.Module):
    """Vectors h of noised tokens -> W norm(h) + b [B, N, P]: epsilon, v or whatever `NoiseProcess.target` is."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm = layer_norm(width)
        self.linear = nn.Linear(width, patch_values)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.linear(self.norm(x_BND))


class Images(Modality):
    """Images, whose noised tokens are denoised."""

    kind, head_name = IMAGE, "noise_head"
    projections = (1, 2)

    def __init__(self, grid: int, patch_values: int, width: int, learnable_positions: bool) -> None:
        embedder = ImageEmbedder(grid, patch_values, width, learnable_positions)
        super().__init__(embedder, NoiseHead(width, patch_values))
        self._patch_values = patch_values

    def empty_segment(self, given: Sequence[Segment], device: torch.device) -> Segment | None:
        """Of no noised tokens, since only these are told a time."""
        if any(one.noised is not None for one in given):
            return None
        batch_size = next((len(one.clean) for one in given if one.clean is not None), 1)
        nothing_BLP = torch.zeros(batch_size, 0, self._patch_values, device=device)
        times_B = torch.zeros(batch_size, device=device)
        return Segment(IMAGE, noised=nothing_BLP, positions_BL=nothing_BLP[..., 0].long(), times_B=times_B)

    @staticmethod
    def read(clean_BLD: Tensor, noised_BND: Tensor) -> Tensor:
        """The noised tokens: what clean ones are is known."""
        return noised_BND

    @staticmethod
    def loss(prediction_BLP: Tensor, segments: Sequence[Segment]) -> LossTerms:
        """The sum over AR steps s of w_s |target - f(x_{t,kappa_s}, t, x_{0,kappa_1..s-1})|^2, and its values' number.

        The weights are those of the AR axis (`ar.ar_weights`); the attention's mask makes one pass of all steps.
        """
        targets_BLP, weights_BL = (join(tensors_of(segments, name)) for name in ("targets", "weights_BL"))
        squared_error_BLP = (prediction_BLP.float() - targets_BLP).square()
        total = (squared_error_BLP * weights_BL.unsqueeze(-1)).sum()
        return LossTerms(total, count_values(segments)[IMAGE], squared_error_BLP.detach())


# What a loss and a count of FLOPs know a modality by.
MODALITIES: dict[str, type[Modality]] = {CLASS: Classes, IMAGE: Images}


def take_pieces(tokens_BLD: Tensor, sizes: Sequence[int]) -> Iterator[Tensor]:
    """Views of the tokens, one after another, of so many each."""
    begin = 0
    for size in sizes:
        yield tokens_BLD if size == tokens_BLD.shape[1] else tokens_BLD[:, begin : begin + size]
        begin += size

"""Texts: discrete tokens, each a clean AR step of size one, of which each predicts the next.

An AR step of one clean token under the rule of visibility (`segments.py`) is next-token prediction; a text before an
image conditions it, and one behind it sees the whole clean image.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.core.design import BlockDesign
from cfpretrain.core.modalities import MODALITIES, LossTerms, Modality, Vectors, count_values, join
from cfpretrain.core.norm import make_norm
from cfpretrain.core.segments import Segment, tensors_of

TEXT = "text"
FRAME = 2  # the tokens around a text, see `Marks`


class Marks(NamedTuple):
    """The tokens that frame texts."""

    begin: int
    end: int  # of the text and of its sample
    image: int  # of the text: an image follows
    pad: int


def pad_texts(texts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids of several texts, int64 [B, T] padded at their ends, and their lengths, int64 [B]."""
    length_B = torch.tensor([len(text) for text in texts])
    ids_BT = torch.full((len(texts), max(1, int(length_B.max()))), pad)
    for row_T, text in zip(ids_BT, texts, strict=True):
        row_T[: len(text)] = torch.tensor(text)
    return ids_BT, length_B


def text_segment(ids_BT: Tensor, length_B: Tensor | None = None, is_learned_B: Tensor | None = None) -> Segment:
    """Texts of a batch, padded at their ends.

    Args:
        ids_BT: int64, the tokens; what stands behind a text is padding.
        length_B: tokens of each text, may be 0; None: all are of length T.
        is_learned_B: whether a text is predicted; it may also only be given. None: none is.

    Returns:
        The segment, whose targets are the next tokens. Nothing follows the last one of a text: it is not learned.
    """
    B, T = ids_BT.shape
    place_T = torch.arange(T, device=ids_BT.device)
    is_padding_BT = None if length_B is None else place_T >= length_B[:, None]
    segment = Segment(TEXT, place_T[None], is_padding_BL=is_padding_BT, clean=ids_BT, positions_BL=place_T.expand(B, T))
    if is_learned_B is None:
        return segment
    last_B = torch.full((B,), T, device=ids_BT.device) if length_B is None else length_B
    has_next_BT = (place_T < last_B[:, None] - 1) & is_learned_B[:, None]
    weights_BT, num_learned = has_next_BT.float(), int(has_next_BT.sum())
    return dataclasses.replace(segment, targets=ids_BT.roll(-1, 1), weights_BL=weights_BT, num_learned=num_learned)


class TextEmbedder(nn.Module):
    """A token -> its vector, plus that of its place in the text."""

    def __init__(self, vocabulary: int, max_tokens: int, design: BlockDesign) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(vocabulary, design.width)
        self.position_table = None if design.rotary_base else nn.Embedding(max_tokens, design.width)

    def forward(self, segments: Sequence[Segment]) -> Vectors:
        """The clean vectors of all tokens of all segments."""
        ids_BT, places_BT = (join(tensors_of(segments, name)) for name in ("clean", "positions_BL"))
        vectors_BTD = self.embedding_table(ids_BT)
        return vectors_BTD if self.position_table is None else vectors_BTD + self.position_table(places_BT), None


class TextHead(nn.Module):
    """Vectors h of tokens -> W norm(h) [B, T, V], the logits of the tokens behind them."""

    def __init__(self, design: BlockDesign, vocabulary: int) -> None:
        super().__init__()
        self.norm = make_norm(design.norm, design.width, design.norm_eps)
        self.linear = nn.Linear(design.width, vocabulary, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear(self.norm(x_BTD))


class Texts(Modality):
    """Texts, of which each token predicts the next."""

    kind, head_name = TEXT, "text_head"
    projections = (1, 0)  # out; the way in is a table

    def __init__(self, vocabulary: int, max_tokens: int, design: BlockDesign) -> None:
        super().__init__(TextEmbedder(vocabulary, max_tokens, design), TextHead(design, vocabulary))

    @classmethod
    def projections_of(cls, segment: Segment) -> tuple[int, int]:
        """None of a text that is only given: no logits are made of it."""
        return (0, 0) if segment.targets is None else cls.projections

    def empty_segment(self, given: Sequence[Segment], device: torch.device) -> Segment | None:
        """Of no tokens."""
        none = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return None if given else Segment(TEXT, clean=none, positions_BL=none)

    @staticmethod
    def read(clean_BLD: Tensor, noised_BND: Tensor) -> Tensor:
        """All tokens: each predicts the next."""
        return clean_BLD

    @staticmethod
    def loss(prediction_BTV: Tensor, segments: Sequence[Segment]) -> LossTerms:
        """The sum of -log softmax(prediction)[next token], where a text is learned and has a next token."""
        targets_BT, weights_BT = (join(tensors_of(segments, name)) for name in ("targets", "weights_BL"))
        # Of padding too, at the weight 0: to leave it out, the host would wait for a GPU.
        error_N = F.cross_entropy(prediction_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
        return LossTerms(
            (error_N * weights_BT.flatten()).sum(), count_values(segments)[TEXT], prediction_BTV.new_empty(0)
        )


MODALITIES[TEXT] = Texts

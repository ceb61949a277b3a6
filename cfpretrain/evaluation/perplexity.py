"""How well a model foresees captions that it has not learned: perplexity, given their images."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core.context import Context, Predictor
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.segments import Segment
from cfpretrain.core.texts import TEXT, Marks, pad_texts, text_segment


class Likelihood(NamedTuple):
    """Of some captions; those of batches, and of ranks, add up."""

    total: float  # sum of log p of their tokens, the one that ends each among them
    num_tokens: int


@torch.no_grad()
def caption_likelihood(
    model: Predictor, images_BLP: Tensor, texts: Sequence[Sequence[int]], marks: Marks
) -> Likelihood:
    """The likelihood of captions behind their images, which are read clean and in one AR step, as for captioning.

    Args:
        model: with texts.
        images_BLP: float32, tokens in raster order, on the model's device.
        texts: the tokens of each one's caption, without those that frame it.
        marks: these.
    """
    B, L, _ = images_BLP.shape
    device = images_BLP.device
    ids_BT, length_B = pad_texts([[marks.begin, *text, marks.end] for text in texts], marks.pad)
    context = Context(model, L + ids_BT.shape[1])
    first_B, positions_BL = torch.zeros(B, dtype=torch.int64, device=device), torch.arange(L, device=device)
    context.read(Segment(IMAGE, clean=images_BLP, positions_BL=positions_BL.expand(B, L), ordinal_B=first_B))
    given = text_segment(ids_BT, length_B)
    assert given.positions_BL is not None
    behind = Segment(
        TEXT,
        given.steps_BL,
        is_padding_BL=given.is_padding_BL,
        clean=ids_BT.to(device),
        positions_BL=given.positions_BL.to(device),
        ordinal_B=first_B + 1,
    )
    logits_BTV = context.read(behind)[TEXT]
    log_p_BTV = F.log_softmax(logits_BTV[:, :-1].double(), -1)
    log_p_BT = log_p_BTV.gather(-1, ids_BT[:, 1:, None].to(device)).squeeze(-1).cpu()
    has_next_BT = torch.arange(1, ids_BT.shape[1]) < length_B[:, None]
    return Likelihood(float(log_p_BT[has_next_BT].sum()), int(has_next_BT.sum()))


def perplexity(found: Iterable[Likelihood]) -> float:
    """exp(-mean log p of a token) of all captions together; of a model that knows nothing, the size of its vocabulary.

    Perplexities of two tokenizers are not comparable. Infinite where a float cannot hold it, as while a model diverges.
    """
    totals, counts = zip(*found, strict=True)
    try:
        return math.exp(-sum(totals) / sum(counts))
    except OverflowError:
        return math.inf

"""How well a model foresees captions that it has not learned: perplexity, given their images."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core.context import Context, Predictor
from cfpretrain.core.modalities import clean_image_segment
from cfpretrain.core.texts import Marks, pad_texts
from cfpretrain.core.writing import read_texts


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
    device, framed = images_BLP.device, [[marks.begin, *text, marks.end] for text in texts]
    ids_BT, length_B = pad_texts(framed, marks.pad)
    context = Context(model, images_BLP.shape[1] + ids_BT.shape[1])
    first_B = torch.zeros(len(texts), dtype=torch.int64, device=device)
    context.read(clean_image_segment(images_BLP, first_B))
    logits_BTV, _ = read_texts(context, framed, marks.pad, device, first_B + 1)
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

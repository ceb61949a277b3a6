"""How much a sequence is to compute: tokens, visible pairs and projections, and how long sequences can be.

Of a batch that is there it is counted; of what training will draw, it is the exact mean over AR steps.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cfpretrain.core.ar import ARSettings, equal_sizes, last_size_probabilities, last_size_table
from cfpretrain.core.modalities import MODALITIES
from cfpretrain.core.segments import Layout, Segment, build_layout, num_clean_kept, visible_keys
from cfpretrain.core.texts import TEXT


class Work(NamedTuple):
    """What FLOPs are counted by, padding left out."""

    tokens: float  # of all sequences
    visible: float  # pairs of query and key that attention computes
    projections: Mapping[str, float]  # by kind, of its tokens into the network and out (`Modality.projections`)
    text_tokens: float  # of `tokens`, those of texts


def count_work(segments: Sequence[Segment], layout: Layout, batch_size: int = 1) -> Work:
    """The work of the sequences of a batch; a layout of one row serves all samples."""
    is_useful_BM = ~layout.is_padding_BM
    per_row = batch_size // len(is_useful_BM)
    noised = [one for one in segments if one.is_noised]
    if layout.place_BM is not None:  # of each token that is given, in order
        num_given = sum(layout.num_clean) + sum(one.num_tokens for one in noised)
        none_BN = torch.zeros(len(is_useful_BM), num_given, dtype=torch.bool)
        useful_BN = none_BN.scatter(1, layout.place_BM, is_useful_BM)
    else:
        useful_BN = is_useful_BM
    ends = list(itertools.accumulate([*layout.num_clean, *(one.num_tokens for one in noised)], initial=0))
    useful = F.pad(useful_BN.sum(0).cumsum(0), (1, 0))[ends].tolist()
    projections, num_texts = dict.fromkeys(MODALITIES, 0), 0
    for i, (one, (begin, end)) in enumerate(zip([*segments, *noised], itertools.pairwise(ends), strict=True)):
        num_tokens = per_row * (useful[i + 1] - useful[i])
        num_texts += num_tokens * (one.kind == TEXT)
        if one.kind == TEXT and one.weights_BL is not None:  # beside texts of which no token is learned
            num_tokens = int(useful_BN[:, begin:end][one.weights_BL.any(1)].sum())
        projections[one.kind] += num_tokens * MODALITIES[one.kind].projections_of(one)[i >= len(segments)]
    num_visible = int((visible_keys(layout.intervals_BMI) * is_useful_BM).sum())
    return Work(per_row * useful[-1], per_row * num_visible, projections, num_texts)


def sequence_lengths(segments: Sequence[Segment], ar: ARSettings, clean_multiple: int) -> dict[int, float]:
    """The lengths that sequences can have, padding included, the shortest first, and their probabilities.

    Args:
        segments: in the order of generation; of the noised ones only the size counts, since `ar` cuts them.
        ar: AR steps in training.
        clean_multiple: as for `build_layout`.
    """
    num_tokens = sum(one.num_tokens * (1 + one.is_noised) for one in segments)
    if not segments[-1].is_noised:
        return {num_tokens: 1.0}
    L = segments[-1].num_tokens
    last_L = last_size_probabilities(L, ar.ar_step_decay, ar.num_ar_steps, ar.ar_step_sizes)
    lengths_L = num_tokens - L + num_clean_kept(L - torch.arange(1, L + 1), L, clean_multiple)
    return {length: float(last_L[lengths_L == length].sum()) for length in lengths_L[last_L > 0].unique().tolist()}


def expected_work(segments: Sequence[Segment], ar: ARSettings) -> Work:
    """The work of a sequence in the mean over splits; noised segments are given uncut, as one AR step each."""
    tokens, visible, projections, num_texts = count_work(segments, build_layout(segments))
    projections, num_before = dict(projections), 0
    for i, one in enumerate(segments):
        if one.is_noised:
            L = one.num_tokens
            last, squares = _mean_sizes(L, ar)
            if i < len(segments) - 1:  # the clean tokens of its last step are there too, for those behind
                last = L
            # Beside an image of one AR step, L - last clean tokens more. A token of a step that ends at e sees
            # num_before + e, clean or noised, and e adds up to (L^2 + squares) / 2 over an image.
            num_more = L - last
            tokens += num_more
            visible += num_before * num_more + squares - L * last
            projections[one.kind] += MODALITIES[one.kind].projections_of(one)[0] * num_more
        num_before += one.num_tokens
    return Work(tokens, visible, projections, num_texts)


def _mean_sizes(num_tokens: int, ar: ARSettings) -> tuple[float, float]:
    """E[size of the last AR step], and E[sum of the squares of all sizes]."""
    law = (num_tokens, ar.ar_step_decay, ar.num_ar_steps)
    size = torch.arange(1, num_tokens + 1, dtype=torch.float64)
    last = float(last_size_probabilities(*law, ar.ar_step_sizes) @ size)
    if ar.ar_step_sizes == "equal":
        return last, float(sum(n**2 for n in equal_sizes(num_tokens, ar.num_ar_steps)))
    # Sizes of a split are exchangeable: the sum of squares has the mean of S times the last one's square.
    return last, float(size.square() @ last_size_table(*law) @ size)

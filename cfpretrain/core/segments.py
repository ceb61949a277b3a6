"""Segments of a sequence, their layout, and who sees whom: the one rule of visibility.

A sequence is built from segments (a class, an image, later a text), any number in any order. Every token has an AR step
and is clean or noised; one rule says who sees whom (section 3 of arXiv 2412.12095):

    a query sees a key  iff  the key is clean and its step comes before the query's,
                        or   both are of the same step and of the same kind.

The clean tokens of all segments come first, in order, then the noised tokens of all images. What a query row sees is
then at most two intervals of keys, so four integers a row drive every attention backend and no dense mask need exist.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cfpretrain.core.ar import ARSettings, equal_sizes, last_size_probabilities, last_size_table, step_begin


@dataclass(frozen=True)
class Segment:
    """Tokens of one kind that stand side by side in a sequence, in the order of generation.

    A layout needs the AR steps alone; the network needs the values of those tokens that enter a call, and the loss
    what they should be. Tensors are of the batch's size, or of 1 where all samples share them.

    Attributes:
        kind: name of the modality that embeds the tokens and predicts them: "class", "image".
        steps_BL: int64 [B, L], the AR step (0-based, not decreasing) of each position; None beside a cache, where all
            that is there is seen.
        is_noised: whether each token is also there noised, to be denoised; a segment that is only given is not.
        is_padding_BL: bool [B, L], positions that a sample does not have: before all of its clean tokens, or after.
        clean: values of the clean tokens: int64 [B] labels of a class, float32 [B, L', P] the first tokens of an image.
        noised: values of the noised tokens: float32 [B, L, P].
        positions_BL: int64, the tokens' places on the grid (row * grid + column).
        times_B: the times that the noised tokens are told.
        targets: what is to be predicted, as the modality has it.
        weights_BL: float32, the tokens' loss weights.
    """

    kind: str
    steps_BL: Tensor | None = None
    is_noised: bool = False
    is_padding_BL: Tensor | None = None
    clean: Tensor | None = None
    noised: Tensor | None = None
    positions_BL: Tensor | None = None
    times_B: Tensor | None = None
    targets: Tensor | None = None
    weights_BL: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Positions, those that a sample lacks among them."""
        return 0 if self.steps_BL is None else self.steps_BL.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def keep_clean(self, num_clean: int) -> "Segment":
        """The segment with the first of its clean tokens; one that is only given keeps all."""
        if self.clean is None or not self.is_noised:
            return self
        return dataclasses.replace(self, clean=self.clean[:, :num_clean])


# ---------------------------------------------------------------------------
# Layout


@dataclass(frozen=True)
class Layout:
    """Where tokens stand in a sequence and what each row sees; B is 1 where all samples share their splits.

    Attributes:
        step_BM: int64 [B, M], the AR step of each token, counted over all segments.
        intervals_BMI: int32 [B, M, 4], (prefix_begin, prefix_end, own_begin, own_end) of each row: key k is visible iff
            prefix_begin <= k < prefix_end or own_begin <= k < own_end. The two never overlap.
        num_clean: for each segment, how many of its tokens stand in the clean part, which comes first.
        is_padding_BM: bool [B, M], true for tokens that fill the length up and that no other token sees.
    """

    step_BM: Tensor
    intervals_BMI: Tensor
    num_clean: tuple[int, ...]
    is_padding_BM: Tensor


def build_layout(segments: Sequence[Segment], clean_multiple: int = 1) -> Layout:
    """Lays segments out as [clean tokens of all segments | noised tokens of those that are noised].

    The clean tokens of the last AR step are left out where the sequence ends with them noised: no one would see them.
    Some of them may stay as padding, which changes no other token, so that sequences have few lengths: for segments of
    given sizes at most ceil(L / clean_multiple) + 1.

    Args:
        segments: in the order of generation, with their AR steps.
        clean_multiple: the clean tokens of a noised segment at the end are a multiple of it, or all L.

    Raises:
        ValueError: no segment, an empty one, a multiple below 1, a noised segment at the end whose samples have last
            steps of different sizes (their sequences would differ in length), or padding between a sample's tokens.
    """
    if not segments:
        raise ValueError("a sequence needs at least one segment")
    if clean_multiple < 1:
        raise ValueError(f"clean_multiple: expected at least 1, got {clean_multiple}")
    clean, noised, num_clean = [], [], []
    next_step = torch.zeros(1, 1, dtype=torch.int64)
    for i, segment in enumerate(segments):
        if segment.steps_BL is None or segment.num_tokens == 0:
            raise ValueError(f"a segment needs at least one token, got {segment}")
        steps_BL = next_step + segment.steps_BL
        num_kept = segment.num_tokens
        if segment.is_noised:
            noised.append(steps_BL)
            if i == len(segments) - 1:
                num_kept = _clean_tokens_at_end(segment.steps_BL, clean_multiple)
        num_clean.append(num_kept)
        clean.append(steps_BL[:, :num_kept])
        next_step = steps_BL[:, -1:] + 1
    step_BM = _cat([*clean, *noised])
    is_clean_M = torch.arange(step_BM.shape[1]) < sum(num_clean)
    is_unseen_BM = is_clean_M & (step_BM == next_step - 1) & segments[-1].is_noised
    if all(segment.is_padding_BL is None for segment in segments):
        intervals_BMI = _intervals(step_BM, sum(num_clean))
        return Layout(step_BM, intervals_BMI.to(torch.int32), tuple(num_clean), is_unseen_BM)
    missing = [_missing(segment) for segment in segments]
    missing_clean = [missing_BL[:, :num] for missing_BL, num in zip(missing, num_clean, strict=True)]
    missing_noised = [missing_BL for missing_BL, segment in zip(missing, segments, strict=True) if segment.is_noised]
    step_BM, missing_BM = torch.broadcast_tensors(step_BM, _cat([*missing_clean, *missing_noised]))
    intervals_BMI = _padded_intervals(step_BM, sum(num_clean), missing_BM)
    return Layout(step_BM, intervals_BMI.to(torch.int32), tuple(num_clean), missing_BM | is_unseen_BM)


def _missing(segment: Segment) -> Tensor:
    return (
        torch.zeros(1, segment.num_tokens, dtype=torch.bool) if segment.is_padding_BL is None else segment.is_padding_BL
    )


def _clean_tokens_at_end(steps_BL: Tensor, clean_multiple: int) -> int:
    begins_B = step_begin(steps_BL)[:, -1]
    kept_B = num_clean_kept(begins_B, steps_BL.shape[1], clean_multiple)
    if (kept_B != kept_B[0]).any():
        raise ValueError(f"the samples' last AR steps must have equal sizes, got them at positions {begins_B.tolist()}")
    return int(kept_B[0])


def num_clean_kept(begin_of_last: Tensor, num_tokens: int, clean_multiple: int) -> Tensor:
    """Clean tokens of a noised segment at the end, padding included, by where its last AR step begins."""
    return (-(-begin_of_last // clean_multiple) * clean_multiple).clamp(max=num_tokens)


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """Joins [B or 1, n] parts along the second axis."""
    batch_size = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch_size, -1) for part in parts], dim=1)


def _intervals(step_BM: Tensor, num_clean: int) -> Tensor:
    """The row intervals of a sequence whose first `num_clean` tokens are clean; steps never decrease in either part."""
    clean_BK, noised_BN = step_BM[:, :num_clean].contiguous(), step_BM[:, num_clean:].contiguous()
    zero_BM = torch.zeros_like(step_BM)
    # A clean row sees the clean tokens up to the end of its own step: one interval, its own is empty.
    clean_end = torch.searchsorted(clean_BK, clean_BK, right=True)
    before = torch.searchsorted(clean_BK, noised_BN, right=False)
    own_begin = num_clean + torch.searchsorted(noised_BN, noised_BN, right=False)
    own_end = num_clean + torch.searchsorted(noised_BN, noised_BN, right=True)
    none_BK = zero_BM[:, :num_clean]
    return torch.stack(
        [
            zero_BM,
            torch.cat([clean_end, before], dim=1),
            torch.cat([none_BK, own_begin], dim=1),
            torch.cat([none_BK, own_end], dim=1),
        ],
        dim=-1,
    )


def _padded_intervals(step_BM: Tensor, num_clean: int, missing_BM: Tensor) -> Tensor:
    """The same where samples miss tokens: rows that are padding see themselves, since none may see nothing."""
    missing_BK = missing_BM[:, :num_clean]
    first_B1 = missing_BK.int().cumprod(1).sum(1, keepdim=True)
    is_behind_BK = missing_BK & (torch.arange(num_clean) >= first_B1)
    if (is_behind_BK.int().diff(dim=1) < 0).any():
        raise ValueError("padding of a sample must stand before or after all of its clean tokens")
    # Padding before a sample's clean tokens counts as a step before all, and behind them as one behind all. A noised
    # segment is padded at its end: between its last step and the next one's first.
    clean_BK = 2 * step_BM[:, :num_clean].masked_fill(missing_BK, -1).masked_fill(is_behind_BK, step_BM.max() + 1)
    noised_BN = 2 * step_BM[:, num_clean:] + missing_BM[:, num_clean:]
    intervals_BMI = _intervals(torch.cat([clean_BK, noised_BN], dim=1), num_clean)
    intervals_BMI[..., 0] = first_B1
    itself_M = torch.arange(step_BM.shape[1])
    itself_MI = torch.stack([itself_M, itself_M + 1, 0 * itself_M, 0 * itself_M], -1)
    return torch.where(missing_BM.unsqueeze(-1), itself_MI, intervals_BMI)


def pack(layouts: Sequence[Layout]) -> Layout:
    """Several samples in each row, [clean tokens of all | noised tokens of all]; none sees another's.

    The network takes their segments in the same order, one sample's after another's.

    Args:
        layouts: one for each sample of a row, all of as many rows.
    """
    num_clean = [sum(layout.num_clean) for layout in layouts]
    clean, noised = [], []
    clean_before, noised_before = 0, sum(num_clean)
    for layout, num in zip(layouts, num_clean, strict=True):
        shift = torch.tensor([clean_before, clean_before, 0, 0])
        shift_noised = torch.tensor([clean_before, clean_before, noised_before - num, noised_before - num])
        of_layout = (layout.step_BM, layout.intervals_BMI, layout.is_padding_BM)
        steps, intervals, padding = ((tensor[:, :num], tensor[:, num:]) for tensor in of_layout)
        clean.append((steps[0], intervals[0] + shift, padding[0]))
        noised.append((steps[1], intervals[1] + shift_noised, padding[1]))
        clean_before += num
        noised_before += layout.step_BM.shape[1] - num
    step_BM, intervals_BMI, is_padding_BM = (torch.cat(parts, 1) for parts in zip(*clean, *noised, strict=True))
    together = tuple(num for layout in layouts for num in layout.num_clean)
    return Layout(step_BM, intervals_BMI.to(torch.int32), together, is_padding_BM)


def may_attend(intervals_BMI: Tensor, num_keys: int) -> Tensor:
    """The dense form of the row intervals: bool [B, M, K], true where the query row may attend to the key."""
    key_K = torch.arange(num_keys, device=intervals_BMI.device)
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.unsqueeze(-1).unbind(2)
    return ((prefix_begin <= key_K) & (key_K < prefix_end)) | ((own_begin <= key_K) & (key_K < own_end))


# ---------------------------------------------------------------------------
# Counting


class Work(NamedTuple):
    """What FLOPs are counted by, padding left out; of the batches of a step they add up.

    Attributes:
        tokens: of all sequences.
        visible: pairs of query and key that attention computes.
        patches: projections of image tokens: of each clean one into the network, of each noised one into it and out.
    """

    tokens: float = 0
    visible: float = 0
    patches: float = 0


def visible_keys(intervals_BMI: Tensor) -> Tensor:
    """How many keys each row sees: int64 [B, M]."""
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.long().unbind(-1)
    return prefix_end - prefix_begin + own_end - own_begin


def count_work(segments: Sequence[Segment], layout: Layout, batch_size: int = 1) -> Work:
    """The work of the sequences of a batch; a layout of one row serves all samples."""
    is_useful_BM = ~layout.is_padding_BM
    num_visible_B = (visible_keys(layout.intervals_BMI) * is_useful_BM).sum(-1)
    # The weight of a column of the sequence: [clean of all segments | noised of those that are].
    clean = [torch.full((n,), int(one.kind == "image")) for one, n in zip(segments, layout.num_clean, strict=True)]
    noised = [torch.full((one.num_tokens,), 2 * int(one.kind == "image")) for one in segments if one.is_noised]
    patches_M = torch.cat([*clean, *noised])
    counts = (is_useful_BM.sum(-1), num_visible_B, (is_useful_BM * patches_M).sum(-1))
    return Work(*(int(count_B.expand(batch_size).sum()) for count_B in counts))


def sequence_lengths(
    before: Sequence[Segment], num_tokens: int, ar: ARSettings, clean_multiple: int
) -> dict[int, float]:
    """The lengths that sequences with an image at their end can have, padding included, and their probabilities.

    Args:
        before: what stands before the image.
        num_tokens: L, of the image.
        ar: its AR steps.
        clean_multiple: as for `build_layout`.

    Returns:
        {tokens: probability}, the shortest first.
    """
    last_L = last_size_probabilities(num_tokens, ar.ar_step_decay, ar.num_ar_steps, ar.ar_step_sizes)
    begin_L = num_tokens - torch.arange(1, num_tokens + 1)
    of_one_step = build_layout(_ending_in_one_step(before, num_tokens))
    lengths_L = of_one_step.step_BM.shape[1] + num_clean_kept(begin_L, num_tokens, clean_multiple)
    return {length: float(last_L[lengths_L == length].sum()) for length in lengths_L[last_L > 0].unique().tolist()}


def expected_work(before: Sequence[Segment], num_tokens: int, ar: ARSettings) -> Work:
    """The work of a sequence with an image at its end, in the mean over splits; arguments as for `sequence_lengths`."""
    L, law = num_tokens, (num_tokens, ar.ar_step_decay, ar.num_ar_steps)
    size = torch.arange(1, L + 1, dtype=torch.float64)
    last = float(last_size_probabilities(*law, ar.ar_step_sizes) @ size)
    if ar.ar_step_sizes == "equal":
        squares = float(sum(n**2 for n in equal_sizes(L, ar.num_ar_steps)))
    else:
        # Sizes of a split are exchangeable: S times the last one's square has the mean of the sum of squares.
        squares = float(size.square() @ last_size_table(*law) @ size)
    segments = _ending_in_one_step(before, L)
    layout = build_layout(segments)
    of_one_step, num_before = count_work(segments, layout), sum(layout.num_clean)
    # Beside an image of one AR step, L - last clean tokens more. A token of a step that ends at e sees num_before + e,
    # clean or noised, and e adds up to (L^2 + squares) / 2 over an image.
    num_more = L - last
    return Work(
        of_one_step.tokens + num_more,
        of_one_step.visible + num_before * num_more + squares - L * last,
        of_one_step.patches + num_more,
    )


def _ending_in_one_step(before: Sequence[Segment], num_tokens: int) -> list[Segment]:
    return [*before, Segment("image", torch.zeros(1, num_tokens, dtype=torch.int64), is_noised=True)]

"""Segments of a sequence, their layout, and who sees whom: the one rule of visibility.

A sequence is built from segments (a class, an image, a text), any number in any order. Every token has an AR step and
is clean or noised; one rule says who sees whom (the generalised causal attention of arXiv 2412.12095, section 3):

    a query sees a key  iff  the key is clean and its step comes before the query's,
                        or   both are of the same step and of the same kind, clean or noised.

A class is one AR step, an image has S of them, and each token of a text is one, which is causal attention. The clean
tokens of all segments come first, in order, then the noised tokens of all images. Here a class (step 0) and an image of
three AR steps, whose last step is not there clean, since no token would see it:

                 clean     noised
    step       0 1 1 2   1 1 2 3   keys
    clean  0   # . . .   . . . .
           1   # # # .   . . . .   with n(s) clean tokens in the steps up to s:
           2   # # # #   . . . .     a clean row of step s sees [0, n(s)),
    noised 1   # . . .   # # . .     a noised one [0, n(s - 1)) and the noised tokens of step s.
           2   # # # .   . . # .
           3   # # # #   . . . #

What a query row sees is at most two intervals of keys, so four integers a row drive every attention backend and no mask
of all pairs need exist.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.core.ar import step_begin


@dataclass(frozen=True)
class Segment:
    """Tokens of one kind that stand side by side in a sequence, in the order of generation.

    A layout needs the AR steps alone; the network needs the values of those tokens that enter a call, and the loss
    what they should be. Tensors are of the batch's size, or of 1 where all samples share them.
    """

    kind: str  # name of the modality that embeds the tokens and predicts them
    steps_BL: Tensor | None = None  # int64, each position's AR step, 0-based, not decreasing; None beside a cache
    is_noised: bool = False  # each token is also there noised, to be denoised
    is_padding_BL: Tensor | None = None  # bool, positions that a sample lacks
    clean: Tensor | None = None  # int64 [B] labels of a class, float32 [B, L', P] first tokens of an image
    noised: Tensor | None = None  # float32 [B, L, P]
    positions_BL: Tensor | None = None  # int64, a token's place: in its text, or row * grid + column of its image
    ordinal_B: Tensor | None = None  # int64, the segment's place among those of its sample; None: it is told none
    rotary_BL: Tensor | None = None  # int64, its rotary position, clean or noised, where the trunk has such
    times_B: Tensor | None = None  # that the noised tokens are told
    targets: Tensor | None = None  # what is to be predicted, as the modality has it
    weights_BL: Tensor | None = None  # float32, of the tokens in the loss
    num_learned: int | None = None  # how many values of the targets are in the loss; None: all

    @property
    def num_tokens(self) -> int:
        """Positions, those that a sample lacks among them."""
        return 0 if self.steps_BL is None else self.steps_BL.shape[1]

    @property
    def num_loss_values(self) -> int:
        """How many values its loss is the sum of: of the positions that it has and learns."""
        if self.targets is None:
            return 0
        return self.targets.numel() if self.num_learned is None else self.num_learned

    def lacks(self, sample: int) -> bool:
        """Whether a sample has none of its tokens."""
        return self.is_padding_BL is not None and bool(self.is_padding_BL[sample].all())

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def keep_clean(self, num_clean: int) -> "Segment":
        """The segment with the first of its clean tokens; one that is only given keeps all."""
        if self.clean is None or not self.is_noised:
            return self
        return dataclasses.replace(self, clean=self.clean[:, :num_clean])


def tensors_of(segments: Sequence[Segment], name: str) -> list[Tensor]:
    """The tensors of that field, of those segments that have it."""
    return [tensors[name] for tensors in (one.tensors() for one in segments) if name in tensors]


# ---------------------------------------------------------------------------
# Layout


@dataclass(frozen=True)
class Layout:
    """Where tokens stand in a sequence and what each row sees; B is 1 where all samples share their splits.

    A row's interval is (prefix_begin, prefix_end, own_begin, own_end): it sees key k iff prefix_begin <= k < prefix_end
    or own_begin <= k < own_end. The two never overlap.
    """

    step_BM: Tensor  # int64, the AR step of each token, counted over all segments
    intervals_BMI: Tensor  # int32 [B, M, 4]
    num_clean: tuple[int, ...]  # for each segment, how many of its tokens are given clean
    is_padding_BM: Tensor  # bool, tokens that fill the length up and that no other token sees
    # Which of [clean tokens of all segments | noised tokens of all] stands where, int64, since samples that lack tokens
    # close up; None: each at its own place.
    place_BM: Tensor | None = None
    num_clean_columns: int = 0  # how many columns of the sequence are clean


def build_layout(
    segments: Sequence[Segment], clean_multiple: int = 1, shares_steps: bool = False, packed: Sequence[int] = ()
) -> Layout:
    """Lays segments out as [clean tokens of all segments | noised tokens of those that are noised].

    The clean tokens of the last AR step are left out where a sample ends with them noised: no one would see them. Some
    of them may stay as padding, which changes no other token, so that sequences have few lengths: for segments of given
    sizes at most ceil(L / clean_multiple) + 1.

    Several samples may share a row, none of which sees another's. Where they do, or lack tokens, which may stand
    anywhere, the others close up, and rows end in padding.

    Args:
        segments: in the order of generation, with their AR steps; of one sample of a row after another.
        clean_multiple: the clean tokens of a noised segment at the end are a multiple of it, or all L. Where rows close
            up, all clean columns are.
        shares_steps: all samples have the AR steps of the first, so that one row serves all that lack no tokens.
        packed: how many of the segments each sample of a row has; empty: all are of one.

    Raises:
        ValueError: no segment, an empty one, a multiple below 1, or, where rows do not close up, a noised segment at
            the end whose samples have last steps of different sizes (their sequences would differ in length).
    """
    if not segments:
        raise ValueError("a sequence needs at least one segment")
    if clean_multiple < 1:
        raise ValueError(f"clean_multiple: expected at least 1, got {clean_multiple}")
    closes_up = len(packed) > 1 or any(one.is_padding_BL is not None for one in segments)
    all_steps = _count_on(segments, shares_steps)
    # Of each token: its step, the first one of its sample, and whether it is left out.
    clean: list[tuple[Tensor, ...]] = []
    noised: list[tuple[Tensor, ...]] = []
    for begin, end in itertools.pairwise(itertools.accumulate([0, *(packed or [len(segments)])])):
        own = list(zip(segments[begin:end], all_steps[begin:end], strict=True))
        first_B1 = all_steps[begin][:, :1]
        last_B1 = functools.reduce(torch.maximum, (_last_step(*pair) for pair in own))
        for one, steps_BL in own:
            first_BL, lacks_BL = first_B1 + 0 * steps_BL, _lacks(one)
            clean.append((steps_BL, first_BL, lacks_BL | ((steps_BL == last_B1) & one.is_noised)))
            if one.is_noised:
                noised.append((steps_BL, first_BL, lacks_BL))
    if not closes_up and segments[-1].is_noised:
        num_kept = _clean_tokens_at_end(all_steps[-1], clean_multiple)
        clean[-1] = tuple(tensor[:, :num_kept] for tensor in clean[-1])
    num_clean = tuple(steps_BL.shape[1] for steps_BL, *_ in clean)
    step_BM, first_BM, is_left_out_BM = (_cat(of_all) for of_all in zip(*clean, *noised, strict=True))
    if closes_up:
        return _close_up(step_BM, first_BM, is_left_out_BM, num_clean, clean_multiple)
    intervals_BMI = _intervals(step_BM, None, sum(num_clean))
    return Layout(step_BM, intervals_BMI, num_clean, is_left_out_BM.expand_as(step_BM), None, sum(num_clean))


def _count_on(segments: Sequence[Segment], shares_steps: bool) -> list[Tensor]:
    """The AR steps of each segment's tokens, counted over all segments: [B or 1, L]."""
    found = []
    next_step = torch.zeros(1, 1, dtype=torch.int64)
    for one in segments:
        if one.steps_BL is None or one.num_tokens == 0:
            raise ValueError(f"a segment needs at least one token, got {one}")
        found.append(next_step + (one.steps_BL[:1] if shares_steps else one.steps_BL))
        next_step = found[-1][:, -1:] + 1
    return found


def _lacks(segment: Segment) -> Tensor:
    if segment.is_padding_BL is None:
        return torch.zeros(1, segment.num_tokens, dtype=torch.bool)
    return segment.is_padding_BL


def _last_step(segment: Segment, steps_BL: Tensor) -> Tensor:
    """The AR step of the last token that each sample has of a segment: [B or 1, 1]; -1 where it has none."""
    return torch.where(_lacks(segment), -1, steps_BL).amax(1, keepdim=True)


def _close_up(
    step_BM: Tensor, first_BM: Tensor, is_left_out_BM: Tensor, num_clean: tuple[int, ...], clean_multiple: int
) -> Layout:
    """The layout without the tokens that are left out, each part as long as in the longest row."""
    step_BM, first_BM, is_left_out_BM = torch.broadcast_tensors(step_BM, first_BM, is_left_out_BM)
    places = []
    for begin, end, multiple in ((0, sum(num_clean), clean_multiple), (sum(num_clean), step_BM.shape[1], 1)):
        is_left_out_BN = is_left_out_BM[:, begin:end]
        num_kept = int((~is_left_out_BN).sum(1).amax()) if end > begin else 0
        num_columns = min(-(-num_kept // multiple) * multiple, end - begin)
        places.append(begin + is_left_out_BN.int().argsort(dim=1, stable=True)[:, :num_columns])
    place_BM, num_columns = torch.cat(places, 1), places[0].shape[1]
    behind = int(step_BM.max()) + 1
    step_BM, first_BM, is_padding_BM = (one.gather(1, place_BM) for one in (step_BM, first_BM, is_left_out_BM))
    # Padding is of a step behind all, so that no other row sees it; and since no row may see nothing, it sees itself.
    intervals_BMI = _intervals(step_BM.masked_fill(is_padding_BM, behind), first_BM, num_columns)
    itself_M = torch.arange(step_BM.shape[1], dtype=torch.int32)
    itself_MI = torch.stack([itself_M, itself_M + 1, 0 * itself_M, 0 * itself_M], -1)
    intervals_BMI = torch.where(is_padding_BM.unsqueeze(-1), itself_MI, intervals_BMI)
    return Layout(step_BM, intervals_BMI, num_clean, is_padding_BM, place_BM, num_columns)


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
    """Joins [B or 1, n, ...] parts along the second axis."""
    batch_size = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch_size, *part.shape[1:]) for part in parts], dim=1)


def _intervals(step_BM: Tensor, first_BM: Tensor | None, num_clean: int) -> Tensor:
    """The row intervals of [clean | noised] tokens whose steps never decrease in either part: int32 [B, M, 4].

    `first_BM`: the first step of each token's sample; None: 0.
    """
    clean_BK, noised_BN = step_BM[:, :num_clean].contiguous(), step_BM[:, num_clean:].contiguous()
    none_BK = torch.zeros_like(clean_BK)
    prefix_begin_BM = torch.zeros_like(step_BM) if first_BM is None else torch.searchsorted(clean_BK, first_BM)
    # A clean row's own step ends its prefix; as an own interval, its keys would count twice.
    prefix_end = [torch.searchsorted(clean_BK, clean_BK, right=True), torch.searchsorted(clean_BK, noised_BN)]
    own_begin_BN = num_clean + torch.searchsorted(noised_BN, noised_BN)
    own_end_BN = num_clean + torch.searchsorted(noised_BN, noised_BN, right=True)
    own = [torch.cat([none_BK, own_BN], 1) for own_BN in (own_begin_BN, own_end_BN)]
    return torch.stack([prefix_begin_BM, torch.cat(prefix_end, 1), *own], -1).to(torch.int32)


def may_attend(intervals_BMI: Tensor, num_keys: int) -> Tensor:
    """The dense form of the row intervals: bool [B, M, K], true where the query row may attend to the key."""
    key_K = torch.arange(num_keys, device=intervals_BMI.device)
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.unsqueeze(-1).unbind(2)
    return ((prefix_begin <= key_K) & (key_K < prefix_end)) | ((own_begin <= key_K) & (key_K < own_end))


def visible_keys(intervals_BMI: Tensor) -> Tensor:
    """How many keys each row sees: int64 [B, M]."""
    prefix_begin, prefix_end, own_begin, own_end = intervals_BMI.long().unbind(-1)
    return prefix_end - prefix_begin + own_end - own_begin


# ---------------------------------------------------------------------------
# Rotary positions


def with_rotary_positions(segments: Sequence[Segment]) -> list[Segment]:
    """The segments of a sample with the rotary positions of their tokens: how many AR steps come before a token's own.

    A noised segment counts as one step, whatever its split. So each token of a text is a position further than the one
    before, as in a language model, and all tokens of an image stand at one (as in BAGEL, arXiv 2505.14683): within it
    the embedded positions say where they are. Tokens that a sample lacks count for nothing.
    """
    found = []
    begin_B1 = torch.zeros(1, 1, dtype=torch.int64)
    for one in segments:
        rotary_BL, begin_B1 = rotary_positions(one, begin_B1)
        found.append(dataclasses.replace(one, rotary_BL=rotary_BL))
    return found


def rotary_positions(segment: Segment, begin_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary positions of a segment's tokens [B or 1, L], and that of what follows [B or 1, 1]; from `begin_B1`."""
    assert segment.steps_BL is not None
    steps_BL = torch.zeros_like(segment.steps_BL[:1]) if segment.is_noised else segment.steps_BL
    if segment.is_padding_BL is not None:
        steps_BL = torch.where(segment.is_padding_BL, -1, steps_BL).cummax(1).values
    num_begun_BL = (steps_BL.diff(dim=1, prepend=torch.full_like(steps_BL[:, :1], -1)) > 0).cumsum(1)
    return begin_B1 + (num_begun_BL - 1).clamp(min=0), begin_B1 + num_begun_BL[:, -1:]


def join_rotary_positions(segments: Sequence[Segment], sizes: Sequence[int]) -> Tensor:
    """The rotary positions of a sequence, int64 [B or 1, M].

    Args:
        segments: in order.
        sizes: how many clean tokens of each stand in the sequence, and then how many noised ones of each.
    """
    parts = []
    for one, size in zip([*segments, *segments], sizes, strict=True):
        if size:
            assert one.rotary_BL is not None, f"a trunk with rotary positions needs those of each {one.kind}"
            parts.append(one.rotary_BL[:, :size])
    return _cat(parts)

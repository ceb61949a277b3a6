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
    is_padding_BL: Tensor | None = None  # bool, positions that a sample lacks: before its clean tokens, or after
    clean: Tensor | None = None  # int64 [B] labels of a class, float32 [B, L', P] first tokens of an image
    noised: Tensor | None = None  # float32 [B, L, P]
    positions_BL: Tensor | None = None  # int64, a token's place: row * grid + column of its image
    rotary_BL: Tensor | None = None  # int64, its rotary position, clean or noised, where the trunk has such
    times_B: Tensor | None = None  # that the noised tokens are told
    targets: Tensor | None = None  # what is to be predicted, as the modality has it
    weights_BL: Tensor | None = None  # float32, of the tokens in the loss

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
    num_clean: tuple[int, ...]  # for each segment, how many of its tokens stand in the clean part, which comes first
    is_padding_BM: Tensor  # bool, tokens that fill the length up and that no other token sees


def build_layout(segments: Sequence[Segment], clean_multiple: int = 1, shares_steps: bool = False) -> Layout:
    """Lays segments out as [clean tokens of all segments | noised tokens of those that are noised].

    The clean tokens of the last AR step are left out where the sequence ends with them noised: no one would see them.
    Some of them may stay as padding, which changes no other token, so that sequences have few lengths: for segments of
    given sizes at most ceil(L / clean_multiple) + 1.

    Args:
        segments: in the order of generation, with their AR steps.
        clean_multiple: the clean tokens of a noised segment at the end are a multiple of it, or all L.
        shares_steps: all samples have the AR steps of the first, so that one row serves all that lack no tokens.

    Raises:
        ValueError: no segment, an empty one, a multiple below 1, a noised segment at the end whose samples have last
            steps of different sizes (their sequences would differ in length), or padding between a sample's tokens.
    """
    if not segments:
        raise ValueError("a sequence needs at least one segment")
    if clean_multiple < 1:
        raise ValueError(f"clean_multiple: expected at least 1, got {clean_multiple}")
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}  # steps and padding, clean and noised
    num_clean = []
    next_step = torch.zeros(1, 1, dtype=torch.int64)
    for i, segment in enumerate(segments):
        if segment.steps_BL is None or segment.num_tokens == 0:
            raise ValueError(f"a segment needs at least one token, got {segment}")
        own_BL = segment.steps_BL[:1] if shares_steps else segment.steps_BL
        steps_BL = next_step + own_BL
        lacks_BL = torch.zeros(1, segment.num_tokens, dtype=torch.bool)
        lacks_BL = lacks_BL if segment.is_padding_BL is None else segment.is_padding_BL
        num_kept = segment.num_tokens
        if segment.is_noised:
            parts[True].append((steps_BL, lacks_BL))
            if i == len(segments) - 1:
                num_kept = _clean_tokens_at_end(own_BL, clean_multiple)
        num_clean.append(num_kept)
        parts[False].append((steps_BL[:, :num_kept], lacks_BL[:, :num_kept]))
        next_step = steps_BL[:, -1:] + 1
    step_BM, lacks_BM = (_cat(of_all) for of_all in zip(*parts[False], *parts[True], strict=True))
    is_clean_M = torch.arange(step_BM.shape[1]) < sum(num_clean)
    is_unseen_BM = is_clean_M & (step_BM == next_step - 1) & segments[-1].is_noised
    if all(segment.is_padding_BL is None for segment in segments):
        intervals_BMI = _intervals(step_BM[:, : sum(num_clean)], step_BM[:, sum(num_clean) :])
    else:
        step_BM, lacks_BM = torch.broadcast_tensors(step_BM, lacks_BM)
        intervals_BMI = _padded_intervals(step_BM, sum(num_clean), lacks_BM)
    return Layout(step_BM, intervals_BMI.to(torch.int32), tuple(num_clean), lacks_BM | is_unseen_BM)


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


def _intervals(clean_BK: Tensor, noised_BN: Tensor) -> Tensor:
    """The row intervals of clean and noised tokens by their steps, which never decrease in either part: [B, M, 4]."""
    clean_BK, noised_BN = clean_BK.contiguous(), noised_BN.contiguous()
    none_BK, num_clean = torch.zeros_like(clean_BK), clean_BK.shape[1]
    # A clean row's own step ends its prefix; as an own interval, its keys would count twice.
    prefix_end = [torch.searchsorted(clean_BK, clean_BK, right=True), torch.searchsorted(clean_BK, noised_BN)]
    own_begin = [none_BK, num_clean + torch.searchsorted(noised_BN, noised_BN)]
    own_end = [none_BK, num_clean + torch.searchsorted(noised_BN, noised_BN, right=True)]
    bounds = [torch.cat(parts, dim=1) for parts in (prefix_end, own_begin, own_end)]
    return torch.stack([torch.zeros_like(bounds[0]), *bounds], dim=-1)


def _padded_intervals(step_BM: Tensor, num_clean: int, lacks_BM: Tensor) -> Tensor:
    """The same where samples lack tokens, whose rows see themselves, since none may see nothing."""
    lacks_BK = lacks_BM[:, :num_clean]
    first_B1 = lacks_BK.int().cumprod(1).sum(1, keepdim=True)
    is_behind_BK = lacks_BK & (torch.arange(num_clean) >= first_B1)
    if (is_behind_BK.int().diff(dim=1) < 0).any():
        raise ValueError("padding of a sample must stand before or after all of its clean tokens")
    # Padding before a sample's clean tokens counts as a step before all, and behind them as one behind all. A noised
    # segment is padded at its end: between its last step and the next one's first.
    clean_BK = 2 * step_BM[:, :num_clean].masked_fill(lacks_BK, -1).masked_fill(is_behind_BK, int(step_BM.max()) + 1)
    intervals_BMI = _intervals(clean_BK, 2 * step_BM[:, num_clean:] + lacks_BM[:, num_clean:])
    intervals_BMI[..., 0] = first_B1
    itself_M = torch.arange(step_BM.shape[1])
    itself_MI = torch.stack([itself_M, itself_M + 1, 0 * itself_M, 0 * itself_M], -1)
    return torch.where(lacks_BM.unsqueeze(-1), itself_MI, intervals_BMI)


def pack(layouts: Sequence[Layout]) -> Layout:
    """Several samples in each row, [clean tokens of all | noised tokens of all]; none sees another's.

    The network takes their segments in the same order, one sample's after another's; positions are the sample's own.
    `layouts` has one for each sample of a row, of B rows or of 1.
    """
    parts: dict[bool, list[tuple[Tensor, Tensor, Tensor]]] = {False: [], True: []}  # clean and noised
    num_clean = tuple(num for layout in layouts for num in layout.num_clean)
    clean_before, noised_before = 0, sum(num_clean)
    for layout in layouts:
        num = sum(layout.num_clean)
        for is_noised, rows in ((False, slice(num)), (True, slice(num, None))):
            own = noised_before - num if is_noised else 0
            shift = torch.tensor([clean_before, clean_before, own, own], dtype=torch.int32)
            intervals_BMI = layout.intervals_BMI[:, rows] + shift
            parts[is_noised].append((layout.step_BM[:, rows], intervals_BMI, layout.is_padding_BM[:, rows]))
        clean_before += num
        noised_before += layout.step_BM.shape[1] - num
    step_BM, intervals_BMI, is_padding_BM = (_cat(of_all) for of_all in zip(*parts[False], *parts[True], strict=True))
    return Layout(step_BM, intervals_BMI, num_clean, is_padding_BM)


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
        assert one.steps_BL is not None
        steps_BL = torch.zeros_like(one.steps_BL[:1]) if one.is_noised else one.steps_BL
        if one.is_padding_BL is not None:
            steps_BL = torch.where(one.is_padding_BL, -1, steps_BL).cummax(1).values
        num_begun_BL = (steps_BL.diff(dim=1, prepend=torch.full_like(steps_BL[:, :1], -1)) > 0).cumsum(1)
        found.append(dataclasses.replace(one, rotary_BL=begin_B1 + (num_begun_BL - 1).clamp(min=0)))
        begin_B1 = begin_B1 + num_begun_BL[:, -1:]
    return found


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

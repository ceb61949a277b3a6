"""What a model has read, from which it goes on: clean tokens in a cache, and what further tokens see of them."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cfpretrain.core.model import KeyValueCache
from cfpretrain.core.segments import Segment, build_layout, rotary_positions


class Predictor(Protocol):
    """A `Network`; called alike on every rank, as ZeRO-3 wants."""

    depth: int

    @property
    def has_rotary(self) -> bool:
        """See `Network.has_rotary`."""

    def __call__(
        self,
        segments: Sequence[Segment],
        intervals_BMI: Tensor | None = None,
        cache: KeyValueCache | None = None,
        place_BM: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """By kind, what is predicted of the tokens of this call."""


class Context:
    """What a model has read of each sequence of a batch; they may differ in length."""

    def __init__(self, model: Predictor, capacity: int) -> None:
        """`capacity`: tokens of the longest sequence, those of any call included."""
        self.model = model
        self._cache = KeyValueCache(model.depth, capacity)
        self._rotary_B1 = torch.zeros(1, 1, dtype=torch.int64)  # of what follows, where the model is told such

    def take(self, rows: Sequence[int | None], room: int) -> "Context":
        """The contexts of some sequences in this order, in memory of their own with room for so many further tokens.

        None instead of a sequence's place is the context of one that has read nothing.
        """
        taken = Context(self.model, 0)
        taken._cache = self._cache.take(rows, room)
        places_B = torch.tensor([row or 0 for row in rows], device=self._rotary_B1.device)
        has_read_B1 = torch.tensor([[row is not None] for row in rows], device=self._rotary_B1.device)
        begin_B1 = self._rotary_B1 if len(self._rotary_B1) == 1 else self._rotary_B1[places_B]
        taken._rotary_B1 = begin_B1 * has_read_B1
        return taken

    @torch.no_grad()
    def read(self, segment: Segment, kept_B: Tensor | None = None, goes_on: bool = False) -> dict[str, Tensor]:
        """Puts a segment's clean tokens behind what was read; returns what is predicted of them.

        Args:
            segment: its values on the model's device, AR steps and padding on the CPU. Without AR steps, its tokens are
                of one.
            kept_B: int64, how many of the first tokens each sequence keeps; None: all that it has.
            goes_on: these are tokens of an image of which others follow.
        """
        assert segment.clean is not None
        steps_BL, place_BM = segment.steps_BL, None
        num_tokens = segment.clean.shape[1] if steps_BL is None else steps_BL.shape[1]
        if segment.is_padding_BL is None and (steps_BL is None or bool((steps_BL == steps_BL[:, :1]).all())):
            intervals_BMI = self._seeing_all(num_tokens, len(segment.clean))
        else:
            layout = build_layout([segment])
            intervals_BMI = self._seeing(layout.intervals_BMI[..., 1].to(segment.clean.device))
            if layout.place_BM is not None:
                place_BM = layout.place_BM.to(segment.clean.device)
                kept_B = (~layout.is_padding_BM).sum(1).to(segment.clean.device)
        entering = dataclasses.replace(segment, steps_BL=None, is_padding_BL=None)
        if self.model.has_rotary:
            if steps_BL is None:
                segment = dataclasses.replace(segment, steps_BL=torch.zeros(1, num_tokens, dtype=torch.int64))
            entering = dataclasses.replace(entering, rotary_BL=self._pass_positions(segment, kept_B, goes_on))
        predictions = self.model([entering], intervals_BMI, self._cache, place_BM)
        self._cache.keep(num_tokens if kept_B is None else kept_B)
        return predictions

    @torch.no_grad()
    def predict(self, segment: Segment) -> Tensor:
        """What is predicted of noised tokens, of the first sequences where they are of fewer; nothing is kept."""
        assert segment.noised is not None
        num_sequences, num_tokens = segment.noised.shape[:2]
        cache = self._cache.of_first(num_sequences)
        intervals_BMI = self._seeing_all(num_tokens, num_sequences)
        if self.model.has_rotary:
            rotary_B1 = self._rotary_B1[:num_sequences].to(segment.noised.device)
            segment = dataclasses.replace(segment, rotary_BL=rotary_B1.expand(-1, num_tokens))
        return self.model([segment], intervals_BMI, cache)[segment.kind]

    def _pass_positions(self, segment: Segment, kept_B: Tensor | None, goes_on: bool) -> Tensor:
        """The rotary positions of a segment that is read, [B or 1, N], behind which those of the next begin."""
        device = segment.tensors()["clean"].device
        steps_BL, is_padding_BL = (
            None if one is None else one.to(device) for one in (segment.steps_BL, segment.is_padding_BL)
        )
        placed = dataclasses.replace(segment, steps_BL=steps_BL, is_padding_BL=is_padding_BL)
        begin_B1 = self._rotary_B1.to(device)
        rotary_BN, end_B1 = rotary_positions(placed, begin_B1)
        if kept_B is not None:  # of a sequence that keeps none of them, or only the first
            end_B1 = torch.minimum(end_B1, begin_B1 + kept_B[:, None])
        if not goes_on:
            self._rotary_B1 = end_B1
        return rotary_BN

    def _seeing_all(self, num_tokens: int, num_sequences: int) -> Tensor | None:
        """Intervals of tokens that see the context and each other; None where that is all there is in the cache."""
        length_B = self._cache.length_B
        if length_B is None:
            return None
        return self._seeing(torch.full((num_sequences, num_tokens), num_tokens, device=length_B.device))

    def _seeing(self, end_BM: Tensor) -> Tensor:
        """Intervals [B, M, 4] of tokens that see the context, and of these tokens those before an end."""
        length_B = self._cache.length_B
        end_BM = end_BM + (self._cache.length if length_B is None else length_B[: len(end_BM), None])
        none_BM = torch.zeros_like(end_BM)
        return torch.stack([none_BM, end_BM, none_BM, none_BM], -1).to(torch.int32)

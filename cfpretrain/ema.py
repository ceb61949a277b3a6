"""Exponential moving average of the weights, in the shards that the engine holds: no communication, no gathering."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cfpretrain.engine import Engine, Fragment


class ShardedEMA:
    """One fp32 tensor for each fragment of this rank: average <- decay * average + (1 - decay) * weights.

    The trainer calls `update` after each step that was applied, and not after one that was skipped.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float) -> None:
        """Starts from the present weights.

        Args:
            fragments: of `Engine.fragments`; they stay the source of every update.
            decay: in [0, 1].
        """
        self._weights = [fragment.values for fragment in fragments]
        self._decay = decay
        self.values: list[Tensor] = [weights.clone() for weights in self._weights]
        """The averages, aligned with the fragments; a restored checkpoint is written into them in place."""

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages by one step."""
        # A rank of a large world may hold nothing.
        if self.values:
            torch._foreach_lerp_(self.values, self._weights, 1.0 - self._decay)

    @contextmanager
    def applied(self, engine: Engine) -> Iterator[None]:
        """Exchanges weights and averages inside the block, so that forwards use the averages; all ranks together.

        The weights come back bit by bit, also after an exception. Nothing may train or save inside.
        """
        self._exchange(engine)
        try:
            yield
        finally:
            self._exchange(engine)

    @torch.no_grad()
    def _exchange(self, engine: Engine) -> None:
        for weights, average in zip(self._weights, self.values, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        engine.refresh()

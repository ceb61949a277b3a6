"""Exponential moving average of the weights, in the shards that the engine holds: no communication, no gathering."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cfpretrain.engine import Engine, Fragment

_STAGED_NUMEL = 16 * 2**20  # weights on their way to the host at once: 64 MiB


class ShardedEMA:
    """One fp32 tensor for each fragment of this rank: average <- decay * average + (1 - decay) * weights.

    The trainer calls `update` after each step that was applied, and not after one that was skipped.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float, on_host: bool = False) -> None:
        """Starts from the present weights.

        Args:
            fragments: of `Engine.fragments`; they stay the source of every update.
            decay: in [0, 1].
            on_host: keep the averages in host memory: four bytes a weight less on the GPU, for a copy of the weights
                to the host and an average there in each step.
        """
        self._weights = [fragment.values for fragment in fragments]
        self._decay = decay
        self._staged = self._make_staged() if on_host else None
        self.values: list[Tensor] = [self._make_average(weights) for weights in self._weights]
        """The averages, aligned with the fragments; a restored checkpoint is written into them in place."""

    def _make_staged(self) -> Tensor:
        # Pinned memory is scarce, and only what is on its way gains by it.
        numel = min(_STAGED_NUMEL, max((weights.numel() for weights in self._weights), default=0))
        return torch.empty(numel, pin_memory=torch.cuda.is_available())

    def _make_average(self, weights: Tensor) -> Tensor:
        return weights.clone() if self._staged is None else weights.to("cpu", copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages by one step."""
        if self._staged is not None:
            self._update_on_host(self._staged)
        elif self.values:  # a rank of a large world may hold nothing
            torch._foreach_lerp_(self.values, self._weights, 1.0 - self._decay)

    def _update_on_host(self, staged: Tensor) -> None:
        for average, weights in zip(self.values, self._weights, strict=True):
            for part, source in zip(
                torch.split(average, _STAGED_NUMEL), torch.split(weights, _STAGED_NUMEL), strict=True
            ):
                part.lerp_(staged[: source.numel()].copy_(source), 1.0 - self._decay)

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

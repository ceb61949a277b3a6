"""Exponential moving average of the weights, in the shards that the engine holds: no communication, no gathering."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from cfpretrain.base.background import Task
from cfpretrain.run.tensor_files import Fragment
from cfpretrain.training.engine import Engine

_STAGED_NUMEL = 16 * 2**20  # weights of one of the two pieces on their way to the host: 64 MiB


class ShardedEMA:
    """One fp32 tensor for each fragment of this rank: average <- decay * average + (1 - decay) * weights.

    The trainer calls `update` after each step that was applied, and not after one that was skipped; and `wait` before
    it changes the weights or reads `values`.
    """

    def __init__(self, fragments: Sequence[Fragment], decay: float, on_host: bool = False) -> None:
        """Starts from the present weights.

        Args:
            fragments: the source of every update.
            decay: in [0, 1].
            on_host: keep the averages in host memory: four bytes a weight less on the GPU, for a copy of the weights
                to the host and an average there in each step, both beside the forwards and backwards of the next one.
        """
        moving = [fragment.values for fragment in fragments if not fragment.is_frozen]
        self._weights, self._decay = moving, decay
        self._averages = [weights.to("cpu", copy=True) if on_host else weights.clone() for weights in moving]
        averages = iter(self._averages)
        self.values: list[Tensor] = [one.values if one.is_frozen else next(averages) for one in fragments]
        """The averages, aligned with the fragments; a restored checkpoint is written into them in place.

        Those of frozen weights are these themselves.
        """
        has_thread = on_host and moving  # a rank of a large world may hold nothing
        self._thread = _HostThread(self._averages, moving, 1.0 - decay) if has_thread else None

    @torch.no_grad()
    def update(self) -> None:
        """Moves the averages by one step; those in host memory by the next `wait`, from the weights of this moment."""
        if self._thread is not None:
            self._thread.begin()
        elif self._averages:
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - self._decay)

    def wait(self) -> None:
        """Ends the update under way: the weights may change after it, and `values` be read. Raises what stopped it."""
        if self._thread is not None:
            self._thread.wait()

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
        self.wait()
        for weights, average in zip(self._weights, self._averages, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        engine.refresh()


class _HostThread:
    """Moves averages in host memory beside training: one piece of weights is copied while the one before is averaged.

    The weights have the averages' shapes and are on any one device; `share` is theirs in the new averages.
    """

    def __init__(self, averages: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
        self._share = share
        self._pieces = [
            piece
            for pair in zip(averages, weights, strict=True)
            for piece in zip(*(torch.split(tensor, _STAGED_NUMEL) for tensor in pair), strict=True)
        ]
        device = weights[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Pieces take turns in two buffers: pinned memory is scarce, and only copies under way gain by it.
        most = max(values.numel() for _, values in self._pieces)
        self._staged = [torch.empty(most, pin_memory=device.type == "cuda") for _ in range(min(2, len(self._pieces)))]
        self._under_way: Task | None = None

    def begin(self) -> None:
        """Begins an update from the present weights, those of the work that the current stream has queued."""
        self.wait()
        changed = None if self._stream is None else torch.cuda.current_stream().record_event()
        self._under_way = Task(functools.partial(self._update, changed), "ema")

    def wait(self) -> None:
        """Until the update under way is complete; raises what stopped it, each time, since the averages are torn."""
        if self._under_way is not None:
            self._under_way.join()
            if self._under_way.error is not None:
                raise self._under_way.error

    @torch.no_grad()
    def _update(self, changed: torch.cuda.Event | None) -> None:
        if changed is not None:
            changed.wait(self._stream)
        copies = [self._copy(0)]
        for number, (average, _) in enumerate(self._pieces):
            if number + 1 < len(self._pieces):
                copies.append(self._copy(number + 1))
            staged, copied = copies.pop(0)
            if copied is not None:
                copied.synchronize()
            average.lerp_(staged, self._share)

    def _copy(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begins to copy a piece of the weights; returns the copy, and the event of its end (None: it is done)."""
        weights = self._pieces[number][1]
        staged = self._staged[number % 2][: weights.numel()]
        # A new thread does not know the stream's device; its context does.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            staged.copy_(weights, non_blocking=True)
        # Its waiter sleeps: cores are for the data.
        return staged, None if self._stream is None else self._stream.record_event(torch.cuda.Event(blocking=True))

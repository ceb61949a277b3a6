"""One step: the batches of a global batch become a loss, which moves the engine where the ranks agree to it."""

import functools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.config import Config, TrainConfig
from cfpretrain.base.console import UserError
from cfpretrain.base.stopping import StopRequest
from cfpretrain.core.modalities import LossTerms, Modality
from cfpretrain.core.objective import Batch
from cfpretrain.data.loader import Loader
from cfpretrain.run.build import make_loss
from cfpretrain.run.checkpoint_writer import CheckpointWriter
from cfpretrain.run.guard import Guard
from cfpretrain.run.metrics import training_flops
from cfpretrain.training.ema import ShardedEMA
from cfpretrain.training.engine import Engine


@dataclass
class Counters:
    """How far a run is; a checkpoint holds them."""

    step: int = 0  # global batches consumed
    num_skipped: int = 0  # batches whose update is not in the weights: skipped, or undone by a rewind
    num_rewinds: int = 0
    train_seconds: float = 0.0  # in the loop, over all resumes


@dataclass
class StepResult:
    """What came of a step; the same on all ranks but for `sample_ids`."""

    loss: float  # of the global batch
    by_kind: dict[str, tuple[float, int]]  # the same of each kind of token, unweighted, and of how many values
    grad_norm: float  # of the whole gradient before clipping; infinite where one is not finite
    flops: float  # over all ranks
    problem: str | None  # why the update is not applied; None where it is
    must_stop: bool  # a rank was asked to stop
    is_writing: bool  # a rank still writes its part of the checkpoint in flight
    has_failed: bool  # a rank could not write its part
    lacks_data: bool  # a rank could not read its share of the next step
    num_bad_images: int = 0  # over all ranks, which are not trained on
    learning_rate: float = 0.0
    sample_ids: list[int] | None = None  # of this rank; None where they are not logged
    bad_images: list[str] = field(default_factory=list)  # what is wrong with each


class LostDataError(UserError):
    """Data that cannot be read any more, on all ranks at once, between two steps."""


@dataclass
class TrainingStep:
    """Makes one step a call; ranks call it together."""

    config: Config
    device: torch.device
    engine: Engine
    ema: ShardedEMA
    loader: Loader[Batch]
    guard: Guard
    writer: CheckpointWriter
    stop: StopRequest

    def __post_init__(self) -> None:
        self.loss = make_loss(self.config)
        self.result: StepResult | None = None  # of the latest step
        modalities: dict[str, Modality] = self.engine.module.modalities  # type: ignore[assignment]
        self.kinds = sorted(kind for kind, one in modalities.items() if one.head is not None)
        # By kind, how many values the losses of the next step are the sums of, over all ranks; None: not known yet.
        self.counts: list[float] | None = None

    def __call__(self, at: Counters) -> StepResult:
        """Consumes a global batch, and counts it in `at`."""
        batches = self._next_batches(at.step)
        assert self.counts is not None
        num_batches = len(batches) * runtime.world_size()
        counts = {kind: count / num_batches for kind, count in zip(self.kinds, self.counts, strict=True)}
        terms = []
        for batch in upload_ahead(batches, self.device):
            terms.append(self.loss(self.engine, batch))
            self.engine.backward(self.loss.total(terms[-1], counts))
        if self.stop.reason is None:
            self.loader.read_ahead()  # a GPU is at work on the backward meanwhile

        told = self.exchange(terms, batches)
        rate = learning_rate(self.config.train, at)
        self.ema.wait()
        applied = self.engine.step(rate, functools.partial(self.decide, told))
        result = self.result
        assert result is not None
        result.learning_rate = rate
        if self.config.metrics.log_sample_ids:
            result.sample_ids = [i for batch in batches for i in batch.ids_B.tolist()]
        at.step += 1
        if applied:
            self.ema.update()
            self.guard.applied(result.loss, result.grad_norm)
        else:
            self.guard.skipped()
            at.num_skipped += 1
        if result.num_bad_images:
            result.bad_images = self._gather_bad_images(batches)
        return result

    def _gather_bad_images(self, batches: Sequence[Batch]) -> list[str]:
        """What is wrong with the images that are not trained on, of all ranks."""
        of_ranks = runtime.gather([reason for batch in batches for reason in batch.skipped])
        return sorted(chain.from_iterable(of_ranks))  # the same on any number of ranks

    def refuse_bad_images(self, result: StepResult) -> None:
        """`LostDataError` on all ranks where most images of a step are bad."""
        size = self.config.train.global_batch_size
        if result.num_bad_images > max(1, size // 2):
            raise LostDataError(
                f"data.on_bad_image: expected most images of a step to be good, got {result.num_bad_images} bad ones "
                f"of {size}; the first is {result.bad_images[0]}"
            )

    def _next_batches(self, step: int) -> list[Batch]:
        """The step's micro-batches; `LostDataError` on all ranks where one of them cannot read its own."""
        if self.counts is None:
            self.loader.read_ahead()
            try:
                runtime.agree(self.loader.problem)
            except UserError as error:
                raise LostDataError(str(error)) from error
            told = torch.tensor(self._counts_ahead(), dtype=torch.float64)
            self.counts = runtime.read_back(runtime.sum_over_ranks(told))
        batches = next(self.loader)
        if any(batch.step != step for batch in batches):
            raise RuntimeError(f"the loader gave batches of step {batches[0].step} at step {step}")
        return batches

    def _counts_ahead(self) -> list[int]:
        """By kind, values in the losses of this rank's share of the next step, as far as it is read."""
        counts = [batch.counts() for batch in self.loader.ahead]
        return [sum(one[kind] for one in counts) for kind in self.kinds]

    def exchange(self, terms: Sequence[Mapping[str, LossTerms]], batches: Sequence[Batch]) -> Tensor:
        """The only exchange between ranks before the update: a sum on the device, in the order of `decide`."""
        told = [
            *self._counts_ahead(),
            sum(training_flops(self.config.model, batch.work, self.config.train.freeze) for batch in batches),
            self.stop.reason is not None,
            self.writer.is_working,  # before `has_failed`
            self.writer.has_failed,
            self.loader.problem is not None,
            sum(len(batch.skipped) for batch in batches),
        ]
        totals = [torch.stack([one[kind].total.detach() for one in terms]) for kind in self.kinds]
        sums = [of_batches.double().sum(0, keepdim=True) for of_batches in totals]
        on_host = torch.tensor(told, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        return runtime.sum_over_ranks(torch.cat([*sums, on_host.to(self.device, non_blocking=True)]))

    def decide(self, told: Tensor, grad_norm: Tensor) -> bool:
        """Whether to apply the update; the only place of a step where the host waits for the device."""
        values = runtime.read_back(torch.cat([told, grad_norm.to(told, non_blocking=True).reshape(1)]))
        num_kinds = len(self.kinds)
        sums, counts = values[:num_kinds], self.counts
        flops, must_stop, is_writing, has_failed, lacks_data, num_bad, norm = values[2 * num_kinds :]
        assert counts is not None
        self.counts = None if must_stop or lacks_data else values[num_kinds : 2 * num_kinds]
        by_kind = {
            kind: (total / count if count else math.nan, round(count))
            for kind, total, count in zip(self.kinds, sums, counts, strict=True)
        }
        loss = sum(self.loss.weights.get(kind, 1.0) * value for kind, (value, count) in by_kind.items() if count)
        problem = self.guard.problem_of_loss(loss) or self.guard.problem_of_grad_norm(norm)
        self.result = StepResult(
            loss,
            by_kind,
            norm,
            flops,
            problem,
            must_stop > 0,
            is_writing > 0,
            has_failed > 0,
            lacks_data > 0,
            round(num_bad),
        )
        return problem is None


def learning_rate(train: TrainConfig, at: Counters) -> float:
    """Of the next step: linear warm-up, constant, and with `decay_steps` a linear fall to 0 over the last steps."""
    # A skipped step does not move the warm-up; the end of the decay is fixed.
    warm_up = (at.step - at.num_skipped + 1) / max(train.warmup_steps, 1)
    fall = (train.num_steps - at.step) / max(train.decay_steps, 1)
    return train.learning_rate * min(1.0, warm_up, fall)


def upload_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """A step's batches, from pinned memory, on the device; each is copied while the device works on the one before.

    The first is copied while the device works on the update of the step before. On a CPU they stay as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    compute, copying = torch.cuda.current_stream(device), _copy_stream(device)
    ahead: deque[tuple[Batch, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            ahead.append((batch.to(device, non_blocking=True), copying.record_event()))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft(), compute)
    while ahead:
        yield _arrived(*ahead.popleft(), compute)


def _arrived(batch: Batch, copied: torch.cuda.Event, stream: torch.cuda.Stream) -> Batch:
    """Lets a stream work with what another has copied."""
    stream.wait_event(copied)
    for tensor in batch.tensors().values():
        tensor.record_stream(stream)  # the other stream may reuse the memory only once this one is done with it
    return batch


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)

"""The training loss: AR steps -> noise -> a ready batch, then model -> (sum, count) of each kind of token.

    E over images x_0, their class, S, kappa, t and epsilon of
        sum_s w_s |target - f(x_{t,kappa_s}, t, x_{0,kappa_1..s-1}, class)|^2,   x_t = alpha_t x_0 + sigma_t epsilon

`ar.py` has the laws of S and kappa and the weights w_s, `process.py` those of t, the noise and the target; the class is
replaced by the null class with probability `label_drop_prob`, for guidance. What samples with texts are trained as is
in `tasks.py`. All that is random or derived is made by `draw` and `prepare`, on the CPU and ahead of the step
(`data.loader`); the step itself computes the network and its losses, of which that of images is the squared error.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import ARSettings, ar_weights, draw_orders
from cfpretrain.core.latents import patchify, take_tokens
from cfpretrain.core.modalities import IMAGE, LossTerms, class_segment, count_values, loss_of
from cfpretrain.core.process import NoiseProcess
from cfpretrain.core.segments import Segment, build_layout, with_rotary_positions
from cfpretrain.core.tasks import INTERLEAVED, Interleaved, Tasks
from cfpretrain.core.work import Work, count_work


class Places(NamedTuple):
    """Where samples may have several images: which of them are trained on, those of one sample after another's."""

    sample_I: Tensor  # int64, whose each is, as a place in the micro-batch
    number_I: Tensor  # int64, which of its sample's
    given_I: Tensor  # int64, its place among all images of the micro-batch


@dataclass(frozen=True)
class Draws:
    """All that is random in the loss of a micro-batch. What is of images has a row for each, see `places`."""

    step: int  # the optimizer step they were drawn for
    ids_B: Tensor  # int64, the samples they were drawn for
    labels_B: Tensor  # int64, after the drop to the null class
    order_BL: Tensor  # int64, which token of the grid stands at each position of an image
    steps_BL: Tensor  # int64, the AR step of each position
    timesteps_B: Tensor  # the times that the network is told (`NoiseProcess.draw_times`)
    noise_BLP: Tensor  # epsilon, float32, in raster order
    task_B: Tensor | None = None  # int64, what samples are trained as (`Tasks.draw`); None: images of their classes
    lacks_condition_B: Tensor | None = None  # bool, with `task_B`
    places: Places | None = None  # None: each sample has one image


@dataclass(frozen=True)
class Batch:
    """A micro-batch, ready for the network and its loss."""

    step: int  # the optimizer step it was made for
    ids_B: Tensor  # int64, of the samples
    segments: tuple[Segment, ...]  # with values, targets and weights; an image's tokens are all there clean
    num_clean: tuple[int, ...]  # for each segment, how many of the first clean tokens enter the sequence
    intervals_BMI: Tensor  # int32 [B or 1, M, 4], see `segments.Layout`
    place_BM: Tensor | None  # int64, see `segments.Layout`
    work: Work  # what the sequences' FLOPs are counted by
    skipped: tuple[str, ...] = ()  # why samples are not trained on: their weights are 0

    def counts(self) -> dict[str, int]:
        """By kind, how many values its losses will be the sums of."""
        return count_values(self.segments)

    def of_kind(self, kind: str) -> Segment:
        """The only segment of a kind."""
        (found,) = (segment for segment in self.segments if segment.kind == kind)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields, those of a segment behind its number."""
        of_segments = {
            f"{i}.{name}": value for i, one in enumerate(self.segments) for name, value in one.tensors().items()
        }
        own = {"ids_B": self.ids_B, "intervals_BMI": self.intervals_BMI}
        return own | ({} if self.place_BM is None else {"place_BM": self.place_BM}) | of_segments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._with({name: value.to(device, non_blocking=non_blocking) for name, value in self.tensors().items()})

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory, from which copies to a GPU are asynchronous."""
        # Orders and splits that samples share are one row in memory, which cannot be written as many.
        return self._with({name: value.contiguous().pin_memory() for name, value in self.tensors().items()})

    def __reduce__(self) -> tuple[Callable[..., "Batch"], tuple[Any, ...]]:
        # Each tensor that comes from a worker costs the training thread 0.2 ms, so all come as one.
        tensors = self.tensors()
        forms = {name: (value.dtype, value.shape, value.nbytes) for name, value in tensors.items()}
        # Each begins at a multiple of 8 bytes.
        as_bytes = (value.contiguous().flatten().view(torch.uint8) for value in tensors.values())
        packed = torch.cat([F.pad(value, (0, -len(value) % 8)) for value in as_bytes])
        return _unpack, (vars(self._with(dict.fromkeys(tensors))), forms, packed)

    def _with(self, tensors: Mapping[str, Tensor | None]) -> "Batch":
        """The batch with others in the places of its `tensors`."""
        own: dict[str, Any] = {}
        of_segments: list[dict[str, Any]] = [{} for _ in self.segments]
        for name, value in tensors.items():
            *number, field = name.split(".")
            (of_segments[int(number[0])] if number else own)[field] = value
        segments = (dataclasses.replace(one, **fields) for one, fields in zip(self.segments, of_segments, strict=True))
        return dataclasses.replace(self, **own, segments=tuple(segments))


def _unpack(others: dict[str, Any], forms: dict[str, tuple[torch.dtype, torch.Size, int]], packed: Tensor) -> Batch:
    pieces = packed.split([num_bytes + -num_bytes % 8 for _, _, num_bytes in forms.values()])
    tensors = {
        name: piece[:num_bytes].view(dtype).view(shape)
        for (name, (dtype, shape, num_bytes)), piece in zip(forms.items(), pieces, strict=True)
    }
    return Batch(**others)._with(tensors)


def _place_images(task_B: Tensor | None, num_given_B: Tensor) -> Places:
    """Of samples that have so many images, those that their tasks train on: all of interleaved ones, else the first."""
    num_used_B = torch.ones_like(num_given_B)
    if task_B is not None:
        num_used_B = torch.where(task_B == INTERLEAVED, num_given_B, num_used_B)
    sample_I = torch.arange(len(num_used_B)).repeat_interleave(num_used_B)
    first_given_B, first_used_B = (num_B.cumsum(0) - num_B for num_B in (num_given_B, num_used_B))
    number_I = torch.arange(len(sample_I)) - first_used_B[sample_I]
    return Places(sample_I, number_I, first_given_B[sample_I] + number_I)


@dataclass(frozen=True)
class DenoisingLoss:
    """Squared error of the network's prediction over AR steps of random number, size and order."""

    process: NoiseProcess
    ar: ARSettings
    patch_size: int  # latent rows = columns of a token
    num_cond_tokens: int  # Q
    null_class: int  # the label that stands for "no class"
    label_drop_prob: float  # of being trained as it
    seed: int  # the run's
    clean_multiple: int = 1  # clean tokens are padded up to a multiple of it; see `build_layout`
    has_rotary: bool = False  # the trunk has rotary positions
    tasks: Tasks | None = None  # None: all samples are trained as images of their classes
    weights: Mapping[str, float] = field(default_factory=dict)  # of a kind's loss beside those of others; without: 1

    def draw(
        self,
        step: int,
        epoch: int,
        ids_B: Tensor,
        labels_B: Tensor,
        num_tokens: int,
        patch_values: int,
        num_images: Sequence[int] = (),
    ) -> Draws:
        """The random numbers of a micro-batch of samples with these ids and labels, int64 [B].

        They are functions of (seed, epoch, id) and, of several images of a sample, which of them it is; what a whole
        global batch shares is one of (seed, optimizer step).

        Args:
            num_images: of each sample; empty: one. Interleaved ones are trained on all of them, others on the first.
        """

        def sample_keys(purpose: str) -> Tensor:
            return seeds.fold(seeds.fold(seeds.key(self.seed, purpose), epoch), ids_B)

        def image_keys(purpose: str) -> Tensor:
            keys_B = sample_keys(purpose)
            if places is None:
                return keys_B
            further_I = seeds.fold(sample_keys(f"{purpose} of further images")[places.sample_I], places.number_I)
            return torch.where(places.number_I > 0, further_I, keys_B[places.sample_I])

        shared_key = seeds.fold(seeds.key(self.seed, "shared ar split"), step)
        dropped_B = seeds.uniform(sample_keys("label drop")) < self.label_drop_prob
        task_B = lacks_condition_B = None
        if self.tasks is not None:
            task_B, lacks_condition_B = self.tasks.draw(sample_keys("task"), sample_keys("condition drop"))
        places = _place_images(task_B, torch.tensor(num_images)) if num_images else None
        return Draws(
            step,
            ids_B,
            labels_B=torch.where(dropped_B, self.null_class, labels_B),
            order_BL=draw_orders(image_keys("order"), num_tokens, self.ar.token_order, self.ar.block_size),
            steps_BL=self.ar.draw_steps(shared_key, image_keys("ar split"), num_tokens),
            timesteps_B=self.process.draw_times(image_keys("timestep")),
            noise_BLP=seeds.normal(image_keys("noise"), (num_tokens, patch_values)),
            task_B=task_B,
            lacks_condition_B=lacks_condition_B,
            places=places,
        )

    def prepare(
        self,
        latents_BCYX: Tensor,
        draws: Draws,
        skipped: Sequence[int] = (),
        texts: Sequence[Sequence[int]] = (),
        interleaved: Sequence[Interleaved] = (),
    ) -> Batch:
        """The batch that the draws make of these samples' latents (as the network sees them), all on the CPU.

        Args:
            latents_BCYX: of all images, those of one sample after another's.
            draws: of the samples.
            skipped: places of samples that have the weight 0.
            texts: the tokens of each sample's caption, where some may be trained with it.
            interleaved: of each sample, where some may be trained as such.
        """
        num_samples, skipped_I = len(draws.ids_B), torch.tensor(list(skipped), dtype=torch.int64)
        if draws.places is not None:
            latents_BCYX = latents_BCYX[draws.places.given_I]
            skipped_I = torch.isin(draws.places.sample_I, skipped_I).nonzero().squeeze(1)
        images = self._noise(latents_BCYX, draws, skipped_I)
        of_class = class_segment(self.num_cond_tokens, draws.labels_B)
        segments: tuple[Segment, ...] = (of_class, images)
        if self.tasks is not None:
            assert draws.task_B is not None
            assert draws.lacks_condition_B is not None
            drawn = draws.task_B.tolist(), draws.lacks_condition_B.tolist()
            given = texts or [()] * num_samples, interleaved or [()] * num_samples
            parts = [self.tasks.parts(*of_sample) for of_sample in zip(*drawn, *given, strict=True)]
            segments = self.tasks.fill(parts, of_class, images, skipped)
        layout = build_layout(segments, self.clean_multiple, self.ar.shares_split)
        work = count_work(segments, layout, num_samples)
        num_clean, intervals_BMI, place_BM = layout.num_clean, layout.intervals_BMI, layout.place_BM
        placed = tuple(with_rotary_positions(segments)) if self.has_rotary else segments
        return Batch(draws.step, draws.ids_B, placed, num_clean, intervals_BMI, place_BM, work)

    def _noise(self, latents_BCYX: Tensor, draws: Draws, skipped_I: Tensor) -> Segment:
        """Images to be learned, as the draws noise them; those at the places `skipped_I` have the weight 0."""
        order_BL, ar = draws.order_BL, self.ar
        clean_BLP = take_tokens(patchify(latents_BCYX, self.patch_size), order_BL)
        noise_BLP = take_tokens(draws.noise_BLP, order_BL)
        noised_BLP, target_BLP = self.process.noise(clean_BLP, noise_BLP, draws.timesteps_B)
        weights_BL = ar_weights(draws.steps_BL, ar.ar_weight_first, ar.ar_weight_last, ar.ar_weight_schedule)
        return Segment(
            IMAGE,
            draws.steps_BL,
            is_noised=True,
            clean=clean_BLP,
            noised=noised_BLP,
            positions_BL=order_BL,
            times_B=draws.timesteps_B,
            targets=target_BLP,
            weights_BL=weights_BL.index_fill(0, skipped_I, 0.0) if len(skipped_I) else weights_BL,
        )

    def __call__(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> dict[str, LossTerms]:
        """The losses of a micro-batch that lies on the model's device, by kind."""
        entering = [one.keep_clean(num) for one, num in zip(batch.segments, batch.num_clean, strict=True)]
        return loss_of(model(entering, batch.intervals_BMI, place_BM=batch.place_BM), entering)

    def total(self, terms: Mapping[str, LossTerms], counts: Mapping[str, float] | None = None) -> Tensor:
        """The loss of all kinds, sum_k weight_k * total_k / count_k.

        Args:
            terms: of a micro-batch.
            counts: where several micro-batches make a loss together, the values of one in the mean over all of them;
                the mean over these of the result is then the loss. None: those of the terms.
        """
        losses = []
        for kind, one in terms.items():
            count = one.count if counts is None else counts[kind]
            losses.append(self.weights.get(kind, 1.0) * one.total / (count or 1))
        return functools.reduce(operator.add, losses)

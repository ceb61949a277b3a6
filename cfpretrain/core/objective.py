"""The training loss: AR steps -> noise -> a ready batch, then model -> (sum, count).

All that is random or derived is made by `draw` and `prepare`, on the CPU and ahead of the step (`data.loader`); the
step itself computes the network and its squared error.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.latents import patchify, take_tokens
from cfpretrain.core.modalities import IMAGE, MODALITIES, LossTerms, class_segment
from cfpretrain.core.process import NoiseProcess
from cfpretrain.core.segments import Segment, Work, build_layout, count_work


@dataclass(frozen=True)
class Draws:
    """All that is random in the loss of a micro-batch.

    Attributes:
        step: the optimizer step they were drawn for.
        ids_B: int64 [B], the samples they were drawn for.
        labels_B: int64 [B], labels after the drop to the null class.
        order_BL: int64 [B, L], which token of the grid stands at each position.
        steps_BL: int64 [B, L], the AR step of each position.
        timesteps_B: [B], the times that the network is told (`NoiseProcess.draw_times`).
        noise_BLP: float32 [B, L, P], in raster order.
    """

    step: int
    ids_B: Tensor
    labels_B: Tensor
    order_BL: Tensor
    steps_BL: Tensor
    timesteps_B: Tensor
    noise_BLP: Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch, ready for the network and its loss.

    Attributes:
        step: the optimizer step it was made for.
        ids_B: int64 [B], the samples' ids.
        segments: of the samples' sequences, with their values, targets and weights; all tokens of an image are there
            clean, though no token sees those of its last AR step.
        num_clean: for each segment, how many of the first clean tokens stand in the sequence.
        intervals_BMI: int32 [B or 1, M, 4], see `segments.Layout`.
        work: what the sequences' FLOPs are counted by.
    """

    step: int
    ids_B: Tensor
    segments: tuple[Segment, ...]
    num_clean: tuple[int, ...]
    intervals_BMI: Tensor
    work: Work

    def __len__(self) -> int:
        return len(self.ids_B)

    def of_kind(self, kind: str) -> Segment:
        """The only segment of a kind."""
        (found,) = (segment for segment in self.segments if segment.kind == kind)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields, those of a segment behind its number."""
        of_segments = {
            f"{i}.{name}": value for i, one in enumerate(self.segments) for name, value in one.tensors().items()
        }
        return {"ids_B": self.ids_B, "intervals_BMI": self.intervals_BMI} | of_segments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory, from which copies to a GPU are asynchronous."""
        # Orders and splits that samples share are one row in memory, which cannot be written as many.
        return self._map(lambda tensor: tensor.contiguous().pin_memory())

    def __reduce__(self) -> tuple[Callable[..., "Batch"], tuple[Any, ...]]:
        # Each tensor that comes from a worker costs the training thread 0.2 ms, so all come as one.
        others = [
            {name: value for name, value in vars(one).items() if not isinstance(value, Tensor)}
            for one in (self, *self.segments)
        ]
        del others[0]["segments"]
        tensors = self.tensors()
        forms = {name: (value.dtype, value.shape, value.nbytes) for name, value in tensors.items()}
        # Each begins at a multiple of 8 bytes.
        as_bytes = (value.contiguous().flatten().view(torch.uint8) for value in tensors.values())
        packed = torch.cat([F.pad(value, (0, -len(value) % 8)) for value in as_bytes])
        return _unpack, (others, forms, packed)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        segments = (
            Segment(**vars(one) | {name: function(value) for name, value in one.tensors().items()})
            for one in self.segments
        )
        return dataclasses.replace(
            self, ids_B=function(self.ids_B), intervals_BMI=function(self.intervals_BMI), segments=tuple(segments)
        )


def _unpack(
    others: list[dict[str, Any]], forms: dict[str, tuple[torch.dtype, torch.Size, int]], packed: Tensor
) -> Batch:
    pieces = packed.split([num_bytes + -num_bytes % 8 for _, _, num_bytes in forms.values()])
    for (name, (dtype, shape, num_bytes)), piece in zip(forms.items(), pieces, strict=True):
        *number, field = name.split(".")
        others[1 + int(number[0]) if number else 0][field] = piece[:num_bytes].view(dtype).view(shape)
    return Batch(**others[0], segments=tuple(Segment(**fields) for fields in others[1:]))


@dataclass(frozen=True)
class DenoisingLoss:
    """Squared error of the network's prediction over AR steps of random number, size and order.

    Attributes:
        process: how tokens are noised, and what is predicted; one time for each sample.
        ar: AR steps, orders and weights.
        patch_size: latent rows = columns of a token.
        num_cond_tokens: Q.
        null_class: the label that stands for "no class".
        label_drop_prob: probability of it.
        seed: the run's seed.
        clean_multiple: clean tokens are padded up to a multiple of it; see `build_layout`.
    """

    process: NoiseProcess
    ar: ARSettings
    patch_size: int
    num_cond_tokens: int
    null_class: int
    label_drop_prob: float
    seed: int
    clean_multiple: int = 1

    def draw(self, step: int, epoch: int, ids_B: Tensor, labels_B: Tensor, num_tokens: int, patch_values: int) -> Draws:
        """The random numbers of a micro-batch of samples with these ids and labels, int64 [B].

        They are functions of the seed, the pass over the data and the samples' ids; what a whole global batch shares is
        one of the seed and the optimizer step.
        """

        def sample_keys(purpose: str) -> Tensor:
            return seeds.fold(seeds.fold(seeds.key(self.seed, purpose), epoch), ids_B)

        shared_key = seeds.fold(seeds.key(self.seed, "shared ar split"), step)
        dropped_B = seeds.uniform(sample_keys("label drop")) < self.label_drop_prob
        return Draws(
            step,
            ids_B,
            labels_B=torch.where(dropped_B, self.null_class, labels_B),
            order_BL=self.ar.draw_orders(sample_keys("order"), num_tokens),
            steps_BL=self.ar.draw_steps(shared_key, sample_keys("ar split"), num_tokens),
            timesteps_B=self.process.draw_times(sample_keys("timestep")),
            noise_BLP=seeds.normal(sample_keys("noise"), (num_tokens, patch_values)),
        )

    def prepare(self, latents_BCYX: Tensor, draws: Draws) -> Batch:
        """The batch that the draws make of latents, all on the CPU.

        Args:
            latents_BCYX: what the network sees, shift and scale applied.
            draws: of these samples.
        """
        order_BL = draws.order_BL
        clean_BLP = take_tokens(patchify(latents_BCYX, self.patch_size), order_BL)
        noise_BLP = take_tokens(draws.noise_BLP, order_BL)
        noised_BLP, target_BLP = self.process.noise(clean_BLP, noise_BLP, draws.timesteps_B)
        image = Segment(
            IMAGE,
            draws.steps_BL,
            is_noised=True,
            clean=clean_BLP,
            noised=noised_BLP,
            positions_BL=order_BL,
            times_B=draws.timesteps_B,
            targets=target_BLP,
            weights_BL=self.ar.weights(draws.steps_BL),
        )
        segments = (class_segment(self.num_cond_tokens, draws.labels_B), image)
        # Where samples share their split, one row of a layout serves all.
        laid_out = dataclasses.replace(image, steps_BL=draws.steps_BL[:1] if self.ar.shares_split else draws.steps_BL)
        layout = build_layout([segments[0], laid_out], self.clean_multiple)
        work = count_work(segments, layout, len(latents_BCYX))
        return Batch(draws.step, draws.ids_B, segments, layout.num_clean, layout.intervals_BMI, work)

    def __call__(self, model: Callable[..., list[Tensor]], batch: Batch) -> LossTerms:
        """The loss of a micro-batch that lies on the model's device."""
        entering = [one.keep_clean(num) for one, num in zip(batch.segments, batch.num_clean, strict=True)]
        predictions = model(entering, batch.intervals_BMI)
        learned = [one for one in entering if one.targets is not None]
        terms = (
            MODALITIES[one.kind].loss(prediction, one) for prediction, one in zip(predictions, learned, strict=True)
        )
        return functools.reduce(operator.add, terms)

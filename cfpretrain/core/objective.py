"""The training loss: AR steps -> noise -> a ready batch, then model -> (sum, count).

All that is random or derived is made by `draw` and `prepare`, on the CPU and ahead of the step (`data.loader`); the
step itself computes the network and its squared error.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import ARSettings, Condition, Image, build_layout, count_useful
from cfpretrain.core.model import ClassPart, ImagePart, patchify, take_tokens
from cfpretrain.core.process import NoiseProcess


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
    """A micro-batch, ready for the network and its loss. Tokens stand in the order of generation.

    Attributes:
        step: the optimizer step it was made for.
        ids_B: int64 [B], the samples' ids.
        labels_B: int64 [B], the null class among them.
        clean_BLP: float32 [B, L, P].
        noised_BLP: float32 [B, L, P].
        target_BLP: float32 [B, L, P], what the network is to predict.
        positions_BL: int64 [B, L], the tokens' places on the grid (row * grid + column).
        steps_BL: int64 [B, L], the tokens' AR steps.
        timesteps_B: [B], the times that the network is told.
        weights_BL: float32 [B, L], the tokens' loss weights.
        intervals_BMI: int32 [B or 1, M, 4], see `order.Layout`.
        num_clean: the first clean tokens, those that stand in the sequence; no token sees the others.
        num_tokens: tokens of all sequences, padding left out.
        num_visible: their visible pairs of query and key.
    """

    step: int
    ids_B: Tensor
    labels_B: Tensor
    clean_BLP: Tensor
    noised_BLP: Tensor
    target_BLP: Tensor
    positions_BL: Tensor
    steps_BL: Tensor
    timesteps_B: Tensor
    weights_BL: Tensor
    intervals_BMI: Tensor
    num_clean: int
    num_tokens: int
    num_visible: int

    def __len__(self) -> int:
        return len(self.ids_B)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by the names of their fields."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The batch with its tensors in pinned memory, from which copies to a GPU are asynchronous."""
        # Orders and splits that samples share are one row in memory, which cannot be written as many.
        return self._map(lambda tensor: tensor.contiguous().pin_memory())

    def __reduce__(self) -> tuple[Callable[..., "Batch"], tuple[Any, ...]]:
        # Each tensor that comes from a worker costs the training thread 0.2 ms, so all come as one.
        others = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        layout: list[_Place] = []
        for name, value in self.tensors().items():
            begin = layout[-1].end if layout else 0
            layout.append(_Place(name, value.dtype, tuple(value.shape), begin, begin + -(-value.nbytes // 8) * 8))
        packed = torch.empty(layout[-1].end, dtype=torch.uint8)
        for place in layout:
            place.view(packed).copy_(getattr(self, place.name))
        return _unpack, (others, layout, packed)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        mapped: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **mapped)


class _Place(NamedTuple):
    """Where a tensor lies in a packed batch, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def view(self, packed: Tensor) -> Tensor:
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return packed[self.begin : self.begin + num_bytes].view(self.dtype).view(self.shape)


def _unpack(others: dict[str, Any], layout: list[_Place], packed: Tensor) -> Batch:
    fields: dict[str, Any] = others | {place.name: place.view(packed) for place in layout}
    return Batch(**fields)


@dataclass(frozen=True)
class LossTerms:
    """A loss as a pair, since counts may differ between ranks.

    Attributes:
        total: scalar, the weighted squared errors added up.
        count: number of values added.
        squared_error_BLP: float32 [B, L, P], unweighted, in the order of generation; detached.
    """

    total: Tensor
    count: int
    squared_error_BLP: Tensor


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
        """The random numbers of a micro-batch: functions of the seed, the step, the epoch and the samples' ids.

        Args:
            step: optimizer step; what a whole global batch shares depends on it alone.
            epoch: pass over the data.
            ids_B: int64 [B], the samples' ids.
            labels_B: int64 [B], their labels.
            num_tokens: L.
            patch_values: P.
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
        steps_BL = draws.steps_BL[:1] if self.ar.shares_split else draws.steps_BL
        layout = build_layout([Condition(self.num_cond_tokens), Image(steps_BL)], self.clean_multiple)
        num_tokens, num_visible = (int(n_B.expand(len(latents_BCYX)).sum()) for n_B in count_useful(layout))
        return Batch(
            step=draws.step,
            ids_B=draws.ids_B,
            labels_B=draws.labels_B,
            clean_BLP=clean_BLP,
            noised_BLP=noised_BLP,
            target_BLP=target_BLP,
            positions_BL=order_BL,
            steps_BL=draws.steps_BL,
            timesteps_B=draws.timesteps_B,
            weights_BL=self.ar.weights(draws.steps_BL),
            intervals_BMI=layout.intervals_BMI,
            num_clean=layout.num_clean_image_tokens[0],
            num_tokens=num_tokens,
            num_visible=num_visible,
        )

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> LossTerms:
        """The loss of a micro-batch that lies on the model's device."""
        n = batch.num_clean
        image = ImagePart(
            batch.clean_BLP[:, :n], batch.positions_BL[:, :n], batch.noised_BLP, batch.positions_BL, batch.timesteps_B
        )
        prediction_BLP = model([ClassPart(batch.labels_B), image], batch.intervals_BMI)
        squared_error_BLP = (prediction_BLP.float() - batch.target_BLP).square()
        total = (squared_error_BLP * batch.weights_BL.unsqueeze(-1)).sum()
        return LossTerms(total, squared_error_BLP.numel(), squared_error_BLP.detach())

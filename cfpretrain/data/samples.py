"""Samples as shards hold them -> a micro-batch of latents, drawn from their posteriors.

Whether a sample is mirrored, its posterior's noise and its random crop are functions of (seed, epoch, id): the same
whoever reads it, and from latent shards as from image shards.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.base.config import Config
from cfpretrain.core import seeds
from cfpretrain.data.images import declared_size
from cfpretrain.data.shards import LatentsInfo

# What an id says besides the sample's own, which is smaller: noise differs between the visits of an epoch.
FOLDER_BIT, REPETITION_BIT = 40, 56


def split_ids(ids_B: Tensor) -> list[tuple[int, int]]:
    """The number of each sample's folder, and its id there."""
    folders_B = ids_B % (1 << REPETITION_BIT) >> FOLDER_BIT
    return list(zip(folders_B.tolist(), (ids_B % (1 << FOLDER_BIT)).tolist(), strict=True))


@dataclass(frozen=True)
class Visits:
    """A micro-batch of one rank as shards hold it."""

    step: int  # the optimizer step that it is for
    epoch: int
    ids_B: Tensor  # int64: a sample's id in its folder, + folder << 40, + repetition in the epoch << 56
    labels_B: Tensor  # int64
    columns: Sequence[Mapping[str, Any]]  # of each sample, all of them, by name


@dataclass(frozen=True)
class Samples:
    """A micro-batch of one rank, as latents."""

    ids_B: Tensor  # of `Visits`
    epoch: int
    latents_BCYX: Tensor  # float32, drawn from the posterior, raw: shift and scale are the model's
    labels_B: Tensor  # int64
    skipped: Mapping[int, str] = field(default_factory=dict)  # by place, why one is not trained on; its latents are 0


T = TypeVar("T")
# What makes of samples, and of the optimizer step that they are for, what `next` of a loader gives.
Prepare = Callable[[Samples, int], T]


class VisitDraws:
    """What is random about a sample at one of its visits; of a config, `run.seed` and `data.mirror_prob` are used."""

    def __init__(self, config: Config) -> None:
        seed, self._mirror_prob = config.run.seed, config.data.mirror_prob
        # The same for a whole epoch, and as much work as the rest of a small draw.
        self._epoch_key = functools.lru_cache(lambda purpose, epoch: seeds.fold(seeds.key(seed, purpose), epoch))

    def mirrored(self, epoch: int, ids_B: Tensor) -> Tensor:
        """Which are mirrored: bool [B]."""
        if self._mirror_prob == 0:
            return torch.zeros_like(ids_B, dtype=torch.bool)
        return seeds.uniform(self._keys("mirror", epoch, ids_B)) < self._mirror_prob

    def crops(self, epoch: int, ids_B: Tensor) -> Tensor:
        """The numbers that choose random crops (`pixels.Decoder`): [B, 4], from 0 to 1."""
        keys_B = self._keys("crop", epoch, ids_B)
        return torch.stack([seeds.uniform(seeds.fold(keys_B, number)) for number in range(4)], dim=1)

    def latents(self, epoch: int, ids_B: Tensor, mean_BCYX: Tensor, log_variance_BCYX: Tensor | None) -> Tensor:
        """mean + exp(log_variance / 2) * epsilon: float32; the mean itself where there is no posterior."""
        latents_BCYX = mean_BCYX.float()
        if log_variance_BCYX is not None:
            deviation_BCYX = (0.5 * log_variance_BCYX.float()).exp_()
            noise_BCYX = seeds.normal(self._keys("posterior", epoch, ids_B), latents_BCYX.shape[1:])
            latents_BCYX = latents_BCYX + deviation_BCYX * noise_BCYX
        return latents_BCYX

    def _keys(self, purpose: str, epoch: int, ids_B: Tensor) -> Tensor:
        return seeds.fold(self._epoch_key(purpose, epoch), ids_B)


@dataclass(frozen=True)
class LatentReading(Generic[T]):
    """Samples of latent shards -> what a loader gives."""

    info: LatentsInfo
    draws: VisitDraws
    prepare: Prepare[T]

    def __call__(self, visits: Visits) -> T:
        mirrored_B = self.draws.mirrored(visits.epoch, visits.ids_B)
        mean_BCYX = self._stack(visits, "mean", mirrored_B)
        if not self.info.has_mirror and mirrored_B.any():
            mean_BCYX = torch.where(mirrored_B[:, None, None, None], mean_BCYX.flip(-1), mean_BCYX)
        log_variance_BCYX = self._stack(visits, "log_variance", mirrored_B) if self.info.has_posterior else None
        latents_BCYX = self.draws.latents(visits.epoch, visits.ids_B, mean_BCYX, log_variance_BCYX)
        return self.prepare(Samples(visits.ids_B, visits.epoch, latents_BCYX, visits.labels_B), visits.step)

    def _stack(self, visits: Visits, name: str, mirrored_B: Tensor) -> Tensor:
        names = [f"mirror_{name}" if mirrored and self.info.has_mirror else name for mirrored in mirrored_B.tolist()]
        stacked = np.stack([columns[name] for columns, name in zip(visits.columns, names, strict=True)])
        return torch.from_numpy(stacked.astype(np.float32))


@dataclass(frozen=True)
class ImageFiles:
    """A micro-batch of image shards: `Visits`, its files in one tensor, as processes hand it over."""

    step: int
    epoch: int
    ids_B: Tensor
    labels_B: Tensor
    sizes_B2: Tensor  # int64, width and height that each declares; 0 where it is no image (`images.declared_size`)
    ends_B: Tensor  # int64, where each file ends in `data`
    data: Tensor  # uint8

    @classmethod
    def of(cls, visits: Visits) -> "ImageFiles":
        """Of samples of image shards."""
        files = [np.frombuffer(columns["image"], np.uint8) for columns in visits.columns]
        sizes_B2 = torch.tensor([declared_size(file) or (0, 0) for file in files])
        ends_B = torch.tensor([len(file) for file in files]).cumsum(0)
        data = torch.from_numpy(np.concatenate(files))
        return cls(visits.step, visits.epoch, visits.ids_B, visits.labels_B, sizes_B2, ends_B, data)

    def files(self) -> list[NDArray[np.uint8]]:
        """The bytes of each image."""
        return np.split(self.data.numpy(), self.ends_B[:-1].tolist())

    def sizes(self) -> list[tuple[int, int] | None]:
        """Width and height that each declares; None where it is no image."""
        return [(width, height) if width else None for width, height in self.sizes_B2.tolist()]

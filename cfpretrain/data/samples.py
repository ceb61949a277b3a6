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
from cfpretrain.data.interleaved import Segments, files_of, num_images, parse_column
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
    # Float32, drawn from the posterior, raw: shift and scale are the model's. Where samples have several images, those
    # of one sample after another's.
    latents_BCYX: Tensor
    labels_B: Tensor  # int64
    skipped: Mapping[int, str] = field(default_factory=dict)  # by place, why one is not trained on; its latents are 0
    captions: Sequence[str] = ()  # of each
    segments: Sequence[Segments] = ()  # of each, where they are interleaved


T = TypeVar("T")
# What makes of samples, and of the optimizer step that they are for, what `next` of a loader gives.
Prepare = Callable[[Samples, int], T]


def place_images(num_samples: int, segments: Sequence[Segments]) -> tuple[Tensor, Tensor | None]:
    """Whose each image of a micro-batch is, as a place in it, and which of its sample's: int64 [I] each.

    The latter is None where samples have no segments, but are images.
    """
    if not segments:
        return torch.arange(num_samples), None
    counts = [num_images(one) for one in segments]
    return (
        torch.arange(num_samples).repeat_interleave(torch.tensor(counts)),
        torch.cat([torch.arange(count) for count in counts]),
    )


def segments_of(columns: Sequence[Mapping[str, Any]]) -> list[Segments]:
    """The segments of samples; empty where they are not interleaved."""
    return [parse_column(one["segments"]) for one in columns if "segments" in one]


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

    def latents(
        self,
        epoch: int,
        ids_B: Tensor,
        mean_BCYX: Tensor,
        log_variance_BCYX: Tensor | None,
        number_B: Tensor | None = None,
    ) -> Tensor:
        """mean + exp(log_variance / 2) * epsilon: float32; the mean itself where there is no posterior.

        All are of images; `number_B`: which of its sample's each is, where samples have several.
        """
        latents_BCYX = mean_BCYX.float()
        if log_variance_BCYX is not None:
            deviation_BCYX = (0.5 * log_variance_BCYX.float()).exp_()
            keys_B = self._keys("posterior", epoch, ids_B)
            if number_B is not None:
                further_B = seeds.fold(self._keys("posterior of further images", epoch, ids_B), number_B)
                keys_B = torch.where(number_B > 0, further_B, keys_B)
            noise_BCYX = seeds.normal(keys_B, latents_BCYX.shape[1:])
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
        segments = segments_of(visits.columns)
        sample_I, number_I = place_images(len(visits.columns), segments)
        ids_I = visits.ids_B[sample_I]
        mirrored_B = self.draws.mirrored(visits.epoch, visits.ids_B)
        mean_ICYX = self._join(visits, "mean", mirrored_B)
        if not self.info.has_mirror and mirrored_B.any():
            mean_ICYX = torch.where(mirrored_B[sample_I][:, None, None, None], mean_ICYX.flip(-1), mean_ICYX)
        log_variance_ICYX = self._join(visits, "log_variance", mirrored_B) if self.info.has_posterior else None
        latents_ICYX = self.draws.latents(visits.epoch, ids_I, mean_ICYX, log_variance_ICYX, number_I)
        captions = [columns["caption"] for columns in visits.columns]
        samples = Samples(visits.ids_B, visits.epoch, latents_ICYX, visits.labels_B, {}, captions, segments)
        return self.prepare(samples, visits.step)

    def _join(self, visits: Visits, name: str, mirrored_B: Tensor) -> Tensor:
        """A column of all images, those of one sample after another's."""
        names = [f"mirror_{name}" if mirrored and self.info.has_mirror else name for mirrored in mirrored_B.tolist()]
        arrays = [columns[name] for columns, name in zip(visits.columns, names, strict=True)]
        joined = np.concatenate(arrays) if self.info.most_segments else np.stack(arrays)
        return torch.from_numpy(joined.astype(np.float32))


@dataclass(frozen=True)
class ImageFiles:
    """A micro-batch of image shards: `Visits`, its files in one tensor, as processes hand it over."""

    step: int
    epoch: int
    ids_B: Tensor
    labels_B: Tensor
    sizes_I2: Tensor  # int64, width and height that each declares; 0 where it is no image (`images.declared_size`)
    ends_I: Tensor  # int64, where each file ends in `data`; those of one sample after another's
    data: Tensor  # uint8
    captions: Sequence[str]
    segments: Sequence[Segments]  # empty where each sample is an image

    @classmethod
    def of(cls, visits: Visits) -> "ImageFiles":
        """Of samples of image shards."""
        files = [np.frombuffer(file, np.uint8) for columns in visits.columns for file in files_of(columns)]
        sizes_I2 = torch.tensor([declared_size(file) or (0, 0) for file in files])
        ends_I = torch.tensor([len(file) for file in files]).cumsum(0)
        data = torch.from_numpy(np.concatenate(files))
        captions, segments = [columns["caption"] for columns in visits.columns], segments_of(visits.columns)
        return cls(visits.step, visits.epoch, visits.ids_B, visits.labels_B, sizes_I2, ends_I, data, captions, segments)

    def files(self) -> list[NDArray[np.uint8]]:
        """The bytes of each image."""
        return np.split(self.data.numpy(), self.ends_I[:-1].tolist())

    def sizes(self) -> list[tuple[int, int] | None]:
        """Width and height that each declares; None where it is no image."""
        return [(width, height) if width else None for width, height in self.sizes_I2.tolist()]

"""Image shards -> latent shards: one shard of latents for each of images, by any number of ranks.

What is kept of an image, and of its mirror image, is the posterior's mean and log-variance, raw and in float16;
training draws its latents from them. Every batch has the same size, is cut by shard (pixels.py) and is encoded by one
thread, so the bytes of a shard depend neither on ranks and threads nor on the order of work and kills in it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder
from cfpretrain.base import runtime
from cfpretrain.base.console import UserError
from cfpretrain.data.pixels import PixelBatch, Sample, dali_version, decode_shards
from cfpretrain.data.shard_writer import ShardWriter, merged_versions
from cfpretrain.data.shards import ImagesInfo, LatentsInfo, Shards, latent_columns

_Moments = dict[str, NDArray[np.float16]]  # by column: [B, C, Y, X]


@dataclass(frozen=True)
class Encoding:
    """Which images are encoded, and how: all that the bytes of the latent shards depend on.

    Raises:
        UserError: the autoencoder does not take these images.
    """

    images: Shards
    autoencoder: IdentityAutoencoder | KLAutoencoder
    device: torch.device
    precision: str  # in which the autoencoder computes, for the record
    batch_size: int
    with_mirror: bool

    def __post_init__(self) -> None:
        _ = self.latent_shape  # the autoencoder refuses what it does not take

    @property
    def images_info(self) -> ImagesInfo:
        """The description of the images."""
        assert isinstance(self.images.info, ImagesInfo)
        return self.images.info

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents."""
        info = self.images_info
        return self.autoencoder.latent_shape((info.channels, info.image_size, info.image_size))

    @property
    def has_posterior(self) -> bool:
        """Whether there are log-variances: pixels have none."""
        return not isinstance(self.autoencoder, IdentityAutoencoder)

    @property
    def has_mirror(self) -> bool:
        """Whether mirrored images are encoded too: pixels need only be flipped."""
        return self.with_mirror and self.has_posterior

    @property
    def columns(self) -> dict[str, str]:
        """Columns of the latent shards."""
        return latent_columns(self.latent_shape, self.has_posterior, self.has_mirror)

    def plan(self) -> dict[str, Any]:
        """What `ShardWriter` holds unfinished work against."""
        return {
            "images": self.images.fingerprint,
            "autoencoder": self.autoencoder.fingerprint,
            "latent_shift": self.autoencoder.shift,
            "latent_scale": self.autoencoder.scale,
            "mirror": self.has_mirror,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "device": self.device.type,
        }

    def describe(self, records: Sequence[Mapping[str, Any]]) -> LatentsInfo:
        """The description of the latents, from what `encode` left with each shard."""
        info = self.images_info
        return LatentsInfo(
            autoencoder=self.autoencoder.fingerprint,
            latent_shape=self.latent_shape,
            latent_shift=self.autoencoder.shift,
            latent_scale=self.autoencoder.scale,
            class_names=info.class_names,
            num_samples=info.num_samples,
            source=info.source,
            image_size=info.image_size,
            crop="adm" if info.store == "lossless" else "dali",
            has_posterior=self.has_posterior,
            has_mirror=self.has_mirror,
            statistics=_statistics(records),
            versions=merged_versions(records),
        )

    def versions(self) -> dict[str, str]:
        """Of what decides the bits of latents."""
        names = ["torch", *["diffusers"] * self.has_posterior]
        return runtime.package_versions(*names) | {"dali": dali_version()}


def encode(
    encoding: Encoding,
    writer: ShardWriter,
    numbers: Sequence[int],
    num_threads: int,
    on_batch: Callable[[int], None],
) -> None:
    """Encodes image shards and writes a latent shard of each.

    Args:
        encoding: of what and how.
        writer: which has begun.
        numbers: of the shards.
        num_threads: of the CPU, for decoding and, without a GPU, as many for encoding.
        on_batch: called with the number of images after each batch.

    Raises:
        UserError: as `decode_shards`; or the GPU's memory does not hold a batch, float16 cannot hold the latents, or
            they cannot be written.
    """
    batches = decode_shards(encoding.images, numbers, encoding.batch_size, encoding.device, num_threads)
    num_workers = 1 if encoding.device.type == "cuda" else num_threads
    with _enough_memory(encoding), _exact_convolutions(), _threads(num_workers) as pool:
        encoded = _in_order(pool, lambda batch: _encode_batch(encoding, batch), batches, ahead=num_workers)
        for number, of_shard in groupby(encoded, key=lambda pair: pair[0].shard):
            _write_shard(encoding, writer, number, of_shard, on_batch)


def _write_shard(
    encoding: Encoding,
    writer: ShardWriter,
    number: int,
    encoded: Iterable[tuple[PixelBatch, _Moments]],
    on_batch: Callable[[int], None],
) -> None:
    totals = _Totals(encoding.latent_shape[0])
    writer.write(
        number,
        _samples(encoded, totals, on_batch),
        record=lambda: totals.record() | {"versions": encoding.versions()},
    )


def _samples(
    encoded: Iterable[tuple[PixelBatch, _Moments]], totals: "_Totals", on_batch: Callable[[int], None]
) -> Iterator[Sample]:
    for batch, moments in encoded:
        totals.add(moments)
        for place, sample in enumerate(batch.samples):
            kept = {name: sample[name] for name in ("id", "label", "caption")}
            yield kept | {name: values[place] for name, values in moments.items()}
        on_batch(len(batch.samples))


def _encode_batch(encoding: Encoding, batch: PixelBatch) -> _Moments:
    """The columns of a batch's samples, without what only filled the batch."""
    images_BCYX = batch.pixels_BYXC.permute(0, 3, 1, 2).contiguous().float() / 255
    moments: _Moments = {}
    for prefix in ("", "mirror_") if encoding.has_mirror else ("",):
        mean_BCYX, log_variance_BCYX = encoding.autoencoder.encode(images_BCYX.flip(-1) if prefix else images_BCYX)
        moments[f"{prefix}mean"] = _stored(encoding, batch, mean_BCYX)
        if log_variance_BCYX is not None:
            moments[f"{prefix}log_variance"] = _stored(encoding, batch, log_variance_BCYX)
    return moments


def _stored(encoding: Encoding, batch: PixelBatch, values_BCYX: torch.Tensor) -> NDArray[np.float16]:
    stored: NDArray[np.float16] = values_BCYX[: len(batch.samples)].to(torch.float16).cpu().numpy()
    for sample, values in zip(batch.samples, stored, strict=True):
        if not np.isfinite(values).all():
            raise UserError(
                f"{encoding.images.source.address}: image of id {sample['id']}: expected latents that float16 can "
                f"hold, got {float(values.min()):g} to {float(values.max()):g}; encode with --precision fp32, or with "
                "another autoencoder"
            )
    return stored


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


class _Totals:
    """Sums over the latents that would be drawn from posteriors, for their mean and standard deviation."""

    def __init__(self, num_channels: int) -> None:
        self._count = 0
        self._sum, self._sum_of_squares = np.zeros(num_channels), np.zeros(num_channels)

    def add(self, moments: _Moments) -> None:
        """Counts a batch and its mirror image; pixels are their own mean, and vary no further."""
        for name, values in moments.items():
            values_BCYX = values.astype(np.float64)
            if name.endswith("mean"):
                self._count += values_BCYX[:, 0].size
                self._sum += values_BCYX.sum((0, 2, 3))
                self._sum_of_squares += np.square(values_BCYX).sum((0, 2, 3))
            else:
                self._sum_of_squares += np.exp(values_BCYX).sum((0, 2, 3))

    def record(self) -> dict[str, Any]:
        """The sums, for JSON."""
        return {
            "count": self._count,
            "sum": self._sum.tolist(),
            "sum_of_squares": self._sum_of_squares.tolist(),
        }


def _statistics(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, over all shards in their order."""
    count = sum(record["count"] for record in records)
    mean, mean_of_squares = (
        np.sum([record[name] for record in records], axis=0) / count for name in ("sum", "sum_of_squares")
    )
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(mean_of_squares - mean**2, 0)).tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# Threads and memory


@contextmanager
def _enough_memory(encoding: Encoding) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        size = encoding.images_info.image_size
        raise UserError(
            f"--batch-size: {encoding.device} has too little memory to encode {encoding.batch_size} images of {size} x "
            f"{size} pixels at once; give fewer, or end what else uses its memory"
        ) from error


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """The same bits at every run on a GPU, and float32 where float32 is asked for."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


@contextmanager
def _threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads each of which computes alone: how torch would share a batch among threads decides bits of the result."""
    pool = ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[PixelBatch], _Moments], batches: Iterable[PixelBatch], ahead: int
) -> Iterator[tuple[PixelBatch, _Moments]]:
    """Each batch and what the function makes of it, computed up to `ahead` batches before it is wanted."""
    computing: deque[tuple[PixelBatch, Future[_Moments]]] = deque()
    for batch in batches:
        computing.append((batch, pool.submit(function, batch)))
        if len(computing) > ahead:
            batch, moments = computing.popleft()
            yield batch, moments.result()
    for batch, moments in computing:
        yield batch, moments.result()

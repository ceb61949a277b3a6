"""Image shards -> latent shards: one shard of latents for each of images, by any number of ranks.

Of an image, and of its mirror image, the posterior's mean and log-variance are stored, raw and in float16; training
draws its latents from them. Every batch is cut by shard, padded to one size and encoded by one thread, so the bytes of
a shard depend neither on ranks and threads nor on the order of work and kills in it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder, deterministic_convolutions
from cfpretrain.base import runtime
from cfpretrain.base.console import UserError
from cfpretrain.data.pixels import PixelBatch, Sample, dali_version, decode_shards
from cfpretrain.data.shard_writer import ShardWriter, merged_versions
from cfpretrain.data.shards import ImagesInfo, LatentsInfo, Shards, latent_columns

_Moments = dict[str, NDArray[np.float16]]  # by column: [B, C, Y, X]
_Encoded = tuple[PixelBatch, _Moments]

_OTHER_PRECISION = "have it computed in fp32 (--precision, in training engine.precision), or "


class Encoding:
    """Which images are encoded, and how: all that the bytes of the latent shards depend on.

    UserError where the autoencoder does not take these images.
    """

    def __init__(
        self,
        images: Shards,
        autoencoder: IdentityAutoencoder | KLAutoencoder,
        device: torch.device,
        precision: str,
        batch_size: int,
        with_mirror: bool,
        has_random_crops: bool = False,
    ) -> None:
        assert isinstance(images.info, ImagesInfo)
        info = images.info
        self.images, self.info = images, info
        self.autoencoder, self.device, self.batch_size = autoencoder, device, batch_size
        self.has_random_crops = has_random_crops
        self._crop = "random" if has_random_crops else "adm" if info.store == "lossless" else "dali"
        self.precision = precision  # in which the autoencoder computes, for the record
        self.latent_shape = autoencoder.latent_shape((info.channels, info.image_size, info.image_size))
        # Pixels have no log-variances, and need only be flipped.
        self.has_posterior = not isinstance(autoencoder, IdentityAutoencoder)
        self.has_mirror = with_mirror and self.has_posterior
        self.columns = latent_columns(self.latent_shape, self.has_posterior, self.has_mirror, info.most_segments > 0)

    def plan(self) -> dict[str, Any]:
        """The plan of the `ShardWriter`."""
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

    def describe(self, records: Sequence[Mapping[str, Any]] = ()) -> LatentsInfo:
        """The description of the latents, from the records of all shards; without any, of latents yet to be made."""
        return LatentsInfo(
            autoencoder=self.autoencoder.fingerprint,
            latent_shape=self.latent_shape,
            latent_shift=self.autoencoder.shift,
            latent_scale=self.autoencoder.scale,
            class_names=self.info.class_names,
            num_samples=self.info.num_samples,
            source=self.info.source,
            image_size=self.info.image_size,
            crop=self._crop,
            has_posterior=self.has_posterior,
            has_mirror=self.has_mirror,
            statistics=_statistics(records) if records else {},
            versions=merged_versions(records) if records else {},
            most_segments=self.info.most_segments,
        )

    def describe_work(self) -> str:
        """What is done with images during training, in a line."""
        made_by = "pixels are the latents"
        if self.has_posterior:
            made_by = f"encoded {self.batch_size} at once in {self.precision}"
        return f"images are decoded during training, {self._crop} crop; {made_by}"

    def moments(self, pixels_BYXC: torch.Tensor, mirrored_B: torch.Tensor, names: Sequence[str]) -> _Moments:
        """What is kept of images, or of the mirror images of some: columns `mean` and, of a posterior, `log_variance`.

        UserError where float16 cannot hold them.

        Args:
            pixels_BYXC: uint8, at most `batch_size` images, on the device.
            mirrored_B: which are mirrored before they are encoded.
            names: of the images, for messages.
        """
        assert len(names) == len(pixels_BYXC)
        images_BCYX = _padded(pixels_BYXC, self.batch_size).permute(0, 3, 1, 2).contiguous().float() / 255
        turned_B = _padded(mirrored_B.to(images_BCYX.device), self.batch_size)
        images_BCYX = torch.where(turned_B[:, None, None, None], images_BCYX.flip(-1), images_BCYX)
        mean_BCYX, log_variance_BCYX = self.autoencoder.encode(images_BCYX)
        found = {"mean": self._stored(mean_BCYX, names)}
        if log_variance_BCYX is not None:
            found["log_variance"] = self._stored(log_variance_BCYX, names)
        return found

    def _stored(self, values_BCYX: torch.Tensor, names: Sequence[str]) -> NDArray[np.float16]:
        """In float16, without the padding of the batch."""
        stored: NDArray[np.float16] = values_BCYX[: len(names)].to(torch.float16).cpu().numpy()
        for name, values, values_CYX in zip(names, stored, values_BCYX, strict=False):  # the batch may be padded
            if not np.isfinite(values).all():
                way_out = "take another autoencoder"
                if self.precision != "fp32":
                    way_out = f"{_OTHER_PRECISION}{way_out}"
                raise UserError(
                    f"{name}: expected latents that float16 can hold, got {float(values_CYX.min()):g} to "
                    f"{float(values_CYX.max()):g}; {way_out}"
                )
        return stored

    def versions(self) -> dict[str, str]:
        """Of the packages that decide the bits of latents."""
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
        encoding: which images are encoded, and how.
        writer: its `begin` was called.
        numbers: of the shards.
        num_threads: of the CPU, for decoding and, without a GPU, as many for encoding.
        on_batch: called with the number of samples begun in each batch.
    """
    batches = decode_shards(encoding.images, numbers, encoding.batch_size, encoding.device, num_threads)
    num_workers = 1 if encoding.device.type == "cuda" else num_threads
    # Each computes alone: the bits of a result depend on how torch shares a batch among threads.
    threads = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with deterministic_convolutions():
            encoded = _in_order(threads, encoding, batches, ahead=num_workers)
            for number, of_shard in groupby(encoded, key=lambda pair: pair[0].shard):
                _write_shard(encoding, writer, number, of_shard, on_batch)
    except torch.OutOfMemoryError as error:
        size = encoding.info.image_size
        raise UserError(
            f"--batch-size: {encoding.device} has too little memory to encode {encoding.batch_size} images of {size} x "
            f"{size} pixels at once; give fewer, or end what else uses its memory"
        ) from error
    finally:
        threads.shutdown(cancel_futures=True)


def _in_order(threads: Executor, encoding: Encoding, batches: Iterable[PixelBatch], ahead: int) -> Iterator[_Encoded]:
    """The batches, each encoded up to `ahead` batches before it is wanted."""
    encoded: deque[Future[_Encoded]] = deque()
    for batch in batches:
        encoded.append(threads.submit(_encode_batch, encoding, batch))
        if len(encoded) > ahead:
            yield encoded.popleft().result()
    while encoded:
        yield encoded.popleft().result()


def _encode_batch(encoding: Encoding, batch: PixelBatch) -> _Encoded:
    """A batch, and the columns of its samples."""
    moments: _Moments = {}
    names = [f"{encoding.images.source.address}: image of id {sample['id']}" for sample in batch.samples]
    for prefix, is_mirrored in (("", False), ("mirror_", True)) if encoding.has_mirror else (("", False),):
        found = encoding.moments(batch.pixels_BYXC, torch.full((len(names),), is_mirrored), names)
        moments |= {f"{prefix}{name}": values for name, values in found.items()}
    return batch, moments


def _padded(values_B: torch.Tensor, batch_size: int) -> torch.Tensor:
    """A batch with its last value repeated up to a size."""
    return torch.cat([values_B, values_B[-1:].expand(batch_size - len(values_B), *values_B.shape[1:])])


def _write_shard(
    encoding: Encoding, writer: ShardWriter, number: int, encoded: Iterable[_Encoded], on_batch: Callable[[int], None]
) -> None:
    num_channels = encoding.latent_shape[0]
    sums = {"count": np.zeros((), np.int64), "sum": np.zeros(num_channels), "sum_of_squares": np.zeros(num_channels)}

    def images() -> Iterator[tuple[Sample, _Moments]]:
        before = None
        for batch, moments in encoded:
            _add_to(sums, moments)
            for place, sample in enumerate(batch.samples):
                yield sample, {name: values[place] for name, values in moments.items()}
            ids = [sample["id"] for sample in batch.samples]
            on_batch(len(set(ids) - {before}))
            before = ids[-1]  # whose other images may follow

    def samples() -> Iterator[Sample]:
        for _, of_sample in groupby(images(), key=lambda pair: pair[0]["id"]):
            pairs = list(of_sample)
            sample, moments = pairs[0]
            kept = {name: sample[name] for name in ("id", "label", "caption", "segments") if name in sample}
            if "segments" in sample:
                moments = {name: np.stack([of_image[name] for _, of_image in pairs]) for name in moments}
            yield kept | moments

    def record() -> dict[str, Any]:
        return {name: values.tolist() for name, values in sums.items()} | {"versions": encoding.versions()}

    writer.write(number, samples(), record)


def _add_to(sums: dict[str, NDArray[Any]], moments: _Moments) -> None:
    """Adds a batch and its mirror images to the sums over latents of the posteriors; pixels have no variance."""
    for name, values in moments.items():
        values_BCYX = values.astype(np.float64)
        if name.endswith("mean"):
            sums["count"] += values_BCYX[:, 0].size
            sums["sum"] += values_BCYX.sum((0, 2, 3))
            sums["sum_of_squares"] += np.square(values_BCYX).sum((0, 2, 3))
        else:
            sums["sum_of_squares"] += np.exp(values_BCYX).sum((0, 2, 3))


def _statistics(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, over all shards in their order."""
    count = sum(record["count"] for record in records)
    mean, mean_of_squares = (
        np.sum([record[name] for record in records], axis=0) / count for name in ("sum", "sum_of_squares")
    )
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(mean_of_squares - mean**2, 0)).tolist()}

"""Images as shards hold them -> pixels: the door to DALI, NVIDIA's library for decoding."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.data.images import MOST_PIXELS, declared_size
from cfpretrain.data.shards import ImagesInfo, Shards

Sample = Mapping[str, Any]

# Of a random crop, before what exceeds the image is cut off and the rest is scaled: its share of the image's area, and
# width / height. Of a square image both bounds hold after the cut too; of a long one it is as wide as the image allows.
_CROP_AREA, _CROP_ASPECT = (0.5, 1.0), (3 / 4, 4 / 3)
_AGAIN = "make the image shards again"


class BadImagesError(Exception):
    """Images of a batch that cannot be decoded, or are of another size."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        super().__init__(reasons)
        self.reasons = reasons  # by their places in the batch


class Decoder:
    """Decodes batches of image files, by DALI; between two calls nothing is in flight.

    Args:
        info: of the folder. Where its `store` is "lossless", pixels are those that were stored; "original" images are
            resized and cropped, near the ADM crop but not equal to it.
        batch_size: most images of a call.
        device: where the pixels go; a GPU decodes JPEG itself.
        num_threads: of the CPU.
        has_random_crops: each call says how every image is cropped; the crop is scaled to the size of the images.
    """

    def __init__(
        self,
        info: ImagesInfo,
        batch_size: int,
        device: torch.device,
        num_threads: int,
        has_random_crops: bool = False,
    ) -> None:
        self._make = lambda: _make_pipeline(info, batch_size, device, num_threads, has_random_crops)
        self._info, self._has_random_crops = info, has_random_crops
        self._pipeline = self._make()

    def __call__(self, files: Sequence[bytes | NDArray[np.uint8]], crops_B4: Tensor | None = None) -> Tensor:
        """The pixels of square images: uint8 [B, Y, X, C].

        Args:
            files: the bytes of each image.
            crops_B4: numbers from 0 to 1 that choose the random crops: area, aspect, column, row.

        Raises:
            BadImagesError: names every image that cannot be decoded, or is of another size.
        """
        reasons = self._find_oversized(files)
        if reasons:
            raise BadImagesError(reasons)
        self._pipeline.feed_input("files", [np.frombuffer(file, np.uint8) for file in files])
        if self._has_random_crops:
            assert crops_B4 is not None
            self._pipeline.feed_input("crops", list(crops_B4.float().numpy()))
        try:
            (decoded,) = self._pipeline.run()
        except RuntimeError:
            self._pipeline = self._make()  # one that has failed gives nothing more
            reasons = self._find_undecodable(files)
            if not reasons:
                raise
            raise BadImagesError(reasons) from None
        # A copy, since the pipeline writes its next batch into the same memory.
        pixels_BYXC = torch.utils.dlpack.from_dlpack(decoded.as_tensor()).clone()
        if pixels_BYXC.is_cuda:
            torch.cuda.current_stream(pixels_BYXC.device).synchronize()
        return pixels_BYXC

    def _find_oversized(self, files: Sequence[bytes | NDArray[np.uint8]]) -> dict[int, str]:
        """Those of which DALI would take memory for other pixels than were stored, by what they declare."""
        size, reasons = (self._info.image_size, self._info.image_size), {}
        for place, file in enumerate(files):
            declared = declared_size(file)
            if declared is None:
                reasons[place] = f"it is no image, or one of more than {MOST_PIXELS:,} pixels; {_AGAIN}"
            elif self._info.store == "lossless" and not self._has_random_crops and declared != size:
                reasons[place] = f"expected {_by(size)} pixels, got {_by(declared)}; {_AGAIN}"
        return reasons

    def _find_undecodable(self, files: Sequence[bytes | NDArray[np.uint8]]) -> dict[int, str]:
        """Those that cannot be decoded alone, on the CPU, and why."""
        fix = _AGAIN if self._info.store == "lossless" else f"{_AGAIN} with --store lossless, which PIL decodes"
        reasons: dict[int, str] = {}
        alone = None
        for place, file in enumerate(files):
            alone = alone or _make_pipeline(self._info, 1, torch.device("cpu"), 1)
            alone.feed_input("files", [np.frombuffer(file, np.uint8)])
            try:
                alone.run()
            except RuntimeError as error:
                reason = str(error).partition("encountered:\n")[2].partition("Current pipeline")[0]
                reasons[place] = f"DALI cannot decode it ({' '.join(reason.split()):.200}); {fix}"
                alone = None
        return reasons


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


@dataclass(frozen=True)
class PixelBatch:
    """Images of one shard, decoded."""

    shard: int
    samples: Sequence[Sample]  # their columns, in the order of the shard
    pixels_BYXC: Tensor  # uint8, as of `Decoder`


def decode_shards(
    shards: Shards, numbers: Iterable[int], batch_size: int, device: torch.device, num_threads: int
) -> Iterator[PixelBatch]:
    """Decodes whole shards, those of these numbers, in order; batches are cut by shard.

    UserError where an image is damaged, cannot be decoded or is of another size; arguments as of `Decoder`.
    """
    assert isinstance(shards.info, ImagesInfo)
    decoder = Decoder(shards.info, batch_size, device, num_threads)
    for number in numbers:
        of_shard = shards.shard(number)
        while samples := list(islice(of_shard, batch_size)):
            try:
                yield PixelBatch(number, samples, decoder([sample["image"] for sample in samples]))
            except BadImagesError as error:
                place, reason = next(iter(error.reasons.items()))
                raise UserError(
                    f"{shards.source.address}/{shards.files[number].name}: image of id {samples[place]['id']}: {reason}"
                ) from error


def padded(values_B: Tensor, batch_size: int) -> Tensor:
    """A batch with its last value repeated up to a size."""
    return torch.cat([values_B, values_B[-1:].expand(batch_size - len(values_B), *values_B.shape[1:])])


def dali_version() -> str:
    """The version of DALI; UserError where it is not installed."""
    return str(_import_dali().__version__)


def _import_dali() -> Any:
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(
            f'NVIDIA DALI, which decodes the images, cannot be imported ({error}); pip install "cfpretrain[dali]"'
        ) from error
    return nvidia.dali


def _make_pipeline(
    info: ImagesInfo, batch_size: int, device: torch.device, num_threads: int, has_random_crops: bool = False
) -> Any:
    dali = _import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(
        batch_size,
        num_threads,
        device.index if on_gpu else None,
        exec_async=False,  # with these two, a call gives the batch that was fed
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    with pipeline:
        encoded = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB if info.channels == 3 else types.GRAY,
            adjust_orientation=False,  # as ADM reads its images
            jpeg_fancy_upsampling=True,  # as the CPU does
        )
        size, how = info.image_size, {"interp_type": types.INTERP_CUBIC, "antialias": True}
        if has_random_crops:
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            in_pixels = {"axes": (0, 1), "normalized_anchor": False, "normalized_shape": False}
            images = fn.slice(images, *_random_crop(dali, shape), **in_pixels)
            images = fn.resize(images, size=(size, size), **how)
        elif info.store == "original":
            images = fn.resize(images, resize_shorter=size, **how)
            images = fn.crop(images, crop=(size, size), rounding="truncate")
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _random_crop(dali: Any, shape: Any) -> tuple[Any, Any]:
    """Where a random crop of an image of this shape begins, and its shape, in pixels: nodes of a pipeline."""
    fn, math = dali.fn, dali.math
    draws = fn.external_source(name="crops", dtype=dali.types.FLOAT, ndim=1)
    height, width = (fn.cast(shape[axis], dtype=dali.types.FLOAT) for axis in (0, 1))
    least, most = _CROP_AREA
    area = (least + (most - least) * draws[0]) * height * width
    thinnest, widest = _CROP_ASPECT
    aspect = thinnest * math.pow(widest / thinnest, draws[1])  # even over its logarithm
    crop_width = math.min(math.sqrt(area * aspect), width)
    crop_height = math.min(math.sqrt(area / aspect), height)
    begin = fn.stack((height - crop_height) * draws[3], (width - crop_width) * draws[2])
    return begin, fn.stack(crop_height, crop_width)

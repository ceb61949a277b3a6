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
from cfpretrain.data.interleaved import files_of
from cfpretrain.data.shards import ImagesInfo, Shards

Sample = Mapping[str, Any]
File = bytes | NDArray[np.uint8]  # the bytes of an image file

# Of a random crop, before what exceeds the image is cut off and the rest is scaled: its share of the image's area, and
# width / height. Of a square image both bounds hold after the cut too; of a long one it is as wide as the image allows.
_CROP_AREA, _CROP_ASPECT = (0.5, 1.0), (3 / 4, 4 / 3)
_AGAIN = "make the image shards again"


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
        self._info, self._batch_size, self._device = info, batch_size, device
        self._num_threads, self._has_random_crops = num_threads, has_random_crops
        self._pipeline = self._make(batch_size, num_threads)

    def __call__(
        self, files: Sequence[File], sizes: Sequence[tuple[int, int] | None], crops_B4: Tensor | None = None
    ) -> tuple[Tensor, dict[int, str]]:
        """The pixels of square images.

        Args:
            files: the bytes of each image.
            sizes: what each declares (`images.declared_size`), by which DALI would take memory.
            crops_B4: numbers from 0 to 1 that choose the random crops: area, aspect, column, row.

        Returns:
            uint8 [B, Y, X, C], black where an image is bad; and by place what is wrong with each bad one: it cannot be
            decoded, or is of another size.
        """
        reasons = self._refused_by_header(sizes)
        shape = (len(files), self._info.image_size, self._info.image_size, self._info.channels)
        pixels_BYXC = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        while good := [place for place in range(len(files)) if place not in reasons]:
            try:
                pixels_BYXC[good] = self._decode(self._pipeline, files, crops_B4, good)
                break
            except RuntimeError as error:
                self._pipeline = self._make(self._batch_size, self._num_threads)  # a failed one gives nothing more
                found = self._find_undecodable(files, crops_B4, good)
                if not found:
                    raise RuntimeError("DALI fails on a batch of images each of which it decodes alone") from error
                reasons |= found
        if pixels_BYXC.is_cuda:
            torch.cuda.current_stream(self._device).synchronize()
        return pixels_BYXC, reasons

    def _make(self, batch_size: int, num_threads: int) -> Any:
        return _make_pipeline(self._info, batch_size, self._device, num_threads, self._has_random_crops)

    def _decode(self, pipeline: Any, files: Sequence[File], crops_B4: Tensor | None, places: Sequence[int]) -> Tensor:
        """The images at some places."""
        pipeline.feed_input("files", [np.frombuffer(files[place], np.uint8) for place in places])
        if self._has_random_crops:
            assert crops_B4 is not None
            pipeline.feed_input("crops", list(crops_B4[list(places)].float().numpy()))
        (decoded,) = pipeline.run()
        # A copy, since the pipeline writes its next batch into the same memory.
        return torch.utils.dlpack.from_dlpack(decoded.as_tensor()).clone()

    def _refused_by_header(self, sizes: Sequence[tuple[int, int] | None]) -> dict[int, str]:
        """By place, what is wrong with images that need not be decoded to be refused."""
        size, reasons = (self._info.image_size, self._info.image_size), {}
        is_stored_so = self._info.store == "lossless" and not self._has_random_crops
        for place, declared in enumerate(sizes):
            if declared is None:
                reasons[place] = f"it is no image, or one of more than {MOST_PIXELS:,} pixels; {_AGAIN}"
            elif is_stored_so and declared != size:
                reasons[place] = f"expected {_by(size)} pixels, got {_by(declared)}; {_AGAIN}"
        return reasons

    def _find_undecodable(
        self, files: Sequence[File], crops_B4: Tensor | None, places: Sequence[int]
    ) -> dict[int, str]:
        """By place, why images cannot be decoded alone."""
        fix = _AGAIN if self._info.store == "lossless" else f"{_AGAIN} with --store lossless, which PIL decodes"
        reasons: dict[int, str] = {}
        alone = None
        for place in places:
            alone = alone or self._make(1, 1)
            try:
                self._decode(alone, files, crops_B4, [place])
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
    samples: Sequence[Sample]  # the columns of each image's, in the order of the shard
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
        of_shard = ((sample, file) for sample in shards.shard(number) for file in files_of(sample))
        while pairs := list(islice(of_shard, batch_size)):
            samples, images = [sample for sample, _ in pairs], [file for _, file in pairs]
            pixels_BYXC, reasons = decoder(images, list(map(declared_size, images)))
            for place, reason in reasons.items():
                raise UserError(
                    f"{shards.source.address}/{shards.files[number].name}: image of id {samples[place]['id']}: {reason}"
                )
            yield PixelBatch(number, samples, pixels_BYXC)


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

"""Images as shards hold them -> pixels: the door to DALI, NVIDIA's library for decoding.

Batches have one size and are cut by shard: the other images in the batch of an image depend on its shard alone, never
on the rank or on earlier shards.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.data.shards import ImagesInfo, Shards

Sample = Mapping[str, Any]
_Files = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class PixelBatch:
    """Images of one shard, decoded."""

    shard: int
    samples: Sequence[Sample]  # their columns, in the order of the shard
    pixels_BYXC: Tensor  # uint8; padded with the last of the samples, so that every batch is full


def decode_shards(
    shards: Shards, numbers: Iterable[int], batch_size: int, device: torch.device, num_threads: int
) -> Iterator[PixelBatch]:
    """Decodes whole shards; while one batch is used, the next is being decoded, also across shards.

    UserError where an image is damaged, cannot be decoded or is of another size.

    Args:
        shards: of images.
        numbers: which of them, in order.
        batch_size: images in a batch.
        device: where the pixels go; a GPU decodes JPEG itself.
        num_threads: of the CPU.

    Yields:
        Square images, `image_size` pixels a side. Where the folder's `store` is "lossless" they are the pixels that
        were stored; "original" ones are resized and cropped by DALI, near the ADM crop but not equal to it.
    """
    info = shards.info
    assert isinstance(info, ImagesInfo)
    decoding: deque[tuple[int, list[Sample]]] = deque()  # given to the pipeline, and not decoded yet

    def files() -> Iterator[_Files]:
        for number in numbers:
            samples = shards.shard(number)
            while batch := list[Sample](islice(samples, batch_size)):
                decoding.append((number, batch))
                yield _files(batch) + _files(batch[-1:]) * (batch_size - len(batch))

    pipeline = _make_pipeline(info, files(), batch_size, device, num_threads)
    while True:
        try:
            (decoded,) = pipeline.run()
        except StopIteration:
            return
        except RuntimeError:
            _refuse_undecodable(shards, *decoding[0])
            raise
        number, batch = decoding.popleft()
        expected = (info.image_size, info.image_size, info.channels)
        for sample, shape in zip(batch, decoded.shape(), strict=False):
            if tuple(shape) != expected:
                raise UserError(
                    f"{_name(shards, number, sample)}: expected {' x '.join(map(str, expected))} pixels, got "
                    f"{' x '.join(map(str, shape))}; make the image shards again"
                )
        # A copy, since the pipeline writes its next batch into the same memory.
        pixels_BYXC = torch.utils.dlpack.from_dlpack(decoded.as_tensor()).clone()
        if pixels_BYXC.is_cuda:
            torch.cuda.current_stream(pixels_BYXC.device).synchronize()
        yield PixelBatch(number, batch, pixels_BYXC)


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
    info: ImagesInfo, files: Iterator[_Files], batch_size: int, device: torch.device, num_threads: int
) -> Any:
    dali = _import_dali()
    fn, types = dali.fn, dali.types
    on_gpu = device.type == "cuda"
    pipeline = dali.Pipeline(batch_size, num_threads, device.index if on_gpu else None)
    with pipeline:
        encoded = fn.external_source(source=files, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB if info.channels == 3 else types.GRAY,
            adjust_orientation=False,  # as ADM reads its images
            jpeg_fancy_upsampling=True,  # as the CPU does
        )
        if info.store == "original":
            images = fn.resize(images, resize_shorter=info.image_size, interp_type=types.INTERP_CUBIC, antialias=True)
            images = fn.crop(images, crop=(info.image_size, info.image_size), rounding="truncate")
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _files(samples: Sequence[Sample]) -> _Files:
    return [np.frombuffer(sample["image"], np.uint8) for sample in samples]


def _refuse_undecodable(shards: Shards, number: int, samples: Sequence[Sample]) -> None:
    """UserError that names the image of a failed batch which cannot be decoded alone, where there is one."""
    assert isinstance(shards.info, ImagesInfo)
    alone = _make_pipeline(shards.info, (_files([sample]) for sample in samples), 1, torch.device("cpu"), num_threads=1)
    for sample in samples:
        try:
            alone.run()
        except RuntimeError as error:
            reason = str(error).partition("encountered:\n")[2].partition("Current pipeline")[0]
            raise UserError(
                f"{_name(shards, number, sample)}: DALI cannot decode it ({' '.join(reason.split()):.200}); make the "
                "image shards with --store lossless, which PIL decodes"
            ) from error


def _name(shards: Shards, number: int, sample: Sample) -> str:
    return f"{shards.source.address}/{shards.files[number].name}: image of id {sample['id']}"

"""Training from image shards: files -> pixels -> the frozen autoencoder -> latents, ahead of the step.

What is made of an image is what tools/encode_latents.py and the loader of latent shards make of it: the same mirror,
moments rounded to float16, the same posterior noise. Images are encoded in batches of one size, in which an image's
latents do not depend on the others, so neither ranks nor micro-batches change them.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder, deterministic_convolutions
from cfpretrain.base import runtime
from cfpretrain.base.background import Task
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.latents import LatentScaling
from cfpretrain.data.cache import Cache
from cfpretrain.data.latent_shards import Encoding
from cfpretrain.data.pixels import Decoder, dali_version
from cfpretrain.data.reader import MicroBatches, Reader, Request
from cfpretrain.data.samples import ImageFiles, Prepare, Samples, T, VisitDraws, place_images, split_ids
from cfpretrain.data.shards import ImagesInfo, LatentsInfo, Shards, read_info

_POLL_SECONDS = 1.0
_CLOSE_SECONDS = 30.0  # for a batch that is being encoded


@dataclass(frozen=True)
class TrainingData:
    """The folders of `data.shards`, and what training makes of them."""

    folders: list[Shards]
    latents: list[LatentsInfo]  # of each folder: of its latents, or of those that its images become
    encodings: list[Encoding]  # of each folder of images; none where the folders hold latents
    cache: Cache  # of copies, for addresses

    @property
    def kind(self) -> str:
        """What the folders hold: "images" or "latents"."""
        return self.folders[0].info.kind


def open_training_data(config: Config, device: torch.device | None = None) -> TrainingData:
    """The data that a config names; UserError where a folder cannot be read, or the autoencoder does not take images.

    Args:
        config: its section `data`.
        device: where images are encoded; the CPU by default.
    """
    device, cache = device or torch.device("cpu"), Cache.of(config.data)
    folders = [Shards(address, cache=cache) for address in config.data.shards]
    infos = [folder.info for folder in folders]
    latents = [info for info in infos if isinstance(info, LatentsInfo)]
    images = [info for info in infos if isinstance(info, ImagesInfo)]
    if latents and images:
        raise UserError(
            f"data.shards: expected shards of one kind, got images and latents in {', '.join(config.data.shards)}; "
            "encode the images, or leave one kind out"
        )
    if latents:
        return TrainingData(folders, latents, [], cache)
    dali_version()  # before an engine is built
    autoencoder, precision = _open_autoencoder(config, images[0], device)
    encodings = [
        Encoding(
            folder,
            autoencoder,
            device,
            precision,
            config.data.encode_batch_size,
            with_mirror=config.data.mirror_prob > 0,
            has_random_crops=config.data.crop == "random",
        )
        for folder in folders
    ]
    return TrainingData(folders, [encoding.describe() for encoding in encodings], encodings, cache)


def _open_autoencoder(
    config: Config, info: ImagesInfo, device: torch.device
) -> tuple[IdentityAutoencoder | KLAutoencoder, str]:
    """What encodes images of a config, and in which precision."""
    data, channels = config.data, config.model.latent_channels
    if not data.autoencoder:
        if info.channels != channels:
            raise UserError(
                f"data.autoencoder: expected the folder of the one that encodes the images of {data.shards[0]}, since "
                f"model.latent_channels = {channels} are not their {info.channels}, got none; set it, encode them "
                f"before with tools/encode_latents.py, or set model.latent_channels={info.channels} to train on pixels"
            )
        values = (of * info.channels if len(of) == 1 else of for of in (data.latent_shift, data.latent_scale))
        return IdentityAutoencoder(LatentScaling(*values)), "fp32"
    precision = encoding_precision(config, device.type)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return KLAutoencoder.load(data.autoencoder, device, dtype), precision


def encoding_precision(config: Config, device_type: str) -> str:
    """In which images are encoded on a device ("cpu" or "cuda"): "bf16" or "fp32"."""
    return "bf16" if device_type == "cuda" and config.engine.precision == "bf16" else "fp32"


def kind_at_hand(config: Config) -> str | None:
    """What `data.shards` hold, "images" or "latents"; None where no folder of this machine says it."""
    for address in config.data.shards:
        if Path(address).is_dir():
            with suppress(UserError):
                return read_info(address).kind
    return None


class OnlineEncoder:
    """Image files -> a micro-batch of latents.

    Args:
        encodings: of the folders, which are alike (`compatibility.check_infos`).
        config: its sections `data` and `run`.
    """

    def __init__(self, encodings: Sequence[Encoding], config: Config) -> None:
        self._draws, self._on_bad_image = VisitDraws(config), config.data.on_bad_image
        self._addresses = [encoding.images.source.address for encoding in encodings]
        self._encoding = first = encodings[0]
        self._decoder = Decoder(first.info, first.batch_size, first.device, runtime.num_cores(), first.has_random_crops)

    def __call__(self, images: ImageFiles) -> Samples:
        """The latents of a micro-batch; errors as of `moments`."""
        epoch, ids_B = images.epoch, images.ids_B
        sample_I, number_I = place_images(len(ids_B), images.segments)
        moments, skipped = self.moments(images, self._draws.mirrored(epoch, ids_B))
        found = moments["mean"], moments.get("log_variance")
        latents_ICYX = self._draws.latents(epoch, ids_B[sample_I], *found, number_I)
        latents_ICYX[torch.isin(sample_I, torch.tensor(list(skipped), dtype=torch.int64))] = 0
        return Samples(ids_B, epoch, latents_ICYX, images.labels_B, skipped, images.captions, images.segments)

    def moments(self, images: ImageFiles, mirrored_B: Tensor) -> tuple[dict[str, Tensor], dict[int, str]]:
        """As of `Encoding.moments`, of images or of the mirror images of those of some samples, one behind another.

        Also, by place, why a sample is skipped. UserError where an image is bad and `data.on_bad_image` is "stop".
        """
        files, sizes = images.files(), images.sizes()
        sample_I, _ = place_images(len(images.ids_B), images.segments)
        of_samples = [
            f"data.shards: {self._addresses[folder]}: image of id {id}" for folder, id in split_ids(images.ids_B)
        ]
        names, mirrored_I = [of_samples[sample] for sample in sample_I.tolist()], mirrored_B[sample_I]
        crops_I4 = None
        if self._encoding.has_random_crops:
            crops_I4 = self._draws.crops(images.epoch, images.ids_B)[sample_I]
        skipped: dict[int, str] = {}
        moments: list[dict[str, Tensor]] = []
        for begin in range(0, len(files), self._encoding.batch_size):
            end = begin + self._encoding.batch_size
            crops = None if crops_I4 is None else crops_I4[begin:end]
            pixels_BYXC, reasons = self._decoder(files[begin:end], sizes[begin:end], crops)
            bad = {begin + place: f"{names[begin + place]}: {reason}" for place, reason in reasons.items()}
            if bad and self._on_bad_image == "stop":
                raise UserError(f"{next(iter(bad.values()))}; or set data.on_bad_image=skip")
            skipped |= {int(sample_I[place]): reason for place, reason in bad.items()}
            found = self._encoding.moments(pixels_BYXC, mirrored_I[begin:end], names[begin:end])
            moments.append({name: torch.from_numpy(values) for name, values in found.items()})
        return {name: torch.cat([part[name] for part in moments]) for name in moments[0]}, skipped


class EncodingReader(Generic[T]):
    """Reads requests of image shards in order; a thread encodes and prepares them, ahead of who reads.

    Args:
        data: folders of images.
        config: its sections `data` and `run`.
        prepare: makes a micro-batch of its samples.
        requests: as of `Reader`.
        depth: micro-batches made and not read, at most; one more is in the making.
        device: where images are decoded and encoded. On a GPU that is done on a stream of its own, and what is made is
            put into pinned memory.
    """

    def __init__(
        self,
        data: TrainingData,
        config: Config,
        prepare: Prepare[T],
        requests: Iterator[Request],
        depth: int,
        device: torch.device,
    ) -> None:
        self._budget, self._device, self._prepare = data.cache.budget, device, prepare
        # First, since it forks processes, in which DALI's threads and this one's would be missing.
        self._files = Reader(
            MicroBatches(data.folders, ImageFiles.of), requests, config.data.num_workers, False, self._budget
        )
        self._encoder = OnlineEncoder(data.encodings, config)
        self._made: queue.Queue[T] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._task = Task(self._work, "images")

    def read(self) -> T:
        """The next micro-batch; errors as of `Reader` and `OnlineEncoder`."""
        while True:
            has_ended = not self._task.is_alive()
            try:
                return self._made.get(timeout=0.0 if has_ended else _POLL_SECONDS)
            except queue.Empty:
                if has_ended:
                    assert self._task.error is not None
                    raise self._task.error from None
                self._budget.check()

    def close(self) -> None:
        """Ends the thread, once what it is encoding is done or takes too long, and the workers."""
        self._is_closed.set()
        with suppress(queue.Empty):
            self._made.get_nowait()  # the thread may wait for room
        self._task.join(_CLOSE_SECONDS)
        self._files.close()

    def kill(self) -> None:
        """Ends the thread, and kills the workers."""
        self._is_closed.set()
        self._files.kill()
        self._task.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        torch.set_num_threads(1)  # here and in later threads: how many share a batch decides the bits of its latents
        on_gpu = self._device.type == "cuda"
        stream = torch.cuda.Stream(self._device) if on_gpu else None
        with (
            torch.cuda.device(self._device) if on_gpu else nullcontext(),
            torch.cuda.stream(stream),
            deterministic_convolutions(),
        ):
            while not self._is_closed.is_set():
                made = self._make()
                while not self._is_closed.is_set():
                    with suppress(queue.Full):
                        self._made.put(made, timeout=_POLL_SECONDS)
                        break

    def _make(self) -> T:
        images = self._files.read()
        made: Any = self._prepare(self._encoder(images), images.step)
        result: T = made.pin_memory() if self._device.type == "cuda" else made
        return result

"""Times the steps of the data plane beside the plain way.

    python tools/measure.py data make_shards
    python tools/measure.py data encode
    python tools/measure.py data loader --latents kl16
    python tools/measure.py data ready --latents kl16
    python tools/measure.py data images

make_shards: tools/make_shards.py against a loop in one process. encode: tools/encode_latents.py against PIL in a
DataLoader. loader: the training loader against a shuffling DataLoader over the shards. ready: the training thread's
time for a batch that workers made ready, or not. images: the training loader from image shards against latent shards of
the same images, and decoding and encoding alone. Sides run in one process and take turns (a b, b a, ...); what is
compared are their medians. Images are made at the start out of the photos that scikit-learn and scikit-image ship.
"""

import argparse
import functools
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import runtime
from cfpretrain.base.command_line import check_range
from cfpretrain.base.config import Config, DataConfig, ModelConfig, TrainConfig
from cfpretrain.base.console import phase
from cfpretrain.data.image_shards import write_image_shards
from cfpretrain.data.images import PNG_LEVEL, ImageFormat
from cfpretrain.data.latent_shards import Encoding
from cfpretrain.data.listing import list_images
from cfpretrain.data.loader import Loader
from cfpretrain.data.shards import Shards
from cfpretrain.run.build import make_prepare
from tools.measuring.common import alternate, on_noise, print_rates
from tools.measuring.images import images, write_latents
from tools.measuring.photos import photo_shards, write_autoencoder, write_photos

# What the options that are left out mean.
_DEFAULTS: dict[str, dict[str, int]] = {
    "make_shards": {"images": 800},
    "encode": {"images": 96, "batch_size": 16},
    "loader": {"samples": 4096, "batch_size": 32, "workers": len(os.sched_getaffinity(0))},
    "ready": {"samples": 1024, "batch_size": 64, "workers": 1},
    "images": {"images": 96, "batch_size": 32, "workers": len(os.sched_getaffinity(0))},
}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One of five."""
    for name, value in _DEFAULTS[arguments.what].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    run = {"make_shards": make_shards, "encode": encode_latents, "loader": loader, "ready": ready, "images": images}
    return {"measured": arguments.what, **run[arguments.what](arguments)}


def _alternate_writing(
    sides: dict[str, Callable[[Path], None]], arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """`alternate` of two ways to write all images to a folder, which is a new one below `folder` each time."""

    def rate(write: Callable[[Path], None]) -> float:
        out = Path(tempfile.mkdtemp(dir=folder)) / "out"
        begin = time.perf_counter()
        write(out)
        return arguments.images / (time.perf_counter() - begin)

    rates = {name: functools.partial(rate, write) for name, write in sides.items()}
    return print_rates(alternate(rates, arguments.pairs, "images/s"), "images/s")


# ---------------------------------------------------------------------------------------------------------------------
# make_shards


def make_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of tools/make_shards.py, without its start, against `plain_shards`."""
    num_workers = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        with phase(f"writing {arguments.images} photos"):
            photos = write_photos(Path(temporary) / "photos", arguments.images)
        listing = list_images(photos)

        def ours(out: Path) -> None:
            # So small that all workers have something to do to the end, as they have with a large set.
            per_shard = max(1, arguments.images // (8 * num_workers))
            how = ImageFormat(arguments.store, arguments.size)
            write_image_shards([(listing, out)], how, "photos", per_shard, num_workers)

        plain = functools.partial(plain_shards, photos, size=arguments.size, store=arguments.store)
        return _alternate_writing({"make_shards": ours, "plain loop": plain}, arguments, Path(temporary))


def plain_shards(photos: Path, out: Path, size: int, store: str) -> None:
    """Shards of a folder of class folders as one would first write them: one loop, nothing noted on the way."""
    from streaming import MDSWriter

    columns = {"id": "int64", "label": "int32", "caption": "str", "image": "bytes"}
    with MDSWriter(columns=columns, out=str(out), hashes=["blake2b"]) as writer:
        paths = sorted(photos.glob("*/*.jpg"))
        names = sorted({path.parent.name for path in paths})
        for id, path in enumerate(paths):
            data = path.read_bytes()
            image = Image.open(io.BytesIO(data)).convert("RGB")
            if store == "lossless":
                while min(image.size) >= 2 * size:
                    image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
                scale = size / min(image.size)
                sides = round(image.width * scale), round(image.height * scale)
                image = image.resize(sides, Image.Resampling.BICUBIC)
                left, top = (image.width - size) // 2, (image.height - size) // 2
                buffer = io.BytesIO()
                cut = image.crop((left, top, left + size, top + size))
                cut.save(buffer, "PNG", compress_level=PNG_LEVEL)  # both compress alike
                data = buffer.getvalue()
            writer.write({"id": id, "label": names.index(path.parent.name), "caption": "", "image": data})


# ---------------------------------------------------------------------------------------------------------------------
# encode


def encode_latents(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of what tools/encode_latents.py does, without its start, against `plain_latents`."""
    num_threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with phase(f"making shards of {arguments.images} photos"):
            where = photo_shards(folder / "images", arguments.images, arguments.size, "lossless")
        device, dtype = runtime.pick_device(), {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
        given = arguments.autoencoder or write_autoencoder(folder / "autoencoder", arguments.layout)
        autoencoder = KLAutoencoder.load(given, device, dtype, key="--autoencoder")
        images = Shards(where, "images")
        encoding = Encoding(images, autoencoder, device, arguments.precision, arguments.batch_size, with_mirror=True)

        ours = functools.partial(write_latents, encoding, num_threads)
        plain = functools.partial(plain_latents, images, autoencoder, device, arguments.batch_size, num_threads)
        return _alternate_writing({"encode_latents": ours, "plain loop": plain}, arguments, folder)


def plain_latents(images: Any, autoencoder: Any, device: Any, batch_size: int, num_threads: int, out: Path) -> None:
    """Latent shards as one would first write them: PIL in the workers of a DataLoader, one encoding loop."""
    from streaming import MDSWriter

    torch.set_num_threads(num_threads)
    size = images.info.image_size
    array = "ndarray:float16:" + ",".join(map(str, autoencoder.latent_shape((3, size, size))))
    names = ("mean", "log_variance", "mirror_mean", "mirror_log_variance")
    columns = {"id": "int64", "label": "int32", "caption": "str", **dict.fromkeys(names, array)}

    def decode(index: int) -> tuple[int, int, str, torch.Tensor]:
        sample = images.sample(index)
        pixels_YXC = np.array(Image.open(io.BytesIO(sample["image"])))
        pixels_CYX = torch.from_numpy(pixels_YXC).permute(2, 0, 1).float() / 255
        return sample["id"], sample["label"], sample["caption"], pixels_CYX

    batches = _batches(len(images), decode, batch_size, num_workers=num_threads)
    with MDSWriter(columns=columns, out=str(out), hashes=["blake2b"]) as writer:
        for ids, labels, captions, images_BCYX in batches:
            images_BCYX = images_BCYX.to(device)
            moments = [*autoencoder.encode(images_BCYX), *autoencoder.encode(images_BCYX.flip(-1))]
            arrays = [values.to(torch.float16).cpu().numpy() for values in moments]
            for i in range(len(ids)):
                sample = {"id": int(ids[i]), "label": int(labels[i]), "caption": captions[i]}
                writer.write(sample | {name: values[i] for name, values in zip(names, arrays, strict=True)})


# ---------------------------------------------------------------------------------------------------------------------
# loader

# Shape; whether there are mirrored moments; latents a second that training takes from one machine.
_LATENTS = {
    "kl16": ((16, 16, 16), True, 8 * 250),  # 8 GPUs that train XL
    "demo": ((4, 4, 4), False, 700),  # 2 CPU cores
}


def loader(arguments: argparse.Namespace) -> dict[str, Any]:
    """Latents per second of the training loader, drawn from their posteriors, against `plain_loader`."""
    needed, batch_size, num_workers = _LATENTS[arguments.latents][2], arguments.batch_size, arguments.workers
    num_batches = 2 * arguments.samples // batch_size  # two epochs: the turn counts
    cpu_seconds: list[float] = []  # for one latent
    with tempfile.TemporaryDirectory() as temporary:
        config = _run_on_noise(arguments, num_workers, Path(temporary))

        def timed(batches: Any) -> float:
            for _ in range(num_workers + 1):  # the processes are up
                next(batches)
            begin = time.perf_counter()
            for _ in range(num_batches):
                next(batches)
            return num_batches * batch_size / (time.perf_counter() - begin)

        def ours() -> float:
            begin = sum(os.times()[:4])  # of this process and of those that it has ended
            with closing(Loader(config, lambda samples, step: samples, 0, 1)) as batches:
                rate = timed(batches)
            cpu_seconds.append((sum(os.times()[:4]) - begin) / (num_batches * batch_size))
            return rate

        def plain() -> float:
            return timed(plain_loader(Path(config.data.shards[0]), batch_size, num_workers))

        measured = print_rates(
            alternate({"loader": ours, "DataLoader": plain}, arguments.pairs, "latents/s"), "latents/s"
        )
    num_busy = needed * statistics.median(cpu_seconds)
    print(f"{'needed':28}{needed:10.2f} latents/s, which keep {num_busy:.2f} cores busy")
    settings = {"latents": arguments.latents, "num_workers": num_workers}
    return {**measured, **settings, "needed": needed, "cores_busy": num_busy}


_MICRO_BATCHES_TIMED = 10
_PAUSE_SECONDS = 0.5  # in which a device would compute, and workers read ahead


def _run_on_noise(arguments: argparse.Namespace, num_workers: int, folder: Path) -> Config:
    """The config of a run with the loader's options, and its latents, of noise."""
    (channels, size, _), has_mirror, _ = _LATENTS[arguments.latents]
    config = Config(
        model=ModelConfig(latent_size=size, latent_channels=channels, num_classes=2),
        data=DataConfig(latent_scale=(1.0,), mirror_prob=has_mirror / 2, num_workers=num_workers),
        train=TrainConfig(global_batch_size=arguments.batch_size, micro_batch_size=arguments.batch_size),
    )
    with phase(f"writing {arguments.samples} latents"):
        return on_noise(config, folder, arguments.samples)


def ready(arguments: argparse.Namespace) -> dict[str, Any]:
    """CPU milliseconds of the training thread for a micro-batch, made by workers and made in that thread."""
    check_range("--workers", arguments.workers, 1)
    check_range("--batch-size", arguments.batch_size, 1, arguments.samples)

    def milliseconds(num_workers: int) -> float:
        spent = []
        with tempfile.TemporaryDirectory() as folder:
            config = _run_on_noise(arguments, num_workers, Path(folder))
            with closing(Loader(config, make_prepare(config), 0, 1)) as loader:
                next(loader)
                for _ in range(_MICRO_BATCHES_TIMED):
                    time.sleep(_PAUSE_SECONDS)
                    begin = time.thread_time()
                    next(loader)
                    spent.append(1e3 * (time.thread_time() - begin))
        return statistics.median(spent)

    workers = {"made ready by workers": arguments.workers, "made in the training thread": 0}
    sides = {name: functools.partial(milliseconds, count) for name, count in workers.items()}
    spent = alternate(sides, arguments.pairs, "ms", num_warm_up=0)
    print_rates(spent, f"ms of the training thread a micro-batch of {arguments.batch_size}")
    return {"unit": "ms", "spent": spent, "latents": arguments.latents, "batch_size": arguments.batch_size}


def plain_loader(folder: Path, batch_size: int, num_workers: int) -> Iterator[Any]:
    """Batches as one would first make them: torch's shuffle and torch's noise; neither goes on after a stop."""
    from streaming import LocalDataset  # whole, which takes seconds

    samples = LocalDataset(str(folder))

    def draw(index: int) -> tuple[int, torch.Tensor, int]:
        """A sample of the posterior of a latent, or of its mirror."""
        sample = samples[index]
        prefix = "mirror_" if "mirror_mean" in sample and torch.rand(()) < 0.5 else ""
        names = (f"{prefix}mean", f"{prefix}log_variance")
        mean_CYX, log_variance_CYX = (torch.from_numpy(sample[name].astype("float32")) for name in names)
        latent_CYX = mean_CYX + (0.5 * log_variance_CYX).exp() * torch.randn_like(mean_CYX)
        return int(sample["id"]), latent_CYX, int(sample["label"])

    batches = _batches(len(samples), draw, batch_size, num_workers=num_workers, shuffle=True, drop_last=True)
    while True:
        yield from batches


def _batches(num_samples: int, make: Callable[[int], Any], batch_size: int, **how: Any) -> DataLoader[Any]:
    """Batches of what `make` makes of the places of samples, in the workers."""
    how |= {"multiprocessing_context": "fork"} if how.get("num_workers") else {}  # which takes any function along
    return DataLoader(
        range(num_samples), batch_size, collate_fn=lambda places: default_collate(list(map(make, places))), **how
    )

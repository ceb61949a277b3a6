"""What training from image shards costs beside latent shards of the same images: tools/measure.py data images."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cfpretrain.autoencoder import deterministic_convolutions
from cfpretrain.base import runtime
from cfpretrain.base.command_line import check_range
from cfpretrain.base.config import Config, DataConfig, EngineConfig, ModelConfig, TrainConfig
from cfpretrain.base.console import UserError, phase
from cfpretrain.data.images import declared_size
from cfpretrain.data.interleaved import refuse_interleaved
from cfpretrain.data.latent_shards import Encoding, encode
from cfpretrain.data.loader import Loader
from cfpretrain.data.online import TrainingData, open_training_data
from cfpretrain.data.pixels import Decoder
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.run.build import make_prepare
from cfpretrain.training.encoding_cost import encoding_cost
from tools.measuring.common import alternate, print_rates
from tools.measuring.photos import photo_shards, write_autoencoder


def images(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of the loader, from image shards and from latent shards, and of decoding and encoding alone.

    The loader's batches are those of a training step, drawn and made ready. Decoding alone has the files in memory;
    encoding alone has the pixels on the device, and one thread where that is the CPU, as in training.
    """
    device, batch_size = runtime.pick_device(), arguments.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config, data = _open(arguments, folder, device)
        encoding, num_batches = data.encodings[0], arguments.images // batch_size
        check_range("--batch-size", batch_size, 1, len(encoding.images))
        check_range("--images", arguments.images, batch_size)
        with phase(f"encoding {len(encoding.images)} images"):
            write_latents(encoding, runtime.num_cores(), folder / "latents")
        latents = replace(config, data=replace(config.data, shards=(str(folder / "latents"),), autoencoder=""))
        decode, encode_alone = _alone(encoding, num_batches)
        sides = {
            "loader, from images": lambda: _loader_rate(config, num_batches, device, data),
            "loader, from latents": lambda: _loader_rate(latents, num_batches, device),
            "decoding alone": decode,
            "encoding alone": encode_alone,
        }
        measured = print_rates(alternate(sides, arguments.pairs, "images/s"), "images/s")
        flops = encoding_cost(config, device.type == "cuda").flops
    rate = flops * statistics.median(measured["rates"]["encoding alone"])
    how = f"{encoding.precision}, {batch_size} at once"
    print(f"encoding, in {how}: {flops:.3e} FLOPs an image; alone {rate / 1e12:.3g} TFLOP/s")
    info, settings = encoding.info, {"batch_size": batch_size, "num_workers": arguments.workers}
    described = {"store": info.store, "image_size": info.image_size, "latent_shape": encoding.latent_shape}
    return {**measured, **settings, **described, "precision": encoding.precision, "encoding_flops": flops}


def write_latents(encoding: Encoding, num_threads: int, out: Path) -> None:
    """What tools/encode_latents.py does, without its start."""
    writer, num_shards = ShardWriter(out, encoding.columns, encoding.plan()), len(encoding.images.shard_sizes)
    writer.begin()
    encode(encoding, writer, range(num_shards), num_threads, lambda num_images: None)
    writer.finish(encoding.describe(writer.records(num_shards)), num_shards)


def _open(arguments: argparse.Namespace, folder: Path, device: torch.device) -> tuple[Config, TrainingData]:
    """The config of a run on the image shards, and they and the autoencoder, which are made where none are given."""
    shards = arguments.shards
    if shards is None:
        with phase(f"making shards of {arguments.images} photos"):
            shards = photo_shards(folder / "images", arguments.images, arguments.size, arguments.store)
    autoencoder = arguments.autoencoder or write_autoencoder(folder / "autoencoder", arguments.layout)
    data = DataConfig(
        shards=(str(shards),),
        autoencoder=str(autoencoder),
        mirror_prob=0.0 if arguments.no_mirror else 0.5,
        encode_batch_size=arguments.batch_size,
        num_workers=arguments.workers,
    )
    train = TrainConfig(global_batch_size=arguments.batch_size, micro_batch_size=arguments.batch_size)
    config = Config(data=data, train=train, engine=EngineConfig(precision=arguments.precision))
    opened = open_training_data(config, device)
    if not opened.encodings:
        raise UserError(f"--shards: expected image shards, got latents in {shards}; give the images they were made of")
    info = opened.latents[0]
    refuse_interleaved(info.most_segments, f"--shards: {shards}")
    channels, size, _ = info.latent_shape
    model = ModelConfig(latent_size=size, latent_channels=channels, num_classes=len(info.class_names))
    data = replace(data, latent_shift=info.latent_shift, latent_scale=info.latent_scale)
    return replace(config, model=model, data=data), opened


def _loader_rate(config: Config, num_batches: int, device: torch.device, data: TrainingData | None = None) -> float:
    """Of batches as a step takes them, one right after the other."""
    with closing(Loader(config, make_prepare(config), 0, 1, device=device, data=data)) as loader:
        for _ in range(config.data.num_workers + 2):  # processes are up, and what is read ahead is there
            next(loader)
        return _rate(lambda place: next(loader), num_batches, config.train.global_batch_size)


def _alone(encoding: Encoding, num_batches: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """What measures decoding, and what encoding, each alone."""
    batch_size, device = encoding.batch_size, encoding.device
    places = [
        [n % len(encoding.images) for n in range(at * batch_size, (at + 1) * batch_size)] for at in range(num_batches)
    ]
    files = [[sample["image"] for sample in encoding.images.samples(one)] for one in places]
    sizes = [list(map(declared_size, of_batch)) for of_batch in files]
    decoder = Decoder(encoding.info, batch_size, device, runtime.num_cores())
    pixels_BYXC, mirrored_B = decoder(files[0], sizes[0])[0], torch.zeros(batch_size, dtype=torch.bool)
    names = [""] * batch_size

    def decode() -> float:
        return _rate(lambda place: decoder(files[place], sizes[place]), num_batches, batch_size)

    def encode_alone() -> float:
        return _rate(lambda place: encoding.moments(pixels_BYXC, mirrored_B, names), num_batches, batch_size)

    def in_one_thread() -> float:
        with (
            deterministic_convolutions(),
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as threads,
        ):
            return threads.submit(encode_alone).result()

    return decode, in_one_thread


def _rate(make: Callable[[int], Any], num_batches: int, batch_size: int) -> float:
    """Images per second of batches, each of which is there when `make` returns."""
    begin = time.perf_counter()
    for place in range(num_batches):
        make(place)
    return num_batches * batch_size / (time.perf_counter() - begin)

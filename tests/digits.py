"""Small shards of real digits and small configs for tests of whole runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from cfpretrain.base import config as configs
from cfpretrain.base.config import Config
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import LatentsInfo, columns_of
from tests.processes import REPOSITORY


def write_latents(
    folder: Path,
    info: LatentsInfo,
    samples: Iterable[tuple[Any, ...]],
    samples_per_shard: int = 1000,
    captions: Mapping[int, str] = MappingProxyType({}),
) -> Path:
    """Latent shards of (id, label, mean, the other arrays of `columns_of(info)` in the order of their names).

    `captions` are by id; who lacks one has an empty one.
    """
    columns = columns_of(info)
    arrays = ["mean", *sorted(columns.keys() - {"id", "label", "caption", "checksum", "mean"})]
    all_samples = [
        {"id": sample[0], "label": sample[1], "caption": captions.get(sample[0], "")}
        | {name: np.asarray(array, np.float16) for name, array in zip(arrays, sample[2:], strict=True)}
        for sample in samples
    ]
    writer = ShardWriter(folder, columns, {"made": "by a test"})
    writer.begin()
    num_shards = -(-len(all_samples) // samples_per_shard)
    for number in range(num_shards):
        writer.write(number, all_samples[number * samples_per_shard : (number + 1) * samples_per_shard])
    writer.finish(info, num_shards)
    return folder


def digits_info(num_samples: int) -> LatentsInfo:
    """The description of scikit-learn's 8x8 digits as latents."""
    return LatentsInfo(
        autoencoder="identity",
        latent_shape=(1, 8, 8),
        latent_shift=(0.5,),
        latent_scale=(2.0,),
        class_names=tuple(map(str, range(10))),
        num_samples=num_samples,
        source="scikit-learn load_digits",
        image_size=8,
        crop="adm",
    )


def digits(num_samples: int) -> list[tuple[int, int, NDArray[np.float64]]]:
    """The first of scikit-learn's 8x8 digits: id, label, pixels [1, 8, 8] in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    return [(i, int(labels[i]), pixels[i].reshape(1, 8, 8) / 16) for i in range(num_samples)]


def write_digits(folder: Path, num_samples: int = 100) -> Path:
    """The first real digits as latent shards."""
    return write_latents(folder, digits_info(num_samples), digits(num_samples))


def small_run(shards: Path, folder: Path, *overrides: str) -> list[str]:
    """Arguments of `cfpretrain/train.py` for a run of seconds: the tiny preset made tinier."""
    return [
        "--config",
        str(REPOSITORY / "configs" / "tiny.yaml"),
        f"run.folder={folder}",
        f"data.shards={shards}",
        "model.width=32",
        "model.depth=2",
        "model.num_heads=2",
        "train.global_batch_size=16",
        "train.micro_batch_size=4",
        "train.num_steps=12",
        "train.max_train_seconds=0",
        "train.learning_rate=1e-3",
        "train.warmup_steps=4",
        "train.decay_steps=3",
        "checkpoint.every_steps=4",
        "sample.every_steps=0",
        "sample.num_per_class=1",
        "sample.num_denoising_steps=2",
        "sample.num_ar_steps=[1,2]",
        "metrics.log_every_steps=1",
        "metrics.wandb=disabled",
        *overrides,
    ]


def small_config(shards: Path, folder: Path, *overrides: str) -> Config:
    """The same as a config."""
    _, path, *rest = small_run(shards, folder, *overrides)
    return configs.load(path, rest)

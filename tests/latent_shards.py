"""Small folders of latent shards whose numbers follow from the samples' ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cfpretrain.base.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from cfpretrain.data.samples import Samples
from cfpretrain.data.shards import LatentsInfo, Shards, columns_of
from tests.digits import write_latents

SHAPE = (2, 4, 4)
MOMENTS = ("mean", "log_variance", "mirror_mean", "mirror_log_variance")


def as_read(samples: Samples, step: int) -> Samples:
    """Prepares nothing: for loaders whose samples themselves are looked at."""
    return samples


def id_of(place: int) -> int:
    """The id of the sample at a place of a folder."""
    return 1000 + 3 * place


def moment_of(sample_id: int, name: str = "mean", shape: Sequence[int] = SHAPE) -> np.ndarray:
    """A column of the sample."""
    return np.random.default_rng([sample_id, MOMENTS.index(name)]).standard_normal(shape).astype(np.float16)


def write_samples(
    folder: Path,
    num_samples: int,
    samples_per_shard: int = 20,
    shape: tuple[int, int, int] = SHAPE,
    has_posterior: bool = False,
    has_mirror: bool = False,
    **description: Any,
) -> Path:
    """A folder of latent shards of three classes."""
    info = LatentsInfo(
        **{
            "autoencoder": "0123456789abcdef" if has_posterior else "identity",
            "latent_shape": shape,
            "latent_shift": (0.0,) * shape[0],
            "latent_scale": (1.0,) * shape[0],
            "class_names": ("a", "b", "c"),
            "num_samples": num_samples,
            "source": "test",
            "has_posterior": has_posterior,
            "has_mirror": has_mirror,
            **description,
        }
    )
    others = sorted(columns_of(info).keys() & set(MOMENTS) - {"mean"})
    samples = [
        (id_of(place), place % 3, *(moment_of(id_of(place), name, shape) for name in ("mean", *others)))
        for place in range(num_samples)
    ]
    return write_latents(folder, info, samples, samples_per_shard)


def columns_in(folder: Path) -> dict[str, torch.Tensor]:
    """The ids, labels and arrays of a folder, each of all samples, arrays as float32."""
    shards = Shards(folder)
    samples = shards.samples(range(len(shards)))
    names = samples[0].keys() - {"caption", "checksum"}
    columns = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in names}
    return {name: column.float() if column.dtype == torch.float16 else column for name, column in columns.items()}


def config_for(
    folders: Path | str | Sequence[Path | str],
    global_batch_size: int = 24,
    micro_batch_size: int = 6,
    num_canonical_nodes: int = 1,
    num_workers: int = 0,
    mirror_prob: float = 0.0,
    seed: int = 5,
    shape: tuple[int, int, int] = SHAPE,
    **data: Any,
) -> Config:
    """A config that fits such folders; `data` are further values of its section data."""
    addresses = [folders] if isinstance(folders, Path | str) else folders
    settings = {
        "shards": tuple(map(str, addresses)),
        "latent_scale": (1.0,),
        "mirror_prob": mirror_prob,
        "num_workers": num_workers,
        "num_canonical_nodes": num_canonical_nodes,
        "shuffle_block_size": 64,
        **data,
    }
    return Config(
        run=RunConfig(seed=seed),
        model=ModelConfig(latent_size=shape[1], latent_channels=shape[0], num_classes=3),
        data=DataConfig(**settings),
        train=TrainConfig(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
    )

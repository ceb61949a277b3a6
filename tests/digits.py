"""Small shards of real digits and small configs for tests of whole runs."""

from pathlib import Path

from sklearn.datasets import load_digits

from cfpretrain import config as configs
from cfpretrain.config import Config
from cfpretrain.data.shards import ShardInfo, write_shards
from tests.processes import REPOSITORY


def write_digits(folder: Path, num_samples: int = 100) -> Path:
    """The first real digits as shards, as the demo writes them."""
    pixels, labels = load_digits(return_X_y=True)
    info = ShardInfo(
        autoencoder="identity",
        latent_shape=(1, 8, 8),
        latent_shift=(0.5,),
        latent_scale=(2.0,),
        class_names=tuple(map(str, range(10))),
        num_samples=num_samples,
        source="scikit-learn load_digits",
    )
    samples = ((i, pixels[i].reshape(1, 8, 8) / 16, int(labels[i])) for i in range(num_samples))
    assert write_shards(folder, info, samples)
    return folder


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

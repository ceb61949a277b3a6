"""Photos, image shards of them, and autoencoders with random weights, for measurements that download nothing."""

import dataclasses
import os
import random
import tempfile
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from cfpretrain.autoencoder import KLAutoencoder, make_network, write_folder
from cfpretrain.base import files
from cfpretrain.base.config import Config
from cfpretrain.base.console import phase
from cfpretrain.data.image_shards import write_image_shards
from cfpretrain.data.images import ImageFormat
from cfpretrain.data.listing import list_images
from tools.measuring.common import confined

_PHOTO_SIDES = (300, 640)  # pixels, as those of ImageNet mostly are
_PHOTO_QUALITY = 90
_NUM_CLASSES = 4
_FEWEST_PHOTOS = 64

LAYOUTS = {
    # So small that decoding counts beside it.
    "small": {
        "block_out_channels": [8, 16, 32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
    },
    # MAR's KL-16.
    "kl16": {
        "block_out_channels": [128, 128, 256, 256, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"] * 5,
        "latent_channels": 16,
        "layers_per_block": 2,
    },
}


def write_photos(folder: Path, num_photos: int) -> Path:
    """JPEG files of varied size, cut out of real photos of installed packages and scaled, in class folders."""
    rng = random.Random(0)
    packages = {"sklearn": "datasets/images", "skimage": "data"}  # the two photos of the first are enough
    folders = [Path(spec.origin).parent / place for name, place in packages.items() if (spec := find_spec(name))]
    sources = [Image.open(path).convert("RGB") for place in folders for path in sorted(place.glob("*.jp*g"))]
    for i in range(num_photos):
        photo = sources[i % len(sources)]
        share = rng.uniform(0.6, 1.0)
        width, height = int(photo.width * share), int(photo.height * share)
        left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
        sides = (rng.randint(*_PHOTO_SIDES), rng.randint(*_PHOTO_SIDES))
        path = folder / f"class{i % _NUM_CLASSES}" / f"{i:05d}.jpg"
        files.make_folder(path.parent)
        cut = photo.crop((left, top, left + width, top + height)).resize(sides, Image.Resampling.BICUBIC)
        with files.create(path) as opened:
            cut.save(opened, "JPEG", quality=_PHOTO_QUALITY)
    return folder


def photo_shards(folder: Path, num_photos: int, size: int, store: str) -> Path:
    """Image shards of new photos, RGB; returns their folder. `size` and `store` are those of tools/make_shards.py."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        listing = list_images(write_photos(Path(temporary) / "photos", num_photos))
        per_shard, num_workers = max(1, num_photos // 4), len(os.sched_getaffinity(0))
        write_image_shards([(listing, folder)], ImageFormat(store, size), "photos", per_shard, num_workers)
    return folder


def write_autoencoder(folder: Path, layout: str) -> Path:
    """An autoencoder of one of `LAYOUTS` with random weights; returns its folder."""
    write_folder(folder, make_network(LAYOUTS[layout], layout))
    return folder


def on_photos(config: Config, folder: Path, layout: str) -> Config:
    """Writes JPEG photos as image shards, and an autoencoder with random weights; returns the config of a run on them.

    The photos have four classes, and as many pixels as make the config's latents.

    Args:
        config: of a run.
        folder: gets the shards, the autoencoder and the run folder.
        layout: of the autoencoder: one of `LAYOUTS`.
    """
    autoencoder = KLAutoencoder.load(write_autoencoder(folder / "autoencoder", layout), "cpu")
    num_photos = max(2 * config.train.global_batch_size, _FEWEST_PHOTOS)
    with phase(f"writing {num_photos} photos"):
        size = config.model.latent_size * autoencoder.stride
        shards = photo_shards(folder / "images", num_photos, size, "original")
    config = confined(config, folder, shards, str(folder / "autoencoder"))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_classes=_NUM_CLASSES),
        data=dataclasses.replace(config.data, latent_shift=autoencoder.shift, latent_scale=autoencoder.scale),
    )

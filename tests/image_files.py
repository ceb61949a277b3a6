"""Small images as files, shards and archives."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import ImagesInfo, image_columns


def digits(first: int, num: int, size: int = 8) -> np.ndarray:
    """Some of scikit-learn's digits, uint8 [num, size, size, 3]."""
    small = (load_digits().images[first : first + num] * 15.9).astype(np.uint8)
    large = small.repeat(size // 8, 1).repeat(size // 8, 2)
    return np.repeat(large[..., None], 3, -1)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    """PNG files in class folders that say nothing."""
    (folder / "all").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / "all" / f"{i:05d}.png")
    return folder


def pixels(path: Path) -> np.ndarray:
    """Those of a file."""
    with Image.open(path) as image:
        return np.asarray(image)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def write_images(
    folder: Path,
    shards: Sequence[Sequence[bytes]],
    size: int,
    *,
    ids: Sequence[int] = (),
    labels: Sequence[int] = (),
    files: Mapping[str, str] | None = None,
    **description: Any,
) -> Path:
    """Image shards of these files.

    Args:
        folder: of the shards.
        shards: the files of each.
        size: of an image, in pixels a side.
        ids: of the images; by default with gaps, as where images were rejected.
        labels: of the images; by default of two classes in turn.
        files: others of the folder, with their texts.
        description: what `ImagesInfo` says besides.
    """
    writer = ShardWriter(folder, image_columns(), {"made": "by a test"})
    writer.begin()
    num_samples = sum(map(len, shards))
    places = zip(ids or range(0, 3 * num_samples, 3), labels or [n % 2 for n in range(num_samples)], strict=True)
    rows = ({"id": i, "label": label, "caption": f"image {i}"} for i, label in places)
    for number, images in enumerate(shards):
        writer.write(number, [next(rows) | {"image": image} for image in images])
    given = {
        "class_names": ("a", "b"),
        "num_rejected": 0,
        "store": "lossless",
        "channels": 3,
        "source": "a test",
        **description,
    }
    writer.finish(ImagesInfo(num_samples=num_samples, image_size=size, **given), len(shards), files)
    return folder


def write_digits(folder: Path, first: int, num: int, size: int = 8) -> Path:
    """Grey digits as image shards, as the demo's."""
    ids = range(first, first + num)
    labels = load_digits().target[ids].tolist()
    images = [encoded(image[..., 0]) for image in digits(first, num, size)]
    return write_images(folder, [images], size, ids=ids, labels=labels, class_names=tuple("0123456789"), channels=1)

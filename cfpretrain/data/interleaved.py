"""Interleaved samples: texts and images in an order, as a list in JSON.

    in a table    ["a cat", {"image": "cat.png"}, "and a dog", {"image": "dogs/1.png"}]
    in a shard    ["a cat", {"image": 0}, "and a dog", {"image": 1}]

An image of a shard is named by its number among those of its sample, which come in order. A text may be empty: the end
of each says whether an image follows or the sample ends, which a model learns. Two texts do not stand side by side.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfpretrain.base.console import UserError
from cfpretrain.base.files import parse_json

# Of a sample; as the list in a shard.
MOST_IMAGES, _MOST_CHARACTERS = 64, 2**20

_UNFIT = re.compile("[\ud800-\udfff]")  # characters that cannot be written as UTF-8

# A sample's texts, and None for each image.
Segments = tuple[str | None, ...]


def parse_column(text: str) -> Segments:
    """The segments in the column of a shard; ValueError where it holds none, or its images are not 0, 1, 2, ..."""
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"expected at most {_MOST_CHARACTERS} characters of segments, got {len(text)}")
    segments, numbers = take_apart(parse_json(text, tuple))
    for number, got in enumerate(numbers):
        if type(got) is not int or got != number:
            raise ValueError(f'expected {{"image": {number}}} as the next image, got {got!r:.40}')
    return segments


def column_of(segments: Segments) -> str:
    """The inverse of `parse_column`; ValueError where it would be too long."""
    numbers = iter(range(len(segments)))
    text = json.dumps([{"image": next(numbers)} if one is None else one for one in segments], ensure_ascii=False)
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"expected at most {_MOST_CHARACTERS} characters of segments, got {len(text)}")
    return text


def take_apart(value: Any) -> tuple[Segments, list[Any]]:
    """The segments in a list from JSON, whose objects are tuples of pairs, and what names the images.

    ValueError where it is no such list, has no image or too many, or texts stand side by side.
    """
    if not isinstance(value, list):
        raise ValueError(f"expected a list of texts and images, got {_shown(value)!r:.40}")
    segments: list[str | None] = []
    names: list[Any] = []
    for one in value:
        if isinstance(one, str):
            if _UNFIT.search(one):
                raise ValueError(f"expected texts in UTF-8, got {one!r:.40}")
            if segments and segments[-1] is not None:
                raise ValueError(f"expected an image between two texts, got {segments[-1]!r:.40} and {one!r:.40}")
            segments.append(one)
        elif isinstance(one, tuple) and [name for name, _ in one] == ["image"]:
            names.append(one[0][1])
            segments.append(None)
        else:
            raise ValueError(f'expected texts and {{"image": ...}}, got {_shown(one)!r:.40}')
    if not 1 <= len(names) <= MOST_IMAGES:
        raise ValueError(f"expected 1 to {MOST_IMAGES} images, got {len(names)}")
    return tuple(segments), names


def _shown(value: Any) -> Any:
    return dict(value) if isinstance(value, tuple) else value


def num_images(segments: Sequence[str | None]) -> int:
    """Of a sample."""
    return sum(one is None for one in segments)


# ---------------------------------------------------------------------------------------------------------------------
# The columns of a sample


def files_of(sample: Mapping[str, Any]) -> list[bytes]:
    """The bytes of each image of a sample of image shards."""
    if "image" in sample:
        return [sample["image"]]
    ends = [0, *sample["image_ends"].tolist()]
    return [sample["images"][begin:end] for begin, end in itertools.pairwise(ends)]


def columns_of_files(files: Sequence[bytes]) -> dict[str, Any]:
    """The inverse of `files_of` for an interleaved sample."""
    return {"images": b"".join(files), "image_ends": np.cumsum([len(file) for file in files], dtype=np.int64)}


def check_images(sample: Mapping[str, Any], most_segments: int, latent_shape: tuple[int, ...]) -> None:
    """ValueError where the images of an interleaved sample are not those that its segments name.

    Args:
        sample: its columns.
        most_segments: that it may have.
        latent_shape: of an image; empty in image shards.
    """
    segments = parse_column(sample["segments"])
    if len(segments) > most_segments:
        raise ValueError(f"expected at most {most_segments} segments, got {len(segments)}")
    count = num_images(segments)
    for name, array in sample.items():
        wanted = (count, *latent_shape)
        if isinstance(array, np.ndarray) and array.shape != wanted:
            raise ValueError(f"expected {name} of shape {wanted}, as its segments say, got {array.shape}")
    if not latent_shape:
        ends = [0, *sample["image_ends"].tolist()]
        if sorted(set(ends)) != ends or ends[-1] != len(sample["images"]):
            raise ValueError(f"expected images up to byte {len(sample['images'])}, got ends {ends!s:.80}")


def refuse_interleaved(most_segments: int, where: str) -> None:
    """UserError where shards are of interleaved samples, for what takes one image after another."""
    if most_segments:
        raise UserError(
            f"{where}: expected shards of single images, got interleaved samples; give shards of a folder of images, "
            "or of a table with the column path"
        )

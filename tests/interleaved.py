"""Small tables of interleaved samples, of real digits and words, and the shards that are made of them."""

import json
from pathlib import Path
from typing import Any

from cfpretrain.autoencoder import IdentityAutoencoder
from cfpretrain.core.latents import LatentScaling
from cfpretrain.data.image_shards import write_image_shards
from cfpretrain.data.images import ImageFormat
from cfpretrain.data.listing import list_images
from tests.image_files import digits, encoded
from tests.test_latent_shards import encoding_of, write

SIZE = 8
# Of texts (words) and images (places in the row's images), in turn.
PATTERNS: list[list[str | int]] = [
    ["a digit", 0, ", then", 1],
    [0, "is what it is"],
    [0, 1, 2],
    ["", 0, ""],
    ["this one", 0, 1, ""],
    ["a", 0, "b", 1, "c", 2, "d"],
]
MOST_SEGMENTS = 7


def rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows of a table; row i is of the images i, i + 1, ..."""
    return [
        {
            "segments": [
                part if isinstance(part, str) else {"image": f"images/{i + part}.png"} for part in PATTERNS[i % 6]
            ],
            "caption": f"row {i}",
        }
        for i in range(num_rows)
    ]


def write_table(folder: Path, num_rows: int, changes: dict[int, dict[str, Any]] | None = None) -> Path:
    """A .jsonl and its images in a folder beside it; some rows are others."""
    (folder / "images").mkdir(parents=True)
    for i, image in enumerate(digits(0, num_rows + 3, SIZE)):
        (folder / "images" / f"{i}.png").write_bytes(encoded(image[..., 0]))
    made = [(changes or {}).get(i, row) for i, row in enumerate(rows(num_rows))]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder / "table.jsonl"


def write_shards(folder: Path, num_rows: int, images_per_shard: int = 16, batch_size: int = 5) -> tuple[Path, Path]:
    """Image shards of such a table, and latent shards of their pixels."""
    table = write_table(folder, num_rows)
    write_image_shards(
        [(list_images(table), folder / "shards")],
        ImageFormat("lossless", SIZE, is_grey=True),
        "a test",
        images_per_shard,
    )
    encoding = encoding_of(folder / "shards", IdentityAutoencoder(LatentScaling([0.5], [2.0])), batch_size=batch_size)
    parts = [range(len(encoding.images.shard_sizes))]
    return folder / "shards", write(encoding, folder / "latents", parts)

"""Images -> image shards: a folder of class folders, or a table of paths or segments, labels and captions.

    python tools/make_shards.py imagenet/train --out data/imagenet-train --size 256
    python tools/make_shards.py pictures.csv --out data/pictures --size 512 --store original

    python tools/make_shards.py pictures --out data/pictures --size 64 --hold-out 0.1 --held-out data/pictures-held-out

`--store lossless` keeps ADM's centre crop, bit by bit PIL's, as PNG: the crop that published scores rest on.
`--store original` keeps the bytes of the files, for decoding on GPUs: the crop then is DALI's, and only near ADM's.

Every image is decoded. What cannot be stored is named in rejected.jsonl, with the reason. What is transparent is
composited on --background: give black for white strokes on nothing, such as digits of your own. EXIF rotation is
ignored, as ADM does, where --upright does not ask for it. Of these, and of all else that images lose, counts are said
at the end. Same images and options, same shards, whatever the number of workers. The command may be stopped or killed
at any moment; run again, it goes on.
A table's column `segments`, in place of `path`, makes interleaved samples: a list in JSON of texts and images, such as
["a cat", {"image": "cat.png"}, "and a dog", {"image": "dog.png"}].
--hold-out puts a share of each class, chosen by hashes of paths, into a second folder, which training never sees.
An image is known by its path, size in bytes, label and caption: where only the content of files changed, what is there
is taken for theirs, so give another --out.
Exit code 2: a mistake, or too many images rejected; 75: it was asked to stop.
"""

import argparse
import os
from pathlib import Path

from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import (
    UserError,
    count,
    ending_in_one_line,
    path_argument,
    phase,
    say,
)
from cfpretrain.base.stopping import leave_when_asked

_MOST_WORKERS = 1024


def main() -> None:
    """The command."""
    arguments = _parse()
    leave_when_asked()
    with ending_in_one_line():
        run(arguments)


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "images",
        type=path_argument,
        help="folder of class folders (numbers in the order of numbers, else of names); or a table, .csv or .jsonl, "
        "with columns path, or segments, and, where wanted, label and caption",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the shards")
    parser.add_argument("--size", type=int, required=True, help="pixels a side of the centre crop, e.g. 256")
    parser.add_argument("--store", choices=("lossless", "original"), default="lossless",
                        help="PNG of the crop (default), or the bytes of the files")  # fmt: skip
    parser.add_argument("--grey", action="store_true", help="one channel instead of RGB")
    parser.add_argument("--background", metavar="COLOUR", default="white",
                        help="behind what is transparent: a name or '#rrggbb' (default white)")  # fmt: skip
    parser.add_argument("--upright", action="store_true", help="turn images as their EXIF rotation says")
    parser.add_argument(
        "--root", type=path_argument, help="what a table's paths begin at (default: the table's folder)"
    )
    parser.add_argument(
        "--ignore-columns", nargs="+", default=[], metavar="NAME", help="of a table, that are not to be read"
    )
    parser.add_argument("--hold-out", type=float, metavar="SHARE", help="of each class, for --held-out (e.g. 0.1)")
    parser.add_argument(
        "--held-out", type=path_argument, metavar="FOLDER", help="folder for the shards of what --hold-out holds out"
    )
    num_cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers", type=int, default=min(num_cores, _MOST_WORKERS), help="processes (default: one a CPU core)"
    )
    parser.add_argument("--images-per-shard", type=int, default=1024, help="default 1024")
    parser.add_argument("--max-rejected-share", type=float, default=0.01,
                        help="stop when more of all images than this share are rejected (default 0.01)")  # fmt: skip
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Lists the images and makes the shards that are missing."""
    check_range("--size", arguments.size, 1, 8192)
    check_range("--workers", arguments.workers, 1, _MOST_WORKERS)
    check_range("--images-per-shard", arguments.images_per_shard, 1, 1 << 20)
    check_range("--max-rejected-share", arguments.max_rejected_share, 0, 1)
    with phase("loading torch and streaming"):
        from cfpretrain.data.image_shards import write_image_shards
        from cfpretrain.data.images import ImageFormat, parse_background
        from cfpretrain.data.listing import hold_out, list_images
    background = parse_background(arguments.background)
    image_format = ImageFormat(arguments.store, arguments.size, arguments.grey, background, arguments.upright)
    _check_places(arguments)
    with phase(f"listing {arguments.images}"):
        listing = list_images(arguments.images, arguments.root, arguments.ignore_columns)
    ignored = f"; ignored: {listing.ignored}" if listing.ignored else ""
    kind = "interleaved sample" if listing.is_interleaved else "image"
    say(
        f"{count(len(listing.rows), kind)} of {count(len(listing.class_names), 'class', 'classes')} in "
        f"{arguments.images}{ignored}"
    )
    for text in listing.warnings:
        say(f"WARNING: {text}")
    parts = [(listing, arguments.out)]
    if arguments.hold_out is not None:
        rest, held_out = hold_out(listing, arguments.hold_out)
        alone = len(listing.class_names) - len({row.label for row in held_out.rows})
        none = f", none of {alone} classes of a single image" if alone else ""
        say(
            f"{count(len(rest.rows), kind)} for {arguments.out}, {len(held_out.rows)} held out for "
            f"{arguments.held_out}{none}"
        )
        parts = [(rest, arguments.out), (held_out, arguments.held_out)]
    write_image_shards(
        parts,
        image_format,
        source=str(arguments.images),
        images_per_shard=arguments.images_per_shard,
        num_workers=arguments.workers,
        max_rejected_share=arguments.max_rejected_share,
    )


def _check_places(arguments: argparse.Namespace) -> None:
    """UserError where shards would lie among the images, or in one another."""
    if (arguments.hold_out is None) != (arguments.held_out is None):
        raise UserError("--hold-out and --held-out: expected a share and a folder for it, got one of them; give both")
    if arguments.hold_out is not None and not 0 < arguments.hold_out < 1:
        raise UserError(f"--hold-out: expected a share between 0 and 1, got {arguments.hold_out:g}")
    # Unlike Path.resolve, it takes a link that leads to itself.
    images, out = (Path(os.path.realpath(path)) for path in (arguments.images, arguments.out))
    if out.is_relative_to(images):
        raise UserError(f"--out: expected a folder outside of the images, got {arguments.out}; choose another")
    if arguments.held_out is not None:
        held_out = Path(os.path.realpath(arguments.held_out))
        if any(held_out.is_relative_to(other) or other.is_relative_to(held_out) for other in (images, out)):
            raise UserError(
                f"--held-out: expected a folder outside of the images and of --out, got {arguments.held_out}; choose "
                "another"
            )


if __name__ == "__main__":
    main()

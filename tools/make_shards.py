"""Images -> image shards: a folder of class folders, or a table of paths, labels and captions.

    python tools/make_shards.py imagenet/train --out data/imagenet-train --size 256
    python tools/make_shards.py pictures.csv --out data/pictures --size 512 --store original

`--store lossless` keeps ADM's centre crop, bit by bit PIL's, as PNG: the crop that published scores rest on.
`--store original` keeps the bytes of the files, for decoding on GPUs: the crop then is DALI's, and only near ADM's.

Every image is decoded. What cannot be stored is named in rejected.jsonl, with the reason. Same images and options, same
shards, whatever the number of workers. The command may be stopped or killed at any moment; run again, it goes on.
An image is known by its path, size in bytes, label and caption: where only the content of files changed, what is there
is taken for theirs, so give another --out.
Exit code 2: a mistake, or too many images rejected; 75: it was asked to stop.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from cfpretrain.console import EXIT_REQUEUE, UserError, ending_in_one_line, path_argument, phase, say


def main() -> None:
    """The command."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ending_in_one_line():
        try:
            run(arguments)
        except KeyboardInterrupt:
            say("stopped; the same command goes on")
            sys.exit(EXIT_REQUEUE)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write shards of images, for tools/encode_latents.py.")
    parser.add_argument(
        "images",
        type=path_argument,
        help="folder of class folders; or a table, .csv or .jsonl, with column path (and label, caption if wanted)",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the shards")
    parser.add_argument(
        "--size", type=_from_one_to(8192), required=True, help="pixels a side of the centre crop, e.g. 256"
    )
    parser.add_argument("--store", choices=("lossless", "original"), default="lossless",
                        help="PNG of the crop (default), or the bytes of the files")  # fmt: skip
    parser.add_argument("--grey", action="store_true", help="one channel instead of RGB")
    parser.add_argument(
        "--root", type=path_argument, help="what a table's paths begin at (default: the table's folder)"
    )
    parser.add_argument("--workers", type=_from_one_to(1024), help="processes (default: one a CPU core)")
    parser.add_argument("--images-per-shard", type=_from_one_to(1 << 20), default=1024, help="default 1024")
    parser.add_argument("--max-rejected-share", type=_share, default=0.01,
                        help="stop when more of all images than this share are rejected (default 0.01)")  # fmt: skip
    return parser.parse_args()


def _from_one_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most}, got {text!r:.40}")
        return int(text)

    return number


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Lists the images and makes the shards that are missing."""
    with phase("loading torch and streaming"):
        from cfpretrain.data.images import Storing, list_images
        from cfpretrain.data.storing import store_images
    # Unlike Path.resolve, it takes a link that leads to itself.
    out, images = (Path(os.path.realpath(path)) for path in (arguments.out, arguments.images))
    if out.is_relative_to(images):
        raise UserError(f"--out: expected a folder outside of the images, got {arguments.out}; choose another")
    with phase(f"listing {arguments.images}"):
        listing = list_images(arguments.images, arguments.root)
    ignored = f"; ignored: {listing.ignored}" if listing.ignored else ""
    say(f"{len(listing.rows)} images of {len(listing.class_names)} classes in {arguments.images}{ignored}")
    store_images(
        listing,
        Storing(arguments.store, arguments.size, arguments.grey),
        arguments.out,
        source=str(arguments.images),
        images_per_shard=arguments.images_per_shard,
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        max_rejected_share=arguments.max_rejected_share,
    )


if __name__ == "__main__":
    main()

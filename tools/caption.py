"""Writes a caption of each image, by a model with texts: a run folder, or an exported one.

    python tools/caption.py runs/demo-text digit.png photos/*.png
    python tools/caption.py runs/demo-text digit.png --prefix "a bold" --temperature 0.8 --top-p 0.9 --seed 3
    deepspeed tools/caption.py runs/L-text photos/*.jpg --out captions.jsonl --guidance 1.5 --precision bf16

Image files may have any size: they are turned upright as their EXIF rotation says, and cropped as for training. A
caption is the same on any number of ranks. --out gets a line of JSON for each image, with its path and its caption.
"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, check_range, run_on_ranks
from cfpretrain.base.console import Progress, count, path_argument, phase, say
from cfpretrain.evaluation.sampling_options import (
    MOST_IN_A_BATCH,
    add_source_options,
    add_text_options,
    check_place,
    read_writing,
)

if TYPE_CHECKING:
    from torch import Tensor


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    add("images", type=path_argument, nargs="+", metavar="IMAGE", help="image files of any size")
    add("--prefix", default="", help="how each caption begins")
    add("--out", type=path_argument, metavar="NAME.jsonl", help="a new file for the captions")
    add("--background", metavar="COLOUR", default="white",
        help="behind what is transparent: a name or '#rrggbb' (default white)")  # fmt: skip
    add_text_options(parser, "--guidance")
    add_source_options(parser, batch_size=64)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Captions on all ranks; rank 0 says them."""
    check_range("--batch-size", arguments.batch_size, 1, MOST_IN_A_BATCH)
    if arguments.out is not None:
        check_place("--out", arguments.out)
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.data.images import parse_background
        from cfpretrain.evaluation.captioning import Captioner
        from cfpretrain.evaluation.editing import read_tokens
        from cfpretrain.evaluation.source import open_source
    background, device = parse_background(arguments.background), runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together(), phase(f"loading {arguments.source}"):
            # Mistakes in texts and settings are found before the weights are read.
            source = open_source(arguments.source, device, arguments.precision, arguments.weights, arguments.step)
            writing = read_writing(arguments, source, "--guidance")
            # A token begins with the blank before its word: one at the end would be a word.
            prefix = source.tokens_of("--prefix", arguments.prefix.rstrip(), writing.max_tokens)
            source.load()
            autoencoder = source.make_autoencoder()
        say(f"{source.title}: captions of {count(len(arguments.images), 'image')}")

        def read(places: Sequence[int]) -> "Tensor":
            paths = [arguments.images[place] for place in places]
            return read_tokens(paths, source.config, autoencoder, device, background, "IMAGE")[1]

        bar = Progress(len(arguments.images), 0, "image")
        try:
            captioner = Captioner(source.model, source.texts("SOURCE"), writing, arguments.batch_size)
            captions = captioner.captions(read, len(arguments.images), prefix, bar.show)
        finally:
            bar.close()
        with runtime.together():
            if runtime.rank() == 0:
                _write(arguments, captions)


def _write(arguments: argparse.Namespace, captions: list[str]) -> None:
    from cfpretrain.base.outputs import whole_or_nothing

    for path, caption in zip(arguments.images, captions, strict=True):
        say(f"{path}: {caption}")
    if arguments.out is None:
        return
    pairs = zip(map(str, arguments.images), captions, strict=True)
    lines = [json.dumps({"image": path, "caption": caption}) + "\n" for path, caption in pairs]
    with whole_or_nothing(arguments.out, "--out") as unfinished:
        files.replace(unfinished, "".join(lines))
    say(f"{count(len(captions), 'caption')}: {arguments.out}")


if __name__ == "__main__":
    main()

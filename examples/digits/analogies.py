"""Writes a table of analogies of digits, [A] "three" [A'] "four" [B] "seven eight" [B'], for make_shards.py.

    python -m examples.digits.analogies data/mnist-captioned-files --out data/mnist-captioned-files/analogies.jsonl
    python tools/make_shards.py data/mnist-captioned-files/analogies.jsonl --out data/analogies-images --size 32 --grey
    python tools/train_tokenizer.py data/analogies-images --out data/analogies-tokenizer.json --size 600
    deepspeed --num_accelerators 2 tools/encode_latents.py data/analogies-images --out data/analogies-latents \
      --autoencoder configs/autoencoders/digits --no-mirror
    deepspeed --num_accelerators 2 cfpretrain/train.py --config configs/demo-text.yaml run.folder=runs/analogies \
      data.shards=data/analogies-latents data.tokenizer=data/analogies-tokenizer.json model.vocabulary=298 \
      model.max_text_tokens=6 model.max_segments=8 model.num_classes=1 data.tasks.text_to_image=0 \
      data.tasks.image_to_text=0 data.tasks.interleaved=1 train.global_batch_size=48 train.text_loss_weight=1

What leads from A to A', and from B to B', is the same rule: the digit after, the one before, or the same digit (nine
and zero are neighbours). No text names it. Of some digits some rules are never asked.
"""

import argparse
import csv
import json
from collections.abc import Sequence

import torch

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, positive
from cfpretrain.base.console import ending_in_one_line, explaining, path_argument, say
from cfpretrain.core import seeds
from examples.digits.captioned_digits import TRAIN_FILE
from examples.digits.captions import DIGITS

RULES = (0, 1, -1)  # what is added to a digit, modulo 10
NEVER_ASKED = ((3, 1), (7, -1), (5, 0))  # digits B, and the rules


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("files", type=path_argument, help="a folder of tools/captioned_digits.py")
    parser.add_argument("--out", type=path_argument, required=True, help="the table, .jsonl, in that folder")
    parser.add_argument("--num", type=positive, default=5000, help="of analogies (default 5000)")
    with ending_in_one_line():
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Writes the table."""
    paths: dict[int, list[str]] = {}
    with explaining(f"FILES: expected a folder of tools/captioned_digits.py, got {arguments.files} ({{reason}})"):
        table = files.read_text(arguments.files / TRAIN_FILE)
    for row in csv.DictReader(table.splitlines()):
        paths.setdefault(int(row["label"]), []).append(row["path"])
    asked = [(first, second, rule) for first in range(10) for second in range(10) for rule in RULES
             if (second, rule) not in NEVER_ASKED]  # fmt: skip
    key = seeds.key(0, "analogies")
    uniform_N5 = seeds.uniform(seeds.fold(key, torch.arange(arguments.num)), (5,)).tolist()
    lines = []
    for drawn, *places in uniform_N5:
        digits = digits_of(*asked[int(drawn * len(asked))])
        images = [paths[digit][int(place * len(paths[digit]))] for digit, place in zip(digits, places, strict=True)]
        parts = [
            part for image, text in zip(images, texts_of(digits), strict=True) for part in ({"image": image}, text)
        ]
        lines.append(json.dumps({"segments": parts[:-1]}))
    files.replace(arguments.out, "\n".join(lines) + "\n")
    say(f"{arguments.out}: {len(lines)} analogies")


def digits_of(first: int, second: int, rule: int) -> tuple[int, int, int, int]:
    """A, A', B and B'."""
    return first, (first + rule) % 10, second, (second + rule) % 10


def texts_of(digits: Sequence[int]) -> list[str]:
    """What stands behind each image; behind B its own word and the answer, behind B' nothing."""
    words = [DIGITS[digit] for digit in digits]
    return [words[0], words[1], f"{words[2]} {words[3]}", ""]


if __name__ == "__main__":
    main()

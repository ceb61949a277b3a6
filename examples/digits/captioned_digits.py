"""Writes MNIST's digits and variants of them with captions that are true by measurement: tables for make_shards.py.

    python tools/captioned_digits.py --out data/mnist-captioned-files

The folder has PNG files and two tables. train.csv: real digits and variants of them (turned, sheared, stretched, bent,
thinner, bolder), each measured as it is, without the combinations of words that training is never to see. held-out.csv:
the real digits that `tools/example_images.py` holds out, with all combinations. words.json has the measures between
which each word is true.
"""

import argparse
import csv
import functools
import io
import itertools
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cfpretrain.base import files, outputs
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import UserError, ending_in_one_line, path_argument, phase, say
from examples.digits import captions

TRAIN_FILE, HELD_OUT_FILE, WORDS_FILE = "train.csv", "held-out.csv", "words.json"
_SHARE_HELD_OUT = 0.1
_MOST_VARIANTS = 100
_PIECE = 100  # digits that a process is given at once

_Real = tuple[int, int, NDArray[np.uint8]]  # number, label, pixels


@dataclass(frozen=True)
class _Digit:
    """A picture of a digit, and what was measured in it."""

    number: int  # of the real digit, in the order of the data set
    variant: int  # 0: the real digit itself
    label: int
    pixels_YX: NDArray[np.uint8]
    measures_3: NDArray[np.float64]

    @property
    def name(self) -> str:
        return f"{self.label}/{self.number:05d}_{self.variant}.png"


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=path_argument, required=True, help="folder for the images and tables")
    add("--variants", type=int, default=4, help="of each digit, beside itself (default 4)")
    add("--digits", type=int, default=5000, help="real ones to begin with (default 5000: all)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Writes the folder, whole or not at all."""
    out: Path = arguments.out
    check_range("--variants", arguments.variants, 0, _MOST_VARIANTS)
    check_range("--digits", arguments.digits, 100, 5000)
    wanted = {"variants": arguments.variants, "digits": arguments.digits}
    if _is_there(out, wanted):
        say(f"nothing to do: {out} is there")
        return
    outputs.refuse_existing(out, "--out")
    with phase("reading mnist"):
        from examples.digits.example_images import read_mnist, split

        pixels_BYX, labels_B = read_mnist()
        held = set(split(labels_B.tolist(), _SHARE_HELD_OUT))
    step = len(labels_B) / arguments.digits
    chosen = [int(i * step) for i in range(arguments.digits)]  # they come class by class
    real = [(i, int(labels_B[i]), pixels_BYX[i]) for i in chosen]
    with phase(f"making {arguments.variants} variants of each digit, and measuring all"):
        made = _make_all([one for one in real if one[0] not in held], arguments.variants)
        kept = _make_all([one for one in real if one[0] in held], 0)
    borders_32 = captions.terciles(np.stack([one.measures_3 for one in made if not one.variant]))
    levels = captions.levels_of(np.stack([one.measures_3 for one in made]), borders_32).tolist()
    learned = [one for one, of_one in zip(made, levels, strict=True) if not captions.is_held_out(one.label, of_one)]
    words = json.dumps({**wanted, "borders": borders_32.tolist()}) + "\n"
    tables = {TRAIN_FILE: _table(learned, borders_32), HELD_OUT_FILE: _table(kept, borders_32), WORDS_FILE: words}
    _write(out, [*learned, *kept], tables)
    say(f"{out}: {len(learned)} digits; {len(made) - len(learned)} of combinations never to be trained on are left out")


def read_words(folder: Path) -> NDArray[np.float64]:
    """The borders of `captions.terciles` by which the digits in a folder are described."""
    try:
        return np.array(files.read_json(folder / WORDS_FILE)["borders"], np.float64).reshape(3, 2)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"--files: expected a folder of tools/captioned_digits.py, got {folder}, whose {WORDS_FILE} cannot be read"
        ) from error


def _is_there(folder: Path, wanted: dict[str, int]) -> bool:
    """Whether a folder is complete and of these settings."""
    try:
        there = files.read_json(folder / WORDS_FILE)
        return all(there[name] == value for name, value in wanted.items())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _make_all(real: Sequence[_Real], num_variants: int) -> list[_Digit]:
    pieces = [real[i : i + _PIECE] for i in range(0, len(real), _PIECE)]
    with ProcessPoolExecutor(min(len(pieces), len(os.sched_getaffinity(0))), get_context("spawn")) as pool:
        return list(itertools.chain(*pool.map(functools.partial(_make, num_variants=num_variants), pieces)))


def _make(real: Sequence[_Real], num_variants: int) -> list[_Digit]:
    from cfpretrain.core import seeds
    from examples.digits.variants import variant

    made = []
    for number, label, pixels_YX in real:
        (measures_3,) = captions.measure(pixels_YX[None] / 255)
        made.append(_Digit(number, 0, label, pixels_YX, measures_3))
        key = seeds.fold(seeds.key(0, "variants of digits"), number)
        for k in range(1, num_variants + 1):
            changed_YX = variant(pixels_YX, float(measures_3[0]), seeds.fold(key, k))
            made.append(_Digit(number, k, label, changed_YX, captions.measure(changed_YX[None] / 255)[0]))
    return made


def _table(digits: Sequence[_Digit], borders_32: NDArray[np.float64]) -> str:
    """Paths, labels and captions as CSV; the templates take turns."""
    levels = captions.levels_of(np.stack([one.measures_3 for one in digits]), borders_32).tolist()
    table = io.StringIO()
    rows = csv.writer(table)
    rows.writerow(("path", "label", "caption"))
    for one, of_one in zip(digits, levels, strict=True):
        description = captions.Description(one.label, tuple(of_one))
        template = (one.number + one.variant) % len(captions.TEMPLATES)
        rows.writerow((one.name, one.label, description.caption(template)))
    return table.getvalue()


def _write(out: Path, digits: Sequence[_Digit], texts: dict[str, str]) -> None:
    """Pictures, and files of text beside them."""
    from PIL import Image

    with phase(f"writing {out}"), outputs.whole_or_nothing(out, "--out") as unfinished:
        for one in digits:
            files.make_folder((unfinished / one.name).parent)
            with files.create(unfinished / one.name) as opened:
                Image.fromarray(one.pixels_YX).save(opened, "PNG")
        for name, text in texts.items():
            files.replace(unfinished / name, text)


if __name__ == "__main__":
    main()

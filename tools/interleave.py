"""Continues a sample of texts and images in any order, by a model that was trained on such.

    python tools/interleave.py runs/words text:three image:3.png text:four image:4.png text:seven --out next
    python tools/interleave.py runs/words image:a.png text:three image:b.png text:four image:c.png --out eight
    python tools/interleave.py runs/shapes image:a.png image:a_turned.png image:b.png image --out b_turned

Parts are text:WORDS and image:FILE; a text: of no words is an empty one. Behind them the model writes a text, which
continues the last part where that is one, and says at its end whether an image follows, which it then makes, and so
on. A last part that is only the word text or image says what comes first instead: behind images alone, as in
A : A' :: B : ?, no text can say that an image follows. The folder gets all images as the model sees them, part_N.png,
and transcript.json. Image files may have any size: they are turned upright and cropped as for training.
"""

import argparse
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files, launch
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import UserError, count, ending_in_one_line, excerpt, path_argument, phase, say
from cfpretrain.evaluation.sampling_options import (
    add_sampling_options,
    add_text_options,
    check_place,
    read_settings,
    read_writing,
)

if TYPE_CHECKING:
    from cfpretrain.core.continuation import Part, Writing
    from cfpretrain.evaluation.generation import GenerationSettings
    from cfpretrain.evaluation.source import Source

_KINDS = ("text", "image")
_NEW_PARTS = 2  # where no other number is given, or as many as the model has places for


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    add("parts", nargs="+", metavar="PART", help="text:WORDS or image:FILE; the last may be text or image: see below")
    add("--max-new-parts", type=int, help=f"texts and images that the model adds at most (default {_NEW_PARTS})")
    add("--out", type=path_argument, default=Path("interleaved"), help="a new folder (default interleaved)")
    add("--background", metavar="COLOUR", default="white",
        help="behind what is transparent: a name or '#rrggbb' (default white)")  # fmt: skip
    add_text_options(parser, "--text-guidance")
    add_sampling_options(parser, batch_size=None)
    arguments = parser.parse_args()
    launch.check()
    with ending_in_one_line():
        run(arguments)


@dataclass(frozen=True)
class _Asked:
    """What the command line gives."""

    parts: list[tuple[str, str]]  # kind, and words or a path
    first: str | None  # kind of what comes behind them; None: a text, which may continue the last part

    @property
    def continues_last(self) -> bool:
        """The first new part begins with the last one given."""
        return self.first is None and bool(self.parts) and self.parts[-1][0] == "text"


def run(arguments: argparse.Namespace) -> None:
    """Continues a sample on one process."""
    asked = _read_parts(arguments.parts)
    if arguments.max_new_parts is not None:
        check_range("--max-new-parts", arguments.max_new_parts, 1)
    check_place("--out", arguments.out)
    with phase("loading torch"):
        from torch import Tensor

        from cfpretrain.base import runtime
        from cfpretrain.core.latents import unpatchify
        from cfpretrain.evaluation.source import open_source
    if runtime.world_size() != 1:
        raise UserError(f"interleave.py works on one rank, got {runtime.world_size()}; start it with python alone")
    with phase(f"loading {arguments.source}"):
        device = runtime.pick_device()
        source = open_source(arguments.source, device, arguments.precision, arguments.weights, arguments.step)
        writing = read_writing(arguments, source, "--text-guidance")
        settings = read_settings(arguments, source.config, source.config.model.num_tokens)
        max_new_parts = _read_number(asked, arguments.max_new_parts, source)
        texts = [
            source.tokens_of("PART", value, writing.max_tokens) if kind == "text" else [] for kind, value in asked.parts
        ]
        source.load()
        autoencoder = source.make_autoencoder()
    crops, given = _read_images(arguments, asked, source, autoencoder, texts)
    say(f"{source.title}: {count(len(given), 'part')} given, {settings}")
    with phase("continuing the sample"):
        new = _continue(source, given, asked, writing, settings, max_new_parts)
    kept = len(crops) - asked.continues_last
    made: list[Any] = [*crops[:kept]]
    for part in new:
        if isinstance(part, Tensor):
            made.append(autoencoder.decode(unpatchify(part[None], source.config.model.patch_size)).cpu()[0])
        else:
            made.append(source.texts("SOURCE").decode(part))
    _write(arguments.out, made, kept)


def _read_parts(words: list[str]) -> _Asked:
    first = words[-1] if words[-1] in _KINDS else None
    parts = []
    for word in words[: len(words) - (first is not None)]:
        kind, colon, value = word.partition(":")
        if kind not in _KINDS or not colon:
            raise UserError(
                f"PART: expected text:WORDS or image:FILE, or as the last one text or image, got {excerpt(word, 80)!r}"
            )
        if kind == "image" and not value:
            raise UserError(f"PART: expected image:FILE, got {word!r} without a file; name one")
        try:
            parts.append((kind, value if kind == "text" else str(path_argument(value))))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"PART: {error}") from error
    for (kind, before), (other, behind) in itertools.pairwise(parts):
        if kind == other == "text":
            got = f"{excerpt(before, 40)!r} and {excerpt(behind, 40)!r}"
            raise UserError(f"PART: expected an image between two texts, as in training, got {got}; join them")
    asked = _Asked(parts, first)
    if asked.continues_last:  # a token begins with the blank before its word: one at the end would be a word
        parts[-1] = "text", parts[-1][1].rstrip()
    return asked


def _read_number(asked: _Asked, max_new_parts: int | None, source: "Source") -> int:
    """How many parts are added at most: the model is told each part's place, of which it knows so many."""
    most = source.config.model.max_segments - len(asked.parts) + asked.continues_last
    if most < 1:
        num_parts, known = len(asked.parts), source.config.model.max_segments
        raise UserError(
            f"PART: expected fewer than the {known} parts of a sample that the model knows, got {num_parts}"
        )
    if max_new_parts is None:
        return min(_NEW_PARTS, most)
    check_range("--max-new-parts", max_new_parts, 1, most)
    return max_new_parts


def _read_images(
    arguments: argparse.Namespace, asked: _Asked, source: "Source", autoencoder: Any, texts: list[list[int]]
) -> "tuple[list[Any], list[Part]]":
    """The parts given, as people see them, texts and images [C, Y, X], and as the model does."""
    from cfpretrain.data.images import parse_background
    from cfpretrain.evaluation.editing import read_tokens

    background = parse_background(arguments.background)
    seen: list[Any] = []
    parts: list[Part] = []
    for (kind, value), tokens in zip(asked.parts, texts, strict=True):
        if kind == "text":
            seen.append(value)
            parts.append(tokens)
        else:
            crop, image = read_tokens([Path(value)], source.config, autoencoder, source.device, background, "PART")
            seen.append(crop[0])
            parts.append(image[0])
    return seen, parts


def _continue(
    source: "Source",
    given: "list[Part]",
    asked: _Asked,
    writing: "Writing",
    settings: "GenerationSettings",
    max_new_parts: int,
) -> "list[Part]":
    import torch

    from cfpretrain.core.continuation import continue_samples
    from cfpretrain.evaluation.generation import ImageGenerator

    generator = ImageGenerator(source.config, source.model, settings, source.device, writing.marks)
    ids_B = torch.zeros(1, dtype=torch.int64, device=source.device)
    how = writing, generator.drawing(), max_new_parts, [asked.first]
    return continue_samples(source.model, [given], ids_B, *how)[0]


def _write(out: Path, parts: list[Any], num_given: int) -> None:
    """The images and the transcript; says the new parts."""
    from cfpretrain.base.outputs import whole_or_nothing
    from cfpretrain.evaluation.pictures import to_rgb, write_png

    transcript: list[dict[str, Any]] = []
    with whole_or_nothing(out, "--out") as folder:
        files.make_folder(folder)
        for i, part in enumerate(parts):
            is_new = i >= num_given
            if isinstance(part, str):
                transcript.append({"text": part, "is_new": is_new})
                continue
            name = f"part_{i + 1}.png"
            write_png(folder / name, to_rgb(part[None], (0.0, 1.0))[0])
            transcript.append({"image": name, "is_new": is_new})
        files.replace(folder / "transcript.json", json.dumps(transcript, indent=2) + "\n")
    for one in transcript[num_given:]:
        say(f"text: {one['text']}" if "text" in one else f"image: {out / one['image']}")
    say(f"{count(len(parts) - num_given, 'new part')}: {out}")


if __name__ == "__main__":
    main()

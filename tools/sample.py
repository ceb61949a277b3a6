"""Samples images from a model: a run folder, or an exported one.

    python tools/sample.py runs/demo --classes 3 7 --num-per-class 8 --num-ar-steps 4
    python tools/sample.py runs/demo --out digits.npz --num-images 1000 --solver dpm++
    deepspeed tools/sample.py runs/XL --out fid-50k.npz --num-images 50000 --guidance 1.5 --precision bf16
    python tools/sample.py runs/demo --classes 7 --num-ar-steps 4 --trajectory way.png
    python tools/sample.py runs/demo-text --prompt "a bold narrow seven" "a thin two, leaning right" --guidance 4
    python tools/sample.py runs/demo-text --prompts captions.txt --num-per-class 1 --out drawn

What --out is called decides what is written: NAME.png is a grid, NAME.npz one array as ADM's evaluation reads it, and
anything else a folder of PNG. Image i is the same on any number of ranks, and its class follows from i and --classes.
A model with texts draws prompts instead: a folder's labels.csv names each image's, an archive's arr_2.
An archive or a folder that was interrupted goes on with the same command, which also makes again what is missing from a
folder, or damaged in it.
"""

import argparse
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, check_range, run_on_ranks
from cfpretrain.base.console import Progress, UserError, count, path_argument, phase, reason_of, say
from cfpretrain.evaluation.sampling_options import (
    add_sampling_options,
    check_picture,
    check_place,
    is_picture,
    read_settings,
)

if TYPE_CHECKING:
    from cfpretrain.core.texts import Marks
    from cfpretrain.evaluation.generation import Condition, GenerationSettings
    from cfpretrain.evaluation.image_set import ImageSet
    from cfpretrain.evaluation.source import Source

_MOST_ROWS = 10  # of a grid where no classes are asked for
_PER_CLASS = 8
_WAY_CELL_SIZE = 72  # of a trajectory; picture pixels a side
_NOT_MADE = "#e5e8ec"
_MOST_PROMPT_BYTES = 2**30  # of a file of them
_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # hardly meant as names of folders


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    add("--classes", nargs="+", metavar="CLASS",
        help="names or numbers, name:10 or index:10 where a word is both (default: all, evenly)")  # fmt: skip
    add("--prompt", nargs="+", metavar="TEXT", help="texts instead of classes, for a model with texts")
    add("--prompts", type=path_argument, metavar="FILE", help="the same from a file, one a line")
    add("--num-images", type=int, help="in all, evenly over the classes or prompts")
    add("--num-per-class", type=int, help=f"or per prompt, instead of --num-images (default {_PER_CLASS})")
    add("--out", type=path_argument, help="NAME.png, NAME.npz, or a folder (default samples.png)")
    add("--trajectory", type=path_argument, metavar="NAME.png", help="draw one image's way, and nothing else")
    add_sampling_options(parser, batch_size=64)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Samples on all ranks; rank 0 draws and finishes."""
    _check(arguments)
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.evaluation.source import open_source
    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together(), phase(f"loading {arguments.source}"):
            # Mistakes in names and settings are found before the weights are read.
            source = open_source(arguments.source, device, arguments.precision, arguments.weights, arguments.step)
            settings = read_settings(arguments, source.config, source.config.model.num_tokens)
            wanted = _wanted(arguments, source)
            source.load()
        say(f"{source.title}: {settings}")
        if arguments.trajectory is not None:
            _draw_trajectory(arguments.trajectory, source, wanted, settings)
        elif is_picture(arguments.out):
            _draw_grid(arguments.out, source, wanted, settings)
        else:
            _write_set(arguments.out, source, wanted, settings)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.trajectory is not None and arguments.out is not None:
        raise UserError("--trajectory: expected alone, got --out too; give two commands")
    if arguments.num_images is not None and arguments.num_per_class is not None:
        raise UserError("--num-images: expected alone, got --num-per-class too; leave one out")
    for name, value in (("--num-images", arguments.num_images), ("--num-per-class", arguments.num_per_class)):
        if value is not None:
            check_range(name, value, 1)
    given = [f"--{name}" for name in ("classes", "prompt", "prompts") if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise UserError(f"{given[0]}: expected alone, got {given[1]} too; leave one out")
    arguments.out = arguments.out or Path("samples.png")
    if arguments.trajectory is not None:
        check_picture("--trajectory", arguments.trajectory)
        check_place("--trajectory", arguments.trajectory)
    elif arguments.out.suffix.lower() in _OTHER_PICTURES:
        raise UserError(f"--out: expected NAME.png, NAME.npz or the name of a folder, got {arguments.out}")
    else:
        # An archive or a folder may be there and hold these images.
        check_place("--out", arguments.out, must_be_new=is_picture(arguments.out))


@dataclass(frozen=True)
class _Wanted:
    """The images to make."""

    labels: list[int]  # the class of each, or its prompt by number
    names: Sequence[str]  # of all classes; or the prompts
    tokens: Sequence[Sequence[int]] = ()  # of each prompt
    marks: "Marks | None" = None

    def conditions(self) -> "list[Condition]":
        """What each image is made of."""
        return [self.tokens[label] for label in self.labels] if self.tokens else list(self.labels)

    def plan(self, source: "Source") -> dict[str, Any]:
        """What it depends on."""
        if not self.tokens:
            return {"classes": list(dict.fromkeys(self.labels))}
        texts = hashlib.sha256(json.dumps(list(self.names)).encode()).hexdigest()
        return {"prompts": texts, "tokenizer": source.texts("--prompt").fingerprint}


def _wanted(arguments: argparse.Namespace, source: "Source") -> _Wanted:
    """The classes or prompts in turn, so that image i has the same whatever the number of images."""
    option = "--prompt" if arguments.prompts is None else "--prompts"
    prompts = arguments.prompt if arguments.prompts is None else _read_prompts(arguments.prompts)
    if prompts is None and not arguments.classes and not source.has_classes:
        raise UserError(
            f"--prompt: expected a text, since {source.title} was trained without classes (data.tasks.class_to_image), "
            "got none"
        )
    if prompts is not None:
        tokens = [source.tokens_of(option, text) for text in prompts]
        labels = _labels(arguments, list(range(len(prompts))), "prompts")
        return _Wanted(labels, prompts, tokens, source.marks(option))
    num_classes = len(source.class_names)
    if arguments.classes:
        classes = [source.label_of(text, "--classes") for text in arguments.classes]
    else:
        num_asked = min(num_classes, _MOST_ROWS) if is_picture(arguments.out) else num_classes
        classes = [i * num_classes // num_asked for i in range(num_asked)]
    return _Wanted(_labels(arguments, classes, "classes"), source.class_names)


def _labels(arguments: argparse.Namespace, classes: list[int], what: str) -> list[int]:
    num_images = arguments.num_images or len(classes) * (arguments.num_per_class or _PER_CLASS)
    if is_picture(arguments.out) and num_images % len(classes):
        raise UserError(
            f"--num-images: expected a multiple of the {len(classes)} {what} for a grid, got {num_images}; "
            "give --num-per-class"
        )
    return [classes[i % len(classes)] for i in range(num_images)]


def _read_prompts(path: Path) -> list[str]:
    wanted = f"--prompts: expected a text file with a prompt a line, got {path}"
    try:
        prompts = _lines(files.read_text(path, _MOST_PROMPT_BYTES))
    except (OSError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "which is no UTF-8"
        raise UserError(f"{wanted} ({reason}); give another") from error
    if not prompts:
        raise UserError(f"{wanted}, which is empty; an empty line is an empty prompt")
    return prompts


def _lines(text: str) -> list[str]:
    """As editors show them: without a mark in front, and not ended at the other characters where Python ends lines."""
    lines = io.StringIO(text.removeprefix("\ufeff"), newline=None).read().split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _draw_grid(path: Path, source: "Source", wanted: _Wanted, settings: "GenerationSettings") -> None:
    from cfpretrain.evaluation.generation import ImageGenerator, decode_to_look_at, draw_grid, grid_title

    config, device, labels = source.config, source.device, wanted.labels
    decode, note = decode_to_look_at(config, device, source.make_autoencoder)
    with _progress(len(labels), 0, settings.num_batches(len(labels)), settings) as on_step:
        generator = ImageGenerator(config, source.model, settings, device, wanted.marks)
        images = generator.images(wanted.conditions(), decode, on_step)
    classes = list(dict.fromkeys(labels))
    by_class = [i for label in classes for i in range(len(labels)) if labels[i] == label]
    names = [wanted.names[label] for label in classes]
    draw_grid(path, "--out", images[by_class], names, grid_title(source.title, settings, note))
    say(f"{count(len(labels), 'image')}: {path}")


def _draw_trajectory(path: Path, source: "Source", wanted: _Wanted, settings: "GenerationSettings") -> None:
    from cfpretrain.core.latents import unpatchify
    from cfpretrain.evaluation.generation import ImageGenerator, decode_to_look_at, draw_grid, grid_title
    from cfpretrain.evaluation.pictures import tinted

    config, device = source.config, source.device
    decode, colours = decode_to_look_at(config, device, source.make_autoencoder)
    note = ", ".join(filter(None, ("grey: not made yet", colours)))
    with phase("following one image on its way"):
        generator = ImageGenerator(config, source.model, settings, device, wanted.marks)
        way = generator.follow(wanted.conditions()[0])
    latents = unpatchify(way.states.flatten(0, 1), config.model.patch_size)
    what = "prompt" if wanted.tokens else "class"
    is_made = way.is_made.repeat_interleave(len(way.timesteps), 0)
    draw_grid(
        path,
        "--trajectory",
        tinted(decode(latents.to(device)).cpu(), ~is_made, _NOT_MADE, 1.0),
        [f"AR step {step}" for step in way.ar_steps],
        grid_title(f"{what} {wanted.names[wanted.labels[0]]}, {source.title}", settings, note),
        cell_size=_WAY_CELL_SIZE,
        column_names=["clean" if t is None else f"t = {t}" for t in way.timesteps],
    )
    say(f"the way of one image: {path}")


def _write_set(out: Path, source: "Source", wanted: _Wanted, settings: "GenerationSettings") -> None:
    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.generation import ImageGenerator, plan_of
    from cfpretrain.evaluation.image_set import ImageSet

    config, device, labels = source.config, source.device, wanted.labels
    plan, missing = {}, None
    with runtime.together():
        autoencoder = source.make_autoencoder()
        if runtime.rank() == 0:
            with phase("hashing the weights", announce=False):
                weights = fingerprint(source.model.state_dict())
            # All that the bytes depend on.
            plan = {"num_images": len(labels)} | wanted.plan(source)
            plan |= plan_of(config, weights, autoencoder.fingerprint, settings)
        images = ImageSet(out, labels, wanted.names, settings.batch_size, plan, bool(wanted.tokens))
        if runtime.rank() == 0:
            missing = _begin(images)
    missing = runtime.gather(missing)[0]
    if missing is None:
        return
    num_done = len(labels) - images.count(missing)
    with _progress(len(labels), num_done, len(missing), settings) as on_step, runtime.Exchange() as exchange:
        generator = ImageGenerator(config, source.model, settings, device, wanted.marks)
        for ids, made in generator.batches(wanted.conditions(), autoencoder.decode, missing, on_step):
            images.write(ids, made)
            exchange.add(len(ids))
    with runtime.together():
        if runtime.rank() == 0:
            images.finish()
            say(f"{count(len(labels), 'image')}: {out}")


def _begin(images: "ImageSet") -> list[int] | None:
    """The batches that are missing; None where all is there already."""
    num_images = len(images.labels)
    if images.is_complete():
        say(f"nothing to do: {images.out} holds these {num_images} images already")
        return None
    images.begin()
    missing = images.missing()
    num_missing = images.count(missing)
    there = f"; {num_images - num_missing} of {num_images} are there already" * (num_missing < num_images)
    say(f"sampling {count(num_missing, 'image')}{there}")
    return missing


@contextmanager
def _progress(
    num_images: int, num_done: int, num_batches: int, settings: "GenerationSettings"
) -> Iterator[Callable[[], None]]:
    """A bar of images; gives what moves it with every denoising step."""
    from cfpretrain.base import runtime

    bar, steps = Progress(num_images, num_done, "image"), itertools.count(1)
    num_steps = -(-num_batches // runtime.world_size()) * settings.num_ar_steps * settings.num_denoising_steps
    try:
        yield lambda: bar.show(num_done + (num_images - num_done) * next(steps) // num_steps)
    finally:
        bar.close()


if __name__ == "__main__":
    main()

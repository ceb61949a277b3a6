"""Samples images from a model: a run folder, or an exported one.

    python tools/sample.py runs/demo --classes 3 7 --num-per-class 8 --num-ar-steps 4
    python tools/sample.py runs/demo --out digits.npz --num-images 1000 --solver dpm++
    deepspeed tools/sample.py runs/XL --out fid-50k.npz --num-images 50000 --guidance 1.5 --precision bf16
    python tools/sample.py runs/demo --classes 7 --num-ar-steps 4 --trajectory way.png

What --out is called decides what is written: NAME.png is a grid, NAME.npz one array as ADM's evaluation reads it, and
anything else a folder of PNG. Image i is the same on any number of ranks, and its class follows from i and --classes.
An archive or a folder that was interrupted goes on with the same command, which also makes again what is missing from a
folder, or damaged in it.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfpretrain.base.command_line import Parser, check_range, run_on_ranks
from cfpretrain.base.console import Progress, UserError, count, path_argument, phase, say
from cfpretrain.evaluation.sampling_options import (
    add_sampling_options,
    check_picture,
    check_place,
    is_picture,
    read_settings,
)

if TYPE_CHECKING:
    from cfpretrain.evaluation.generation import GenerationSettings
    from cfpretrain.evaluation.image_set import ImageSet
    from cfpretrain.evaluation.source import Source

_MOST_ROWS = 10  # of a grid where no classes are asked for
_PER_CLASS = 8
_WAY_CELL_SIZE = 72  # of a trajectory; picture pixels a side
_NOT_MADE = "#e5e8ec"
_OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}  # hardly meant as names of folders


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    add("--classes", nargs="+", metavar="CLASS",
        help="names or numbers, name:10 or index:10 where a word is both (default: all, evenly)")  # fmt: skip
    add("--num-images", type=int, help="in all, evenly over the classes")
    add("--num-per-class", type=int, help=f"instead of --num-images (default {_PER_CLASS})")
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
            labels = _labels(arguments, source)
            source.load()
        say(f"{source.title}: {settings}")
        if arguments.trajectory is not None:
            _draw_trajectory(arguments.trajectory, source, labels[0], settings)
        elif is_picture(arguments.out):
            _draw_grid(arguments.out, source, labels, settings)
        else:
            _write_set(arguments.out, source, labels, settings)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.trajectory is not None and arguments.out is not None:
        raise UserError("--trajectory: expected alone, got --out too; give two commands")
    if arguments.num_images is not None and arguments.num_per_class is not None:
        raise UserError("--num-images: expected alone, got --num-per-class too; leave one out")
    for name, value in (("--num-images", arguments.num_images), ("--num-per-class", arguments.num_per_class)):
        if value is not None:
            check_range(name, value, 1)
    arguments.out = arguments.out or Path("samples.png")
    if arguments.trajectory is not None:
        check_picture("--trajectory", arguments.trajectory)
        check_place("--trajectory", arguments.trajectory)
    elif arguments.out.suffix.lower() in _OTHER_PICTURES:
        raise UserError(f"--out: expected NAME.png, NAME.npz or the name of a folder, got {arguments.out}")
    else:
        # An archive or a folder may be there and hold these images.
        check_place("--out", arguments.out, must_be_new=is_picture(arguments.out))


def _labels(arguments: argparse.Namespace, source: "Source") -> list[int]:
    """The class of each image: the classes in turn, so that image i has the same whatever the number of images."""
    num_classes = len(source.class_names)
    if arguments.classes:
        classes = [source.label_of(text) for text in arguments.classes]
    else:
        num_asked = min(num_classes, _MOST_ROWS) if is_picture(arguments.out) else num_classes
        classes = [i * num_classes // num_asked for i in range(num_asked)]
    num_images = arguments.num_images or len(classes) * (arguments.num_per_class or _PER_CLASS)
    if is_picture(arguments.out) and num_images % len(classes):
        raise UserError(
            f"--num-images: expected a multiple of the {len(classes)} classes for a grid, got {num_images}; "
            "give --num-per-class"
        )
    return [classes[i % len(classes)] for i in range(num_images)]


def _draw_grid(path: Path, source: "Source", labels: list[int], settings: "GenerationSettings") -> None:
    from cfpretrain.evaluation.generation import ImageGenerator, decode_to_look_at, draw_grid, grid_title

    config, device = source.config, source.device
    decode, note = decode_to_look_at(config, device, source.make_autoencoder)
    with _progress(len(labels), 0, settings.num_batches(len(labels)), settings) as on_step:
        images = ImageGenerator(config, source.model, settings, device).images(labels, decode, on_step)
    classes = list(dict.fromkeys(labels))
    by_class = [i for label in classes for i in range(len(labels)) if labels[i] == label]
    names = [source.class_names[label] for label in classes]
    draw_grid(path, "--out", images[by_class], names, grid_title(source.title, settings, note))
    say(f"{count(len(labels), 'image')}: {path}")


def _draw_trajectory(path: Path, source: "Source", label: int, settings: "GenerationSettings") -> None:
    from cfpretrain.core.latents import unpatchify
    from cfpretrain.evaluation.generation import ImageGenerator, decode_to_look_at, draw_grid, grid_title
    from cfpretrain.evaluation.pictures import tinted

    config, device = source.config, source.device
    decode, colours = decode_to_look_at(config, device, source.make_autoencoder)
    note = ", ".join(filter(None, ("grey: not made yet", colours)))
    with phase("following one image on its way"):
        way = ImageGenerator(config, source.model, settings, device).follow(label)
    latents = unpatchify(way.states.flatten(0, 1), config.model.patch_size)
    is_made = way.is_made.repeat_interleave(len(way.timesteps), 0)
    draw_grid(
        path,
        "--trajectory",
        tinted(decode(latents.to(device)).cpu(), ~is_made, _NOT_MADE, 1.0),
        [f"AR step {step}" for step in way.ar_steps],
        grid_title(f"class {source.class_names[label]}, {source.title}", settings, note),
        cell_size=_WAY_CELL_SIZE,
        column_names=["clean" if t is None else f"t = {t}" for t in way.timesteps],
    )
    say(f"the way of one image: {path}")


def _write_set(out: Path, source: "Source", labels: list[int], settings: "GenerationSettings") -> None:
    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.generation import ImageGenerator, plan_of
    from cfpretrain.evaluation.image_set import ImageSet

    config, device, plan, missing = source.config, source.device, {}, None
    with runtime.together():
        autoencoder = source.make_autoencoder()
        if runtime.rank() == 0:
            with phase("hashing the weights", announce=False):
                weights = fingerprint(source.model.state_dict())
            # All that the bytes depend on.
            plan = {"num_images": len(labels), "classes": list(dict.fromkeys(labels))}
            plan |= plan_of(config, weights, autoencoder.fingerprint, settings)
        images = ImageSet(out, labels, source.class_names, settings.batch_size, plan)
        if runtime.rank() == 0:
            missing = _begin(images)
    missing = runtime.gather(missing)[0]
    if missing is None:
        return
    num_done = len(labels) - images.count(missing)
    with _progress(len(labels), num_done, len(missing), settings) as on_step, runtime.Exchange() as exchange:
        generator = ImageGenerator(config, source.model, settings, device)
        for ids, made in generator.batches(labels, autoencoder.decode, missing, on_step):
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

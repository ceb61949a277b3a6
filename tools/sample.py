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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import launch
from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import (
    Progress,
    UserError,
    count,
    ending_in_one_line,
    path_argument,
    phase,
    say,
)
from cfpretrain.base.stopping import leave_when_asked
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
    parser.add_argument("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names or numbers, name:10 or index:10 where a word is both (default: all, evenly)",
    )
    parser.add_argument("--num-images", type=int, help="in all, evenly over the classes")
    parser.add_argument("--num-per-class", type=int, help=f"instead of --num-images (default {_PER_CLASS})")
    parser.add_argument("--out", type=path_argument, help="NAME.png, NAME.npz, or a folder (default samples.png)")
    parser.add_argument(
        "--trajectory", type=path_argument, metavar="NAME.png", help="draw one image's way, and nothing else"
    )
    add_sampling_options(parser, batch_size=64)
    arguments = parser.parse_args()
    launch.check()
    leave_when_asked()
    with ending_in_one_line():
        run(arguments)


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
            source.model.eval()
        ar_steps, levels = settings.num_ar_steps, settings.num_denoising_steps
        say(f"{source.title}: AR steps {ar_steps}, denoising steps {levels} ({settings.solver})")
        if arguments.trajectory is not None:
            _draw_trajectory(arguments.trajectory, source, labels[0], settings)
        elif is_picture(arguments.out):
            _draw_grid(arguments.out, source, labels, settings)
        else:
            _write_set(arguments, source, labels, settings)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.trajectory is not None and arguments.out is not None:
        raise UserError("--trajectory: expected alone, got --out too; give two commands")
    if arguments.num_images is not None and arguments.num_per_class is not None:
        raise UserError("--num-images: expected alone, got --num-per-class too; leave one out")
    for name, value in (("--num-images", arguments.num_images), ("--num-per-class", arguments.num_per_class)):
        if value is not None and value < 1:
            raise UserError(f"{name}: expected at least 1, got {value}")
    arguments.out = arguments.out or Path("samples.png")
    if arguments.trajectory is not None:
        check_picture("--trajectory", arguments.trajectory)
        check_place("--trajectory", arguments.trajectory)
    else:
        if arguments.out.suffix.lower() in _OTHER_PICTURES:
            raise UserError(f"--out: expected NAME.png, NAME.npz or the name of a folder, got {arguments.out}")
        # An archive or a folder may be there and hold these images.
        check_place("--out", arguments.out, must_be_new=is_picture(arguments.out))


def _labels(arguments: argparse.Namespace, source: "Source") -> list[int]:
    """The class of each image: the classes in turn, so that image i has the same whatever the number of images."""
    names = source.class_names
    if arguments.classes:
        classes = [source.label_of(text) for text in arguments.classes]
    elif is_picture(arguments.out):
        num_rows = min(len(names), _MOST_ROWS)
        classes = [i * len(names) // num_rows for i in range(num_rows)]
    else:
        classes = list(range(len(names)))
    num_images = arguments.num_images or len(classes) * (arguments.num_per_class or _PER_CLASS)
    if is_picture(arguments.out) and num_images % len(classes):
        raise UserError(
            f"--num-images: expected a multiple of the {len(classes)} classes for a grid, got {num_images}; "
            "give --num-per-class"
        )
    return [classes[i % len(classes)] for i in range(num_images)]


def _draw_grid(path: Path, source: "Source", labels: list[int], settings: "GenerationSettings") -> None:
    from cfpretrain.base import runtime
    from cfpretrain.base.outputs import whole_or_nothing
    from cfpretrain.evaluation import pictures
    from cfpretrain.evaluation.generation import decode_to_look_at, generate_images, grid_title

    config, device = source.config, source.device
    decode, note = decode_to_look_at(config, device, source.make_autoencoder)
    with _Progress(len(labels), 0, settings.num_batches(len(labels)), settings) as progress:
        images = generate_images(config, source.model, labels, settings, device, decode, progress.step)
    classes = list(dict.fromkeys(labels))
    by_class = [i for label in classes for i in range(len(labels)) if labels[i] == label]
    names = [source.class_names[label] for label in classes]
    with runtime.together():
        if runtime.rank() == 0:
            title = grid_title(source.title, settings, note)
            with whole_or_nothing(path, "--out") as unfinished:
                pictures.sample_grid(unfinished, images[by_class], names, title=title, value_range=(0.0, 1.0))
    say(f"{count(len(labels), 'image')}: {path}")


def _draw_trajectory(path: Path, source: "Source", label: int, settings: "GenerationSettings") -> None:
    from cfpretrain.base import runtime
    from cfpretrain.base.outputs import whole_or_nothing
    from cfpretrain.core.latents import unpatchify
    from cfpretrain.evaluation import pictures
    from cfpretrain.evaluation.generation import decode_to_look_at, follow, grid_title

    config, device = source.config, source.device
    decode, colours = decode_to_look_at(config, device, source.make_autoencoder)
    note = ", ".join(filter(None, ("grey: not made yet", colours)))
    with phase("following one image on its way"):
        way = follow(config, source.model, label, settings, device)
    latents = unpatchify(way.states.flatten(0, 1), config.model.patch_size)
    is_made = way.is_made.repeat_interleave(len(way.timesteps), 0)
    images = pictures.tinted(decode(latents.to(device)).cpu(), ~is_made, _NOT_MADE, 1.0)
    with runtime.together():
        if runtime.rank() == 0:
            with whole_or_nothing(path, "--trajectory") as unfinished:
                pictures.sample_grid(
                    unfinished,
                    images,
                    [f"AR step {step}" for step in way.ar_steps],
                    title=grid_title(f"class {source.class_names[label]}, {source.title}", settings, note),
                    value_range=(0.0, 1.0),
                    cell_size=_WAY_CELL_SIZE,
                    column_names=["clean" if t is None else f"t = {t}" for t in way.timesteps],
                )
    say(f"the way of one image: {path}")


def _write_set(
    arguments: argparse.Namespace, source: "Source", labels: list[int], settings: "GenerationSettings"
) -> None:
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.generation import generate_batches
    from cfpretrain.evaluation.image_set import ImageSet

    config, device = source.config, source.device
    with runtime.together():
        autoencoder = source.make_autoencoder()
        plan = _plan(source, autoencoder, labels, settings) if runtime.rank() == 0 else {}
        images = ImageSet(arguments.out, labels, source.class_names, settings.batch_size, plan)
        missing = _begin(images) if runtime.rank() == 0 else None
    missing = runtime.gather(missing)[0]
    if missing is None:
        return

    num_done = len(labels) - images.count(missing)
    with (
        _Progress(len(labels), num_done, len(missing), settings) as progress,
        runtime.Exchange() as exchange,
    ):
        for ids, made in generate_batches(
            config, source.model, labels, settings, device, autoencoder.decode, missing, progress.step
        ):
            images.write(ids, made)
            exchange.add(len(ids))
    with runtime.together():
        if runtime.rank() == 0:
            images.finish()
            say(f"{count(len(labels), 'image')}: {images.out}")


def _plan(source: "Source", autoencoder: Any, labels: list[int], settings: "GenerationSettings") -> dict[str, Any]:
    """All that the bytes depend on."""
    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.evaluation.generation import plan_of

    with phase("hashing the weights", announce=False):
        weights = fingerprint(source.model.state_dict())
    return {
        "num_images": len(labels),
        "classes": list(dict.fromkeys(labels)),
        **plan_of(source.config, weights, autoencoder.fingerprint, settings),
    }


def _begin(images: "ImageSet") -> list[int] | None:
    """The batches that are missing; None where all is there already."""
    if images.is_complete():
        say(f"nothing to do: {images.out} holds these {len(images.labels)} images already")
        return None
    images.begin()
    missing = images.missing()
    num_missing = images.count(missing)
    there = len(images.labels) - num_missing
    say(
        f"sampling {count(num_missing, 'image')}" + f"; {there} of {len(images.labels)} are there already" * bool(there)
    )
    return missing


class _Progress:
    """A bar of images that moves with every denoising step."""

    def __init__(self, num_images: int, num_done: int, num_batches: int, settings: "GenerationSettings") -> None:
        from cfpretrain.base import runtime

        self._bar = Progress(num_images, num_done, "image")
        self._num_done, self._num_left, self._steps = num_done, num_images - num_done, 0
        steps_a_batch = settings.num_ar_steps * settings.num_denoising_steps
        self._num_steps = -(-num_batches // runtime.world_size()) * steps_a_batch

    def step(self) -> None:
        self._steps += 1
        self._bar.show(self._num_done + self._num_left * self._steps // self._num_steps)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


if __name__ == "__main__":
    main()

"""Edits an image: a region of it is regenerated under a new class or text, the rest stays as context.

    python tools/edit.py runs/demo --image digit.png --region top --class 3 8
    python tools/edit.py runs/demo --generate 7 --region box:1,0,3,4 --class 2 --num-seeds 6 --out edit.png
    python tools/edit.py runs/demo-text --image digit.png --region top --prompt "a bold narrow three" "a thin eight"

No training is needed for it: what stays is clean context, like the tokens of an earlier AR step. These tokens come back
bit for bit; pixels beside the region may change a little, since an autoencoder's decoder looks past a token's border,
and all of an image file change as much as the autoencoder changes any image: the picture's column "decoded" shows it
encoded and decoded without an edit.

A region is centre, top, bottom, outside, box:Y0,X0,Y1,X1 (rows and columns of tokens, the ends left out), tokens:0,1,17
(row * columns + column), or mask:FILE, a picture that is white where the image is regenerated and black or transparent
where it stays. It has the size of the image file, of its centre crop, or one pixel a token. A token of which the mask
touches a single pixel is regenerated as a whole: a mask grows to the borders of its tokens. Image files may have any
size: they are turned upright as their EXIF rotation says, and cropped as for training.
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files, launch
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import UserError, count, ending_in_one_line, path_argument, phase, say
from cfpretrain.evaluation.sampling_options import add_sampling_options, check_picture, check_place, read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.evaluation.generation import Condition, GenerationSettings, ImageGenerator
    from cfpretrain.evaluation.source import Source

_REGION_COLOUR, _REGION_SHARE = "#2563a8", 0.65
_MOST_SEEDS = 1000
_CELL_SIZE = 96  # picture pixels a side of an image


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--image", type=path_argument, metavar="FILE", help="an image of any size")
    given.add_argument("--generate", metavar="CLASS",
        help="an image that the model makes first; with --prompt, of a text")  # fmt: skip
    add("--region", required=True, help="what is regenerated: see below")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--class", dest="classes", nargs="+", metavar="CLASS",
        help="names or numbers (name:10 or index:10 where a word is both)")  # fmt: skip
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts instead, for a model with texts")
    add("--background", metavar="COLOUR", default="white",
        help="behind what is transparent in --image: a name or '#rrggbb' (default white)")  # fmt: skip
    add("--num-seeds", type=int, default=4, help="edits of each class or text (default 4)")
    add("--out", type=path_argument, default=Path("edit.png"), help="the picture (default edit.png)")
    add("--images", type=path_argument, metavar="FOLDER", help="a new folder for the edited images alone")
    add_sampling_options(parser, batch_size=16)
    arguments = parser.parse_args()
    launch.check()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Edits on one process."""
    _check(arguments)
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.core.latents import unpatchify
        from cfpretrain.data.images import parse_background
        from cfpretrain.evaluation.editing import read_region
        from cfpretrain.evaluation.generation import ImageGenerator
        from cfpretrain.evaluation.source import open_source
    if runtime.world_size() != 1:
        raise UserError(f"edit.py edits on one rank, got {runtime.world_size()}; start it with python alone")
    background = parse_background(arguments.background)
    device = runtime.pick_device()
    with phase(f"loading {arguments.source}"):
        # Mistakes in names are found before the weights are read.
        source = open_source(arguments.source, device, arguments.precision, arguments.weights, arguments.step)
        conditions = [_condition(source, arguments, text, "--class") for text in arguments.classes or arguments.prompt]
        generated = (
            None if arguments.generate is None else _condition(source, arguments, arguments.generate, "--generate")
        )
        marks = source.marks("--prompt") if arguments.prompt else None
        source.load()
        autoencoder = source.make_autoencoder()
    config, model = source.config, source.config.model
    image_size = model.latent_size * autoencoder.stride
    given = _read_image(arguments.image, source, autoencoder, image_size, background) if arguments.image else None
    region_L = read_region(arguments.region, model.grid, image_size, given.file_size if given else None)
    settings = read_settings(arguments, config, int(region_L.sum()))
    conditions = [one for one in conditions for _ in range(arguments.num_seeds)]
    generator = ImageGenerator(config, source.model, settings, source.device, marks)
    original = given or _make_image(generator, generated, autoencoder)
    say(f"{int(region_L.sum())} of {model.num_tokens} tokens are regenerated: {settings}")
    tokens_BLP = original.tokens.expand(len(conditions), -1, -1)
    with phase(f"making {len(conditions)} edits"):
        # The original, where it was generated, has id 0.
        edited = generator.edit(tokens_BLP, region_L, conditions, first_id=1)
        images = autoencoder.decode(unpatchify(edited, model.patch_size)).cpu()
    _draw(arguments, source, original, region_L, images, settings)
    if arguments.images is not None:
        _write_images(arguments.images, images, arguments.num_seeds)
    say(f"{count(len(conditions), 'edit')}: {arguments.out}" + (f" and {arguments.images}" if arguments.images else ""))


def _condition(source: "Source", arguments: argparse.Namespace, text: str, option: str) -> "Condition":
    """The class that a word of this option means, or the tokens of a text."""
    return source.label_of(text, option) if arguments.classes else source.tokens_of("--prompt", text)


def _check(arguments: argparse.Namespace) -> None:
    check_range("--num-seeds", arguments.num_seeds, 1, _MOST_SEEDS)
    mask = arguments.region.removeprefix("mask:") if arguments.region.startswith("mask:") else None
    for option, file in (("--image", arguments.image), ("--region", mask and Path(mask))):
        if file is not None and file.exists() and not file.is_file():
            raise UserError(f"{option}: expected a file, got {file}, which is none; give an image such as a PNG")
    check_picture("--out", arguments.out)
    check_place("--out", arguments.out)
    if arguments.images is not None:
        check_place("--images", arguments.images)
        if arguments.images.absolute() == arguments.out.absolute():
            raise UserError(f"--images: expected another place than that of --out, got {arguments.images} for both")


@dataclass(frozen=True)
class _Original:
    image: "Tensor"  # [1, C, Y, X]
    tokens: "Tensor"  # [1, L, P]
    decoded: "Tensor | None" = None  # [1, C, Y, X]: what an autoencoder makes of the image, where it does
    file_size: tuple[int, int] | None = None  # (width, height) of what the image was cropped from


def _read_image(path: Path, source: "Source", autoencoder: Any, image_size: int, background: Any) -> _Original:
    from cfpretrain.core.latents import unpatchify
    from cfpretrain.evaluation.editing import encode_tokens, image_channels, read_crop

    config = source.config
    image, file_size = read_crop(path, image_size, image_channels(config, autoencoder) == 1, background)
    tokens = encode_tokens(config, autoencoder, image.to(source.device))
    decoded = None
    if config.data.autoencoder:
        decoded = autoencoder.decode(unpatchify(tokens, config.model.patch_size)).cpu()
    return _Original(image, tokens, decoded, file_size)


def _make_image(generator: "ImageGenerator", condition: "Condition | None", autoencoder: Any) -> _Original:
    import torch

    from cfpretrain.core.ar import equal_sizes
    from cfpretrain.core.latents import unpatchify

    assert condition is not None
    model, settings = generator.config.model, generator.settings
    everywhere = torch.ones(model.num_tokens, dtype=torch.bool)
    nothing = torch.zeros(1, model.num_tokens, model.patch_values)
    settings = dataclasses.replace(settings, ar_step_sizes=equal_sizes(model.num_tokens, settings.num_ar_steps))
    with phase("making the image"):
        tokens = dataclasses.replace(generator, settings=settings).edit(nothing, everywhere, [condition])
        return _Original(autoencoder.decode(unpatchify(tokens, model.patch_size)).cpu(), tokens)


def _draw(
    arguments: argparse.Namespace,
    source: "Source",
    original: _Original,
    region_L: "Tensor",
    images: "Tensor",
    settings: "GenerationSettings",
) -> None:
    """Writes the picture, a row for each class."""
    import torch

    from cfpretrain.evaluation.generation import draw_grid, grid_title
    from cfpretrain.evaluation.pictures import tinted

    left = {"original": original.image.expand(-1, 3, -1, -1)}
    if original.decoded is not None:
        left["decoded"] = original.decoded.expand(-1, 3, -1, -1)
    left["region"] = tinted(original.image, region_L[None], _REGION_COLOUR, _REGION_SHARE)
    names = arguments.prompt or [source.class_names[source.label_of(text)] for text in arguments.classes]
    by_class = images.expand(-1, 3, -1, -1).split(arguments.num_seeds)
    draw_grid(
        arguments.out,
        "--out",
        torch.cat([one for edits in by_class for one in (*left.values(), edits)]),
        [f"-> {name}" for name in names],
        grid_title(f"{source.title}, region {arguments.region}", settings),
        cell_size=_CELL_SIZE,
        column_names=[*left, *(f"edit {i + 1}" for i in range(arguments.num_seeds))],
    )


def _write_images(out: Path, images: "Tensor", num_columns: int) -> None:
    """Writes the edited images, named by their places in the picture."""
    from cfpretrain.base.outputs import whole_or_nothing
    from cfpretrain.evaluation.pictures import to_rgb, write_png

    with whole_or_nothing(out, "--images") as folder:
        files.make_folder(folder)
        for i, image in enumerate(to_rgb(images, (0.0, 1.0))):
            row, column = divmod(i, num_columns)
            write_png(folder / f"row_{row + 1}_edit_{column + 1}.png", image)


if __name__ == "__main__":
    main()

"""Scores images: Frechet distances, Inception Score, precision and recall, beside the floor of the reference.

    python tools/evaluate_fid.py runs/demo --reference data/mnist-images --num-images 1000
    python tools/evaluate_fid.py samples.npz --reference data/images --out scores.json
    deepspeed tools/evaluate_fid.py runs/XL --reference VIRTUAL_imagenet256_labeled.npz --features inception \\
        --feature-weights pt_inception-2015-12-05-6726825d.pth --num-images 50000 --guidance 1 --precision bf16

GENERATED is a run folder or an exported folder, whose images are made on the way and never stored, or images that are
there: a folder, image shards, or an .npz with `arr_0`. The scores are the same on any number of ranks. A command that
was interrupted goes on; docs/evaluation.md says which command gives a paper's numbers.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files, outputs
from cfpretrain.base.command_line import Parser, run_on_ranks
from cfpretrain.base.console import Progress, UserError, path_argument, phase, say
from cfpretrain.base.differences import differences
from cfpretrain.evaluation.sampling_options import add_sampling_options, check_place, read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.data.images import Colour
    from cfpretrain.evaluation.feature_sums import Batches
    from cfpretrain.evaluation.features import FeatureExtractor
    from cfpretrain.evaluation.given_images import GivenImages
    from cfpretrain.evaluation.references import Reference

_DEFAULT_IMAGES = 50_000


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("generated", type=path_argument, help="a run or exported folder; or images: folder, shards, .npz")
    add("--reference", type=path_argument, required=True, help="real images, or an .npz of statistics or both")
    add("--features", default="effnet_lite0", help="inception, effnet_lite0 or module:function (default effnet_lite0)")
    add("--feature-weights", type=path_argument, help="of the FID Inception: pt_inception-2015-12-05-6726825d.pth")
    add("--feature-label", metavar="NAME", help="take other weights, and call the result by this name")
    add("--num-images", type=int, help=f"that a model makes (default {_DEFAULT_IMAGES})")
    add("--labels", choices=("balanced", "random"), default="balanced", help="of a model's images (default balanced)")
    add("--out", type=path_argument, default=Path("scores.json"), help="where scores go (default scores.json)")
    cache = Path("evaluation_cache")
    add("--cache", type=path_argument, default=cache, help=f"of references (default {cache})")
    background_help = "behind what is transparent in folders of images: a name or '#rrggbb' (default white)"
    add("--background", metavar="COLOUR", default="white", help=background_help)
    add("--wandb", metavar="PROJECT", help="log the scores there, too")
    add_sampling_options(parser, batch_size=64, guidance=1.0)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """All ranks see images; rank 0 writes."""
    check_place("--out", arguments.out, must_be_new=False)
    if arguments.out.is_dir():
        raise UserError(f"--out: expected a file, got the folder {arguments.out}; give NAME.json")
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.data.images import parse_background
        from cfpretrain.evaluation.features import make_extractor
        from cfpretrain.evaluation.given_images import say_sizes
        from cfpretrain.evaluation.references import load_reference
        from cfpretrain.evaluation.scores import check_enough
        from cfpretrain.run.build import CONFIG_FILE, INDEX_FILE
    background = parse_background(arguments.background)
    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together(), phase(f"loading {arguments.features}", announce=False):
            extractor = make_extractor(arguments.features, device, arguments.feature_weights, arguments.feature_label)
        is_model = any((arguments.generated / file).is_file() for file in (INDEX_FILE, CONFIG_FILE))
        generated = _from_model(arguments, device) if is_model else _from_images(arguments, background)
        with runtime.together():
            check_enough(generated.num_images, extractor, "--num-images" if is_model else "GENERATED")
        with _progress("reading the reference") as (begin, show):
            reference = load_reference(arguments.reference, extractor, arguments.cache, begin, show, background)
        say_sizes(generated.size, reference.image_size)
        _score(arguments, extractor, reference, generated)


@dataclass(frozen=True)
class _Generated:
    """What is scored."""

    batches: "Batches"
    plan: dict[str, Any]  # all that the images depend on
    num_images: int
    size: tuple[int, int]  # width and height
    given: "GivenImages | None" = None  # where they are there already


def _from_images(arguments: argparse.Namespace, background: "Colour") -> _Generated:
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.given_images import BATCH_SIZE, open_images

    with runtime.together():
        images = open_images(arguments.generated, "GENERATED", background)
        if arguments.num_images not in (None, len(images)):
            raise UserError(
                f"--num-images: expected {len(images)}, the images of {arguments.generated}, got "
                f"{arguments.num_images}; leave it out"
            )
    plan = {"images": images.fingerprint, "num_images": len(images), "batch_size": BATCH_SIZE}
    return _Generated(images.batches, plan, len(images), images.size, images)


def _from_model(arguments: argparse.Namespace, device: Any) -> _Generated:
    import torch

    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.base import runtime
    from cfpretrain.core import seeds
    from cfpretrain.evaluation.generation import ImageGenerator, plan_of, to_pixels
    from cfpretrain.evaluation.source import load_source

    num_images = _DEFAULT_IMAGES if arguments.num_images is None else arguments.num_images
    with runtime.together(), phase(f"loading {arguments.generated}"):
        if num_images < 1:
            raise UserError(f"--num-images: expected at least 1, got {num_images}")
        source = load_source(arguments.generated, device, arguments.precision, arguments.weights, arguments.step)
        if not source.has_classes:
            raise UserError(
                f"GENERATED: expected a model of classes, got {source.title}, which was trained without "
                "(data.tasks.class_to_image); give a folder of what tools/sample.py --prompts draws with it"
            )
        settings = read_settings(arguments, source.config, source.config.model.num_tokens)
        autoencoder = source.make_autoencoder()
    num_classes = len(source.class_names)
    labels_N = torch.arange(num_images) % num_classes
    if arguments.labels == "random":
        labels_N = seeds.integers(seeds.fold(seeds.key(settings.seed, "labels"), torch.arange(num_images)), num_classes)
    labels = labels_N.tolist()
    say(f"{source.title}: {settings}")

    def batches(numbers: list[int]) -> Iterator[tuple[int, "Tensor"]]:
        generator = ImageGenerator(source.config, source.model, settings, device)
        for ids, images in generator.batches(labels, autoencoder.decode, numbers):
            yield int(ids[0]) // settings.batch_size, to_pixels(images)

    with phase("hashing the weights", announce=False):
        weights = fingerprint(source.model.state_dict()) if runtime.rank() == 0 else ""
    plan = {
        "num_images": num_images,
        "labels": arguments.labels,
        "precision": arguments.precision,
        **plan_of(source.config, weights, autoencoder.fingerprint, settings),
    }
    side = source.config.model.latent_size * autoencoder.stride
    return _Generated(batches, plan, num_images, (side, side))


def _score(
    arguments: argparse.Namespace, extractor: "FeatureExtractor", reference: "Reference", generated: _Generated
) -> None:
    import torch

    import cfpretrain
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.feature_sums import Work
    from cfpretrain.evaluation.given_images import say_changes
    from cfpretrain.evaluation.scores import NUM_NEIGHBOURS, compare, statistics_of
    from cfpretrain.run.tracker import Tracker

    out: Path = arguments.out
    num_images = generated.num_images
    plan = {**generated.plan, "features": extractor.fingerprint}
    settings = {**plan, "reference": reference.record["fingerprint"]}
    work = Work(out.absolute(), "--out", plan, num_images, plan["batch_size"])
    with runtime.together():
        found = _found(out, settings) if runtime.rank() == 0 else None
        if found:
            with suppress(OSError):
                files.remove(work.folder)  # of a kill between the result and its removal
    if found := runtime.gather(found)[0]:
        say(f"nothing to do: {out} holds these scores already")
        say(_line({name: found[name] for name in found["scores"]}, found["floor"], found["floor_num_images"]))
        return
    with _progress("scoring") as (begin, show):
        work.sum_up(generated.batches, extractor, lambda done: begin(done, num_images), show)
    if generated.given is not None:
        say_changes(generated.given, "GENERATED")
    with phase("comparing"):
        scores = compare(statistics_of(work), reference.statistics, extractor.name, together=True)
    result = {
        **scores,
        "scores": list(scores),
        "num_images": num_images,
        "generated": str(arguments.generated),
        "reference": reference.record,
        "floor": reference.floor,
        "floor_num_images": reference.floor_num_images,
        "features": extractor.name,
        "feature_weights": extractor.weights,
        "k": NUM_NEIGHBOURS,
        "settings": settings,
        "cfpretrain": cfpretrain.__version__,
        "torch": torch.__version__,
    }
    with runtime.together():
        if runtime.rank() == 0:
            with outputs.writing(f"--out: {out}"):
                files.replace(out, f"{json.dumps(result, indent=2)}\n")
            work.remove()
    if arguments.wandb:
        tracker = Tracker("auto", arguments.wandb, out.absolute().parent, None, result)
        tracker.log({"step": 0, **scores})
        tracker.close()
    say(_line(scores, reference.floor, reference.floor_num_images))
    say(f"scores of {num_images} images: {out}")


def _found(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What this very command has written; None: nothing is there."""
    if not out.exists():
        return None
    try:
        there = outputs.parse_plan(files.read_text(out))
        different = differences(there["settings"], json.loads(json.dumps(settings)))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"--out: {out} is there already and holds no scores; choose another --out") from error
    if different:
        raise UserError(
            f"--out: {out} holds scores of other settings already ({different}); delete it, or choose another --out"
        )
    return there


def _line(scores: dict[str, float], floor: dict[str, float] | None, floor_num_images: int) -> str:
    """All scores on one line, each with the floor behind it where there is one."""
    shown = (
        f"{name} {value:.4g}" + (f" (floor {floor[name]:.4g})" if floor and name in floor else "")
        for name, value in scores.items()
    )
    return ", ".join(shown) + f"; floors are of {floor_num_images} real images against others" * bool(floor)


@contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int, int], None], Callable[[int], None]]]:
    """A bar of images: what begins it, with how many are done of how many, and what moves it."""
    bars: list[Progress] = []

    def begin(num_done: int, num_images: int) -> None:
        there = f"; {num_done} of {num_images} are done already" if num_done else ""
        say(f"{what}: {num_images - num_done} images{there}")
        bars.append(Progress(num_images, num_done, "image"))

    try:
        yield begin, lambda num_done: bars[0].show(num_done)
    finally:
        for bar in bars:
            bar.close()


if __name__ == "__main__":
    main()

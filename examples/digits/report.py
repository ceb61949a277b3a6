"""Samples and scores a run: report.json, a loss map and sample grids in the run folder, and a table on the screen.

    deepspeed --num_accelerators 2 tools/report.py runs/demo \
        --images data/mnist-images --held-out data/mnist-held-out

Samples are decoded and held against real images, not against what the autoencoder makes of those. The scores are those
of small images judged in pixel space, as the demo's digits are.

It may be stopped or killed at any moment; the same command goes on with the samples that are there, and so does one
with other settings where they share some: until the report is complete they lie in RUN/.report.partial.
Exit code 2: a mistake; 75: it was asked to stop.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files, launch
from cfpretrain.base.command_line import Parser, add_local_rank
from cfpretrain.base.console import (
    UserError,
    ending_in_one_line,
    path_argument,
    phase,
    printable,
    say,
)
from cfpretrain.base.files import read_json
from cfpretrain.base.stopping import leave_when_asked
from cfpretrain.evaluation.sampling_options import check_guidance

if TYPE_CHECKING:
    from cfpretrain.base.outputs import Unfinished
    from examples.digits.sample_sets import SampleSet

# For few denoising steps; examples/digits/measure_quality.py holds it against DDPM's.
_SOLVER, _SPACING = "sde-dpm++", "log_snr"
_REPORT_FILE = "report.json"
_LEAST_SCORED, _MOST_SCORED = 100, 10**6
_LEAST_COMPARED = 4  # images of each set: one more than the neighbours behind precision and recall
_MOST_MAPPED = 1500  # latents behind the loss map
_FEATURES = "fd_effnet_lite0"
_MOST_EMBEDDED = 500  # images of each set behind the distance in these features


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=path_argument, help="a run folder of at least 2 classes, e.g. runs/demo")
    add("--images", type=path_argument, required=True, help="image shards that the latents were made of")
    add("--held-out", type=path_argument, required=True, help="image shards kept from training; with --images at least "
        f"{2 * _LEAST_COMPARED} images more than classes")  # fmt: skip
    add("--num-images", type=int, default=1000,
        help=f"images for each setting, {_LEAST_SCORED} to {_MOST_SCORED} (default 1000)")  # fmt: skip
    add("--num-ar-steps", type=int, nargs="+", default=[1, 4, 16], help="settings, each from 1 to the run's number of "
        "tokens, in any order (default 1 4 16)")  # fmt: skip
    add("--num-denoising-steps", type=int, default=25, help=f"of each AR step, by {_SOLVER}; 2 to the run's "
        "noise.num_timesteps (default 25)")  # fmt: skip
    add("--guidance", type=float, default=2.0, help="beside unguided samples; 0 to 1000 but 1 (default 2)")
    add("--batch-size", type=int, default=250, help=f"images a forward on one rank, 1 to {_MOST_SCORED} (default 250)")
    add_local_rank(parser)
    arguments = parser.parse_args()
    launch.check()
    leave_when_asked()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Samples on all ranks; rank 0 scores and writes."""
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.evaluation.features import EFFNET, make_extractor
        from cfpretrain.run import build
        from examples.digits.sample_sets import make_missing
    device = runtime.pick_device()
    config, model, step = build.load_run(arguments.run, device)
    _check(arguments, config.model.num_tokens, config.noise.num_timesteps)
    _check_decodes(arguments.run, config)
    num_real = _check_images(arguments, config)
    # As many of each set, and the real ones are cut into halves.
    num_embedded = min(_MOST_EMBEDDED, arguments.num_images, num_real // 2)
    settings = _settings(arguments, step, num_embedded)
    there = _table_there(arguments.run, settings)
    if there is not None:
        if runtime.rank() == 0:
            say(f"nothing to do: {arguments.run} is scored at step {step}")
            _print_table(there, arguments.run)
        return
    with runtime.ranks_of_a_tool(device):
        with runtime.together():
            extractor = make_extractor(EFFNET, device)
            work = _begin(arguments.run) if runtime.rank() == 0 else None
        sets = _plan(arguments, config, model, num_embedded, device)
        make_missing(config, list(sets.values()), device)
        made = _judged(sets, arguments)
        with phase(f"comparing {num_embedded} images by {extractor.name}"):
            embedded = _score_embedded(arguments, made, num_embedded, extractor)
        if work is not None:
            with work.writing():
                _report(arguments, config, model, step, sets, embedded, settings)
            work.remove()


def _read_report(folder: Path) -> dict[str, Any]:
    """What an earlier scoring wrote; nothing where there is none, or it is damaged: then it is written again."""
    try:
        report = read_json(folder / _REPORT_FILE)
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _table_there(folder: Path, settings: dict[str, Any]) -> str | None:
    """The table of an earlier scoring with these settings; None where there is none, or it lacks something."""
    report = _read_report(folder)
    try:
        return _table(report, folder) if _is_of(report, settings) else None
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _is_of(report: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a report is of these settings; where the real images lie does not matter."""
    there = dict(report)
    if isinstance(there.get("num_ar_steps"), list):
        there["num_ar_steps"] = sorted(there["num_ar_steps"], key=str)
    wanted = settings | {"num_ar_steps": sorted(settings["num_ar_steps"], key=str)}
    return all(there.get(name) == value for name, value in wanted.items() if name not in ("images", "held_out"))


def _settings(arguments: argparse.Namespace, step: int, num_embedded: int) -> dict[str, Any]:
    """What a report is of; a run that was scored so needs no second scoring."""
    from cfpretrain.data.shards import Shards

    return {
        "scored_step": step,
        "num_scored": arguments.num_images,
        "num_embedded": num_embedded,
        "num_ar_steps": arguments.num_ar_steps,
        "num_denoising_steps": arguments.num_denoising_steps,
        "solver": _SOLVER,
        "guidance": arguments.guidance,
        "images": str(arguments.images),
        "images_fingerprint": Shards(arguments.images, "--images").fingerprint,
        "held_out": str(arguments.held_out),
        "held_out_fingerprint": Shards(arguments.held_out, "--held-out").fingerprint,
    }


def _check(arguments: argparse.Namespace, num_tokens: int, num_levels: int) -> None:
    for name, value, low, high in (
        ("--num-images", arguments.num_images, _LEAST_SCORED, _MOST_SCORED),
        ("--num-denoising-steps", arguments.num_denoising_steps, 2, num_levels),
        ("--batch-size", arguments.batch_size, 1, _MOST_SCORED),
        *(("--num-ar-steps", value, 1, num_tokens) for value in arguments.num_ar_steps),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, got {value}")
    check_guidance(arguments.guidance)
    if arguments.guidance == 1:
        raise UserError("--guidance: expected another scale than 1, which is measured anyway; e.g. 2")
    arguments.num_ar_steps = sorted(set(arguments.num_ar_steps))


def _check_decodes(run: Path, config: Any) -> None:
    from cfpretrain.autoencoder import are_pixels

    if not config.data.autoencoder and not are_pixels(config.model.latent_channels):
        raise UserError(
            f"run folder {run}: expected a run that names its autoencoder (data.autoencoder), so that its samples can "
            "be decoded and scored, got none; train with it, or write it into the run's config.yaml"
        )


def _check_images(arguments: argparse.Namespace, config: Any) -> int:
    """How many images `--images` holds."""
    from cfpretrain.data.loader import open_folders
    from cfpretrain.data.shards import read_images_info

    latents = open_folders(config)[0].latents_info
    infos = {"--images": read_images_info(arguments.images, "--images")}
    infos["--held-out"] = read_images_info(arguments.held_out, "--held-out")
    for key, images in infos.items():
        for name in ("image_size", "class_names"):
            expected, got = getattr(latents, name), getattr(images, name)
            if expected != got:
                raise UserError(f"{key}: expected {name} {expected} as of {config.data.shards[0]}, got {got}")
    num_classes, num_real = len(latents.class_names), sum(images.num_samples for images in infos.values())
    if num_classes < 2:
        raise UserError(f"RUN: expected at least 2 classes, which the scores tell apart, got {num_classes}")
    # Halves of each class are compared.
    if num_real < num_classes + 2 * _LEAST_COMPARED:
        raise UserError(
            f"--images, --held-out: expected at least {num_classes + 2 * _LEAST_COMPARED} images together for "
            f"{num_classes} classes, got {num_real}; give more"
        )
    return infos["--images"].num_samples


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def _kept(run: Path) -> Path:
    return run / ".report.partial"


def _begin(run: Path) -> "Unfinished":
    """Takes the folder of the samples, so that no second report works there."""
    from cfpretrain.base.outputs import Unfinished
    from cfpretrain.run import build

    work = Unfinished(run / "report", "RUN", kind="partial")
    with work.writing():
        files.make_folder(run / build.SAMPLES)
        for folder in (run.resolve(), run / build.SAMPLES):
            files.remove_leftovers(folder)
        work.take()
    return work


def _plan(
    arguments: argparse.Namespace, config: Any, model: Any, num_embedded: int, device: Any
) -> "dict[tuple[int, float] | None, SampleSet]":
    """The sets to sample, by AR steps and guidance; None: of the model before training."""
    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.base.config import to_plain
    from cfpretrain.core.ar import equal_sizes
    from cfpretrain.core.sampler import Guidance
    from cfpretrain.evaluation.generation import GenerationSettings, plan_of
    from cfpretrain.run import build
    from examples.digits.sample_sets import SampleSet

    labels = [i % config.model.num_classes for i in range(arguments.num_images)]
    decoder, weights = build.make_autoencoder(config, device).fingerprint, fingerprint(model.state_dict())
    untrained = json.dumps([config.run.seed, to_plain(config)["model"]])

    def settings(num_ar_steps: int, guidance: float) -> Any:
        return GenerationSettings(
            equal_sizes(config.model.num_tokens, num_ar_steps),
            arguments.num_denoising_steps,
            Guidance(guidance),
            arguments.batch_size,
            config.run.seed,
            _SOLVER,
            _SPACING,
        )

    sets: dict[tuple[int, float] | None, SampleSet] = {}
    for key in [(num, guidance) for guidance in (arguments.guidance, 1.0) for num in arguments.num_ar_steps]:
        name, how = f"AR steps {key[0]}, guidance {key[1]:g}", settings(*key)
        plan = plan_of(config, weights, decoder, how)
        sets[key] = SampleSet(name, lambda: model, labels, how, _kept(arguments.run), plan)
    how = settings(min(arguments.num_ar_steps), 1.0)
    plan = plan_of(config, untrained, decoder, how)
    make_untrained = partial(build.make_untrained, config, device)
    sets[None] = SampleSet(
        "the untrained model", make_untrained, labels[:num_embedded], how, _kept(arguments.run), plan
    )
    return sets


def _judged(sets: "dict[tuple[int, float] | None, SampleSet]", arguments: argparse.Namespace) -> dict[str, Any]:
    """uint8 images to be compared by features, on all ranks: of the model, and of the one before training."""
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.generation import to_pixels

    chosen = {"value": sets[min(arguments.num_ar_steps), 1.0], "untrained": sets[None]}
    num_images = len(chosen["untrained"].labels)
    return runtime.gather(
        {name: to_pixels(one.read()[:num_images]) for name, one in chosen.items()} if runtime.rank() == 0 else None
    )[0]


def _score_embedded(
    arguments: argparse.Namespace, candidates: dict[str, Any], num_images: int, extractor: Any
) -> dict[str, float]:
    """Distances to real images of generated ones, other real ones, and those of the model before training."""
    import numpy as np

    from cfpretrain.base import runtime
    from cfpretrain.evaluation.given_images import open_images
    from examples.digits.embedded import distances_beside_floor

    with runtime.together():
        real = open_images(arguments.images, "--images")
        real_NCYX = real.read(np.linspace(0, len(real) - 1, 2 * num_images).round().astype(int))
    return distances_beside_floor(real_NCYX, candidates, extractor)


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def _report(
    arguments: argparse.Namespace,
    config: Any,
    model: Any,
    step: int,
    sets: "dict[tuple[int, float] | None, SampleSet]",
    embedded: dict[str, float],
    settings: dict[str, Any],
) -> None:
    import numpy as np
    import torch

    from cfpretrain.base import runtime
    from cfpretrain.data.images import read_all_images
    from cfpretrain.data.loader import open_folders
    from cfpretrain.run import build
    from examples.digits.loss_map import draw_loss_map, measure_loss_map
    from examples.digits.reconstruction import reconstruction_error
    from examples.digits.summary import LabelledImages, summarise

    folder: Path = arguments.run
    device = next(model.parameters()).device
    shards = open_folders(config)[0]
    with phase("drawing the loss map"):
        places = np.linspace(0, len(shards) - 1, min(len(shards), _MOST_MAPPED)).round().astype(int)
        samples = shards.samples(places.tolist())
        means_BCYX = torch.from_numpy(np.stack([sample["mean"] for sample in samples])).float()
        labels_B = torch.tensor([int(sample["label"]) for sample in samples])
        latents = build.make_scaling(config).to_model(means_BCYX).to(device)
        errors = measure_loss_map(model, build.make_loss(config), latents, labels_B, num_bins=20, passes=8)
        draw_loss_map(folder / "loss_map.png", *errors, title=f"Loss of the EMA weights at step {step}")
    torch.set_num_threads(torch.get_num_threads() * runtime.world_size())  # those of the ranks that are done
    with phase("scoring"):
        held_out_pixels, held_out_labels = read_all_images(arguments.held_out, "--held-out")
        train, held_out = (
            LabelledImages(images.float() / 127.5 - 1, labels)
            for images, labels in (
                read_all_images(arguments.images, "--images"),
                (held_out_pixels, held_out_labels),
            )
        )
        generated = {
            key: (LabelledImages(one.read() * 2 - 1, torch.tensor(one.labels)), one.settings)
            for key, one in sets.items()
            if key is not None
        }
        guided, unguided = (
            {num: made for (num, scale), (made, _) in generated.items() if scale == wanted}
            for wanted in (arguments.guidance, 1.0)
        )
        scores = summarise(train, held_out, guided, unguided, config.run.seed, num_splits=2)
        autoencoder = build.make_autoencoder(config, device)
        scores[_FEATURES] = embedded
        scores["autoencoder_reconstruction_mse"] = reconstruction_error(autoencoder, held_out_pixels, device)
    _draw_grids(folder, generated, shards.info.class_names[: config.sample.max_classes], step)
    summary = build.read_summary(folder)
    if summary is None or summary["num_steps"] != step:
        summary = {}  # a run that has not ended, or goes on
    report = {**summary, **scores, **settings}
    files.replace(folder / _REPORT_FILE, json.dumps(report, indent=2) + "\n")
    _print_table(_table(report, folder), folder)


def _draw_grids(folder: Path, generated: dict[tuple[int, float], Any], names: Sequence[str], step: int) -> None:
    import torch

    from cfpretrain.evaluation import pictures
    from cfpretrain.evaluation.generation import grid_title
    from cfpretrain.run import build

    for (num_ar_steps, guidance), (made, how) in generated.items():
        rows = [made.images[made.labels_N == label][:10] for label in range(len(names))]
        path = folder / build.SAMPLES / f"report_ar_steps_{num_ar_steps:04d}_guidance_{guidance:g}.png"
        title = grid_title(f"step {step}, EMA weights", how)
        pictures.sample_grid(path, torch.cat(rows), names, title=title, value_range=(-1.0, 1.0))


def _table(report: dict[str, Any], folder: Path) -> str:
    from cfpretrain.run import build

    def line(name: str, *values: object) -> str:
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)
        return f"  {name:<38}" + "".join(f"{cell:>12}" for cell in cells)

    ar_steps = list(report["class_accuracy"])
    lines = [
        "",
        line("share of images that are the class", *(f"{n} AR step{'s' if n != '1' else ''}" for n in ar_steps)),
        line(f"  guidance {report['guidance']:g}", *report["class_accuracy"].values()),
        line("  unguided", *report["class_accuracy_unguided"].values()),
        line("  real images, held out", report["classifier_accuracy_on_real"]),
        "",
        line(f"unguided, AR steps {min(report['num_ar_steps'])}", "model", "real", "cheat"),
        *(
            line(f"  {name}", *(report[name][who] for who in ("value", "real_against_real", "cheat")))
            for name in ("precision", "recall", "frechet_pixel")
        ),
        "",
        line(
            f"unguided, AR steps {min(report['num_ar_steps'])}, {report['num_embedded']} images",
            "model",
            "real",
            "untrained",
        ),
        line(f"  {_FEATURES}", *(report[_FEATURES][who] for who in ("value", "real_against_real", "untrained"))),
        "",
        line("reconstruction by the autoencoder, MSE", report["autoencoder_reconstruction_mse"]),
        "",
    ]
    if report.keys() >= set(build.SUMMARY_NUMBERS):
        lines.append(
            f"  trained {report['num_steps']} steps in {report['train_seconds']:.0f} s on {report['world_size']} ranks "
            f"(ZeRO stage {report['zero_stage']}), {report['images_per_second']:.0f} images/s, "
            f"loss {report['loss_first']:.3f} -> {report['loss_last']:.3f}"
        )
    lines.append(f"  pictures: {folder}/samples/*.png {folder}/curves.png {folder}/loss_map.png")
    lines.append(f"  numbers:  {folder}/report.json")
    return "\n".join(map(printable, lines))


def _print_table(table: str, folder: Path) -> None:
    print(table, flush=True)
    say(f"{folder} is scored")


if __name__ == "__main__":
    main()

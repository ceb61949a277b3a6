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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, add_local_rank, check_range, run_on_ranks
from cfpretrain.base.console import (
    UserError,
    path_argument,
    phase,
    printable,
    say,
)
from cfpretrain.base.files import read_json
from cfpretrain.evaluation.sampling_options import check_guidance

if TYPE_CHECKING:
    from cfpretrain.base.outputs import Unfinished
    from examples.digits.sample_sets import SampleSet

    Sets = dict[tuple[int, float] | None, SampleSet]  # by AR steps and guidance; None: of the model before training

# For few denoising steps; examples/digits/measure_quality.py holds it against DDPM's.
_SOLVER, _SPACING = "sde-dpm++", "log_snr"
_REPORT_FILE = "report.json"
_KEPT = ".report.partial"  # of the run: samples, until the report is complete
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
    add("--guidance", type=float, default=2.0, help="beside unguided samples; 0 to 1000 (default 2)")
    add("--batch-size", type=int, default=250, help=f"images a forward on one rank, 1 to {_MOST_SCORED} (default 250)")
    add_local_rank(parser)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Samples on all ranks; rank 0 scores and writes."""
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.evaluation.features import EFFNET, make_extractor
        from cfpretrain.run import build
        from examples.digits.sample_sets import make_missing
    device = runtime.pick_device()
    found = build.find_checkpoint(arguments.run)
    config, step = found.config, found.state.step
    _check(arguments, config)
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
            model = found.load_model().to(device)
            decoder = found.make_autoencoder(device).fingerprint
            extractor = make_extractor(EFFNET, device)
            work = _begin(arguments.run) if runtime.rank() == 0 else None
        sets = _plan(arguments, config, model, decoder, num_embedded, device)
        make_missing(config, list(sets.values()), device)
        with phase(f"comparing {num_embedded} images by {extractor.name}"):
            embedded = _score_embedded(arguments, sets, num_embedded, extractor)
        if work is not None:
            with work.writing():
                scores = _score(arguments, config, model, sets) | {_FEATURES: embedded}
                _draw(arguments.run, config, model, step, sets)
                summary = build.read_summary(arguments.run)
                if summary is None or summary["num_steps"] != step:
                    summary = {}  # a run that has not ended, or goes on
                report = {**summary, **scores, **settings}
                files.replace(arguments.run / _REPORT_FILE, json.dumps(report, indent=2) + "\n")
                _print_table(_table(report, arguments.run), arguments.run)
            work.remove()


def _table_there(folder: Path, settings: dict[str, Any]) -> str | None:
    """The table of an earlier scoring with these settings; None where there is none, or it lacks something."""
    try:
        report = read_json(folder / _REPORT_FILE)
        return _table(report, folder) if _is_of(report, settings) else None
    except (OSError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
        return None


def _is_of(report: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a report is of these settings; where the real images lie and the order of AR steps do not matter."""
    there, wanted = (
        {name: sorted(value, key=str) if isinstance(value, list) else value for name, value in of.items()}
        for of in (report, settings)
    )
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


def _check(arguments: argparse.Namespace, config: Any) -> None:
    from cfpretrain.autoencoder import are_pixels

    check_range("--num-images", arguments.num_images, _LEAST_SCORED, _MOST_SCORED)
    check_range("--num-denoising-steps", arguments.num_denoising_steps, 2, config.noise.num_timesteps)
    check_range("--batch-size", arguments.batch_size, 1, _MOST_SCORED)
    for num_ar_steps in arguments.num_ar_steps:
        check_range("--num-ar-steps", num_ar_steps, 1, config.model.num_tokens)
    check_guidance(arguments.guidance)
    if arguments.guidance == 1:
        raise UserError("--guidance: expected another scale than 1, which is measured anyway; e.g. 2")
    arguments.num_ar_steps = sorted(set(arguments.num_ar_steps))
    if not config.data.autoencoder and not are_pixels(config.model.latent_channels):
        raise UserError(
            f"run folder {arguments.run}: expected a run that names its autoencoder (data.autoencoder), so that its "
            "samples can be decoded and scored, got none; train with it, or write it into the run's config.yaml"
        )


def _check_images(arguments: argparse.Namespace, config: Any) -> int:
    """How many images `--images` holds."""
    from cfpretrain.data.cache import Cache
    from cfpretrain.data.shards import Shards, read_images_info

    trained = Shards(config.data.shards[0], cache=Cache.of(config.data)).info
    infos = {"--images": read_images_info(arguments.images, "--images")}
    infos["--held-out"] = read_images_info(arguments.held_out, "--held-out")
    for key, images in infos.items():
        for name in ("image_size", "class_names"):
            expected, got = getattr(trained, name), getattr(images, name)
            if expected != got:
                raise UserError(f"{key}: expected {name} {expected} as of {config.data.shards[0]}, got {got}")
    num_classes, num_real = len(trained.class_names), sum(images.num_samples for images in infos.values())
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
    arguments: argparse.Namespace, config: Any, model: Any, decoder: str, num_embedded: int, device: Any
) -> "Sets":
    """The sets to sample."""
    import torch

    from cfpretrain.autoencoder import fingerprint
    from cfpretrain.base.config import to_plain
    from cfpretrain.core.ar import equal_sizes
    from cfpretrain.core.model import initialise
    from cfpretrain.core.sampler import Guidance
    from cfpretrain.evaluation.generation import GenerationSettings, plan_of
    from cfpretrain.run import build
    from examples.digits.sample_sets import SampleSet

    labels = [i % config.model.num_classes for i in range(arguments.num_images)]

    def make_untrained() -> Any:
        """The model as a run begins with it: what any training must beat."""
        with torch.device("meta"):
            model = build.make_model(config)
        model.to_empty(device=device)
        initialise(model, config.run.seed)
        return model.eval().requires_grad_(False)

    def make_set(
        name: str, make_model: Any, weights: str, labels: Any, num_ar_steps: int, guidance: float
    ) -> SampleSet:
        settings = GenerationSettings(
            equal_sizes(config.model.num_tokens, num_ar_steps),
            arguments.num_denoising_steps,
            Guidance(guidance),
            arguments.batch_size,
            config.run.seed,
            _SOLVER,
            _SPACING,
        )
        plan = plan_of(config, weights, decoder, settings)
        return SampleSet(name, make_model, labels, settings, arguments.run / _KEPT, plan)

    trained, untrained = fingerprint(model.state_dict()), json.dumps([config.run.seed, to_plain(config)["model"]])
    sets: Sets = {
        (num, scale): make_set(f"AR steps {num}, guidance {scale:g}", lambda: model, trained, labels, num, scale)
        for scale in (arguments.guidance, 1.0)
        for num in arguments.num_ar_steps
    }
    fewest = min(arguments.num_ar_steps)
    sets[None] = make_set("the untrained model", make_untrained, untrained, labels[:num_embedded], fewest, 1.0)
    return sets


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def _score_embedded(
    arguments: argparse.Namespace,
    sets: "Sets",
    num_images: int,
    extractor: Any,
) -> dict[str, float]:
    """Distances to real images of generated ones, other real ones, and those of the model before training."""
    import numpy as np

    from cfpretrain.base import runtime
    from cfpretrain.evaluation.generation import to_pixels
    from cfpretrain.evaluation.given_images import open_images
    from examples.digits.embedded import distances_beside_floor

    made = None
    if runtime.rank() == 0:
        chosen = {"value": sets[min(arguments.num_ar_steps), 1.0], "untrained": sets[None]}
        made = {name: to_pixels(one.read()[:num_images]) for name, one in chosen.items()}
    made = runtime.gather(made)[0]
    with runtime.together():
        real = open_images(arguments.images, "--images")
        real_NCYX = real.read(np.linspace(0, len(real) - 1, 2 * num_images).round().astype(int))
    return distances_beside_floor(real_NCYX, made, extractor)


def _score(arguments: argparse.Namespace, config: Any, model: Any, sets: "Sets") -> dict[str, Any]:
    import torch

    from cfpretrain.base import runtime
    from cfpretrain.run import build
    from examples.digits.pixels import read_all_images
    from examples.digits.reconstruction import reconstruction_error
    from examples.digits.summary import read_labelled, summarise

    device = next(model.parameters()).device
    torch.set_num_threads(torch.get_num_threads() * runtime.world_size())  # those of the ranks that are done
    with phase("scoring"):
        train, held_out = read_labelled(arguments.images, "--images"), read_labelled(arguments.held_out, "--held-out")
        guided, unguided = (
            {key[0]: one.labelled() for key, one in sets.items() if key is not None and key[1] == scale}
            for scale in (arguments.guidance, 1.0)
        )
        scores = summarise(train, held_out, guided, unguided, config.run.seed, num_splits=2)
        pixels, _ = read_all_images(arguments.held_out, "--held-out")
        autoencoder = build.make_autoencoder(config, device)
        return scores | {"autoencoder_reconstruction_mse": reconstruction_error(autoencoder, pixels, device)}


def _draw(folder: Path, config: Any, model: Any, step: int, sets: "Sets") -> None:
    """The loss map, and a grid of each setting."""
    import torch

    from cfpretrain.data.online import open_training_data
    from cfpretrain.evaluation import pictures
    from cfpretrain.evaluation.generation import grid_title
    from cfpretrain.run import build
    from examples.digits.loss_map import draw_loss_map, measure_loss_map, measure_text_losses, read_means

    with phase("drawing the loss map"):
        device = next(model.parameters()).device
        data = open_training_data(config, device)
        means_NCYX, labels_N, captions = read_means(data, config, _MOST_MAPPED)
        latents_NCYX = build.make_scaling(config).to_model(means_NCYX).to(device)
        loss, tokenizer = build.make_loss(config), build.make_tokenizer(config)
        texts = [] if tokenizer is None else tokenizer.encode_batch(captions)
        of_texts = measure_text_losses(model, loss, latents_NCYX, labels_N, texts) if texts else None
        errors = measure_loss_map(model, loss, latents_NCYX, labels_N, num_bins=20, passes=8, texts=texts)
        draw_loss_map(folder / "loss_map.png", *errors, f"Loss of the EMA weights at step {step}", of_texts)
    names = data.latents[0].class_names[: config.sample.max_classes]
    for key, one in sets.items():
        if key is None:
            continue
        made = one.labelled()
        rows = [made.images[made.labels_N == label][:10] for label in range(len(names))]
        path = folder / build.SAMPLES / f"report_ar_steps_{key[0]:04d}_guidance_{key[1]:g}.png"
        pictures.sample_grid(path, torch.cat(rows), names, grid_title(f"step {step}, EMA weights", one.settings))


def _table(report: dict[str, Any], folder: Path) -> str:
    from cfpretrain.run import build
    from examples.digits.summary import table

    ar_steps, fewest = list(report["class_accuracy"]), f"unguided, AR steps {min(report['num_ar_steps'])}"
    rows: list[tuple[object, ...]] = [
        (),
        ("share of images that are the class", *(f"{n} AR step{'s' if n != '1' else ''}" for n in ar_steps)),
        (f"  guidance {report['guidance']:g}", *report["class_accuracy"].values()),
        ("  unguided", *report["class_accuracy_unguided"].values()),
        ("  real images, held out", report["classifier_accuracy_on_real"]),
        (),
        (fewest, "model", "real", "cheat"),
        *(
            (f"  {name}", *(report[name][who] for who in ("value", "real_against_real", "cheat")))
            for name in ("precision", "recall", "frechet_pixel")
        ),
        (),
        (f"{fewest}, {report['num_embedded']} images", "model", "real", "untrained"),
        (f"  {_FEATURES}", *(report[_FEATURES][who] for who in ("value", "real_against_real", "untrained"))),
        (),
        ("reconstruction by the autoencoder, MSE", report["autoencoder_reconstruction_mse"]),
        (),
    ]
    lines = table(rows).split("\n")
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

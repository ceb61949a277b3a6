"""Samples and scores a run: report.json, a loss map and sample grids in the run folder, and a table on the screen.

    deepspeed --num_accelerators 2 tools/report.py runs/demo \
        --images data/mnist-images --held-out data/mnist-held-out

Samples are decoded and held against real images, not against what the autoencoder makes of those. The scores are those
of small images judged in pixel space, as the demo's digits are.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from cfpretrain import launch
from cfpretrain.console import UserError, ending_in_one_line, path_argument, phase, printable, say
from cfpretrain.evaluation.sampling_options import check_guidance

# For few denoising steps; tools/measure_sampling.py quality holds it against DDPM's.
_SOLVER, _SPACING = "sde-dpm++", "log_snr"
_REPORT_FILE = "report.json"
_MOST_MAPPED = 1500  # latents behind the loss map
_FEATURES = "fd_effnet_lite0"
_MOST_EMBEDDED = 500  # images of each set behind the distance in these features


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Sample and score a run; writes report.json into its folder.")
    parser.add_argument("run", type=path_argument, help="a run folder, e.g. runs/demo")
    parser.add_argument(
        "--images", type=path_argument, required=True, help="image shards that the latents were made of"
    )
    parser.add_argument("--held-out", type=path_argument, required=True, help="image shards kept from training")
    parser.add_argument("--num-images", type=int, default=1000, help="images for each setting (default 1000)")
    parser.add_argument("--num-ar-steps", type=int, nargs="+", default=[1, 4, 16], help="default 1 4 16")
    parser.add_argument(
        "--num-denoising-steps", type=int, default=25, help=f"of each AR step, by {_SOLVER} (default 25)"
    )
    parser.add_argument("--guidance", type=float, default=2.0, help="beside unguided samples (default 2)")
    parser.add_argument("--batch-size", type=int, default=250, help="images a forward on one rank (default 250)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_args()
    launch.check()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Samples on all ranks; rank 0 scores and writes."""
    with phase("loading torch"):
        from cfpretrain import build, runtime
        from cfpretrain.evaluation.features import EFFNET, make_extractor
    device = runtime.pick_device()
    config, model, step = build.load_run(arguments.run, device)
    _check(arguments, config.model.num_tokens, len(build.make_loss(config).schedule))
    _check_decodes(arguments.run, config)
    num_real = _check_images(arguments, config)
    # As many of each set, and the real ones are cut into halves.
    num_embedded = min(_MOST_EMBEDDED, arguments.num_images, num_real // 2)
    settings = _settings(arguments, step, num_embedded)
    report = _read_report(arguments.run)
    if settings.items() <= report.items():
        if runtime.rank() == 0:
            say(f"nothing to do: {arguments.run} is scored at step {step}")
            _print_table(report, arguments.run)
        return
    with runtime.ranks_of_a_tool(device):
        with runtime.together():
            extractor = make_extractor(EFFNET, device)
        generated = {
            guidance: {
                num_ar_steps: _generate(arguments, config, model, num_ar_steps, guidance, device)
                for num_ar_steps in arguments.num_ar_steps
            }
            for guidance in (arguments.guidance, 1.0)
        }
        made = generated[1.0][min(arguments.num_ar_steps)]
        embedded = _score_embedded(arguments, config, made, num_embedded, extractor)
        if runtime.rank() == 0:
            _report(arguments, config, model, step, generated, embedded, settings)


def _read_report(folder: Path) -> dict[str, Any]:
    """What an earlier scoring wrote; nothing where there is none, or it is damaged: it is written anew."""
    try:
        report = json.loads((folder / _REPORT_FILE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _settings(arguments: argparse.Namespace, step: int, num_embedded: int) -> dict[str, Any]:
    """What a report is of; a run that was scored so needs no second scoring."""
    return {
        "scored_step": step,
        "num_scored": arguments.num_images,
        "num_embedded": num_embedded,
        "num_ar_steps": arguments.num_ar_steps,
        "num_denoising_steps": arguments.num_denoising_steps,
        "solver": _SOLVER,
        "guidance": arguments.guidance,
        "images": str(arguments.images),
        "held_out": str(arguments.held_out),
    }


def _check(arguments: argparse.Namespace, num_tokens: int, num_levels: int) -> None:
    for name, value, low, high in (
        ("--num-images", arguments.num_images, 100, 10**6),
        ("--num-denoising-steps", arguments.num_denoising_steps, 2, num_levels),
        ("--batch-size", arguments.batch_size, 1, 10**6),
        *(("--num-ar-steps", value, 1, num_tokens) for value in arguments.num_ar_steps),
    ):
        if not low <= value <= high:
            raise UserError(f"{name}: expected {low} to {high}, got {value}")
    check_guidance(arguments.guidance)
    if arguments.guidance == 1:
        raise UserError("--guidance: expected another scale than 1, which is measured anyway; e.g. 2")


def _check_decodes(run: Path, config: Any) -> None:
    from cfpretrain.model.autoencoder import are_pixels

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
    return infos["--images"].num_samples


def _generate(
    arguments: argparse.Namespace, config: Any, model: Any, num_ar_steps: int, guidance: float, device: Any
) -> Any:
    """Images [N, C, Y, X] with pixels in [-1, 1] and the classes asked for, and how they were made."""
    import torch

    from cfpretrain.evaluation.generation import GenerationSettings, generate_images
    from cfpretrain.evaluation.summary import LabelledImages
    from cfpretrain.order import equal_sizes
    from cfpretrain.sampler import Guidance

    labels = [i % config.model.num_classes for i in range(arguments.num_images)]
    settings = GenerationSettings(
        equal_sizes(config.model.num_tokens, num_ar_steps),
        arguments.num_denoising_steps,
        Guidance(guidance),
        arguments.batch_size,
        config.run.seed,
        _SOLVER,
        _SPACING,
    )
    with phase(f"sampling {len(labels)} images, AR steps {num_ar_steps}, guidance {guidance:g}"):
        images = generate_images(config, model, labels, settings, device)
    return LabelledImages(images * 2 - 1, torch.tensor(labels)), settings


def _score_embedded(
    arguments: argparse.Namespace, config: Any, made: Any, num_images: int, extractor: Any
) -> dict[str, float]:
    """Distances to real images of generated ones, other real ones, and those of the model before training."""
    import numpy as np

    from cfpretrain import build, runtime
    from cfpretrain.evaluation.generation import generate_images, to_pixels
    from cfpretrain.evaluation.given_images import open_images
    from cfpretrain.evaluation.scores import distances_beside_floor

    images, settings = made
    with runtime.together():
        real = open_images(arguments.images, "--images")
        real_NCYX = real.read(np.linspace(0, len(real) - 1, 2 * num_images).round().astype(int))
    labels, device = images.labels_N[:num_images].tolist(), extractor.device
    with phase(f"sampling {num_images} images of the untrained model"):
        untrained = generate_images(config, build.make_untrained(config, device), labels, settings, device)
    candidates = {"value": to_pixels((images.images[:num_images] + 1) / 2), "untrained": to_pixels(untrained)}
    with phase(f"comparing {num_images} images by {extractor.name}"):
        return distances_beside_floor(real_NCYX, candidates, extractor)


def _report(
    arguments: argparse.Namespace,
    config: Any,
    model: Any,
    step: int,
    generated: dict[float, Any],
    embedded: dict[str, float],
    settings: dict[str, Any],
) -> None:
    import numpy as np
    import torch

    from cfpretrain import build, runtime
    from cfpretrain.data.images import read_all_images
    from cfpretrain.data.loader import open_folders
    from cfpretrain.evaluation import pictures
    from cfpretrain.evaluation.generation import grid_title
    from cfpretrain.evaluation.loss_map import measure_loss_map
    from cfpretrain.evaluation.reconstruction import reconstruction_error
    from cfpretrain.evaluation.summary import LabelledImages, summarise

    folder: Path = arguments.run
    device = next(model.parameters()).device
    shards = open_folders(config)[0]
    with phase("drawing the loss map"):
        trained = shards.read_latents(
            np.linspace(0, len(shards) - 1, min(len(shards), _MOST_MAPPED)).round().astype(int)
        )
        latents = build.make_scaling(config).to_model(trained.mean_BCYX).to(device)
        errors = measure_loss_map(model, build.make_loss(config), latents, trained.labels_B, num_bins=20, passes=8)
        pictures.loss_map(folder / "loss_map.png", *errors, title=f"Loss of the EMA weights at step {step}")
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
        guided, unguided = (
            {num: made for num, (made, _) in generated[guidance].items()} for guidance in (arguments.guidance, 1.0)
        )
        scores = summarise(train, held_out, guided, unguided, config.run.seed, num_splits=2)
        autoencoder = build.make_autoencoder(config, device)
        scores[_FEATURES] = embedded
        scores["autoencoder_reconstruction_mse"] = reconstruction_error(autoencoder, held_out_pixels, device)
    names = shards.info.class_names[: config.sample.max_classes]
    samples = folder / build.SAMPLES
    samples.mkdir(exist_ok=True)
    for guidance, by_ar_steps in generated.items():
        for num_ar_steps, (made, how) in by_ar_steps.items():
            rows = [made.images[made.labels_N == label][:10] for label in range(len(names))]
            path = samples / f"report_ar_steps_{num_ar_steps:04d}_guidance_{guidance:g}.png"
            pictures.sample_grid(
                path,
                torch.cat(rows),
                names,
                title=grid_title(f"step {step}, EMA weights", how),
                value_range=(-1.0, 1.0),
            )
    summary = build.read_summary(folder)
    if summary is None or summary["num_steps"] != step:
        summary = {}  # a run that has not ended, or goes on
    report = {**summary, **scores, **settings}
    build.write_text(folder / _REPORT_FILE, json.dumps(report, indent=2) + "\n")
    _print_table(report, folder)


def _print_table(report: dict[str, Any], folder: Path) -> None:
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
    if "train_seconds" in report:
        lines.append(
            f"  trained {report['num_steps']} steps in {report['train_seconds']:.0f} s on {report['world_size']} ranks "
            f"(ZeRO stage {report['zero_stage']}), {report['images_per_second']:.0f} images/s, "
            f"loss {report['loss_first']:.3f} -> {report['loss_last']:.3f}"
        )
    lines.append(f"  pictures: {folder}/samples/*.png {folder}/curves.png {folder}/loss_map.png")
    lines.append(f"  numbers:  {folder}/report.json")
    print(printable("\n".join(lines)), flush=True)
    say(f"{folder} is scored")


if __name__ == "__main__":
    main()

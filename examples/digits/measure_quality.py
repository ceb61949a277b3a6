"""What samples and edits of a model of digits are worth; prints tables and, last, one JSON line.

    python -m examples.digits.measure_quality samples runs/demo --images data/mnist-images \\
        --held-out data/mnist-held-out
    python -m examples.digits.measure_quality edits runs/demo --images data/mnist-images --held-out data/mnist-held-out

samples: the share of images that a classifier, fitted on --images, takes for the class asked for, and seconds an image,
by AR steps; and the few-step solver against DDPM, unguided, with their Frechet distances to all real images.

edits: held-out images of which half the tokens are kept and the others made again as another class: how often the
classifier sees the new class or still the old one; and the step between pixels across the border of the two halves, as
a multiple of that in the same images unedited. Beside it stands what the model makes without regard to the kept half:
tokens of both put together before they are decoded, which smooths the border, and pixels pasted after. Last, how far
the kept tokens moved the new ones from what the model makes without them, as a share of the distance of two images.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import ending_in_one_line, path_argument, phase

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.evaluation.generation import GenerationSettings
    from cfpretrain.evaluation.source import Source
    from examples.digits.classifier import Classifier

_NUM_DDPM_STEPS = 250
_SEAMS = ("seam", "seam_put_together", "seam_pasted")
# Rows of the table of edits.
_EDIT_ROWS = {
    "num_edits": "edits",
    "new_class": "taken for the new class",
    "new_class_put_together": "  put together",
    "old_class": "taken for the old class",
    "old_class_unedited": "  unedited",
    "seam_ratio": "seam, in those of unedited images",
    "seam_ratio_put_together": "  put together",
    "seam_ratio_pasted": "  pasted",
    "moved_by_context": "moved by the kept tokens",
}


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    samples = commands.add_parser("samples", help="class accuracy by AR steps; the few-step solver against DDPM")
    samples.add_argument("--num-ar-steps", type=int, nargs="+", help="default 1 4 16 and one for each token")
    samples.add_argument("--num-images", type=int, default=1000, help="for each setting (default 1000)")
    edits = commands.add_parser("edits", help="new classes seen in edits, and the seam")
    edits.add_argument("--num-ar-steps", type=int, default=1, help="in which the region is made (default 1)")
    edits.add_argument("--num-edits", type=int, default=500, help="default 500")
    edits.add_argument("--regions", nargs="+", default=["top", "bottom"], help="in turn (default top bottom)")
    for command in (samples, edits):
        add = command.add_argument
        add("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
        add("--images", type=path_argument, required=True, help="image shards that the latents were made of")
        add("--held-out", type=path_argument, required=True, help="image shards kept from training")
        add("--num-denoising-steps", type=int, default=25, help="default 25")
        add("--guidance", type=float, default=2.0, help="default 2")
        add("--batch-size", type=int, default=250, help="images (default 250)")
        add("--solver", choices=("ddim", "dpm++", "sde-dpm++"), default="sde-dpm++")
        add("--spacing", choices=("time", "log_snr"), default="log_snr", help="of its noise levels")
        add("--seed", type=int, default=0, help="of noise and orders (default 0)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        for name, least in (("num_images", 1), ("num_edits", 1), ("batch_size", 1), ("num_denoising_steps", 2)):
            check_range(f"--{name.replace('_', '-')}", getattr(arguments, name, least), least)
        with phase("loading torch"):
            import torch
        measured = {"samples": measure_samples, "edits": measure_edits}[arguments.command](arguments)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    print(json.dumps({**options, **measured, "torch": torch.__version__, "hardware": hardware}))


# ---------------------------------------------------------------------------
# Samples


def measure_samples(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples of each number of AR steps, guided and not; and of two solvers in 1 AR step."""
    import torch

    from examples.digits.pixels import frechet_between
    from examples.digits.summary import table

    source, judge, real, held_out = _open(arguments)
    num_tokens = source.config.model.num_tokens
    rows = []
    all_num_ar_steps = arguments.num_ar_steps or sorted({1, min(4, num_tokens), min(16, num_tokens), num_tokens})
    for num_ar_steps in all_num_ar_steps:
        check_range("--num-ar-steps", num_ar_steps, 1, num_tokens)
        guided, unguided = (
            _sample_and_score(arguments, source, judge, _settings(arguments, num_tokens, num_ar_steps, guidance))[1]
            for guidance in (arguments.guidance, 1.0)
        )
        rows.append({"num_ar_steps": num_ar_steps, "guided": guided, "unguided": unguided})
    solvers = {}
    for name in ("ddpm", arguments.solver):
        settings = _settings(arguments, num_tokens, 1, 1.0, is_ddpm=name == "ddpm")
        images, scores = _sample_and_score(arguments, source, judge, settings)
        solvers[name] = {**scores, "frechet_pixel": frechet_between(torch.cat([real, held_out.images]), images)}
    plain, few = solvers["ddpm"], solvers[arguments.solver]
    measured = {
        "rows": rows,
        "solvers": solvers,
        "accuracy_difference": few["accuracy"] - plain["accuracy"],
        "frechet_ratio": few["frechet_pixel"] / plain["frechet_pixel"],
        "classifier_accuracy_on_real": judge.accuracy(held_out.images, held_out.labels_N),
    }
    costs = ("accuracy", "seconds_per_image")
    parts = ("num_evaluations", "accuracy", "frechet_pixel", "seconds_per_image")
    lines: list[tuple[object, ...]] = [
        ("share of images that are the class", f"guidance {arguments.guidance:g}", "s/image", "unguided", "s/image")
    ]
    for row in rows:
        values = [row[which][cost] for which in ("guided", "unguided") for cost in costs]
        lines.append((f"  AR steps {row['num_ar_steps']}", *values))
    lines += [("  real images, held out", measured["classifier_accuracy_on_real"]), ()]
    lines.append(("1 AR step, unguided", "evaluations", "accuracy", "Frechet", "s/image"))
    lines += [(f"  {name}", *(scores[part] for part in parts)) for name, scores in solvers.items()]
    lines.append(("  difference, and ratio", "", measured["accuracy_difference"], measured["frechet_ratio"]))
    print(table(lines), flush=True)
    return measured


def _settings(
    arguments: argparse.Namespace, num_tokens: int, num_ar_steps: int, guidance: float, is_ddpm: bool = False
) -> "GenerationSettings":
    from cfpretrain.core.ar import equal_sizes
    from cfpretrain.core.sampler import Guidance
    from cfpretrain.evaluation.generation import GenerationSettings

    return GenerationSettings(
        equal_sizes(num_tokens, num_ar_steps),
        _NUM_DDPM_STEPS if is_ddpm else arguments.num_denoising_steps,
        Guidance(guidance),
        arguments.batch_size,
        arguments.seed,
        "ddpm" if is_ddpm else arguments.solver,
        "time" if is_ddpm else arguments.spacing,
    )


def _sample_and_score(
    arguments: argparse.Namespace, source: "Source", judge: "Classifier", settings: "GenerationSettings"
) -> tuple["Tensor", dict[str, Any]]:
    """Images with pixels in [-1, 1], all classes evenly; their class accuracy and what they cost."""
    import torch

    from cfpretrain.evaluation.generation import ImageGenerator

    labels = [i % source.config.model.num_classes for i in range(arguments.num_images)]
    with phase(f"sampling {len(labels)} images, {settings}, guidance {settings.guidance.scale:g}"):
        begin = time.perf_counter()
        images = ImageGenerator(source.config, source.model, settings, source.device).images(labels) * 2 - 1
        seconds = time.perf_counter() - begin
    return images, {
        "accuracy": judge.accuracy(images, torch.tensor(labels)),
        # The last batch is filled up.
        "seconds_per_image": seconds / (settings.num_batches(len(labels)) * settings.batch_size),
        "num_evaluations": settings.num_ar_steps * settings.num_denoising_steps,
    }


def _open(arguments: argparse.Namespace) -> tuple["Source", "Classifier", "Tensor", Any]:
    """The model, the classifier, the images it was fitted on, and held-out images; pixels in [-1, 1]."""
    from cfpretrain.base import runtime
    from cfpretrain.evaluation.source import load_source
    from examples.digits import classifier
    from examples.digits.summary import read_labelled

    with phase(f"loading {arguments.source}"):
        source = load_source(arguments.source, runtime.pick_device())
    with phase("fitting the classifier"):
        train, held_out = read_labelled(arguments.images, "--images"), read_labelled(arguments.held_out, "--held-out")
        return source, classifier.fit(train.images, train.labels_N), train.images, held_out


# ---------------------------------------------------------------------------
# Edits


def measure_edits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Edits of held-out images, each under another class than its own, region by region."""
    from cfpretrain.evaluation.editing import read_region
    from examples.digits.summary import table

    source, judge, _, held_out = _open(arguments)
    model, size = source.config.model, held_out.images.shape[-1]
    regions = {text: read_region(text, model.grid, size, None) for text in arguments.regions}
    smallest = min(int(region_L.sum()) for region_L in regions.values())
    check_range("--num-ar-steps", arguments.num_ar_steps, 1, smallest)
    edits = range(arguments.num_edits)
    by_region = {
        text: _edit(arguments, source, judge, held_out, region_L, edits[number :: len(regions)])
        for number, (text, region_L) in enumerate(regions.items())
        if len(edits[number :: len(regions)])
    }
    num_edits = arguments.num_edits
    overall = {
        key: sum(one[key] * one["num_edits"] for one in by_region.values()) / num_edits
        for key in next(iter(by_region.values()))
    }
    columns = {**by_region, "all": {**overall, "num_edits": num_edits}}
    for one in columns.values():
        one |= {name.replace("seam", "seam_ratio"): one[name] / one["seam_unedited"] for name in _SEAMS}
    rows = [(text, *(one[name] for one in columns.values())) for name, text in _EDIT_ROWS.items()]
    print(table([("", *columns), *rows]), flush=True)
    return {**columns.pop("all"), "regions": columns}


def _edit(
    arguments: argparse.Namespace,
    source: "Source",
    judge: "Classifier",
    held_out: Any,
    region_L: "Tensor",
    edits: range,
) -> dict[str, Any]:
    """Scores of edits, of images spread evenly over the held-out ones: these may lie class by class."""
    import torch

    from cfpretrain.core.latents import unpatchify
    from cfpretrain.evaluation.editing import encode_tokens
    from cfpretrain.evaluation.generation import ImageGenerator
    from examples.digits.seams import pixels_of, seam_steps

    config, device, autoencoder = source.config, source.device, source.make_autoencoder()
    num_classes, num_tokens = config.model.num_classes, config.model.num_tokens
    places = torch.tensor(edits) * len(held_out.images) // arguments.num_edits
    old_N = held_out.labels_N[places]
    new_N = (old_N + 1 + torch.tensor(edits) % (num_classes - 1)) % num_classes
    tokens_NLP = encode_tokens(config, autoencoder, ((held_out.images[places] + 1) / 2).to(device))

    def make(region_L: "Tensor") -> "Tensor":
        settings = _settings(arguments, int(region_L.sum()), arguments.num_ar_steps, arguments.guidance)
        generator = ImageGenerator(config, source.model, settings, device)
        return generator.edit(tokens_NLP, region_L, new_N.tolist())

    def look(tokens_NLP: "Tensor") -> "Tensor":
        return autoencoder.decode(unpatchify(tokens_NLP, config.model.patch_size)).cpu() * 2 - 1

    with phase(f"making {len(edits)} edits"):
        edited_NLP = make(region_L)
    if not torch.equal(edited_NLP[:, ~region_L], tokens_NLP[:, ~region_L]):
        raise RuntimeError("kept tokens came back changed")
    with phase("making whole images of the new classes"):
        others_NLP = make(torch.ones(num_tokens, dtype=torch.bool))
    put_together_NLP = torch.where(region_L.to(device)[:, None], others_NLP, tokens_NLP)
    edited, unedited, others, put_together = map(look, (edited_NLP, tokens_NLP, others_NLP, put_together_NLP))
    pasted = torch.where(pixels_of(region_L, unedited), others, unedited)
    two_apart = (others_NLP - others_NLP.roll(1, 0))[:, region_L].square().mean()
    return {
        "num_edits": len(edits),
        "new_class": judge.accuracy(edited, new_N),
        "old_class": judge.accuracy(edited, old_N),
        "old_class_unedited": judge.accuracy(unedited, old_N),
        "new_class_put_together": judge.accuracy(put_together, new_N),
        "new_class_whole": judge.accuracy(others, new_N),
        "seam": float(seam_steps(edited, region_L).mean()),
        "seam_unedited": float(seam_steps(unedited, region_L).mean()),
        "seam_put_together": float(seam_steps(put_together, region_L).mean()),
        "seam_pasted": float(seam_steps(pasted, region_L).mean()),
        "moved_by_context": float((edited_NLP - others_NLP)[:, region_L].square().mean() / two_apart),
    }


if __name__ == "__main__":
    main()

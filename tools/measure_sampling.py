"""What sampling and editing cost and are worth; prints tables and, last, one JSON line.

    OMP_NUM_THREADS=2 python tools/measure_sampling.py speed
    python tools/measure_sampling.py quality runs/demo --images data/mnist-images --held-out data/mnist-held-out
    python tools/measure_sampling.py edits runs/demo --images data/mnist-images --held-out data/mnist-held-out

speed: images a second of the sampler with its cache against a plain one, which is what one would first write: at every
denoising step it passes the condition, the clean tokens made so far and the noised tokens of the AR step through the
network, under the causal mask. It has the same network (of random weights), steps, guidance and noise, leaves tokens
out that are not made yet, and its images are held against ours. The two take turns (a b, b a, ...); what is reported is
the ratio of the medians.

quality: the share of images that a classifier, fitted on --images, takes for the class asked for, and seconds an image,
by AR steps; and the few-step solver against DDPM, unguided, with their Frechet distances to all real images.

edits: held-out images of which half the tokens are kept and the others made anew as another class: how often the
classifier sees the new class or still the old one; and the step between pixels across the border of the two halves, as
a multiple of that in the same images unedited. Beside it stands what the model makes without regard to the kept half:
tokens of both put together before they are decoded, which smoothes the border, and pixels pasted after. Last, how far
the kept tokens moved the new ones from what the model makes without them, as a share of the distance of two images.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base.console import UserError, add_allow_env, ending_in_one_line, path_argument, phase, say

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.core import sampler
    from cfpretrain.core.model import CausalFusion
    from cfpretrain.core.solvers import Solver
    from cfpretrain.evaluation.classifier import Classifier
    from cfpretrain.evaluation.generation import GenerationSettings
    from cfpretrain.evaluation.source import Source

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the largest value
_NUM_DDPM_STEPS = 250


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Measure sampling and editing.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(__doc__.splitlines()[1:]),
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    speed = commands.add_parser("speed", help="the sampler against one without a cache")
    speed.add_argument("--config", nargs="+", default=["configs/benchmark/cpu.yaml"], help="says the network")
    add_allow_env(speed)
    speed.add_argument("--num-ar-steps", type=int, nargs="+", default=[8, 16], help="default 8 16")
    speed.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network (default fp32)")
    speed.add_argument("--alone", action="store_true", help="the sampler with its cache alone")
    speed.add_argument("--pairs", type=int, default=3, help="timed turns of each (default 3)")
    quality = commands.add_parser("quality", help="class accuracy by AR steps; the few-step solver against DDPM")
    quality.add_argument("--num-ar-steps", type=int, nargs="+", help="default 1 4 16 and one for each token")
    quality.add_argument("--num-images", type=int, default=1000, help="for each setting (default 1000)")
    edits = commands.add_parser("edits", help="new classes seen in edits, and the seam")
    edits.add_argument("--num-ar-steps", type=int, default=1, help="in which the region is made (default 1)")
    edits.add_argument("--num-edits", type=int, default=500, help="default 500")
    edits.add_argument("--regions", nargs="+", default=["top", "bottom"], help="in turn (default top bottom)")
    for command, steps, batch_size in ((speed, 10, 4), (quality, 25, 250), (edits, 25, 250)):
        command.add_argument("--num-denoising-steps", type=int, default=steps, help=f"default {steps}")
        command.add_argument("--guidance", type=float, default=2.0, help="default 2")
        command.add_argument("--batch-size", type=int, default=batch_size, help=f"images (default {batch_size})")
    for command in (quality, edits):
        command.add_argument("source", type=path_argument, help="a run folder, or one that tools/export_hf.py wrote")
        command.add_argument(
            "--images", type=path_argument, required=True, help="image shards that the latents were made of"
        )
        command.add_argument("--held-out", type=path_argument, required=True, help="image shards kept from training")
        command.add_argument("--solver", choices=("ddim", "dpm++", "sde-dpm++"), default="sde-dpm++")
        command.add_argument("--spacing", choices=("time", "log_snr"), default="log_snr", help="of its noise levels")
        command.add_argument("--seed", type=int, default=0, help="of noise and orders (default 0)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        _check(arguments)
        with phase("loading torch"):
            import torch
        what = {"speed": measure_speed, "quality": measure_quality, "edits": measure_edits}[arguments.command]
        measured = what(arguments)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    print(json.dumps({**options, **measured, "torch": torch.__version__, "hardware": hardware}))


def _check(arguments: argparse.Namespace) -> None:
    for name in ("pairs", "num_images", "num_edits", "batch_size"):
        value = getattr(arguments, name, 1)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if arguments.num_denoising_steps < 2:
        raise UserError(f"--num-denoising-steps: expected at least 2, got {arguments.num_denoising_steps}")


def _check_ar_steps(all_num_ar_steps: Sequence[int], num_tokens: int) -> None:
    for num_ar_steps in all_num_ar_steps:
        if not 1 <= num_ar_steps <= num_tokens:
            raise UserError(f"--num-ar-steps: expected 1 to {num_tokens}, got {num_ar_steps}")


# ---------------------------------------------------------------------------
# Speed


def measure_speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both samplers for each number of AR steps."""
    import torch

    from cfpretrain.base import config as configs
    from cfpretrain.base import runtime
    from cfpretrain.core import attention
    from cfpretrain.core.model import BlockSettings, initialise
    from cfpretrain.run.build import make_model

    device = runtime.pick_device()
    config = configs.load(arguments.config, (), arguments.allow_env)
    _check_ar_steps(arguments.num_ar_steps, config.model.num_tokens)
    head_width = config.model.width // config.model.num_heads
    cached = attention.choose("auto", "sampling", device.type, arguments.precision, head_width, say)
    with device:
        model = make_model(config, BlockSettings(cached_attention=cached)).eval().requires_grad_(False)
    initialise(model, seed=0)
    torch.nn.init.normal_(model.noise_head.linear.weight, std=0.02)  # the head begins at 0, and would predict nothing
    model.to(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    rows = [_time_both(model, num_ar_steps, arguments, device) for num_ar_steps in arguments.num_ar_steps]
    return {"tokens": config.model.num_tokens, "cached_attention": cached, "rows": rows}


def _time_both(
    model: "CausalFusion", num_ar_steps: int, arguments: argparse.Namespace, device: Any
) -> dict[str, float]:
    import torch

    from cfpretrain.core import ar as order
    from cfpretrain.core import sampler
    from cfpretrain.core.process import make_process
    from cfpretrain.core.solvers import Solver

    ids_B = torch.arange(arguments.batch_size)
    given = (
        model,
        (ids_B % model.num_classes).to(device),
        sampler.sampling_orders(0, ids_B, model.grid**2).to(device),
        order.equal_sizes(model.grid**2, num_ar_steps),
        Solver(make_process(), arguments.num_denoising_steps),
        sampler.Guidance(arguments.guidance),
        sampler.noise_by_image(0, ids_B.to(device), model.patch_values),
    )
    sides: dict[str, Callable[..., Tensor]] = {"cached": sampler.generate}
    if not arguments.alone:
        sides["plain"] = generate_plainly
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    images: dict[str, Tensor] = {}
    for turn in range(arguments.pairs + 1):  # the first warms up
        for name in sides if turn % 2 else reversed(sides):
            begin = time.perf_counter()
            images[name] = sides[name](*given).cpu()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
        say(f"{num_ar_steps} AR steps, turn {turn} of {arguments.pairs}")
    cached = arguments.batch_size / statistics.median(seconds["cached"])
    row = {"num_ar_steps": num_ar_steps, "cached_images_per_second": cached}
    said = f"{num_ar_steps} AR steps: {cached:.3f} images/s with the cache"
    if not arguments.alone:
        difference = float((images["cached"] - images["plain"]).abs().max() / images["plain"].abs().max())
        if not difference < _TOLERANCE[arguments.precision]:
            raise UserError(f"the two samplers disagree by {difference:.2g} at {num_ar_steps} AR steps: not compared")
        plain = arguments.batch_size / statistics.median(seconds["plain"])
        row |= {"plain_images_per_second": plain, "ratio": cached / plain, "difference": difference}
        said += f", {plain:.3f} without: {cached / plain:.2f} times (images differ by {difference:.1g})"
    say(said)
    return row


def generate_plainly(
    model: "CausalFusion",
    labels_B: "Tensor",
    order_BL: "Tensor",
    ar_step_sizes: Sequence[int],
    solver: "Solver",
    guidance: "sampler.Guidance",
    draw_noise: "sampler.NoiseDraw",
) -> "Tensor":
    """What `sampler.generate` does, with the context computed anew at every denoising step."""
    import torch

    from cfpretrain.core.latents import take_tokens

    branches = [labels_B] if guidance.scale == 1 else [labels_B, torch.full_like(labels_B, model.null_class)]
    labels = torch.cat(branches)
    made_BLP = torch.zeros(len(order_BL), 0, model.patch_values, device=labels_B.device)
    for step, size in enumerate(ar_step_sizes):
        begin = made_BLP.shape[1]
        before_BK, at_BN = order_BL[:, :begin], order_BL[:, begin : begin + size]
        intervals_1MI = _visible(model.num_cond_tokens, ar_step_sizes[: step + 1]).to(labels.device)
        x_BNP = solver.denoise(
            functools.partial(
                _predict_plainly, model, labels, made_BLP, before_BK, at_BN, intervals_1MI, guidance.scale
            ),
            lambda k, at_BN=at_BN: draw_noise(k, at_BN),
        )
        made_BLP = torch.cat([made_BLP, x_BNP], dim=1)
    return take_tokens(made_BLP, order_BL.argsort(1))


def _predict_plainly(
    model: "CausalFusion",
    labels: "Tensor",
    made_BLP: "Tensor",
    before_BK: "Tensor",
    at_BN: "Tensor",
    intervals_1MI: "Tensor",
    scale: float,
    x_BNP: "Tensor",
    time: float,
) -> "Tensor":
    import torch

    from cfpretrain.core.modalities import CLASS, IMAGE
    from cfpretrain.core.segments import Segment

    n = len(labels) // len(x_BNP)
    made, noised = made_BLP.repeat(n, 1, 1), x_BNP.repeat(n, 1, 1)
    times = torch.full((len(labels),), time, device=labels.device)
    segments = [
        Segment(CLASS, clean=labels),
        Segment(IMAGE, clean=made, positions_BL=before_BK.repeat(n, 1)),
        Segment(IMAGE, noised=noised, positions_BL=at_BN.repeat(n, 1), times_B=times),
    ]
    with torch.no_grad():
        (prediction,) = model(segments, intervals_1MI)
    if n == 1:
        return prediction
    with_class, without_class = prediction.chunk(2)
    return without_class + scale * (with_class - without_class)


def _visible(num_cond_tokens: int, sizes: Sequence[int]) -> "Tensor":
    """Who sees whom in [condition | clean tokens of all steps but the last | noised tokens of the last]: [1, M, 4]."""
    import torch

    ends = torch.tensor([num_cond_tokens, *sizes]).cumsum(0)
    # The last rows see all: what is there is clean and of earlier steps, or of their own.
    prefix_end_M = ends.repeat_interleave(torch.tensor([num_cond_tokens, *sizes]))
    intervals = torch.zeros(1, len(prefix_end_M), 4, dtype=torch.int32)
    intervals[0, :, 1] = prefix_end_M
    return intervals


# ---------------------------------------------------------------------------
# Quality


def measure_quality(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples of each number of AR steps, guided and not; and of two solvers in 1 AR step."""
    import torch

    from cfpretrain.evaluation.frechet import frechet_between

    source, judge, real, held_out = _open(arguments)
    num_tokens = source.config.model.num_tokens
    rows = []
    all_num_ar_steps = arguments.num_ar_steps or sorted({1, min(4, num_tokens), min(16, num_tokens), num_tokens})
    _check_ar_steps(all_num_ar_steps, num_tokens)
    for num_ar_steps in all_num_ar_steps:
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
    _say_quality(measured, arguments)
    return measured


def _say_quality(measured: dict[str, Any], arguments: argparse.Namespace) -> None:
    lines = [
        f"share of images that are the class (real ones, held out: {measured['classifier_accuracy_on_real']:.3f})",
        f"  {'AR steps':<12}{f'guidance {arguments.guidance:g}':>14}{'s/image':>10}{'unguided':>14}{'s/image':>10}",
    ]
    for row in measured["rows"]:
        cells = "".join(
            f"{row[which]['accuracy']:>14.3f}{row[which]['seconds_per_image']:>10.3f}"
            for which in ("guided", "unguided")
        )
        lines.append(f"  {row['num_ar_steps']:<12}{cells}")
    lines += [
        "1 AR step, unguided",
        f"  {'solver':<16}{'evaluations':>12}{'accuracy':>12}{'Frechet':>12}{'s/image':>10}",
    ]
    for name, scores in measured["solvers"].items():
        lines.append(
            f"  {name:<16}{scores['num_evaluations']:>12}{scores['accuracy']:>12.3f}{scores['frechet_pixel']:>12.3f}"
            f"{scores['seconds_per_image']:>10.3f}"
        )
    lines.append(
        f"  difference of accuracy {measured['accuracy_difference']:+.3f}, ratio of Frechet distances "
        f"{measured['frechet_ratio']:.3f}"
    )
    print("\n".join(lines), flush=True)


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

    from cfpretrain.evaluation.generation import generate_images

    labels = [i % source.config.model.num_classes for i in range(arguments.num_images)]
    what = f"AR steps {settings.num_ar_steps}, {settings.num_denoising_steps} denoising steps ({settings.solver})"
    with phase(f"sampling {len(labels)} images, {what}, guidance {settings.guidance.scale:g}"):
        begin = time.perf_counter()
        images = generate_images(source.config, source.model, labels, settings, source.device) * 2 - 1
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
    from cfpretrain.data.images import read_all_images
    from cfpretrain.evaluation import classifier
    from cfpretrain.evaluation.source import load_source
    from cfpretrain.evaluation.summary import LabelledImages

    with phase(f"loading {arguments.source}"):
        source = load_source(arguments.source, runtime.pick_device())
    with phase("fitting the classifier"):
        train, held_out = (
            LabelledImages(images.float() / 127.5 - 1, labels)
            for images, labels in (
                read_all_images(arguments.images, "--images"),
                read_all_images(arguments.held_out, "--held-out"),
            )
        )
        return source, classifier.fit(train.images, train.labels_N), train.images, held_out


# ---------------------------------------------------------------------------
# Edits


def measure_edits(arguments: argparse.Namespace) -> dict[str, Any]:
    """Edits of held-out images, each under another class than its own, region by region."""
    from cfpretrain.evaluation.editing import read_region

    source, judge, _, held_out = _open(arguments)
    model, size = source.config.model, held_out.images.shape[-1]
    regions = {text: read_region(text, model.grid, size, None) for text in arguments.regions}
    _check_ar_steps([arguments.num_ar_steps], min(int(region_L.sum()) for region_L in regions.values()))
    edits = range(arguments.num_edits)
    by_region = {
        text: _edit(arguments, source, judge, held_out, region_L, edits[number :: len(regions)])
        for number, (text, region_L) in enumerate(regions.items())
        if len(edits[number :: len(regions)])
    }
    overall = {
        key: sum(one[key] * one["num_edits"] for one in by_region.values()) / arguments.num_edits
        for key in next(iter(by_region.values()))
        if key != "num_edits"
    }
    for text, one in {**by_region, "all": {**overall, "num_edits": arguments.num_edits}}.items():
        seams = {name: one[name] / one["seam_unedited"] for name in ("seam", "seam_put_together", "seam_pasted")}
        say(
            f"{text}: of {one['num_edits']} edits the classifier sees the new class in {one['new_class']:.3f} (put "
            f"together: {one['new_class_put_together']:.3f}), the old one in {one['old_class']:.3f} (unedited: "
            f"{one['old_class_unedited']:.3f}); seam {seams['seam']:.2f} of unedited images' (put together "
            f"{seams['seam_put_together']:.2f}, pasted {seams['seam_pasted']:.2f}); moved by the kept tokens: "
            f"{one['moved_by_context']:.3f}"
        )
    return {
        **overall,
        "seam_ratio": overall["seam"] / overall["seam_unedited"],
        "seam_ratio_put_together": overall["seam_put_together"] / overall["seam_unedited"],
        "seam_ratio_pasted": overall["seam_pasted"] / overall["seam_unedited"],
        "regions": by_region,
    }


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
    from cfpretrain.evaluation.editing import encode_tokens, pixels_of, seam_steps
    from cfpretrain.evaluation.generation import edit_tokens

    config, device, autoencoder = source.config, source.device, source.make_autoencoder()
    num_classes, num_tokens = config.model.num_classes, config.model.num_tokens
    places = torch.tensor(edits) * len(held_out.images) // arguments.num_edits
    old_N = held_out.labels_N[places]
    new_N = (old_N + 1 + torch.tensor(edits) % (num_classes - 1)) % num_classes
    tokens_NLP = encode_tokens(config, autoencoder, ((held_out.images[places] + 1) / 2).to(device))

    def make(region_L: "Tensor") -> "Tensor":
        settings = _settings(arguments, int(region_L.sum()), arguments.num_ar_steps, arguments.guidance)
        return edit_tokens(config, source.model, tokens_NLP, region_L, new_N.tolist(), settings, device)

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

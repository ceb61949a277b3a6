"""What sampling costs; prints a line for each number of AR steps and, last, one JSON line.

    OMP_NUM_THREADS=2 python tools/measure_sampling.py speed

speed: images a second of the sampler with its cache against a plain one, which is what one would first write: at every
denoising step it passes the condition, the clean tokens made so far and the noised tokens of the AR step through the
network, under the causal mask. It has the same network (of random weights), steps, guidance and noise, leaves tokens
out that are not made yet, and its images are held against ours. The two take turns (a b, b a, ...); what is reported is
the ratio of the medians.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cfpretrain.base.console import UserError, add_allow_env, ending_in_one_line, phase, say

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.core import sampler
    from cfpretrain.core.model import CausalFusion
    from cfpretrain.core.solvers import Solver

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the largest value


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description="Measure sampling.",
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
    speed.add_argument("--num-denoising-steps", type=int, default=10, help="default 10")
    speed.add_argument("--guidance", type=float, default=2.0, help="default 2")
    speed.add_argument("--batch-size", type=int, default=4, help="images (default 4)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        _check(arguments)
        with phase("loading torch"):
            import torch
        measured = measure_speed(arguments)
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(json.dumps({**vars(arguments), **measured, "torch": torch.__version__, "hardware": hardware}))


def _check(arguments: argparse.Namespace) -> None:
    for name in ("pairs", "batch_size"):
        value = getattr(arguments, name)
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


if __name__ == "__main__":
    main()

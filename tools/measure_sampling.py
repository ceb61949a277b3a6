"""Images a second of the sampler with its cache against a plain one; prints a table and, last, one JSON line.

    OMP_NUM_THREADS=2 python tools/measure_sampling.py --config configs/benchmark/cpu.yaml

The plain sampler is what one would first write: at every denoising step it passes the condition, the clean tokens made
so far and the noised tokens of the AR step through the network, under the causal mask. It has the same network, steps,
guidance and noise, leaves tokens out that are not made yet, and its images are held against ours. The two take turns
(a b, b a, ...); what is reported is the ratio of the medians.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfpretrain import config as configs
from cfpretrain import noise, runtime, sampler
from cfpretrain.build import make_model
from cfpretrain.console import UserError, exit_with, say
from cfpretrain.model.transformer import CausalFusion, ClassPart, ImagePart, initialise
from cfpretrain.order import equal_sizes

_TOLERANCE = 1e-4  # of the largest value


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Time the sampler against one without a cache.")
    parser.add_argument("--config", default="configs/benchmark/cpu.yaml", metavar="FILE", help="says the network")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--num-ar-steps", type=int, nargs="+", default=[8, 16], help="default 8 16")
    parser.add_argument("--num-denoising-steps", type=int, default=10, help="of each AR step (default 10)")
    parser.add_argument("--guidance", type=float, default=2.0, help="default 2; 1: none")
    parser.add_argument("--batch-size", type=int, default=4, help="images (default 4)")
    parser.add_argument("--pairs", type=int, default=3, help="timed turns of each (default 3)")
    arguments = parser.parse_intermixed_args()
    try:
        measured = measure(arguments)
    except UserError as error:
        exit_with(error)
    print(json.dumps(measured))


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Times both for each number of AR steps."""
    device = runtime.pick_device()
    config = configs.load(arguments.config, arguments.overrides)
    for num_ar_steps in arguments.num_ar_steps:
        if not 1 <= num_ar_steps <= config.model.num_tokens:
            raise UserError(f"--num-ar-steps: expected 1 to {config.model.num_tokens}, got {num_ar_steps}")
    model = make_model(config).eval().requires_grad_(False)
    initialise(model, seed=0)
    torch.nn.init.normal_(model.noise_head.linear.weight, std=0.02)  # the head begins at 0, and would predict nothing
    model.to(device)
    rows = [_measure_one(model, num_ar_steps, arguments, device) for num_ar_steps in arguments.num_ar_steps]
    return {
        "config": arguments.config,
        "tokens": config.model.num_tokens,
        "num_denoising_steps": arguments.num_denoising_steps,
        "guidance": arguments.guidance,
        "batch_size": arguments.batch_size,
        "rows": rows,
        "torch": torch.__version__,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads, {device}",
    }


def _measure_one(
    model: CausalFusion, num_ar_steps: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    schedule = noise.respace(noise.linear_schedule(), arguments.num_denoising_steps)
    ids_B = torch.arange(arguments.batch_size)
    given = (
        model,
        (ids_B % model.num_classes).to(device),
        sampler.sampling_orders(0, ids_B, model.grid**2).to(device),
        equal_sizes(model.grid**2, num_ar_steps),
        schedule,
        sampler.Guidance(arguments.guidance),
        sampler.noise_by_image(0, ids_B.to(device), model.patch_values),
    )
    sides: dict[str, Callable[..., Tensor]] = {"cached": sampler.generate, "plain": generate_plainly}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    images: dict[str, Tensor] = {}
    for turn in range(arguments.pairs + 1):  # the first warms up
        for name in sides if turn % 2 else reversed(sides):
            begin = time.perf_counter()
            images[name] = sides[name](*given).cpu()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
        say(f"{num_ar_steps} AR steps, turn {turn} of {arguments.pairs}")
    difference = float((images["cached"] - images["plain"]).abs().max() / images["plain"].abs().max())
    if not difference < _TOLERANCE:
        raise UserError(f"the two samplers disagree by {difference:.2g} at {num_ar_steps} AR steps: not compared")
    cached, plain = (statistics.median(seconds[name]) for name in sides)
    row = {
        "num_ar_steps": num_ar_steps,
        "cached_images_per_second": arguments.batch_size / cached,
        "plain_images_per_second": arguments.batch_size / plain,
        "ratio": plain / cached,
        "difference": difference,
    }
    say(
        f"{num_ar_steps} AR steps: {row['cached_images_per_second']:.3f} images/s with the cache, "
        f"{row['plain_images_per_second']:.3f} without: {row['ratio']:.2f} times (images differ by {difference:.1g})"
    )
    return row


@torch.no_grad()
def generate_plainly(
    model: CausalFusion,
    labels_B: Tensor,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    schedule: noise.Schedule,
    guidance: sampler.Guidance,
    draw_noise: sampler.NoiseDraw,
) -> Tensor:
    """What `sampler.generate` does, with the context computed anew at every denoising step."""
    branches = [labels_B] if guidance.scale == 1 else [labels_B, torch.full_like(labels_B, model.null_class)]
    labels, orders = torch.cat(branches), order_BL.repeat(len(branches), 1)
    made_BLP = torch.zeros(*order_BL.shape[:1], 0, model.patch_values, device=labels_B.device)
    begin = 0
    for step, size in enumerate(ar_step_sizes):
        end = begin + size
        intervals_1MI = visible(model.num_cond_tokens, ar_step_sizes[: step + 1]).to(labels.device)
        x_BNP = draw_noise(0, order_BL[:, begin:end])
        for denoising_step, level in enumerate(reversed(range(len(schedule))), start=1):
            image = ImagePart(
                made_BLP.repeat(len(branches), 1, 1),
                orders[:, :begin],
                x_BNP.repeat(len(branches), 1, 1),
                orders[:, begin:end],
                schedule.timesteps_T[level].expand(len(labels)).to(labels.device),
            )
            epsilon = model([ClassPart(labels), image], intervals_1MI)
            if len(branches) == 2:
                with_class, without_class = epsilon.chunk(2)
                epsilon = without_class + guidance.scale * (with_class - without_class)
            noise_BNP = draw_noise(denoising_step, order_BL[:, begin:end]) if level else torch.zeros_like(x_BNP)
            x_BNP = noise.ddpm_update(schedule, level, x_BNP, epsilon, noise_BNP)
        made_BLP = torch.cat([made_BLP, x_BNP], dim=1)
        begin = end
    return made_BLP.gather(1, order_BL.argsort(1).unsqueeze(-1).expand_as(made_BLP))


def visible(num_cond_tokens: int, sizes: Sequence[int]) -> Tensor:
    """Who sees whom in [condition | clean tokens of all steps but the last | noised tokens of the last]: [1, M, 4]."""
    ends = torch.tensor([num_cond_tokens, *sizes]).cumsum(0)
    # The last rows see all: what is there is clean and of earlier steps, or of their own.
    prefix_end_M = ends.repeat_interleave(torch.tensor([num_cond_tokens, *sizes]))
    intervals = torch.zeros(1, len(prefix_end_M), 4, dtype=torch.int32)
    intervals[0, :, 1] = prefix_end_M
    return intervals


if __name__ == "__main__":
    main()

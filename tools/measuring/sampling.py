"""Times the sampler with its cache beside a plain one without.

    OMP_NUM_THREADS=2 python tools/measure.py sampling

The plain sampler is what one would first write: at every denoising step it passes the condition, the clean tokens made
so far and the noised tokens of the AR step through the network, under the causal mask. It has the same network (of
random weights; --config says which, by default configs/benchmark/cpu.yaml), steps, guidance and noise, leaves tokens
out that are not made yet, and its images are held against ours. The two take turns (a b, b a, ...); what is reported is
the ratio of the medians of images a second.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import runtime
from cfpretrain.base.command_line import check_range
from cfpretrain.base.console import UserError, say
from cfpretrain.core import ar, attention, sampler
from cfpretrain.core import process as noise
from cfpretrain.core.model import BlockSettings, CausalFusion, ClassPart, ImagePart, initialise, take_tokens
from cfpretrain.run.build import make_model
from tools.measuring.common import alternate

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}  # of the largest value


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times both samplers for each number of AR steps."""
    check_range("--num-denoising-steps", arguments.num_denoising_steps, 2)
    device = runtime.pick_device()
    config = configs.load(arguments.config or ["configs/benchmark/cpu.yaml"], arguments.overrides, arguments.allow_env)
    for num_ar_steps in arguments.num_ar_steps:
        check_range("--num-ar-steps", num_ar_steps, 1, config.model.num_tokens)
    head_width = config.model.width // config.model.num_heads
    cached = attention.choose_cached("auto", device.type, arguments.precision, head_width, say)
    with device:
        model = make_model(config, BlockSettings(cached_attention=cached)).eval().requires_grad_(False)
    initialise(model, seed=0)
    torch.nn.init.normal_(model.noise_head.linear.weight, std=0.02)  # the head begins at 0, and would predict nothing
    model.to(torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    rows = [_time_both(model, num_ar_steps, arguments, device) for num_ar_steps in arguments.num_ar_steps]
    return vars(arguments) | {"tokens": config.model.num_tokens, "cached_attention": cached, "rows": rows}


def _time_both(
    model: CausalFusion, num_ar_steps: int, arguments: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    ids_B = torch.arange(arguments.batch_size)
    given = (
        model,
        (ids_B % model.num_classes).to(device),
        sampler.sampling_orders(0, ids_B, model.grid**2).to(device),
        ar.equal_sizes(model.grid**2, num_ar_steps),
        noise.respace(noise.linear_schedule(), arguments.num_denoising_steps),
        sampler.Guidance(arguments.guidance),
        sampler.noise_by_image(0, ids_B.to(device), model.patch_values),
    )
    images: dict[str, Tensor] = {}

    def rate(name: str, generate: Callable[..., Tensor]) -> float:
        begin = time.perf_counter()
        images[name] = generate(*given).cpu()
        return arguments.batch_size / (time.perf_counter() - begin)

    sides = {"cached": lambda: rate("cached", sampler.generate)}
    if not arguments.alone:
        sides["plain"] = lambda: rate("plain", generate_plainly)
    say(f"{num_ar_steps} AR steps")
    rates = alternate(sides, arguments.pairs, "images/s")
    cached = statistics.median(rates["cached"])
    row = {"num_ar_steps": num_ar_steps, "cached_images_per_second": cached}
    said = f"{num_ar_steps} AR steps: {cached:.3f} images/s with the cache"
    if not arguments.alone:
        difference = float((images["cached"] - images["plain"]).abs().max() / images["plain"].abs().max())
        if not difference < _TOLERANCE[arguments.precision]:
            raise UserError(f"the two samplers disagree by {difference:.2g} at {num_ar_steps} AR steps: not compared")
        plain = statistics.median(rates["plain"])
        row |= {"plain_images_per_second": plain, "ratio": cached / plain, "difference": difference}
        said += f", {plain:.3f} without: {cached / plain:.2f} times (images differ by {difference:.1g})"
    say(said)
    return row


def generate_plainly(
    model: CausalFusion,
    labels_B: Tensor,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    schedule: noise.Schedule,
    guidance: sampler.Guidance,
    draw_noise: sampler.NoiseDraw,
) -> Tensor:
    """What `sampler.generate` does, with the context computed again at every denoising step."""
    branches = [labels_B] if guidance.scale == 1 else [labels_B, torch.full_like(labels_B, model.null_class)]
    labels, orders = torch.cat(branches), order_BL.repeat(len(branches), 1)
    made_BLP = torch.zeros(*order_BL.shape[:1], 0, model.patch_values, device=labels_B.device)
    begin = 0
    for step, size in enumerate(ar_step_sizes):
        end = begin + size
        intervals_1MI = _visible(model.num_cond_tokens, ar_step_sizes[: step + 1]).to(labels.device)
        x_BNP = draw_noise(0, order_BL[:, begin:end])
        for denoising_step, level in enumerate(reversed(range(len(schedule))), start=1):
            image = ImagePart(
                made_BLP.repeat(len(branches), 1, 1),
                orders[:, :begin],
                x_BNP.repeat(len(branches), 1, 1),
                orders[:, begin:end],
                schedule.timesteps_T[level].expand(len(labels)).to(labels.device),
            )
            with torch.no_grad():
                epsilon = model([ClassPart(labels), image], intervals_1MI)
            if len(branches) == 2:
                with_class, without_class = epsilon.chunk(2)
                epsilon = without_class + guidance.scale * (with_class - without_class)
            noise_BNP = draw_noise(denoising_step, order_BL[:, begin:end]) if level else torch.zeros_like(x_BNP)
            x_BNP = noise.ddpm_update(schedule, level, x_BNP, epsilon, noise_BNP)
        made_BLP = torch.cat([made_BLP, x_BNP], dim=1)
        begin = end
    return take_tokens(made_BLP, order_BL.argsort(1))


def _visible(num_cond_tokens: int, sizes: Sequence[int]) -> Tensor:
    """Who sees whom in [condition | clean tokens of all steps but the last | noised tokens of the last]: [1, M, 4]."""
    ends = torch.tensor([num_cond_tokens, *sizes]).cumsum(0)
    # The last rows see all: what is there is clean and of earlier steps, or of their own.
    prefix_end_M = ends.repeat_interleave(torch.tensor([num_cond_tokens, *sizes]))
    intervals = torch.zeros(1, len(prefix_end_M), 4, dtype=torch.int32)
    intervals[0, :, 1] = prefix_end_M
    return intervals

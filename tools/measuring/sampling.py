"""Times the sampler with its cache beside a plain one without.

    OMP_NUM_THREADS=2 python tools/measure.py sampling

The plain sampler is what one would first write: at every denoising step it passes the condition, the clean tokens made
so far and the noised tokens of the AR step through the network, under the causal mask. It has the same network (of
random weights; --config says which, by default configs/benchmark/cpu.yaml), steps, guidance and noise, leaves tokens
out that are not made yet, and its images are held against ours. The two take turns (a b, b a, ...); what is reported is
the ratio of the medians of images a second.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import runtime
from cfpretrain.base.command_line import check_range
from cfpretrain.base.console import UserError, say
from cfpretrain.core import ar, attention, sampler
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.latents import take_tokens
from cfpretrain.core.modalities import CLASS, IMAGE
from cfpretrain.core.model import CausalFusion, initialise
from cfpretrain.core.process import make_process
from cfpretrain.core.segments import Segment
from cfpretrain.core.solvers import Solver
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
    head_width = config.model.design.head_width
    cached = attention.choose("auto", "sampling", device.type, arguments.precision, head_width, say)
    with device:
        model = make_model(config, BlockSettings(sampling_attention=cached)).eval().requires_grad_(False)
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
        Solver(make_process(), arguments.num_denoising_steps),
        sampler.Guidance(arguments.guidance),
        sampler.noise_by_image(0, ids_B.to(device), model.patch_values),
    )
    images: dict[str, Tensor] = {}

    def rate(name: str) -> float:
        begin = time.perf_counter()
        images[name] = (sampler.generate if name == "cached" else generate_plainly)(*given).cpu()
        return arguments.batch_size / (time.perf_counter() - begin)

    say(f"{num_ar_steps} AR steps")
    names = ["cached"] if arguments.alone else ["cached", "plain"]
    rates = alternate({name: functools.partial(rate, name) for name in names}, arguments.pairs, "images/s")
    medians = {name: statistics.median(of_side) for name, of_side in rates.items()}
    row = {"num_ar_steps": num_ar_steps, **{f"{name}_images_per_second": value for name, value in medians.items()}}
    said = f"{num_ar_steps} AR steps: {medians['cached']:.3f} images/s with the cache"
    if not arguments.alone:
        difference = float((images["cached"] - images["plain"]).abs().max() / images["plain"].abs().max())
        if not difference < _TOLERANCE[arguments.precision]:
            raise UserError(f"the two samplers disagree by {difference:.2g} at {num_ar_steps} AR steps: not compared")
        ratio = medians["cached"] / medians["plain"]
        row |= {"ratio": ratio, "difference": difference}
        said += f", {medians['plain']:.3f} without: {ratio:.2f} times (images differ by {difference:.1g})"
    say(said)
    return row


def generate_plainly(
    model: CausalFusion,
    labels_B: Tensor,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    solver: Solver,
    guidance: sampler.Guidance,
    draw_noise: sampler.NoiseDraw,
) -> Tensor:
    """What `sampler.generate` does, with the context computed again at every denoising step."""
    branches = [labels_B] if guidance.scale == 1 else [labels_B, torch.full_like(labels_B, model.null_class)]
    labels, n = torch.cat(branches), len(branches)
    # Rotary positions of a class and an image, which only some trunks have.
    place_1Q = torch.zeros(1, model.num_cond_tokens, dtype=torch.int64, device=labels.device)
    place_1L = torch.ones(1, order_BL.shape[1], dtype=torch.int64, device=labels.device)
    made_BLP = torch.zeros(len(order_BL), 0, model.patch_values, device=labels_B.device)
    for step, size in enumerate(ar_step_sizes):
        begin = made_BLP.shape[1]
        before_BK, at_BN = order_BL[:, :begin], order_BL[:, begin : begin + size]
        intervals_1MI = _visible(model.num_cond_tokens, ar_step_sizes[: step + 1]).to(labels.device)
        before = [
            Segment(CLASS, clean=labels, rotary_BL=place_1Q),
            Segment(IMAGE, clean=made_BLP.repeat(n, 1, 1), positions_BL=before_BK.repeat(n, 1), rotary_BL=place_1L),
        ]

        @torch.no_grad()
        def predict(x_BNP: Tensor, time: float, before=before, at_BN=at_BN, intervals_1MI=intervals_1MI) -> Tensor:
            times = torch.full((len(labels),), time, device=labels.device)
            places_BN, noised = at_BN.repeat(n, 1), x_BNP.repeat(n, 1, 1)
            image = Segment(IMAGE, noised=noised, positions_BL=places_BN, rotary_BL=place_1L, times_B=times)
            prediction = model([*before, image], intervals_1MI)[IMAGE]
            if n == 1:
                return prediction
            with_class, without_class = prediction.chunk(2)
            return without_class + guidance.scale * (with_class - without_class)

        x_BNP = solver.denoise(predict, lambda k, at_BN=at_BN: draw_noise(k, at_BN))
        made_BLP = torch.cat([made_BLP, x_BNP], dim=1)
    return take_tokens(made_BLP, order_BL.argsort(1))


def _visible(num_cond_tokens: int, sizes: Sequence[int]) -> Tensor:
    """Who sees whom in [condition | clean tokens of all steps but the last | noised tokens of the last]: [1, M, 4]."""
    ends = torch.tensor([num_cond_tokens, *sizes]).cumsum(0)
    # The last rows see all: what is there is clean and of earlier steps, or of their own.
    prefix_end_M = ends.repeat_interleave(torch.tensor([num_cond_tokens, *sizes]))
    intervals = torch.zeros(1, len(prefix_end_M), 4, dtype=torch.int32)
    intervals[0, :, 1] = prefix_end_M
    return intervals

"""Times attention alone, for every backend that trains here.

    python tools/measure.py attention
    python tools/measure.py attention --tokens 256 1024 --head-widths 128

On layouts of the paper's AR steps (decay 0.9): the plain implementation, our backends and, as yardsticks, torch's
FlashAttention 2 and cuDNN's attention without a mask, which compute all pairs. All take turns.

forward: without gradients. kernels: a forward and a backward to q, k and v. both: the same as a network has it, from a
projection's output to its gradient, with the views, and with what autograd does to put three gradients together.
TFLOP/s count visible pairs, and the backward as 2.5 forwards, as the FlashAttention papers do. The error is that of one
sample's output against float64, relative to its largest value.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cfpretrain.base import runtime
from cfpretrain.base.console import say
from cfpretrain.core import attention, seeds
from cfpretrain.core.ar import draw_steps
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout, visible_keys
from tools.measuring.common import alternate, dtype_of, seconds_of

_DENSE = {"dense flash": SDPBackend.FLASH_ATTENTION, "dense cudnn": SDPBackend.CUDNN_ATTENTION}
_NUM_COND_TOKENS = 64
_TOKENS = {"cuda": [128, 256, 608, 1024], "cpu": [128, 256]}  # sequences of 320, 576, 1280 and 2112
_TOKENS_IN_A_BATCH = {"cuda": 32 * 576, "cpu": 1}
_REPEATS_AND_TURNS = {"cuda": (20, 7), "cpu": (1, 5)}
_FORWARDS = {"forward": 1.0, "kernels": 3.5, "both": 3.5}  # as many forwards a run of each kind is worth
_KINDS = tuple(_FORWARDS)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a line for each backend and size; returns them as rows, and why others were not measured."""
    device, missing = runtime.pick_device(), dict[str, str]()
    print(f"{arguments.num_heads} heads, {dtype_of(device)}; ms; TFLOP/s on visible pairs, backward as 2.5 forwards")
    print(f"{'length':>8}{'visible':>9}{'head':>6}{'batch':>7}  {'backend':<12}", end="")
    print("".join(f"{kind + ' ms':>12}" for kind in _KINDS) + f"{'fwd TFLOP/s':>13}{'both TFLOP/s':>14}{'error':>10}")
    rows = []
    for num_tokens in arguments.tokens or _TOKENS[device.type]:
        for head_width in arguments.head_widths:
            rows += _measure_size(num_tokens, head_width, arguments, device, missing)
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason}")
    return {"attention": rows, "not_measured": missing}


def _measure_size(
    num_tokens: int, head_width: int, arguments: argparse.Namespace, device: torch.device, missing: dict[str, str]
) -> list[dict[str, Any]]:
    length = _NUM_COND_TOKENS + 2 * num_tokens
    batch_size = arguments.batch_size or max(1, _TOKENS_IN_A_BATCH[device.type] // length)
    intervals_BMI = full_intervals(0, batch_size, _NUM_COND_TOKENS, num_tokens).to(device)
    names, reasons = backends(device, head_width)
    missing |= {f"{name}, head {head_width}": reason for name, reason in reasons.items()}
    runs = {}
    for name, run in make_runs(names, intervals_BMI, head_width, arguments.num_heads, dtype_of(device)).items():
        try:
            run.check()
        except Exception as error:  # the table goes on without it: compilers and kernels raise what they like
            missing[f"{name}, head {head_width}, {length} tokens"] = " ".join(str(error).split())[:200]
        else:
            runs[name] = run
    if arguments.compile:
        return []
    num_visible, num_pairs = int(visible_keys(intervals_BMI).sum()), batch_size * length**2
    rows = []
    for name, seconds in _race(runs, device).items():
        pairs = num_pairs if name in _DENSE else num_visible
        flops = 4 * arguments.num_heads * head_width * pairs
        tflops = {f"{kind}_tflops": _FORWARDS[kind] * flops / seconds[kind] / 1e12 for kind in _KINDS}
        row = {"length": length, "head_width": head_width, "batch_size": batch_size, "backend": name}
        row |= {"visible_share": pairs / num_pairs, **seconds, **tflops, "error": runs[name].error}
        rows.append(row)
        print(
            f"{length:8}{row['visible_share']:9.2f}{head_width:6}{batch_size:7}  {name:<12}"
            + "".join(f"{1e3 * seconds[kind]:12.3f}" for kind in _KINDS)
            + f"{row['forward_tflops']:13.3f}{row['both_tflops']:14.3f}{row['error']:10.1e}"
        )
    return rows


def backends(device: torch.device, head_width: int) -> tuple[list[str], dict[str, str]]:
    """What there is to measure, and of our backends that do not train here why not."""
    run, missing = ["naive"], {}
    precision = "bf16" if device.type == "cuda" else "fp32"
    for name in attention.names("training")[1:]:
        try:
            run.append(attention.choose(name, "training", device.type, precision, head_width, say))
        except ValueError as error:
            missing[name] = str(error)
    return [*run, *_DENSE], missing


def full_intervals(seed: int, batch_size: int, num_cond_tokens: int, num_tokens: int) -> Tensor:
    """Row intervals of a drawn layout with all clean tokens, hence of Q + 2 L tokens whatever the seed: [B, M, 4]."""
    key = seeds.key(seed, "measured splits")
    while True:
        steps_BL = draw_steps(key, seeds.fold(key, torch.arange(batch_size)), num_tokens, 0.9)
        if bool(steps_BL[0, -1] > 0):
            return build_layout([class_segment(num_cond_tokens), image_segment(steps_BL)], num_tokens).intervals_BMI
        # One AR step has no clean tokens.
        key = seeds.fold(key, 0)


@dataclass
class AttentionRun:
    """Attention of one backend on given inputs."""

    qkv: Tensor  # [B, M, 3, H, E], what a projection gives
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> [B, H, M, E]
    gradient: Tensor  # of the output
    wanted: Tensor  # the output of the first sample in float64
    error: float = math.nan  # of the output, once `check` was called

    def forward(self) -> Tensor:
        """The output alone."""
        with torch.no_grad():
            return self.attend(*_split(self.qkv))

    def kernels(self) -> None:
        """Forward, and the gradients of q, k and v."""
        # As the network has them, permuted views of one projection, but of no gradient in common.
        q, k, v = (x.requires_grad_() for x in _split(self.qkv.detach()))
        torch.autograd.grad(self.attend(q, k, v), (q, k, v), self.gradient)

    def both(self) -> None:
        """Forward and backward as a network has them."""
        self.qkv.grad = None
        self.attend(*_split(self.qkv)).backward(self.gradient)

    def check(self) -> None:
        """Runs everything once, and compares."""
        difference = self.forward()[:1].double() - self.wanted
        self.error = float(difference.abs().max() / self.wanted.abs().max())
        self.kernels()
        self.both()


def _split(qkv: Tensor) -> Sequence[Tensor]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def make_runs(
    names: Sequence[str], intervals_BMI: Tensor, head_width: int, num_heads: int, dtype: torch.dtype
) -> dict[str, AttentionRun]:
    """A run of each backend on the same inputs, under the intervals; those of the yardsticks under no mask."""
    B, M, _ = intervals_BMI.shape
    device = intervals_BMI.device
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, M, 3, num_heads, head_width, generator=generator, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(B, num_heads, M, head_width, generator=generator, device=device).to(dtype)
    may_attend = attention.make_visibility(intervals_BMI, M, "sdpa").mask
    assert isinstance(may_attend, Tensor)
    mask = torch.zeros(may_attend.shape, device=device).masked_fill(~may_attend, -math.inf)
    # One sample is enough to see that a backend computes what it should.
    sample = _split(qkv.detach()[:1].double())
    wanted = naive_attention(*sample, mask[:1].double())
    wanted_dense = naive_attention(*sample, torch.zeros((), dtype=torch.float64, device=device))

    def attend_with(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if backend == "naive":
            return lambda q, k, v: naive_attention(q, k, v, mask.to(dtype))
        if backend in _DENSE:
            return lambda q, k, v: _attend_densely(q, k, v, _DENSE[backend])
        visibility = attention.make_visibility(intervals_BMI, M, backend)
        return lambda q, k, v: attention.attend(q, k, v, visibility)

    return {
        name: AttentionRun(qkv, attend_with(name), gradient, wanted_dense if name in _DENSE else wanted)
        for name in names
    }


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The plain implementation: under a mask to add."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask).softmax(dim=-1).to(v.dtype) @ v


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _race(runs: dict[str, AttentionRun], device: torch.device) -> dict[str, dict[str, float]]:
    """Median seconds of each kind of each run, in turns."""
    repeats, turns = _REPEATS_AND_TURNS[device.type]
    sides = {
        f"{name} {kind}": functools.partial(seconds_of, getattr(run, kind), repeats, device)
        for name, run in runs.items()
        for kind in _KINDS
    }
    seconds = alternate(sides, turns, num_warm_up=0)
    return {name: {kind: statistics.median(seconds[f"{name} {kind}"]) for kind in _KINDS} for name in runs}

"""Sweeps the launch settings of our attention kernels, and prints the best of each.

    python tools/measure.py launches --seconds 150 --out launches.json

For each kernel, head width and length: every setting that could do is compiled, in parallel, and then timed alone, on
the layouts of `measure.py attention`. What is printed at the end are lines for `LAUNCHES` of
cfpretrain/core/attention/block_causal.py: the setting whose times, each divided by the best at its length, have the
least sum.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch

from cfpretrain.base import files, runtime
from cfpretrain.base.console import UserError, say
from cfpretrain.core.attention import block_causal
from cfpretrain.core.attention.block_causal import Launch
from tools.measuring import tool
from tools.measuring.attention import full_intervals
from tools.measuring.common import dtype_of, seconds_of

KERNELS = ("forward", "backward_q", "backward_kv")
_ROWS, _KEYS, _WARPS, _STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
_MOST_TILE_VALUES = 128 * 64  # scores of a tile; more spill
_NUM_COND_TOKENS, _NUM_HEADS = 64, 20
_TOKENS_IN_A_BATCH = 16 * 576
_REPEATS, _TURNS = 10, 3
_COMPILE_SHARE = 0.6  # of the time


def measure(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Compiles and times all settings; as a worker of that, compiles its share alone."""
    device = runtime.pick_device()
    if device.type == "cpu":
        raise UserError("measure.py launches times kernels of a GPU, and there is none here")
    if arguments.worker:
        compile_share(*arguments.worker, arguments.head_widths, arguments.tokens[0], device)
        return None
    end = time.monotonic() + arguments.seconds
    _compile_in_parallel(arguments, time.monotonic() + _COMPILE_SHARE * arguments.seconds)
    timed = sweep(arguments.head_widths, arguments.tokens, settings(), end, device)
    best = best_settings(timed)
    for line in lines_for_launches(best):
        print(line)
    if arguments.out is not None:
        files.replace(arguments.out, json.dumps(best) + "\n")
    return {"best": best, "timed": timed}


def settings() -> list[Launch]:
    """All that are tried."""
    grid = itertools.product(_ROWS, _KEYS, _WARPS, _STAGES)
    return [Launch(*one) for one in grid if one[0] * one[1] <= _MOST_TILE_VALUES]


# ---------------------------------------------------------------------------
# Compiling


def _compile_in_parallel(arguments: argparse.Namespace, end: float) -> None:
    """Fills Triton's cache, until `end` at the latest."""
    num_workers = max(1, len(os.sched_getaffinity(0)) - 1)
    say(f"compiling {len(settings()) * len(KERNELS) * len(arguments.head_widths)} kernels on {num_workers} processes")
    options = ["--tokens", *arguments.tokens, "--head-widths", *arguments.head_widths]
    commands = [tool("launches", *options, "--worker", i, num_workers) for i in range(num_workers)]
    workers = list(map(subprocess.Popen, commands))
    for worker in workers:
        try:
            worker.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def compile_share(worker: int, num_workers: int, head_widths: Sequence[int], num_tokens: int, device: Any) -> None:
    """Runs every `num_workers`-th setting once, on as little as a length takes."""
    jobs = list(itertools.product(head_widths, KERNELS, settings()))
    for head_width, kernel, launch in jobs[worker::num_workers]:
        time_setting(Inputs(1, num_tokens, 2, head_width, device), kernel, launch, repeats=1, turns=1)


# ---------------------------------------------------------------------------
# Timing


class Inputs:
    """What the kernels compute on at one size.

    Args:
        batch_size, num_tokens, num_heads, head_width: of images.
        device: where; bf16 on a GPU.
    """

    def __init__(self, batch_size: int, num_tokens: int, num_heads: int, head_width: int, device: Any) -> None:
        self.intervals_BMI = full_intervals(0, batch_size, _NUM_COND_TOKENS, num_tokens).to(device)
        self.length = self.intervals_BMI.shape[1]
        shape = (batch_size, self.length, 3, num_heads, head_width)
        qkv = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype_of(device))
        self.q, self.k, self.v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        self.gradient = torch.ones_like(self.q)

    def call(self, kernel: str, launch: Launch) -> Callable[[], Any]:
        """Runs the kernel; that of the backward in its operator, beside the other one."""
        tiles = block_causal.prepare(self.intervals_BMI, self.length, launch.keys if kernel == "backward_kv" else None)
        given = self.q, self.k, self.v
        if kernel == "forward":
            return lambda: torch.ops.cfpretrain.block_causal_forward(*given, *tiles)
        out, lse = torch.ops.cfpretrain.block_causal_forward(*given, *tiles)
        return lambda: torch.ops.cfpretrain.block_causal_backward(self.gradient, *given, out, lse, *tiles)


def time_setting(inputs: Inputs, kernel: str, launch: Launch, repeats: int, turns: int) -> float | None:
    """Seconds of an operator with one kernel's setting, the least of some turns; None where it does not run."""
    key = (kernel, inputs.q.shape[-1], inputs.q.element_size())
    with patch.dict(block_causal.LAUNCHES, {key: launch}):
        try:
            call = inputs.call(kernel, launch)
            return min(seconds_of(call, repeats, inputs.q.device) for _ in range(turns))
        except Exception as error:  # too much shared memory, or what a compiler finds: the next setting goes on
            say(f"{kernel}, head {key[1]}, {tuple(launch)}: {' '.join(str(error).split())[:100]}")
            return None


def sweep(
    head_widths: Sequence[int], tokens: Sequence[int], launches: Sequence[Launch], end: float, device: Any
) -> list[dict[str, Any]]:
    """Times settings until `time.monotonic()` is `end`.

    Returns:
        A row for each kernel, head width and length that was reached, with the seconds of each setting.
    """
    rows = []
    for head_width, num_tokens, kernel in itertools.product(head_widths, tokens, KERNELS):
        length = _NUM_COND_TOKENS + 2 * num_tokens
        inputs = Inputs(max(1, _TOKENS_IN_A_BATCH // length), num_tokens, _NUM_HEADS, head_width, device)
        timed: list[dict[str, Any]] = []
        for launch in launches:
            if time.monotonic() > end:
                say(f"out of time at {kernel}, head {head_width}, {length} tokens")
                return rows
            seconds = time_setting(inputs, kernel, launch, _REPEATS, _TURNS)
            if seconds is not None:
                timed.append({"launch": list(launch), "seconds": seconds})
        timed.sort(key=lambda one: one["seconds"])
        key = {"kernel": kernel, "head_width": head_width, "value_bytes": inputs.q.element_size()}
        now = tuple(block_causal.LAUNCHES[tuple(key.values())])
        rows.append({**key, "length": length, "default": list(now), "timed": timed})
        shown = ", ".join(f"{tuple(one['launch'])} {1e3 * one['seconds']:.3f}" for one in timed[:3])
        print(f"{kernel}, head {head_width}, {length} tokens, ms: {shown}; default {now}")
    return rows


def best_settings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel and head width the setting that is best over all lengths that were timed."""
    names = ("kernel", "head_width", "value_bytes")
    by_key: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["timed"]:
            by_key.setdefault(tuple(row[name] for name in names), []).append(row)
    best = []
    for key, alike in by_key.items():
        # Times as multiples of the best at their length; a setting that does not run at one of them is none.
        seconds = [{tuple(one["launch"]): one["seconds"] for one in row["timed"]} for row in alike]
        ratios = {
            launch: statistics.mean(of.get(launch, math.inf) / min(of.values()) for of in seconds)
            for launch in seconds[0]
        }
        launch = min(ratios, key=lambda one: ratios[one])
        lengths = [row["length"] for row in alike]
        found = {"launch": list(launch), "of_best": ratios[launch], "lengths": lengths}
        best.append(dict(zip(names, key, strict=True)) | found)
    return best


def lines_for_launches(best: Sequence[dict[str, Any]]) -> list[str]:
    """The settings as lines of `LAUNCHES`."""
    return [
        f'    ("{one["kernel"]}", {one["head_width"]}, {one["value_bytes"]}): '
        f"Launch({', '.join(map(str, one['launch']))}),  # {one['of_best']:.2f} of the best at {one['lengths']} tokens"
        for one in best
    ]

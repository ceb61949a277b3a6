"""Seconds of drawing a config's initial weights, beside the same with whole tensors of 64-bit numbers in between.

    OMP_NUM_THREADS=1 python tools/measure_start.py --config configs/XL.yaml --num-ranks 16

It draws what the first of `--num-ranks` ranks holds under ZeRO-3, on the device that a run would take. The sides take
turns, parameter by parameter, and must draw the same numbers.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools share code

from cfpretrain.base import runtime
from cfpretrain.base.console import add_allow_env, ending_in_one_line
from cfpretrain.core import seeds
from cfpretrain.run import build
from tools.measuring import positive, synchronise, whereabouts

_GAMMA, _FACTOR_1, _FACTOR_2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure how fast a config's initial weights are drawn.")
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/XL.yaml")
    add_allow_env(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--num-ranks", type=positive, default=1, help="that share the weights (default 1)")
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        print(json.dumps(measure(arguments.config, arguments.overrides, arguments.num_ranks, arguments.allow_env)))


# ---------------------------------------------------------------------------
# The plain side: the formulas of `seeds`, each over the whole tensor


def _plain_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def plain_mix(x: Tensor) -> Tensor:
    """The hash of `seeds`."""
    x = (x ^ _plain_shift(x, 30)) * _FACTOR_1
    x = (x ^ _plain_shift(x, 27)) * _FACTOR_2
    return x ^ _plain_shift(x, 31)


def plain_bits(keys: Tensor, shape: Sequence[int], first: int = 0) -> Tensor:
    """As `seeds.bits`."""
    counter = torch.arange(first + 1, first + math.prod(shape) + 1, device=keys.device)
    return plain_mix(keys.unsqueeze(-1) + counter * _GAMMA).reshape([*keys.shape, *shape])


def plain_uniform(keys: Tensor, shape: Sequence[int] = (), first: int = 0) -> Tensor:
    """As `seeds.uniform`."""
    return (_plain_shift(plain_bits(keys, shape, first), 11).double() + 0.5) * 2.0**-53


def plain_uniform_within(bound: float, keys: Tensor, shape: Sequence[int], first: int, out: Tensor) -> Tensor:
    """As `seeds.uniform_within`."""
    return out.copy_(((2 * plain_uniform(keys, shape, first) - 1) * bound).float())


def plain_normal(keys: Tensor, shape: Sequence[int], first: int, out: Tensor) -> Tensor:
    """As `seeds.normal`."""
    return out.copy_(torch.special.ndtri(plain_uniform(keys, shape, first)).float())


# ---------------------------------------------------------------------------
# Measuring


def measure(path: str, overrides: Sequence[str], num_ranks: int, allow_env: bool = False) -> dict[str, object]:
    """Prints the rates of both sides; returns them, and what they were measured with."""
    config = build.load_config(path, overrides, allow_env)
    device = runtime.pick_device()
    with torch.device("meta"):
        shapes = {name: tuple(values.shape) for name, values in build.make_model(config).named_parameters()}
    write = build.initial_weights(config)
    seconds = {"ours": 0.0, "plain": 0.0}
    num_values = 0
    for i, (name, shape) in enumerate(shapes.items()):
        count = -(-math.prod(shape) // num_ranks)
        drawn = {side: torch.full((count,), math.nan, device=device) for side in seconds}
        for side in sorted(seconds, reverse=bool(i % 2)):
            plainly = patch.multiple(seeds, normal=plain_normal, uniform_within=plain_uniform_within)
            synchronise(device)
            begin = time.perf_counter()
            with plainly if side == "plain" else nullcontext():
                write(name, shape, 0, drawn[side])
            synchronise(device)
            seconds[side] += time.perf_counter() - begin
        if not torch.equal(drawn["ours"], drawn["plain"]):
            raise RuntimeError(f"{name}: the sides drew other numbers")
        num_values += count
    rates = {side: num_values / taken / 1e6 for side, taken in seconds.items()}
    for side, taken in seconds.items():
        print(f"{side:6} {rates[side]:8.1f} M values/s  {taken:8.2f} s for {num_values / 1e6:,.1f} M values")
    print(f"ratio  {rates['ours'] / rates['plain']:8.1f}")
    return {
        "seconds": seconds,
        "million_values_per_second": rates,
        "num_values": num_values,
        "threads": torch.get_num_threads(),
        "command": {"config": path, "overrides": list(overrides), "num_ranks": num_ranks},
        **whereabouts(device),
    }


if __name__ == "__main__":
    main()

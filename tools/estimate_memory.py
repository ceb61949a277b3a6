"""Will a config fit? Memory on each GPU for every ZeRO stage, with and without activation checkpointing.

    python tools/estimate_memory.py --config configs/XL.yaml --num-gpus 8 --gpu-memory-gb 80 [key.sub=value ...]

Needs no GPU and none of the model's memory. A GB is 1e9 bytes. The row of the config itself is marked with `*`. The
peak is at the longest sequence that training can draw. `--measure` makes a real step on this machine, on one rank, and
prints what it held beside the estimate.

Exit code 0: the config fits as it is written; 1: it does not, and the last lines say what to change; 2: a mistake in
the config or on the command line.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from cfpretrain.base.command_line import Parser, add_config, add_local_rank, check_range
from cfpretrain.base.console import UserError, ending_in_one_line, say

if TYPE_CHECKING:
    import torch

    from cfpretrain.base.config import Config
    from cfpretrain.core.objective import Draws
    from cfpretrain.training.memory import Network, Plan

EXIT_DOES_NOT_FIT = 1
GB = 1e9
# Gloo's threads let go of what they reduced only after the result is there.
_GLOO_SECONDS = 0.2


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add_config(parser, "configs/XL.yaml")
    parser.add_argument("--num-gpus", type=int, default=1, help="ranks of the run (default 1)")
    parser.add_argument(
        "--gpu-memory-gb", type=float, default=80.0, help="memory of one GPU, in 1e9 bytes (default 80)"
    )
    parser.add_argument(
        "--reserve-gb",
        type=float,
        default=4.0,
        help="of it for the CUDA context, NCCL, workspaces of kernels and fragmentation (default 4)",
    )
    parser.add_argument("--json", action="store_true", help="print all of it once more as JSON, on the last line")
    add_local_rank(parser)
    parser.add_argument("--measure", action="store_true", help="compare with a real step on this machine, on one rank")
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        fits = run(arguments)
    sys.exit(0 if fits else EXIT_DOES_NOT_FIT)


def run(arguments: argparse.Namespace) -> bool:
    """Prints the tables; returns whether the config fits as it is written."""
    from cfpretrain.base import config as configs
    from cfpretrain.base import config_checks
    from cfpretrain.training.memory import plan_memory

    config = configs.load(arguments.config, arguments.overrides, arguments.allow_env)
    _check_arguments(arguments)
    config_checks.check(config, arguments.num_gpus)
    if arguments.measure:
        if arguments.num_gpus != 1:
            raise UserError(f"--measure: expected --num-gpus 1, since it runs one rank, got {arguments.num_gpus}")
        return _measure(config, arguments)
    network, plan = plan_memory(config, arguments.num_gpus, on_gpu=True)
    budget = int((arguments.gpu_memory_gb - arguments.reserve_gb) * GB)
    rows = [_row(network, other, plan, budget) for other in _alternatives(plan)]
    _print_table(network, plan, rows, arguments)
    chosen = next(row for row in rows if row["chosen"])
    advice = [] if chosen["fits"] else _advise(network, plan, budget)
    for line in [_verdict(chosen, plan, budget), *advice]:
        print(line)
    if arguments.json:
        report = {"num_parameters": network.num_parameters, "budget_bytes": budget, "rows": rows, "advice": advice}
        print(json.dumps(report))
    return bool(chosen["fits"])


def _check_arguments(arguments: argparse.Namespace) -> None:
    check_range("--num-gpus", arguments.num_gpus, 1)
    if not math.isfinite(arguments.gpu_memory_gb):
        raise UserError(f"--gpu-memory-gb: expected a number, e.g. 80, got {arguments.gpu_memory_gb:g}")
    if not 0 <= arguments.reserve_gb < arguments.gpu_memory_gb:
        raise UserError(
            f"--reserve-gb: expected 0 to less than --gpu-memory-gb = {arguments.gpu_memory_gb:g}, "
            f"got {arguments.reserve_gb:g}"
        )


# ---------------------------------------------------------------------------
# Tables


def _alternatives(plan: "Plan") -> list["Plan"]:
    """The plan at every ZeRO stage, with and without checkpointing, where that is possible."""
    plans = [
        _change(plan, zero_stage=stage, checkpointing=checkpointing)
        for stage, checkpointing in itertools.product(range(4), (False, True))
    ]
    return [plan for plan in plans if _is_possible(plan)]


def _change(plan: "Plan", **changes: Any) -> "Plan":
    from cfpretrain.training.zero import overlaps

    changed = dataclasses.replace(plan, **changes)
    overlap = overlaps(changed.zero_stage, changed.num_ranks, changed.on_gpu)
    return dataclasses.replace(changed, overlap=overlap)


def _is_possible(plan: "Plan") -> bool:
    """Whether a config of this plan passes its check."""
    from cfpretrain.base.config import can_checkpoint

    return not plan.checkpointing or can_checkpoint(plan.zero_stage, plan.precision)


def _row(network: "Network", plan: "Plan", written: "Plan", budget: int) -> dict[str, Any]:
    from cfpretrain.training import memory

    found = memory.estimate(network, plan)
    return {
        "zero_stage": plan.zero_stage,
        "checkpointing": plan.checkpointing,
        "chosen": (plan.zero_stage, plan.checkpointing) == (written.zero_stage, written.checkpointing),
        **dataclasses.asdict(found),
        "temporary": found.temporary,
        "worst_moment": found.worst_moment,
        "peak": found.peak,
        "fits": found.peak <= budget,
        "micro_batch_size": plan.micro_batch_size,
        "largest_micro_batch_size": memory.largest_micro_batch(network, plan, budget),
        "static": found.static,
    }


_COLUMNS = ("weights", "gradients", "optimizer", "ema", "buffers", "activations", "temporary", "peak", "host")


def _print_table(network: "Network", plan: "Plan", rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    print(
        f"{network.num_parameters:,} parameters in {plan.precision}; GPUs: {plan.num_ranks} of "
        f"{arguments.gpu_memory_gb:g} GB, of which {arguments.reserve_gb:g} are reserved"
    )
    print(
        f"micro-batches of {plan.micro_batch_size} x {network.max_sequence} tokens (the longest sequence), "
        f"{plan.accumulation_steps} a step"
    )
    print("GB on a GPU; host: host memory for each GPU")
    print()
    names = ("stage", "checkpointing", *_COLUMNS, "at", "fits", "largest micro-batch")
    print("  " + "  ".join(f"{name:>{_width(name)}}" for name in names))
    for row in rows:
        cells = [
            row["zero_stage"],
            "yes" if row["checkpointing"] else "no",
            *(f"{row[name] / GB:.1f}" for name in _COLUMNS),
            row["worst_moment"],
            "yes" if row["fits"] else "no",
            row["largest_micro_batch_size"] or "none",
        ]
        mark = "*" if row["chosen"] else " "
        print(f"{mark} " + "  ".join(f"{cell:>{_width(name)}}" for name, cell in zip(names, cells, strict=True)))
    print()


def _width(name: str) -> int:
    return max(len(name), 9 if name == "at" else 5)


def _verdict(row: dict[str, Any], plan: "Plan", budget: int) -> str:
    peak = f"{row['peak'] / GB:.1f} GB at the peak ({row['worst_moment']}), {budget / GB:.1f} GB are there"
    if not row["fits"]:
        return f"* does not fit as written: {peak}"
    largest = row["largest_micro_batch_size"]
    more = f"; train.micro_batch_size={largest} would fit too" if largest > plan.micro_batch_size else ""
    return f"* fits as written: {peak}{more}"


def _advise(network: "Network", plan: "Plan", budget: int) -> list[str]:
    """The fewest changes that make a config fit, each with its largest micro-batch."""
    from cfpretrain.training import memory

    lines = []
    choices: list[tuple[str, str, list[Any]]] = [
        ("engine.activation_checkpointing", "checkpointing", [True]),
        ("engine.ema_on_host", "ema_on_host", [True]),
        ("engine.zero_stage", "zero_stage", list(range(plan.zero_stage + 1, 4))),
    ]
    for num_changes in range(len(choices) + 1):
        for chosen in itertools.combinations(choices, num_changes):
            for values in itertools.product(*(values for _, _, values in chosen)):
                changes = {field: value for (_, field, _), value in zip(chosen, values, strict=True)}
                if any(getattr(plan, field) == value for field, value in changes.items()):
                    continue
                other = _change(plan, **changes)
                largest = memory.largest_micro_batch(network, other, budget) if _is_possible(other) else None
                if largest is not None:
                    keys = [f"{key}={str(value).lower()}" for (key, _, _), value in zip(chosen, values, strict=True)]
                    micro = min(largest, plan.micro_batch_size)
                    lines.append("  fits with: " + " ".join([*keys, f"train.micro_batch_size={micro}"]))
        if lines:
            return lines
    return ["  nothing in the config makes it fit: it needs more GPUs (--num-gpus) or larger ones"]


# ---------------------------------------------------------------------------
# A real step


def _measure(config: "Config", arguments: argparse.Namespace) -> bool:
    from cfpretrain.base import runtime
    from cfpretrain.training import memory
    from cfpretrain.training.memory import plan_memory

    device = runtime.pick_device()
    on_gpu = device.type == "cuda"
    network, plan = plan_memory(config, 1, on_gpu)
    found = memory.estimate(network, plan)
    say(f"a step on one {device.type} rank ...")
    with runtime.ranks_of_a_tool(device):
        held, peak = measure_step(config, device)
    report = {
        "device": device.type,
        "held_bytes": {"estimated": found.between_micro_batches, "measured": held},
        "peak_bytes": {"estimated": found.peak, "measured": peak},
    }
    for name, title in (("held_bytes", "between micro-batches"), ("peak_bytes", "at the peak")):
        estimated, measured = report[name]["estimated"], report[name]["measured"]
        print(
            f"{title:22s} estimated {estimated / GB:8.3f} GB, measured {measured / GB:8.3f} GB, "
            f"ratio {estimated / measured:.3f}"
        )
    if arguments.json:
        print(json.dumps(report))
    return found.peak <= (arguments.gpu_memory_gb - arguments.reserve_gb) * GB


def measure_step(config: "Config", device: "torch.device") -> tuple[int, int]:
    """An optimizer step or two on synthetic latents, at the longest sequence.

    Returns:
        The most bytes held when no forward or backward is under way, gradients included, and the most of all, on this
        rank. On a CPU, EMA in host memory counts too.
    """
    import contextlib

    import torch

    from cfpretrain.training import memory

    on_gpu = device.type == "cuda"
    account = None if on_gpu else memory.TensorAccount()
    with account or contextlib.nullcontext():
        run_micro_batches = _prepare(config, device)
        held = 0
        if account is not None:
            account.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in run_micro_batches():
            if account is not None:
                time.sleep(_GLOO_SECONDS)
            held = max(held, account.held if account is not None else torch.cuda.memory_allocated(device))
        peak = account.peak if account is not None else torch.cuda.max_memory_allocated(device)
    return held, peak


def _prepare(config: "Config", device: "torch.device") -> Callable[[], Iterator[None]]:
    """Builds engine and EMA; returns a generator function that yields after every micro-batch of a step or two."""
    import torch
    import torch._dynamo  # now: inside ZeRO's construction it would find a patched torch, and fail

    from cfpretrain.base import runtime
    from cfpretrain.run import build
    from cfpretrain.training.ema import ShardedEMA
    from cfpretrain.training.engine import build_engine

    model = config.model
    blocks = build.choose_blocks(config, device.type)
    engine = build_engine(lambda: build.make_model(config, blocks), config, device)
    engine.initialise(build.initial_weights(config))
    ema = ShardedEMA(engine.fragments(), config.train.ema_decay, config.engine.ema_on_host)
    loss = build.make_loss(config)
    B = config.micro_batch_size(runtime.world_size())
    ids_B, labels_B = torch.arange(B), torch.zeros(B, dtype=torch.int64)

    def forward_and_backward() -> None:
        # Its tensors end with it, as those of the trainer's step do.
        latents_BCYX = torch.zeros(B, model.latent_channels, model.latent_size, model.latent_size)
        draws = longest(loss.draw(0, 0, ids_B, labels_B, model.num_tokens, model.patch_values), config)
        terms = loss(engine, loss.prepare(latents_BCYX, draws).to(device))
        engine.backward(terms.total / terms.count)

    def run_micro_batches() -> Iterator[None]:
        # Stage 3 fetches ahead from the second micro-batch on.
        for _ in range(2 if engine.accumulation_steps == 1 else 1):
            for _ in range(engine.accumulation_steps):
                forward_and_backward()
                yield
            ema.wait()
            engine.step(0.0)
            ema.update()

    return run_micro_batches


def longest(draws: "Draws", config: "Config") -> "Draws":
    """The draws with the smallest last AR step that the config can draw, and all before it in one."""
    import torch

    from cfpretrain.core.ar import last_size_probabilities

    order, num_tokens = config.order, config.model.num_tokens
    last_L = last_size_probabilities(num_tokens, order.ar_step_decay, order.num_ar_steps, order.ar_step_sizes)
    smallest = int(last_L.nonzero()[0]) + 1
    is_last_L = torch.arange(num_tokens) >= num_tokens - smallest
    return dataclasses.replace(draws, steps_BL=is_last_L.long().expand_as(draws.steps_BL))


if __name__ == "__main__":
    main()

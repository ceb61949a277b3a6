"""Times the trainer's step, profiles it, and holds it beside a plain implementation.

    python tools/measure.py step --config configs/benchmark/cpu.yaml
    python tools/measure.py step --config configs/benchmark/cpu.yaml --against naive
    python tools/measure.py step --config configs/XL.yaml train.global_batch_size=256 --profile

The step is `Trainer.train_step` on one rank, with all that belongs to it: batches from the loader, which reads latent
shards of noise that the tool writes, forward, backward, clipping, the optimizer's update, guard, EMA and metrics; no
wandb, no checkpoint, no sample. `--bare` leaves the trainer out: engine and objective alone, on batches that were made
ahead. The learning rate is constant, so that losses soon depend on gradients.

Images are read, and encoded during training, where the config names image shards of this machine, and with `--photos`,
for which the tool writes JPEG photos of four classes and an autoencoder with random weights. FLOPs and MFU stay the
model's; those of the autoencoder are said beside them.

`--against naive` holds it beside a plain implementation (tests/plain_step.py), which trains on the same numbers, and
compares the losses. Each side then has a process of its own, one at work at a time, in the order a b, b a, a b, ...
FLOPs count visible pairs of attention only.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks, runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, say
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout
from cfpretrain.data.loader import Loader
from cfpretrain.data.online import kind_at_hand
from cfpretrain.run.build import choose_attention, choose_blocks, make_loss, make_prepare
from cfpretrain.run.metrics import peak_flops
from cfpretrain.run.sequences import has_texts
from cfpretrain.training import memory
from cfpretrain.training.encoding_cost import NO_ENCODING, EncodingCost, encoding_cost
from tools.measuring.common import alternate, confined, on_noise
from tools.measuring.photos import on_photos
from tools.measuring.profiling import count_kernels
from tools.measuring.sides import Measured, StepResult, Worker

_LEARNING_RATE = 1e-4
_RESERVED_BYTES = 6e9  # for the CUDA context, workspaces of kernels and fragmentation
_MOST_STEPS_PLANNED = 1000


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Checks the config, changes it as the options say, and times its step or counts its kernels."""
    device = runtime.pick_device()
    if runtime.world_size() != 1:
        raise UserError(f"measure.py step measures one rank, got {runtime.world_size()}; start it with python alone")
    config = _constant_rate(configs.load(arguments.config, arguments.overrides, arguments.allow_env))
    config_checks.check(config, 1)
    choose_blocks(config, device.type)
    if arguments.kernels:
        kernels = count_kernels(config.model, choose_attention(config, device.type), device)
        print(f"a compiled block, forward and backward: {kernels}")
        return {"kernels": kernels}
    if arguments.against and config.model.vocabulary:
        raise UserError(f"--against: expected a model without texts, which {arguments.against} has not, got some")
    with tempfile.TemporaryDirectory() as folder:
        config = _on_shards(config, Path(folder), arguments)
        if arguments.fit:
            config = _fitting(config, device)
        if arguments.compile:  # all blocks have the kernels of one
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=1))
        config_checks.check(config, 1)
        return time_steps(config, arguments, device)


def _on_shards(config: Config, folder: Path, arguments: argparse.Namespace) -> Config:
    """The config of a run on images, where the command or the shards at hand say so, else on latents of noise."""
    has_images = kind_at_hand(config) == "images"
    if not (has_images or arguments.photos):
        return on_noise(config, folder)
    if arguments.bare or arguments.against:
        raise UserError(
            "--bare, --against: expected latents, since batches that are made ahead tell nothing of images, got images"
        )
    return on_photos(config, folder, arguments.photos) if arguments.photos else confined(config, folder)


def _constant_rate(config: Config) -> Config:
    train = dataclasses.replace(config.train, learning_rate=_LEARNING_RATE, warmup_steps=0, decay_steps=0)
    return dataclasses.replace(config, train=train)


def _encoding_cost(config: Config, device: torch.device) -> EncodingCost:
    return encoding_cost(config, device.type == "cuda") if kind_at_hand(config) == "images" else NO_ENCODING


def _fitting(config: Config, device: torch.device) -> Config:
    """The config with the largest micro-batch that the GPU holds, a half, a quarter, ... of what it says."""
    if device.type == "cpu":
        return config
    there = torch.cuda.get_device_properties(device).total_memory - _RESERVED_BYTES
    encoding = _encoding_cost(config, device)  # of no micro-batch's size
    while memory.estimate(config, 1, True, encoding).peak > there and config.micro_batch_size(1) % 2 == 0:
        train = dataclasses.replace(config.train, micro_batch_size=config.micro_batch_size(1) // 2)
        config = dataclasses.replace(config, train=train)
    return config


# ---------------------------------------------------------------------------
# Which steps


@dataclass(frozen=True)
class Plan:
    """Which of a run's steps are timed."""

    num_warm_up: int  # steps before those that are timed
    lengths: list[int]  # tokens that a sequence (with texts, the longest) is computed with, of the steps that are timed
    num_between: int  # steps between those and the one that is profiled, which has the length of one of them
    profiled_length: int  # of a sequence


def plan_steps(config: Config, num_timed: int, compiles: bool) -> Plan:
    """Chooses the timed steps such that none is the first of anything.

    Args:
        config: of the run.
        num_timed: steps.
        compiles: something is compiled, or tuned, for each length when it first comes.
    """
    lengths_in = functools.cache(_lengths_by_step(config))

    def all_in(steps: range) -> set[int]:
        return {length for step in steps for length in lengths_in(step)}

    num_warm_up = 2 if compiles else 1  # ZeRO stage 3 learns from its first step
    while compiles and num_warm_up < _MOST_STEPS_PLANNED:
        if all_in(range(num_warm_up)) >= all_in(range(num_warm_up, num_warm_up + num_timed)):
            break
        num_warm_up += 1
    end = num_warm_up + num_timed
    timed = [max(lengths_in(step)) for step in range(num_warm_up, end)]
    alike = (i for i in range(_MOST_STEPS_PLANNED) if not compiles or max(lengths_in(end + i)) in timed)
    num_between = next(alike, 0)
    return Plan(num_warm_up, timed, num_between, max(lengths_in(end + num_between)))


def _lengths_by_step(config: Config) -> Callable[[int], Sequence[int]]:
    """What says of a step the tokens that sequences of its micro-batches are computed with."""
    if not has_texts(config):
        loss = make_loss(config)
        return lambda step: [_length_of(config, loss, step)]
    # They depend on the captions.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    loader = Loader(config, make_prepare(config), 0, 1)
    found: list[list[int]] = []

    def lengths_in(step: int) -> list[int]:
        while len(found) <= step:
            found.append([batch.intervals_BMI.shape[1] for batch in next(loader)])
        return found[step]

    return lengths_in


def _length_of(config: Config, loss: Any, step: int) -> int:
    """Tokens that a sequence of this step is computed with: a function of the step alone."""
    zero_B = torch.zeros(1, dtype=torch.int64)
    draws = loss.draw(step, 0, zero_B, zero_B, config.model.num_tokens, config.model.patch_values)
    segments = [class_segment(config.model.num_cond_tokens), image_segment(draws.steps_BL)]
    return int(build_layout(segments, config.clean_token_multiple()).step_BM.shape[1])


# ---------------------------------------------------------------------------
# Steps in alternation


def time_steps(config: Config, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times the config's step, against the plain implementation where the command says so.

    Args:
        config: whose shards are there.
        arguments: `bare`, `against`, `pairs` and `profile`.
        device: where to compute.
    """
    plan = plan_steps(config, arguments.pairs, config.engine.compile_blocks or device.type == "cuda")
    sides: list[Worker | Measured] = []
    try:
        for name in ["bare" if arguments.bare else "trainer", *([arguments.against] if arguments.against else [])]:
            say(f"starting {name}")
            sides.append((Worker if arguments.against else Measured)(name, config))
        results = _take_turns(sides, plan, arguments.pairs)
        profiled = _profile(sides[0], plan, results[sides[0].name], device) if arguments.profile else {}
        peaks = {side.name: side.end() for side in sides}
    finally:
        for side in sides:
            if isinstance(side, Worker):
                side.kill()
    _print_steps(results, plan, peaks)
    measured = _summarise(config, arguments, device, results, peaks)
    return measured | {"lengths": plan.lengths, "start_seconds": sides[0].start} | profiled


def _take_turns(sides: Sequence[Worker | Measured], plan: Plan, num_timed: int) -> dict[str, list[StepResult]]:
    for side in sides:
        say(f"warming up {side.name} with {plan.num_warm_up} steps")
        first, *_ = side.steps(1) + side.steps(plan.num_warm_up - 1)
        side.start["the first step"] = first.seconds
    if len(sides) == 1:
        # As in training, where nothing waits for the device between two steps.
        return {sides[0].name: sides[0].steps(num_timed)}
    turns = {side.name: functools.partial(side.steps, 1) for side in sides}
    return {name: [one for [one] in steps] for name, steps in alternate(turns, num_timed, num_warm_up=0).items()}


def _profile(side: Worker | Measured, plan: Plan, timed: Sequence[StepResult], device: torch.device) -> dict[str, Any]:
    """Profiles a step, and says for how much of its time without a profiler the device is busy."""
    side.steps(plan.num_between)
    found = side.profile()
    alike = [one.seconds for one, length in zip(timed, plan.lengths, strict=True) if length == plan.profiled_length]
    seconds = statistics.median(alike or [one.seconds for one in timed])
    if device.type == "cuda":
        found["busy_share"] = found["device_seconds"] / seconds
        print(f"the device is busy for {found['busy_share']:.1%} of a step of {plan.profiled_length} tokens")
    print(f"{found['num_launches']} launches, {found['num_synchronisations']} synchronisations")
    for kind, share in found["shares"].items():
        print(f"{share:7.1%}  {kind}")
    return {"profile": found | {"length": plan.profiled_length, "step_seconds": seconds}}


def _print_steps(results: dict[str, list[StepResult]], plan: Plan, peaks: dict[str, int]) -> None:
    def line(label: str, seconds: Iterable[float], ratio: float | None, loss: str = "") -> None:
        shown = "".join(f"{value:18.3f}" for value in seconds)
        print(f"{label:>14}{shown}{'' if ratio is None else f'{ratio:.2f}':>8}{loss:>10}")

    titles = "".join(f"{name + ' s':>18}" for name in results)
    print(f"{'step':>6}{'tokens':>8}{titles}{'ratio':>8}{'loss':>10}")
    ratios = _ratios(results)
    for i, made in enumerate(zip(*results.values(), strict=True)):
        label = f"{plan.num_warm_up + i:6}{plan.lengths[i]:8}"
        line(label, (one.seconds for one in made), ratios[i] if ratios else None, f"{made[0].loss:.5f}")
    for label, pick in (("min", min), ("median", statistics.median), ("max", max)):
        line(label, (pick(one.seconds for one in made) for made in results.values()), pick(ratios) if ratios else None)
    print(f"{'peak GB':>14}" + "".join(f"{peaks[name] / 1e9:18.2f}" for name in results))


def _ratios(results: dict[str, list[StepResult]]) -> list[float]:
    """How many times longer the other side takes, pair by pair; nothing where there is none."""
    if len(results) == 1:
        return []
    return [theirs.seconds / ours.seconds for ours, theirs in zip(*results.values(), strict=True)]


def _summarise(
    config: Config,
    arguments: argparse.Namespace,
    device: torch.device,
    results: dict[str, list[StepResult]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    ours, *others = results
    made = results[ours]
    seconds, flops = sum(one.seconds for one in made), sum(one.flops for one in made)
    images_per_second = len(made) * config.train.global_batch_size / seconds
    peak, encoding = peak_flops(device, config.engine.precision), _encoding_cost(config, device)
    summary = {
        "side": ours,
        "seconds": [one.seconds for one in made],
        "seconds_per_step": statistics.median(one.seconds for one in made),
        "images_per_second": images_per_second,
        "tflop_per_second": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_memory_bytes": peaks[ours],
        "estimated_memory_bytes": memory.estimate(config, 1, device.type == "cuda", encoding).peak,
        "micro_batch_size": config.micro_batch_size(1),
        "blocks": vars(choose_blocks(config, device.type)),
        "command": {"config": arguments.config, "overrides": arguments.overrides, "pairs": arguments.pairs},
        "config": {name: configs.to_plain(config)[name] for name in ("model", "order", "train", "engine")},
        "encoding": _describe_encoding(encoding, images_per_second),
    }
    if not others:
        return summary
    theirs, ratios = results[others[0]], _ratios(results)
    difference = max(abs(a.loss / b.loss - 1) for a, b in zip(made, theirs, strict=True))
    return summary | {
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "against": {
            "name": others[0],
            "seconds_per_step": statistics.median(one.seconds for one in theirs),
            "peak_memory_bytes": peaks[others[0]],
            "max_relative_loss_difference": difference,
        },
    }


def _describe_encoding(cost: EncodingCost, images_per_second: float) -> dict[str, Any] | None:
    """What the autoencoder computes beside the model, which is printed; None where latents are read."""
    if cost == NO_ENCODING:
        return None
    tflop_per_second = cost.flops * images_per_second / 1e12
    print(f"encoding images beside the step: {cost.flops:.3e} FLOPs an image, {tflop_per_second:.3g} TFLOP/s")
    return {**dataclasses.asdict(cost), "tflop_per_second": tflop_per_second}

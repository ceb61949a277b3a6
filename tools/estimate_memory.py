"""Will a config fit? Memory on each GPU for every ZeRO stage, with and without activation checkpointing.

    python tools/estimate_memory.py --config configs/XL.yaml --num-gpus 8 --gpu-memory-gb 80 [key.sub=value ...]

Needs no GPU and none of the model's memory. A GB is 1e9 bytes. The row of the config itself is marked with `*`. The
peak is at the longest sequence that training can draw. Where `data.shards` hold images, which are encoded as training
goes, the autoencoder counts: folders of this machine say what they hold, others are taken for latents, or for images
with `--from-images`. `--measure` makes a real step on this machine, on one rank and on latents, and prints what it held
beside the estimate.

Exit code 0: the config fits as it is written; 1: it does not, and the last lines say what to change; 2: a mistake in
the config or on the command line.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base.command_line import Parser, add_config, add_local_rank, check_range
from cfpretrain.base.console import UserError, ending_in_one_line, say

if TYPE_CHECKING:
    import torch

    from cfpretrain.base.config import Config
    from cfpretrain.core.objective import Batch, Draws
    from cfpretrain.training.encoding_cost import EncodingCost

EXIT_DOES_NOT_FIT = 1
GB = 1e9
# Gloo's threads let go of what they reduced only after the result is there.
_GLOO_SECONDS = 0.2
_MOST_DRAWN = 100  # samples, among which there are those of all tasks


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add_config(parser, "configs/XL.yaml")
    add = parser.add_argument
    add("--num-gpus", type=int, default=1, help="ranks of the run (default 1)")
    add("--gpu-memory-gb", type=float, default=80.0, help="memory of one GPU, in 1e9 bytes (default 80)")
    add("--reserve-gb", type=float, default=4.0,
        help="of it for the CUDA context, NCCL, workspaces of kernels and fragmentation (default 4)")  # fmt: skip
    add("--from-images", action="store_true", help="of data.shards that are not at hand: they hold images")
    add("--json", action="store_true", help="print all of it once more as JSON, on the last line")
    add_local_rank(parser)
    add("--measure", action="store_true", help="compare with a real step on this machine, on one rank")
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        fits = run(arguments)
    sys.exit(0 if fits else EXIT_DOES_NOT_FIT)


def run(arguments: argparse.Namespace) -> bool:
    """Prints the tables; returns whether the config fits as it is written."""
    from cfpretrain.base import config as configs
    from cfpretrain.base import config_checks
    from cfpretrain.training.encoding_cost import NO_ENCODING
    from cfpretrain.training.memory import parameter_numels

    config = configs.load(arguments.config, arguments.overrides, arguments.allow_env)
    check_range("--num-gpus", arguments.num_gpus, 1)
    if not math.isfinite(arguments.gpu_memory_gb):
        raise UserError(f"--gpu-memory-gb: expected a number, e.g. 80, got {arguments.gpu_memory_gb:g}")
    if not 0 <= arguments.reserve_gb < arguments.gpu_memory_gb:
        raise UserError(
            f"--reserve-gb: expected 0 to less than --gpu-memory-gb = {arguments.gpu_memory_gb:g}, "
            f"got {arguments.reserve_gb:g}"
        )
    config_checks.check(config, arguments.num_gpus)
    budget = int((arguments.gpu_memory_gb - arguments.reserve_gb) * GB)
    if arguments.measure:
        if arguments.num_gpus != 1:
            raise UserError(f"--measure: expected --num-gpus 1, since it runs one rank, got {arguments.num_gpus}")
        return _measure(config, budget, arguments.json)
    encoding, kind = _encoding(config, arguments.from_images)
    rows = _rows(config, arguments.num_gpus, budget, encoding)
    _print_table(config, rows, arguments, kind)
    chosen = next(row for row in rows if row["chosen"])
    advice = [] if chosen["fits"] else _advise(config, arguments.num_gpus, budget, encoding)
    if advice and encoding.num_bytes:
        advice.append(
            f"  {encoding.num_bytes / GB:.1f} GB are the autoencoder's: a smaller data.encode_batch_size needs less"
        )
    for line in [_verdict(chosen, budget), *advice]:
        print(line)
    if arguments.json:
        num_parameters = sum(parameter_numels(config.model))
        report = {"num_parameters": num_parameters, "budget_bytes": budget, "rows": rows, "advice": advice}
        print(json.dumps(report | {"encoding": dataclasses.asdict(encoding) if encoding != NO_ENCODING else None}))
    return bool(chosen["fits"])


def _encoding(config: "Config", from_images: bool) -> "tuple[EncodingCost, str]":
    """What encoding images takes on a GPU, nothing where latents are read; and, in words, what was assumed."""
    from cfpretrain.data.online import encoding_precision, kind_at_hand
    from cfpretrain.training.encoding_cost import NO_ENCODING, encoding_cost

    kind, data = kind_at_hand(config), config.data
    if kind == "latents" and from_images:
        raise UserError(f"--from-images: expected image shards, but data.shards hold latents: {', '.join(data.shards)}")
    if kind == "latents":
        return NO_ENCODING, "data.shards hold latents: no autoencoder is at work"
    if kind is None and not from_images:
        return NO_ENCODING, "data.shards are not at hand, and taken for latents (for images: --from-images)"
    found = encoding_cost(config, on_gpu=True)
    known = "hold" if kind == "images" else "are taken to hold"
    what = f"{data.autoencoder} in {encoding_precision(config, 'cuda')}" if data.autoencoder else "pixels as latents"
    return found, (
        f"data.shards {known} images, encoded during training: {what}, {found.num_bytes / GB:.2f} GB, of which "
        f"{found.weights / GB:.2f} are weights and {found.working / GB:.2f} a batch of {data.encode_batch_size}"
    )


# ---------------------------------------------------------------------------
# Tables

_COLUMNS = ("weights", "gradients", "optimizer", "ema", "autoencoder", "buffers")
_COLUMNS += ("activations", "temporary", "peak", "host")
_STAGE, _CHECKPOINTING = "engine.zero_stage", "engine.activation_checkpointing"


def _rows(config: "Config", num_gpus: int, budget: int, encoding: "EncodingCost") -> list[dict[str, Any]]:
    """The config at every ZeRO stage, with and without checkpointing, where that is possible."""
    from cfpretrain.base.config import can_checkpoint
    from cfpretrain.training import memory

    engine, rows = config.engine, []
    for stage, checkpointing in itertools.product(range(4), (False, True)):
        if checkpointing and not can_checkpoint(stage, engine.precision):
            continue
        other = memory.with_knobs(config, {_STAGE: stage, _CHECKPOINTING: checkpointing})
        found = memory.estimate(other, num_gpus, True, encoding)
        largest = memory.largest_micro_batch(other, num_gpus, True, budget, encoding)
        rows.append(
            {
                "zero_stage": stage,
                "checkpointing": checkpointing,
                "chosen": (stage, checkpointing) == (engine.zero_stage, engine.activation_checkpointing),
                **dataclasses.asdict(found),
                **{name: getattr(found, name) for name in ("static", "temporary", "worst_moment", "peak")},
                "fits": found.peak <= budget,
                "micro_batch_size": config.micro_batch_size(num_gpus),
                "largest_micro_batch_size": largest,
            }
        )
    return rows


def _print_table(config: "Config", rows: list[dict[str, Any]], arguments: argparse.Namespace, kind: str) -> None:
    from cfpretrain.run.sequences import longest
    from cfpretrain.training.memory import parameter_numels

    num_gpus = arguments.num_gpus
    print(
        f"{sum(parameter_numels(config.model)):,} parameters in {config.engine.precision}; GPUs: {num_gpus} of "
        f"{arguments.gpu_memory_gb:g} GB, of which {arguments.reserve_gb:g} are reserved"
    )
    lengths, micro_batch_size = longest(config), config.micro_batch_size(num_gpus)
    print(
        f"micro-batches of {micro_batch_size} x {lengths.computed} tokens (the longest sequence), "
        f"{config.accumulation_steps(num_gpus)} a step"
    )
    if lengths.learned_text:
        logits = 4 * micro_batch_size * lengths.learned_text * config.model.vocabulary
        print(
            f"of them texts of model.max_text_tokens = {lengths.learned_text}, whose logits take {logits / GB:.2f} GB "
            "of the activations, and of what is temporary twice as much"
        )
    print(kind)
    print("GB on a GPU; host: host memory for each GPU")
    print()
    names = ("stage", "checkpointing", *_COLUMNS, "at", "fits", "largest micro-batch")
    widths = [max(len(name), 9 if name == "at" else 5) for name in names]
    print("  " + "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True)))
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
        print(f"{mark} " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    print()


def _verdict(row: dict[str, Any], budget: int) -> str:
    peak = f"{row['peak'] / GB:.1f} GB at the peak ({row['worst_moment']}), {budget / GB:.1f} GB are there"
    if not row["fits"]:
        return f"* does not fit as written: {peak}"
    largest = row["largest_micro_batch_size"]
    more = f"; train.micro_batch_size={largest} would fit too" if largest > row["micro_batch_size"] else ""
    return f"* fits as written: {peak}{more}"


def _advise(config: "Config", num_gpus: int, budget: int, encoding: "EncodingCost") -> list[str]:
    """The fewest changes that make a config and what encodes images fit, each with its largest micro-batch."""
    from cfpretrain.base.config import can_checkpoint
    from cfpretrain.training import memory

    engine, lines = config.engine, []
    changes: dict[str, list[Any]] = {
        _CHECKPOINTING: [] if engine.activation_checkpointing else [True],
        "engine.ema_on_host": [] if engine.ema_on_host else [True],
        _STAGE: list(range(engine.zero_stage + 1, 4)),
    }
    for num_changes in range(len(changes) + 1):
        for keys in itertools.combinations(changes, num_changes):
            for values in itertools.product(*(changes[key] for key in keys)):
                knobs = dict(zip(keys, values, strict=True))
                other = memory.with_knobs(config, knobs)
                is_possible = can_checkpoint(other.engine.zero_stage, engine.precision)
                if other.engine.activation_checkpointing and not is_possible:
                    continue
                largest = memory.largest_micro_batch(other, num_gpus, True, budget, encoding)
                if largest is not None:
                    knobs["train.micro_batch_size"] = min(largest, config.micro_batch_size(num_gpus))
                    written = " ".join(f"{key}={str(value).lower()}" for key, value in knobs.items())
                    lines.append(f"  fits with: {written}")
        if lines:
            return lines
    return ["  nothing in the config makes it fit: it needs more GPUs (--num-gpus) or larger ones"]


# ---------------------------------------------------------------------------
# A real step


def _measure(config: "Config", budget: int, as_json: bool) -> bool:
    from cfpretrain.base import runtime
    from cfpretrain.training import memory

    device = runtime.pick_device()
    found = memory.estimate(config, 1, on_gpu=device.type == "cuda")
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
    if as_json:
        print(json.dumps(report))
    return found.peak <= budget


def measure_step(config: "Config", device: "torch.device") -> tuple[int, int]:
    """An optimizer step or two on synthetic latents and texts, at the longest sequence.

    Returns:
        The most bytes held when no forward or backward is under way, gradients included, and the most of all, on this
        rank. On a CPU, EMA in host memory counts too.
    """
    import torch

    from cfpretrain.training.encoding_cost import MemoryTracker

    tracker = None if device.type == "cuda" else MemoryTracker()
    with tracker or contextlib.nullcontext():
        micro_batches = _micro_batches(config, device)
        next(micro_batches)  # the engine is built
        held = 0
        if tracker is not None:
            tracker.peak = tracker.held
        else:
            torch.cuda.reset_peak_memory_stats(device)
        for _ in micro_batches:
            if tracker is not None:
                time.sleep(_GLOO_SECONDS)
            held = max(held, tracker.held if tracker is not None else torch.cuda.memory_allocated(device))
        peak = tracker.peak if tracker is not None else torch.cuda.max_memory_allocated(device)
    return held, peak


def _micro_batches(config: "Config", device: "torch.device") -> Iterator[None]:
    """Yields once engine and EMA are built, and after every micro-batch of a step or two."""
    import torch
    import torch._dynamo  # now: inside ZeRO's construction it would find a patched torch, and fail

    from cfpretrain.base import runtime
    from cfpretrain.core.texts import FRAME
    from cfpretrain.run import build
    from cfpretrain.training.ema import ShardedEMA
    from cfpretrain.training.engine import build_engine
    from tools.measuring.common import refuse_segments, with_words

    refuse_segments(config)
    model = config.model
    blocks = build.choose_blocks(config, device.type)
    engine = build_engine(lambda: build.make_model(config, blocks), config, device)
    engine.initialise(build.initial_weights(config))
    ema = ShardedEMA(engine.fragments(), config.train.ema_decay, config.engine.ema_on_host)
    with tempfile.TemporaryDirectory() as folder:
        loss = build.make_loss(with_words(config, Path(folder)))

    def make_batch(ids_B: torch.Tensor) -> "Batch":
        B = len(ids_B)
        latents_BCYX = torch.zeros(B, model.latent_channels, model.latent_size, model.latent_size)
        drawn = loss.draw(0, 0, ids_B, torch.zeros(B, dtype=torch.int64), model.num_tokens, model.patch_values)
        texts = [[0] * (model.max_text_tokens - FRAME)] * B if model.vocabulary else []
        return loss.prepare(latents_BCYX, longest(drawn, config), (), texts)

    # Samples of each kind that there is, the longest first.
    kinds: dict[tuple[str, ...], tuple[int, int]] = {}
    for i in range(_MOST_DRAWN if model.vocabulary else 1):
        alone = make_batch(torch.tensor([i]))
        kinds.setdefault(tuple(one.kind for one in alone.segments), (-alone.intervals_BMI.shape[1], i))
    ids = itertools.cycle(i for _, i in sorted(kinds.values()))
    ids_B = torch.tensor(list(itertools.islice(ids, config.micro_batch_size(runtime.world_size()))))

    def forward_and_backward() -> None:
        # Its tensors end with it, as those of the trainer's step do.
        engine.backward(loss.total(loss(engine, make_batch(ids_B).to(device))))

    yield
    # Stage 3 fetches ahead from the second micro-batch on.
    for _ in range(2 if engine.accumulation_steps == 1 else 1):
        for _ in range(engine.accumulation_steps):
            forward_and_backward()
            yield
        ema.wait()
        engine.step(0.0)
        ema.update()


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

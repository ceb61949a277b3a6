"""Says what logging, EMA, guards and checkpoints cost beside the training step itself.

    deepspeed --num_accelerators 2 tools/measure.py saving --config configs/tiny.yaml
    python tools/measure.py saving --config configs/L.yaml --kinds full saving train.global_batch_size=64

Blocks of steps take turns in one process group: bare (no EMA, no metrics, no exchange between ranks, no guard),
unguarded (EMA and metrics), full (guard and exchange too) and saving (as full, and a checkpoint begins with each block,
which is as long as `--block-steps`). wandb is off: it writes from a process of its own. Latents are noise.

A small difference needs short blocks in many turns, since a machine's speed varies; the cost of guards is seen best
with `--kinds unguarded full --block-steps 2 --pairs 150`.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks, runtime
from cfpretrain.base.console import phase
from cfpretrain.training import trainer as training
from cfpretrain.training.step import StepResult
from tools.measuring.common import alternate, on_noise, refuse_skipped, synchronise

# Kinds of blocks, and what each adds to the one before.
_KINDS = {
    "bare": "",
    "unguarded": "EMA and metrics add",
    "full": "guards and the ranks' exchange add",
    "saving": "a checkpoint a block adds",
}


def measure(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Builds a trainer in a temporary run folder and times it."""
    device = runtime.pick_device()
    # Rank 0's folder serves all ranks; the others' stay empty.
    with runtime.ranks_of_a_tool(device), tempfile.TemporaryDirectory() as own:
        config = configs.load(arguments.config, arguments.overrides, arguments.allow_env)
        config_checks.check(config, runtime.world_size())
        config = on_noise(config, Path(runtime.gather(own)[0]))
        training.prepare_folder(config, device)
        seconds, stalls = _measure(training.Trainer(config, device), arguments)
        runtime.barrier()
    return _summarise(seconds, stalls) if runtime.rank() == 0 else None


def _measure(trainer: Any, arguments: argparse.Namespace) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step, by kind of block, and seconds that a save keeps the step after it waiting."""
    kinds = [kind for kind in _KINDS if kind in arguments.kinds]
    stalls: list[float] = []

    def block(kind: str) -> float:
        with ExitStack() as stack:
            for owner, name, double in _left_out(trainer)[kind]:
                stack.enter_context(patch.object(owner, name, double))
            synchronise(trainer.device)
            runtime.barrier()
            begin = time.perf_counter()
            if kind == "saving":
                trainer.checkpoints.write(trainer.state())
                stalls.append(time.perf_counter() - begin)
            for _ in range(arguments.block_steps):
                trainer.train_step()
                if kind != "bare" and trainer.log.is_due(trainer.at.step):
                    trainer.close_window()
            trainer.ema.wait()
            synchronise(trainer.device)
            runtime.barrier()
            seconds = (time.perf_counter() - begin) / arguments.block_steps
        trainer.checkpoints.wait()
        refuse_skipped(trainer)
        return seconds

    with phase("warming up"):
        for _ in range(-(-arguments.warm_up_steps // arguments.block_steps)):
            block(kinds[-1])
        stalls.clear()
    found = alternate({kind: partial(block, kind) for kind in kinds}, arguments.pairs, num_warm_up=0)
    trainer.loader.close()
    return found, stalls


def _left_out(trainer: Any) -> dict[str, list[tuple[Any, str, Any]]]:
    """What a kind of block does without: (owner, name, what stands in for it)."""
    step = trainer.step
    nothing = {"must_stop": False, "is_writing": False, "has_failed": False, "lacks_data": False, "problem": None}
    step.result = StepResult(1.0, {}, 1.0, 1.0, num_bad_images=0, **nothing)
    unguarded = [
        (step, "exchange", lambda terms, batches: None),
        (step, "decide", lambda told, grad_norm: True),
        # Losses of these steps are constants, and must not reach the guard of the next block.
        (trainer.guard, "applied", lambda loss, grad_norm: None),
    ]
    bare = [*unguarded, (trainer.ema, "update", lambda: None), (trainer.log, "add", lambda *_: {})]
    return {"bare": bare, "unguarded": unguarded, "full": [], "saving": []}


def _summarise(seconds: dict[str, list[float]], stalls: list[float]) -> dict[str, Any]:
    added: dict[str, float] = {}
    for kind, values in seconds.items():
        text = f"{kind:<10}{1e3 * statistics.median(values):8.1f} ms a step (median)"
        before = list(_KINDS)[max(0, list(_KINDS).index(kind) - 1)]
        if kind != before and before in seconds:
            ratios = [a / b - 1 for a, b in zip(values, seconds[before], strict=True)]
            added[kind] = statistics.median(ratios)
            error = 1.25 * statistics.pstdev(ratios) / len(ratios) ** 0.5  # of a median, for a normal distribution
            text += f": {_KINDS[kind]} {added[kind]:+.1%} (standard error {error:.1%})"
        print(text)
    stall = statistics.median(stalls) if stalls else None
    if stall is not None:
        print(f"{'a save':<10}{1e3 * stall:8.1f} ms until the next step begins (median)")
    return {"added": added, "seconds": seconds, "stall_seconds": stall}

"""What logging, EMA and checkpoints cost beside the training step itself, measured in alternation.

    deepspeed --num_accelerators 2 tools/measure_overhead.py --config configs/tiny.yaml

Blocks of bare steps (no EMA, no metrics) alternate with blocks of full ones in one process group, with a checkpoint
after each pair. The cost of a checkpoint is spread over `checkpoint.every_steps`. wandb is off: it writes from a
process of its own.
"""

import argparse
import json
import statistics
import tempfile
import time
from typing import Any
from unittest.mock import patch

from cfpretrain.console import Progress, UserError, exit_with, phase, say


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure what logging, EMA and checkpoints add to a training step.")
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks (default 6)")
    parser.add_argument("--block-steps", type=int, default=20, help="steps of a block (default 20)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_intermixed_args()
    try:
        run(arguments)
    except UserError as error:
        exit_with(error)


def run(arguments: argparse.Namespace) -> None:
    """Builds a trainer in a temporary run folder and times it."""
    with phase("loading torch, deepspeed and streaming"):
        from cfpretrain import config as configs
        from cfpretrain import runtime, trainer
    device = runtime.pick_device()
    runtime.start(device)
    try:
        # Rank 0's folder serves all ranks; the others' stay empty.
        with tempfile.TemporaryDirectory() as own:
            shared = runtime.gather(own)[0]
            overrides = [*arguments.overrides, f"run.folder={shared}", "metrics.wandb=disabled"]
            config = configs.load(arguments.config, overrides)
            configs.check(config, runtime.world_size())
            trainer.prepare_folder(config, device)
            measured = _measure(trainer.Trainer(config, device), arguments)
            runtime.barrier()
    finally:
        runtime.stop()
    if runtime.rank() == 0:
        _print(measured, config.checkpoint.every_steps)


def _measure(trainer: Any, arguments: argparse.Namespace) -> dict[str, list[float]]:
    from cfpretrain import runtime

    progress = Progress(trainer.config.train.num_steps, 0)
    seconds: dict[str, list[float]] = {"bare": [], "full": [], "checkpoint": []}

    def block(kind: str, steps: int) -> None:
        runtime.barrier()
        begin = time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
            if kind == "full" and trainer.window_ends():
                trainer.close_window(progress)
        runtime.barrier()
        seconds[kind].append((time.perf_counter() - begin) / steps)

    with phase("warming up"):
        block("full", arguments.block_steps)
        seconds["full"].clear()
    for pair in range(arguments.pairs):
        say(f"pair {pair + 1} of {arguments.pairs}")
        with patch.object(trainer.ema, "update"), patch.object(trainer, "record_step"):
            block("bare", arguments.block_steps)
        block("full", arguments.block_steps)
        begin = time.perf_counter()
        trainer.save_checkpoint()
        runtime.barrier()
        seconds["checkpoint"].append(time.perf_counter() - begin)
    trainer.loader.close()
    return seconds


def _print(seconds: dict[str, list[float]], every_steps: int) -> None:
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    steps_share = statistics.median(f / b - 1 for b, f in zip(seconds["bare"], seconds["full"], strict=True))
    checkpoint_share = median["checkpoint"] / (every_steps * median["bare"])
    print(f"bare step        {1e3 * median['bare']:8.1f} ms (median)")
    print(f"full step        {1e3 * median['full']:8.1f} ms: EMA and metrics add {100 * steps_share:.1f} %")
    print(
        f"a checkpoint     {1e3 * median['checkpoint']:8.1f} ms, every {every_steps} steps: "
        f"{100 * checkpoint_share:.1f} %"
    )
    print(json.dumps({"overhead": steps_share + checkpoint_share, "seconds": seconds}))


if __name__ == "__main__":
    main()

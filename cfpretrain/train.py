"""Trains a CausalFusion model: parse, check, build, run.

    deepspeed cfpretrain/train.py --config configs/tiny.yaml [key.sub=value ...] [--dry-run]

The same command resumes. The file is started by the launcher and nothing imports it; torch and DeepSpeed are imported
after the first line is out, since that takes seconds.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started by its path, python puts this folder first: our modules would be importable under bare names as well.
    del sys.path[0]

from cfpretrain.console import UserError, exit_with, phase, say


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="deepspeed cfpretrain/train.py", description="Train a CausalFusion model; the same command resumes it."
    )
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. train.num_steps=100")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its arithmetic, and stop")
    parser.add_argument("--num-ranks", type=int, help="ranks that --dry-run assumes (default: those started)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_intermixed_args()


def main() -> None:
    """The command."""
    arguments = parse()
    try:
        if arguments.dry_run:
            dry_run(arguments)
        else:
            run(arguments)
    except UserError as error:
        exit_with(error)


def dry_run(arguments: argparse.Namespace) -> None:
    """Prints the resolved config, the batch arithmetic and the number of parameters, in seconds and without a GPU."""
    from cfpretrain import config as configs
    from cfpretrain import runtime

    config = configs.load(arguments.config, arguments.overrides)
    world_size = arguments.num_ranks or runtime.world_size()
    configs.check(config, world_size)
    if runtime.rank() != 0:
        return
    print(configs.to_yaml(config))

    import torch

    from cfpretrain.build import make_model

    with torch.device("meta"):
        model = make_model(config)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    train = config.train
    print(f"parameters: {num_parameters:,}")
    print(
        f"global batch: {train.global_batch_size} = {config.micro_batch_size(world_size)} a micro-batch x "
        f"{config.accumulation_steps(world_size)} micro-batches x {world_size} ranks"
    )
    print(f"samples in all: {train.num_steps * train.global_batch_size:,} over {train.num_steps:,} steps")


def run(arguments: argparse.Namespace) -> None:
    """Checks the config, then trains."""
    with phase("loading torch"):
        from cfpretrain import config as configs
        from cfpretrain import runtime
    config = configs.load(arguments.config, arguments.overrides)
    configs.check(config, runtime.world_size())
    with phase("loading deepspeed and streaming"):
        from cfpretrain import trainer
    device = runtime.pick_device()
    with phase("waiting for all ranks", announce=False):
        runtime.start(device)
    try:
        trainer.prepare_folder(config)
        step = trainer.finished_step(config)
        if step is not None:
            limit = "num_steps" if step >= config.train.num_steps else "max_train_seconds"
            say(f"nothing to do: {config.run.folder} is complete at step {step}; raise train.{limit} to train on")
            return
        trainer.Trainer(config, device).train()
    finally:
        runtime.stop()


if __name__ == "__main__":
    main()

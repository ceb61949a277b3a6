"""What a step of training costs besides its arithmetic: collectives, and waits for the device."""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cfpretrain.base import runtime
from tests.digits import small_config
from tests.processes import run_in_processes

CPU = torch.device("cpu")


class Recorder(TorchDispatchMode):
    """Counts collectives, and numbers that are read from tensors where a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[str] = Counter()
        self.numbers_read: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(function).partition(".")
        if namespace == "c10d":
            self.collectives[name.partition(".")[0].strip("_")] += 1
        if name.startswith("_local_scalar_dense"):
            callers = [frame.filename for frame in traceback.extract_stack()]
            # Adam's count of steps lies on the CPU; on a GPU, where Adam is fused, nobody reads it.
            if not any(caller.endswith("optim/adam.py") for caller in callers):
                self.numbers_read.append(" < ".join(reversed(callers)))
        return function(*args, **(kwargs or {}))


def watch_a_step(shards: Path, folder: Path, stage: int, precision: str) -> tuple[Counter[str], list[str], int]:
    """Collectives, numbers read and read-backs of a step in the middle of a run."""
    from cfpretrain.training import trainer as trainers

    runtime.start(CPU)
    config = small_config(
        shards, folder, f"engine.zero_stage={stage}", f"engine.precision={precision}", "data.num_workers=1"
    )
    trainers.prepare_folder(config, CPU)
    trainer = trainers.Trainer(config, CPU)
    read_backs = []
    tolist = torch.Tensor.tolist

    def counted(values: torch.Tensor) -> Any:
        read_backs.append(values)
        return tolist(values)

    for _ in range(2):
        trainer.train_step()
    # `Recorder` does not see it. Whoever else in a step reads tensors so is counted too.
    with Recorder() as recorder, patch.object(torch.Tensor, "tolist", counted):
        trainer.train_step()
    trainer.loader.close()
    return recorder.collectives, recorder.numbers_read, len(read_backs)


# One all-reduce is the exchange. The rest is DeepSpeed's, for two micro-batches whose gradients fit into one bucket:
# their sums, the norm of the gradient where ranks hold parts of it, and the weights.
@pytest.mark.parametrize(
    ("stage", "precision", "collectives"),
    [
        (0, "fp32", {"allreduce": 2}),
        (1, "bf16", {"allreduce": 2, "allgather_base": 1}),
        (2, "bf16", {"allreduce": 4, "allgather_base": 1}),
        (3, "bf16", {"allreduce": 2, "allgather_base": 2, "reduce_scatter_base": 2}),
    ],
)
def test_a_step_has_one_exchange_and_one_read_back(
    shards: Path, tmp_path: Path, stage: int, precision: str, collectives: dict[str, int]
) -> None:
    for found, numbers_read, num_read_backs in run_in_processes(watch_a_step, 2, shards, tmp_path, stage, precision):
        assert numbers_read == []
        assert num_read_backs == 1
        assert dict(found) == collectives

"""The sharded EMA against one of whole tensors, and its exchange with the weights, at every ZeRO stage."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.core import seeds
from cfpretrain.run.tensor_files import Fragment
from cfpretrain.training import ema as ema_module
from cfpretrain.training import trainer
from cfpretrain.training.ema import ShardedEMA
from cfpretrain.training.engine import Engine
from tests.digits import small_config
from tests.processes import run_in_processes
from tests.test_engine import CPU, KINDS, gather, process_group, toy_batch, toy_engine, train_step

DECAY = 0.75


def whole_values(engine: Engine) -> dict[str, Tensor]:
    return {key: value for key, value in gather(engine).items() if key.endswith("/values")}


def predict(engine: Engine) -> Tensor:
    engine.module.eval()
    with torch.no_grad():
        prediction: Tensor = engine.module([toy_batch(0)[0]])
    engine.module.train()
    return prediction


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def check_stage(stage: int, precision: str) -> None:
    engine, control = toy_engine(stage, precision), toy_engine(stage, precision)
    ema = ShardedEMA(engine.fragments(), DECAY, on_host=precision == "bf16")
    oracle = whole_values(engine)
    for step in range(3):
        assert train_step(engine, step) == train_step(control, step)
        ema.update()
        ema.wait()
        oracle = {key: DECAY * oracle[key] + (1 - DECAY) * value for key, value in whole_values(engine).items()}

    weights, prediction = whole_values(engine), predict(engine)
    averages = [average.clone() for average in ema.values]
    with ema.applied(engine):
        applied, averaged_prediction = whole_values(engine), predict(engine)
    for key, expected in oracle.items():
        torch.testing.assert_close(applied[key], expected, rtol=1e-5, atol=1e-6)
    # The forward used the averages: it is that of an engine whose weights they are.
    other = toy_engine(stage, precision)
    other.initialise(
        lambda name, shape, offset, values: values.copy_(applied[f"{name}/values"][offset : offset + len(values)])
    )
    assert torch.equal(averaged_prediction, predict(other))
    assert not torch.equal(averaged_prediction, prediction)

    def check_untouched() -> None:
        assert equal(weights, whole_values(engine))
        assert torch.equal(prediction, predict(engine))
        assert all(torch.equal(x, y) for x, y in zip(averages, ema.values, strict=True))

    check_untouched()
    with pytest.raises(KeyError), ema.applied(engine):
        raise KeyError
    check_untouched()
    # Training goes on as if nothing had been exchanged.
    assert train_step(engine, 3) == train_step(control, 3)
    assert equal(whole_values(control), whole_values(engine))


def campaign() -> int:
    with process_group():
        for kind in KINDS:
            check_stage(*kind)
    return dist.get_rank()


def test_sharded_ema_at_every_stage() -> None:
    assert run_in_processes(campaign, 2) == [0, 1]


def fragment(values: Tensor) -> Fragment:
    return Fragment("w", (values.numel(),), 0, values, {}, False)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_update_is_the_recurrence(decay: float, on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Smaller than the fragment and no divisor of it.
    monkeypatch.setattr(ema_module, "_STAGED_NUMEL", 2)
    weights = torch.tensor([1.0, -2.0, 3.0])
    ema = ShardedEMA([fragment(weights)], decay, on_host)
    assert torch.equal(ema.values[0], weights)
    assert ema.values[0].data_ptr() != weights.data_ptr()
    weights.add_(8.0)
    for step in range(1, 4):
        ema.update()
        ema.wait()
        expected = weights - 8.0 * math.pow(decay, step)
        torch.testing.assert_close(ema.values[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_host", [False, True])
def test_rank_that_holds_nothing(on_host: bool) -> None:
    ema = ShardedEMA([], DECAY, on_host)
    ema.update()
    ema.wait()
    assert ema.values == []


# ---------------------------------------------------------------------------------------------------------------------
# Averages in host memory, moved by a thread


def sharded(sizes: tuple[int, ...]) -> tuple[list[Tensor], ShardedEMA]:
    weights = [seeds.normal(seeds.key(i, "weights"), (size,)) for i, size in enumerate(sizes)]
    return weights, ShardedEMA([fragment(values) for values in weights], DECAY, on_host=True)


@contextmanager
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Inside, threads copy no weights to the host before the event is set."""
    may_copy = threading.Event()

    def copy(self, load, copy=ema_module._HostThread._copy):
        may_copy.wait(60)
        return copy(self, load)

    with monkeypatch.context() as patches:
        patches.setattr(ema_module._HostThread, "_copy", copy)
        try:
            yield may_copy
        finally:
            may_copy.set()


def ema_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ema")]


# Loads of many fragments, fragments of many loads, one load, and a fragment of nothing.
@pytest.mark.parametrize("staged_numel", [1, 16, 48, 4096])
@pytest.mark.parametrize("sizes", [(100, 1, 33, 7), (16,), (5, 0, 300)], ids=str)
def test_a_thread_gives_the_bits_of_one_average_after_another(sizes, staged_numel, monkeypatch) -> None:
    monkeypatch.setattr(ema_module, "_STAGED_NUMEL", staged_numel)
    weights, ema = sharded(sizes)
    expected = [values.clone() for values in weights]
    for _ in range(3):
        ema.wait()
        for values, average in zip(weights, expected, strict=True):
            values.mul_(1.1).add_(0.3)
            average.lerp_(values, 1 - DECAY)
        ema.update()
    ema.wait()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(ema.values, expected, strict=True))


def test_an_update_returns_at_once_and_wait_ends_it(monkeypatch) -> None:
    weights, ema = sharded((5, 3))
    before = [average.clone() for average in ema.values]
    weights[0].add_(1.0)
    with held_back(monkeypatch) as may_copy:
        ema.update()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(ema.values, before, strict=True))
        may_copy.set()
        ema.wait()
    torch.testing.assert_close(ema.values[0], before[0] + (1 - DECAY))
    assert not ema_threads()


def test_what_stops_the_thread_reaches_the_trainer(monkeypatch) -> None:
    _, ema = sharded((5,))

    def fail(*_) -> None:
        raise MemoryError("no memory for the copy")

    monkeypatch.setattr(ema_module._HostThread, "_copy", fail)
    ema.update()
    for reads in (ema.wait, ema.update, ema.wait):
        with pytest.raises(MemoryError, match="no memory for the copy"):
            reads()


def train_with_late_copies(shards: Path, folder: Path, *overrides: str) -> None:
    """A run whose thread copies nothing before it is waited for, at the latest by the next update."""
    config = small_config(shards, folder, "train.num_steps=6", *overrides)
    with pytest.MonkeyPatch.context() as patches, held_back(patches) as may_copy:

        def wait(self, wait=ema_module._HostThread.wait) -> None:
            may_copy.set()
            wait(self)
            may_copy.clear()

        patches.setattr(ema_module._HostThread, "wait", wait)
        runtime.start(CPU)
        trainer.prepare_folder(config, CPU)
        assert trainer.Trainer(config, CPU).train()


def test_no_step_and_no_checkpoint_comes_before_the_copy(shards: Path, tmp_path: Path) -> None:
    """Weights and averages of every checkpoint, and the samples of averages, are those of a run without a thread."""
    for on_host in ("true", "false"):
        folder = tmp_path / on_host
        run_in_processes(train_with_late_copies, 1, shards, folder, f"engine.ema_on_host={on_host}")
    files = [path.relative_to(tmp_path / "true") for path in (tmp_path / "true").rglob("*.safetensors")]
    files += [
        path.relative_to(tmp_path / "true") for path in (tmp_path / "true").rglob("*.png") if "samples" in path.parts
    ]
    assert {path.parent.name for path in files} == {"step_00000004", "step_00000006", "samples"}
    for path in files:
        assert (tmp_path / "true" / path).read_bytes() == (tmp_path / "false" / path).read_bytes(), path

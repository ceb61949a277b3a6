"""The sharded EMA against one of whole tensors, and its exchange with the weights, at every ZeRO stage."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cfpretrain import ema as ema_module
from cfpretrain.ema import ShardedEMA
from cfpretrain.engine import Engine, Fragment
from tests.processes import run_in_processes
from tests.test_engine import KINDS, gather, process_group, toy_batch, toy_engine, train_step

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
    return Fragment("w", (values.numel(),), 0, values, torch.zeros_like(values), torch.zeros_like(values), False)


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
        expected = weights - 8.0 * math.pow(decay, step)
        torch.testing.assert_close(ema.values[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_host", [False, True])
def test_rank_that_holds_nothing(on_host: bool) -> None:
    ema = ShardedEMA([], DECAY, on_host)
    ema.update()
    assert ema.values == []

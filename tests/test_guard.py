"""The guard: what it calls sick, what it must not, and that a resumed run decides as an uninterrupted one."""

import json
import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base.config import GuardConfig
from cfpretrain.core import seeds
from cfpretrain.run.guard import Guard

DEFAULT = GuardConfig()
VALUES = st.lists(st.floats(0, 1e30), min_size=8, max_size=40)


def make_guard(
    spike_deviations: float = DEFAULT.spike_deviations,
    window_steps: int = DEFAULT.window_steps,
    max_skips_in_row: int = DEFAULT.max_skips_in_row,
) -> Guard:
    return Guard(GuardConfig(spike_deviations, window_steps, max_skips_in_row))


def with_losses(losses: Iterable[float], window_steps: int = DEFAULT.window_steps) -> Guard:
    guard = make_guard(window_steps=window_steps)
    for loss in losses:
        guard.applied(loss, 1.0)
    return guard


def draws(name: str, count: int) -> list[float]:
    """Standard normal draws."""
    return seeds.normal(seeds.key(3, name), (count,)).tolist()


def healthy(num_steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a run: a fall by a factor of 20 in the first 100 steps, then noise of 15 and 30 %."""
    losses = [(0.1 + 2 * math.exp(-i / 30)) * math.exp(0.15 * x) for i, x in enumerate(draws("loss", num_steps))]
    norms = [(0.3 + 4 * math.exp(-i / 10)) * math.exp(0.3 * x) for i, x in enumerate(draws("norm", num_steps))]
    return list(zip(losses, norms, strict=True))


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))


@pytest.mark.parametrize("spike_deviations", [0.0, 20.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_sick_from_the_first_step_on(value: float, spike_deviations: float) -> None:
    guard = make_guard(spike_deviations)
    assert guard.problem_of_loss(value) == f"the loss is {value}"
    assert guard.problem_of_grad_norm(value) == f"the gradient norm is {value}"
    assert guard.problem_of_loss(1e30) is None
    assert guard.problem_of_grad_norm(0.0) is None


def test_a_spike_of_100_times_is_sick_and_said_with_its_numbers() -> None:
    guard = make_guard()
    for loss, norm in [(4.0, 0.5), (4.1, 0.6), (4.2, 0.7), (5.0, 0.4)] * 50:
        guard.applied(loss, norm)
    # Medians 4.15 and 0.55. A deviation of the loss is 5 % of its median, one of the norm 1.4826 * 0.1.
    assert guard.problem_of_loss(415) == "the loss 415 is 1980 deviations above 4.15, the median of 200 steps"
    assert guard.problem_of_grad_norm(55) == (
        "the gradient norm 55 is 367 deviations above 0.55, the median of 200 steps"
    )
    assert guard.problem_of_loss(5.5) is None
    assert guard.problem_of_grad_norm(3.4) is None
    assert guard.problem_of_grad_norm(3.6) is not None


def test_no_spike_where_the_knob_is_0() -> None:
    guard = make_guard(spike_deviations=0.0)
    for _ in range(200):
        guard.applied(1.0, 1.0)
    assert guard.problem_of_loss(1e30) is None
    assert guard.problem_of_grad_norm(1e30) is None


@pytest.mark.parametrize(("window_steps", "num_silent"), [(8, 8), (32, 8), (33, 9), (200, 50)])
def test_no_verdict_on_spikes_before_a_quarter_of_the_window(window_steps: int, num_silent: int) -> None:
    guard = make_guard(window_steps=window_steps)
    for _ in range(num_silent):
        assert guard.problem_of_loss(1e6) is None
        assert guard.problem_of_grad_norm(1e6) is None
        guard.applied(1.0, 1.0)
    assert guard.problem_of_loss(1e6) is not None
    assert guard.problem_of_grad_norm(1e6) is not None


@given(VALUES, st.floats(0, 1))
def test_nothing_below_twice_the_median_is_a_spike(losses: list[float], share: float) -> None:
    guard = with_losses(losses, window_steps=32)
    assert guard.problem_of_loss(share * 1.999 * median(losses[-32:])) is None


@given(VALUES, st.floats(1, 1e6))
def test_what_is_31_times_the_median_is_a_spike_whatever_the_scatter(losses: list[float], factor: float) -> None:
    middle = median(losses[-32:])
    if middle > 1e-300:
        assert with_losses(losses, window_steps=32).problem_of_loss(31 * factor * middle) is not None


def test_no_verdict_without_a_scale() -> None:
    assert with_losses([0.0] * 200).problem_of_loss(1.0) is None


def test_spikes_among_the_applied_steps_hide_no_other() -> None:
    """A third of the window is spikes, which came before there was a verdict: mean and variance would pass them."""
    guard = with_losses([1.0, 1.1, 100.0] * 60)
    assert guard.problem_of_loss(100.0) is not None
    assert guard.problem_of_loss(1.2) is None


def test_only_the_window_counts() -> None:
    guard = with_losses([1.0] * 50 + [100.0] * 200)
    assert guard.problem_of_loss(190.0) is None
    guard = with_losses([100.0] * 50 + [1.0] * 200)
    assert guard.problem_of_loss(100.0) is not None


def test_skipped_steps_are_not_part_of_what_is_usual() -> None:
    guard = with_losses([1.0] * 200)
    for _ in range(1000):
        guard.skipped()
    assert guard.problem_of_loss(100.0) is not None
    assert guard.to_plain()["losses"] == [1.0] * 200


@pytest.mark.parametrize("window_steps", [32, 200])
def test_healthy_training_is_never_called_sick(window_steps: int) -> None:
    guard = make_guard(window_steps=window_steps)
    for loss, norm in healthy(1000):
        assert guard.problem_of_loss(loss) is None
        assert guard.problem_of_grad_norm(norm) is None
        guard.applied(loss, norm)


def test_a_row_of_skips_asks_for_a_rewind() -> None:
    guard = make_guard(max_skips_in_row=3)
    for _ in range(5):
        guard.skipped()
        guard.skipped()
        assert not guard.must_rewind
        guard.applied(1.0, 1.0)
        assert guard.num_skips_in_row == 0
    for _ in range(3):
        guard.skipped()
    assert guard.must_rewind
    assert guard.num_skips_in_row == 3
    guard.num_skips_in_row = 0  # as after a rewind
    assert (guard.num_skips_in_row, guard.must_rewind) == (0, False)


@pytest.mark.parametrize("num_before", [0, 30, 120, 300])
def test_a_resumed_guard_decides_as_an_uninterrupted_one(num_before: int) -> None:
    guard = make_guard(spike_deviations=4.0)
    rows = healthy(500)
    rows[130] = rows[400] = (50.0, 90.0)
    num_problems = 0
    for step, (loss, norm) in enumerate(rows):
        if step == num_before:
            plain = json.loads(json.dumps(guard.to_plain()))
            resumed = make_guard(spike_deviations=4.0)
            # Whatever it knew is overwritten.
            resumed.applied(7.0, 7.0)
            resumed.skipped()
            resumed.restore(plain)
        problems = guard.problem_of_loss(loss), guard.problem_of_grad_norm(norm)
        sides = [guard, resumed] if step >= num_before else [guard]
        for side in sides:
            assert (side.problem_of_loss(loss), side.problem_of_grad_norm(norm)) == problems
            if problems == (None, None):
                side.applied(loss, norm)
            else:
                side.skipped()
        num_problems += problems != (None, None)
        assert all(side.to_plain() == guard.to_plain() for side in sides)
    assert num_problems >= 2


def test_a_row_of_skips_goes_on_after_a_resume() -> None:
    guard, resumed = make_guard(max_skips_in_row=2), make_guard(max_skips_in_row=2)
    guard.skipped()
    resumed.restore(guard.to_plain())
    resumed.skipped()
    assert resumed.must_rewind


def test_a_smaller_window_keeps_the_latest_steps() -> None:
    guard = make_guard(window_steps=8)
    guard.restore(with_losses([float(i) for i in range(200)]).to_plain())
    assert guard.to_plain()["losses"] == [float(i) for i in range(192, 200)]


def test_what_is_not_finite_never_enters_the_window() -> None:
    guard = make_guard()
    with pytest.raises(AssertionError):
        guard.applied(math.nan, 1.0)
    with pytest.raises(AssertionError):
        guard.applied(1.0, math.inf)
    assert guard.to_plain() == make_guard().to_plain()

"""Noise processes: what they draw, how they noise, what the network predicts and what a prediction means."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.core import seeds
from cfpretrain.core.process import Levels, NoiseProcess, make_process, process_of_scheduler

PROCESSES = {name: make_process(name) for name in ("epsilon", "v", "flow")} | {
    "flow, uniform": make_process("flow", flow_times="uniform")
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
# By keys of samples 0 to 7: a run that goes on draws the same.
DDPM_TIMES = [591, 695, 797, 339, 366, 931, 723, 973]
FLOW_TIMES = {
    "flow": [557.2016, 624.4666, 696.2985, 397.8199, 415.1165, 815.0667, 643.3476, 872.7833],
    "flow, uniform": [591.1677, 694.7049, 796.7888, 339.502, 366.1317, 930.7847, 722.5962, 972.4508],
}


def keys(num: int) -> torch.Tensor:
    return seeds.fold(seeds.key(0, "timestep"), torch.arange(num))


@pytest.mark.parametrize("name", PROCESSES)
def test_times_are_those_that_runs_have_trained_on(name) -> None:
    times = PROCESSES[name].draw_times(keys(8))
    if name in FLOW_TIMES:
        torch.testing.assert_close(times, torch.tensor(FLOW_TIMES[name]), rtol=1e-5, atol=0)
    else:
        assert times.tolist() == DDPM_TIMES


@pytest.mark.parametrize("name", PROCESSES)
def test_times_follow_their_law(name) -> None:
    times = PROCESSES[name].draw_times(keys(20_000)).double()
    assert 0 <= float(times.min()) <= float(times.max()) <= 999
    if name == "flow":
        times = (times / 999).logit()  # standard normal
        mean, deviation = 0.0, 1.0
    else:
        mean, deviation = 499.5, 1000 / 12**0.5
    assert float(times.mean()) == pytest.approx(mean, abs=4 * deviation / 20_000**0.5)
    assert float(times.std()) == pytest.approx(deviation, rel=0.02)


@given(st.sampled_from(list(PROCESSES)), st.integers(0, 2**32))
def test_a_prediction_leads_back(name: str, seed: int) -> None:
    """In float64, noising and the target are inverse to `split` at every time."""
    process, key = PROCESSES[name], seeds.key(seed, "case")
    clean, epsilon = seeds.normal(seeds.fold(key, torch.arange(2)), (4, 3)).double()
    times_B = process.draw_times(seeds.fold(key, torch.arange(4)))
    noised, target = process.noise(clean, epsilon, times_B)
    for i, (alpha, sigma) in enumerate(zip(*map(torch.Tensor.tolist, process.coefficients(times_B)), strict=True)):
        found = process.split(noised[i], target[i], alpha, sigma)
        # alpha and sigma of DDPM's last level amplify rounding 160 times.
        torch.testing.assert_close(found, (clean[i], epsilon[i]), rtol=0, atol=1e-12)


@every_process
def test_levels_are_those_of_their_times(process: NoiseProcess) -> None:
    for num_steps, spacing in itertools.product((2, 7, 250), ("time", "log_snr")):
        levels = process.levels(num_steps, spacing)
        assert len(levels) == num_steps
        alphas, sigmas = process.coefficients(levels.times_T)
        torch.testing.assert_close((levels.alphas_T, levels.sigmas_T), (alphas, sigmas), rtol=0, atol=1e-7)
        assert float(levels.times_T[-1]) == 999
        assert bool((levels.times_T.diff() > 0).all())
        assert bool((levels.half_log_snr().diff() < 0).all())


@pytest.mark.parametrize("name", ["epsilon", "v"])
def test_ddpm_keeps_unit_variance(name) -> None:
    clean, epsilon = seeds.normal(keys(2), (20_000,))
    for level in (0, 300, 999):
        noised, target = PROCESSES[name].noise(clean[None], epsilon[None], torch.tensor([level]))
        assert float(noised.var()) == pytest.approx(1.0, abs=0.05)
        assert float(target.var()) == pytest.approx(1.0, abs=0.05)


def test_flow_goes_straight() -> None:
    """Between two times a token moves by the velocity, whatever they are."""
    process = PROCESSES["flow"]
    clean, epsilon = seeds.normal(keys(2), (64,)).double()
    ends = [process.noise(clean[None], epsilon[None], torch.tensor([999 * t])) for t in (0.0, 0.25, 1.0)]
    torch.testing.assert_close((ends[0][0][0], ends[2][0][0]), (clean, epsilon))
    torch.testing.assert_close(ends[1][0], ends[0][0] + 0.25 * ends[1][1])


def test_other_numbers_of_timesteps_end_at_the_same_noise() -> None:
    ends = [float(make_process(num_timesteps=n).levels(2).alphas_T[-1].log()) for n in (500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.1


@every_process
@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_numbers_of_steps_are_refused(process: NoiseProcess, num_steps: int) -> None:
    with pytest.raises(ValueError, match="2 to 1000"):
        process.levels(num_steps)


def gaps_of(levels: Levels) -> float:
    gaps = -levels.half_log_snr().diff()
    return float(gaps.max() / gaps.min())


@pytest.mark.parametrize("num_steps", [2, 7, 25, 250, 1000])
def test_levels_even_in_log_snr(num_steps: int) -> None:
    process = PROCESSES["epsilon"]
    full, levels = process.levels(1000), process.levels(num_steps, "log_snr")
    steps = levels.times_T.tolist()
    assert (len(steps), steps[0], steps[-1]) == (num_steps, 0, 999)
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert torch.equal(levels.alphas_T, full.alphas_T[levels.times_T])
    if num_steps == 7:
        assert gaps_of(levels) < 1.2
    if num_steps > 3:
        # Of a flow all but the first of sampling, where nothing but noise is.
        flow = PROCESSES["flow"].levels(num_steps, "log_snr")
        assert float(flow.alphas_T[-1]) == 0
        assert gaps_of(Levels(flow.times_T[:-1], flow.alphas_T[:-1], flow.sigmas_T[:-1])) < 1 + 1e-9


@pytest.mark.parametrize("num_timesteps", [1000, 700])
@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
def test_a_scheduler_of_diffusers_says_the_process(name, num_timesteps) -> None:
    process = make_process(name, num_timesteps)
    scheduler = process.scheduler_config()
    assert process_of_scheduler(process.prediction_type, scheduler) == process
    for other in PROCESSES.values():
        if other.prediction_type != process.prediction_type:
            with pytest.raises(ValueError, match=f"scheduler: expected {other.prediction_type} and linear betas"):
                process_of_scheduler(other.prediction_type, scheduler)
    with pytest.raises(ValueError, match=r"linear betas, as the model was trained, got .* and scaled_linear"):
        process_of_scheduler(process.prediction_type, scheduler | {"beta_schedule": "scaled_linear"})

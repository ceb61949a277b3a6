"""The noise axis beyond the golden numbers: the laws of the forward process and of a denoising step."""

import itertools

import pytest
import torch

from cfpretrain.core import process as noise
from cfpretrain.core import seeds


def test_forward_process_keeps_unit_variance() -> None:
    schedule = noise.linear_schedule()
    keys = seeds.fold(seeds.key(0, "x"), torch.arange(2))
    clean, epsilon = seeds.normal(keys, (20_000,))
    for level in (0, 300, 999):
        noised = noise.q_sample(schedule, clean[None], epsilon[None], torch.tensor([level]))
        assert float(noised.var()) == pytest.approx(1.0, abs=0.05)


def test_other_numbers_of_timesteps_end_at_the_same_noise() -> None:
    ends = [float(noise.linear_schedule(n).alphas_cumprod_T[-1].log()) for n in (500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.2


@pytest.mark.parametrize("num_steps", [2, 3, 50, 1000])
def test_denoising_with_the_true_noise_finds_the_image(num_steps: int) -> None:
    """With a perfect model every step stays on the path: x_0 comes back when the last step adds no noise."""
    schedule = noise.respace(noise.linear_schedule(), num_steps)
    keys = seeds.fold(seeds.key(0, "x"), torch.arange(2))
    clean, noised = seeds.normal(keys, (64,)).double()
    for level in reversed(range(num_steps)):
        alpha = schedule.alphas_cumprod_T[level]
        epsilon = (noised - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        fresh = seeds.normal(seeds.fold(keys[0], level), (64,)).double()
        noised = noise.ddpm_update(schedule, level, noised, epsilon, fresh)
    torch.testing.assert_close(noised, clean, rtol=1e-6, atol=1e-6)


def test_posterior_mean_is_bayes() -> None:
    """q(x_{t-1} | x_t, x_0) by Bayes' rule for Gaussians, against the update with its noise left out."""
    schedule = noise.linear_schedule()
    level, clean, noised = 400, 0.7, -0.3
    below, here = (float(schedule.alphas_cumprod_T[i]) for i in (level - 1, level))
    alpha = here / below
    prior_mean, prior_var = below**0.5 * clean, 1 - below
    want = (prior_mean / prior_var + alpha**0.5 * noised / (1 - alpha)) / (1 / prior_var + alpha / (1 - alpha))
    epsilon = torch.tensor((noised - here**0.5 * clean) / (1 - here) ** 0.5, dtype=torch.float64)
    got = noise.ddpm_update(schedule, level, torch.tensor(noised).double(), epsilon, torch.zeros(()))
    assert float(got) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("num_steps", [0, 1, 1001])
def test_impossible_respacing_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match="2 to 1000"):
        noise.respace(noise.linear_schedule(), num_steps)


# ---------------------------------------------------------------------------
# Solvers, on data of which everything is known: x_0 ~ N(MEAN, DEVIATION^2)

MEAN, DEVIATION = 0.5, 0.3


def true_epsilon(schedule: noise.Schedule, level: int, noised: torch.Tensor) -> torch.Tensor:
    """E[epsilon | x_t]."""
    alpha = float(schedule.alphas_cumprod_T[level])
    return (1 - alpha) ** 0.5 * (noised - alpha**0.5 * MEAN) / (alpha * DEVIATION**2 + 1 - alpha)


def quantile(schedule: noise.Schedule, level: int, standard: torch.Tensor) -> torch.Tensor:
    """The probability flow keeps quantiles: where the flow through `standard` deviations passes this level."""
    alpha = float(schedule.alphas_cumprod_T[level])
    return alpha**0.5 * MEAN + (alpha * DEVIATION**2 + 1 - alpha) ** 0.5 * standard


def error_of(solver: str, num_steps: int) -> float:
    """The largest distance to the exact probability flow, at the last level."""
    schedule = noise.respace(noise.linear_schedule(), num_steps, "log_snr")
    standard = torch.linspace(-2, 2, 9, dtype=torch.float64)
    walk, noised = noise.Walk(schedule, solver), quantile(schedule, num_steps - 1, standard)
    for level in range(num_steps - 1, 0, -1):
        noised = walk.step(level, noised, true_epsilon(schedule, level, noised), torch.zeros_like(noised))
    return float((noised - quantile(schedule, 0, standard)).abs().max())


def test_solvers_have_their_order() -> None:
    """Twice the steps: half the error at first order, a quarter at second."""
    for solver, least, most in (("ddim", 1.6, 2.6), ("dpm++", 3.0, 6.0)):
        errors = [error_of(solver, num_steps) for num_steps in (12, 24, 48)]
        for coarse, fine in itertools.pairwise(errors):
            assert least < coarse / fine < most, (solver, errors)
    assert error_of("dpm++", 24) < error_of("ddim", 24) / 10


def moments_of(solver: str, num_steps: int) -> tuple[float, float]:
    """Mean and deviation at the last level, exactly: what walks is (mean, share of the first noise, of the next, ...).

    With the true epsilon, every step is affine in them.
    """
    schedule = noise.respace(noise.linear_schedule(), num_steps, "log_snr")
    unit = torch.eye(num_steps + 1, dtype=torch.float64)
    begin = float(schedule.alphas_cumprod_T[-1])
    noised = begin**0.5 * MEAN * unit[0] + (begin * DEVIATION**2 + 1 - begin) ** 0.5 * unit[1]
    walk = noise.Walk(schedule, solver)
    for k, level in enumerate(range(num_steps - 1, 0, -1), start=2):
        alpha = float(schedule.alphas_cumprod_T[level])
        epsilon = (1 - alpha) ** 0.5 * (noised - alpha**0.5 * MEAN * unit[0]) / (alpha * DEVIATION**2 + 1 - alpha)
        noised = walk.step(level, noised, epsilon, unit[k])
    return float(noised[0]), float(noised[1:].square().sum().sqrt())


def test_the_random_solver_is_of_second_order_in_law() -> None:
    last = noise.linear_schedule().alphas_cumprod_T[0]
    mean, deviation = float(last.sqrt() * MEAN), float((last * DEVIATION**2 + 1 - last).sqrt())

    def error(solver: str, num_steps: int) -> float:
        found_mean, found_deviation = moments_of(solver, num_steps)
        assert abs(found_mean - mean) < 1e-9
        return abs(found_deviation - deviation)

    errors = [error("sde-dpm++", num_steps) for num_steps in (25, 50, 100)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.0 < coarse / fine < 6.0, errors
    assert error("sde-dpm++", 25) < error("ddpm", 100)
    assert error("sde-dpm++", 50) < error("ddpm", 250)


def test_without_a_step_before_the_random_solver_is_ddpm_with_the_posteriors_variance() -> None:
    schedule = noise.respace(noise.linear_schedule(), 20)
    noised, epsilon, drawn = seeds.normal(seeds.fold(seeds.key(0, "x"), torch.arange(3)), (64,)).double()
    for level in (1, 7, 19):
        clean = noise.predicted_clean(schedule, level, noised, epsilon)
        found = noise.dpm_update(schedule, level, noised, clean, None, drawn)
        alpha_bar, below = schedule.alphas_cumprod_T[level], schedule.alphas_cumprod_T[level - 1]
        variance = (1 - below) / (1 - alpha_bar) * (1 - alpha_bar / below)
        mean = noise.ddpm_update(schedule, level, noised, epsilon, torch.zeros_like(noised))
        torch.testing.assert_close(found, mean + variance.sqrt() * drawn, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", noise.SOLVERS)
def test_every_solver_finds_the_image_with_the_true_noise(solver: str) -> None:
    schedule = noise.respace(noise.linear_schedule(), 20)
    clean, noised = seeds.normal(seeds.fold(seeds.key(0, "x"), torch.arange(2)), (64,)).double()
    walk = noise.Walk(schedule, solver)
    for level in reversed(range(20)):
        alpha = schedule.alphas_cumprod_T[level]
        epsilon = (noised - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        noised = walk.step(level, noised, epsilon, torch.zeros_like(noised))
    torch.testing.assert_close(noised, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 7, 25, 250, 1000])
def test_levels_even_in_log_snr(num_steps: int) -> None:
    full = noise.linear_schedule()
    respaced = noise.respace(full, num_steps, "log_snr")
    steps = respaced.timesteps_T.tolist()
    assert (len(steps), steps[0], steps[-1]) == (num_steps, 0, 999)
    assert all(a < b for a, b in itertools.pairwise(steps))
    assert torch.equal(respaced.alphas_cumprod_T, full.alphas_cumprod_T[respaced.timesteps_T])
    if num_steps == 7:
        gaps = -noise.log_snr(respaced).diff()
        assert float(gaps.max() / gaps.min()) < 1.2

"""Solvers on data of which everything is known, for every noise process."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.process import NoiseProcess, make_process
from cfpretrain.core.solvers import SOLVERS, Solver

PROCESSES = {name: make_process(name) for name in ("epsilon", "v", "flow")}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
every_solver = pytest.mark.parametrize("name", SOLVERS)


def normal(num: int, size: int = 64) -> Tensor:
    return seeds.normal(seeds.fold(seeds.key(0, "x"), torch.arange(num)), (size,)).double()


def coefficients(solver: Solver, left: int) -> tuple[float, float]:
    """alpha and sigma with so many steps left."""
    return (float(solver.levels.alphas_T[left - 1]), float(solver.levels.sigmas_T[left - 1])) if left else (1.0, 0.0)


@pytest.mark.parametrize("num_steps", [2, 3, 20, 1000])
@every_solver
@every_process
def test_denoising_with_the_true_noise_finds_the_image(process: NoiseProcess, name: str, num_steps: int) -> None:
    """With a perfect model every step stays on the path: x_0 comes back, since the last step adds no noise."""
    for spacing in ("time", "log_snr"):
        clean, *drawn = normal(num_steps + 1)
        solver = Solver(process, num_steps, spacing, name)

        def predict(noised: Tensor, time: float, process=process, clean=clean) -> Tensor:
            alpha, sigma = process.coefficients(torch.tensor([time]))
            epsilon = noised if alpha == 0 else (noised - alpha * clean) / sigma
            return process.target(clean, epsilon, alpha, sigma)

        found = solver.denoise(predict, drawn.__getitem__)
        torch.testing.assert_close(found, clean, rtol=1e-6, atol=1e-6)


@every_process
def test_posterior_mean_is_bayes(process: NoiseProcess) -> None:
    """q(x_s | x_t, x_0) by Bayes' rule for Gaussians, against the step with its noise left out."""
    solver = Solver(process, 1000)
    clean, noised = torch.tensor(0.7).double(), torch.tensor(-0.3).double()
    for left in (2, 400, 999):
        (alpha, sigma), (alpha_s, sigma_s) = coefficients(solver, left), coefficients(solver, left - 1)
        ratio = alpha / alpha_s
        variance = sigma**2 - (ratio * sigma_s) ** 2
        want = (alpha_s * clean / sigma_s**2 + ratio * noised / variance) / (1 / sigma_s**2 + ratio**2 / variance)
        got = solver.step(left, noised, clean, (noised - alpha * clean) / sigma)
        assert float(got) == pytest.approx(float(want), rel=1e-6)


@every_process
def test_ddpm_keeps_the_variance_of_data_of_unit_variance(process: NoiseProcess) -> None:
    """What x_t knows of x_0 ~ N(0, 1) is E[x_0 | x_t]; with its own variance, a step then leads to the law of x_s."""
    solver = Solver(process, 12)
    for left in range(12, 1, -1):
        (alpha, sigma), (alpha_s, sigma_s) = coefficients(solver, left), coefficients(solver, left - 1)
        total = alpha**2 + sigma**2
        # What is noised and what is drawn, as two axes.
        noised, drawn = torch.tensor([total**0.5, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
        found = solver.step(left, noised, alpha / total * noised, sigma / total * noised, drawn=drawn)
        assert float(found.square().sum()) == pytest.approx(alpha_s**2 + sigma_s**2, rel=1e-6)


def test_first_order_steps_are_one_another() -> None:
    """SDE-DPM-Solver++ without a step before is DDPM with the variance of its posterior; DPM-Solver++ is DDIM."""
    noised, clean, drawn = normal(3)
    for process in PROCESSES.values():
        ddpm, ddim, dpm, sde = (Solver(process, 20, name=name) for name in SOLVERS)
        for left in (2, 8, 20):
            (alpha, sigma), (alpha_s, sigma_s) = coefficients(ddpm, left), coefficients(ddpm, left - 1)
            epsilon = (noised - alpha * clean) / sigma
            variance = (1 - (alpha * sigma_s / (alpha_s * sigma)) ** 2) * sigma_s**2
            mean = ddpm.step(left, noised, clean, epsilon)
            found = sde.step(left, noised, clean, epsilon, drawn=drawn)
            torch.testing.assert_close(found, mean + variance**0.5 * drawn, rtol=1e-9, atol=1e-9)
            found, want = (solver.step(left, noised, clean, epsilon) for solver in (dpm, ddim))
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_ddim_is_eulers_step_along_a_flow() -> None:
    noised, velocity = normal(2)
    solver = Solver(PROCESSES["flow"], 8, name="ddim")
    for left in (1, 5, 8):
        parts = solver.process.split(noised, velocity, *coefficients(solver, left))
        torch.testing.assert_close(solver.step(left, noised, *parts), noised - velocity / 8)


# ---------------------------------------------------------------------------
# x_0 ~ N(MEAN, DEVIATION^2)

MEAN, DEVIATION = 0.5, 0.3


def true_prediction(process: NoiseProcess, mean: Tensor | float = MEAN) -> Callable[[Tensor, float], Tensor]:
    """The target's expectation at x_t; `mean` in the coordinates of the tokens."""

    def predict(noised: Tensor, time: float) -> Tensor:
        alpha, sigma = process.coefficients(torch.tensor([time]))
        variance = alpha**2 * DEVIATION**2 + sigma**2
        clean = mean + alpha * DEVIATION**2 / variance * (noised - alpha * mean)
        epsilon = sigma / variance * (noised - alpha * mean)
        return process.target(clean, epsilon, alpha, sigma)

    return predict


def quantile(solver: Solver, left: int, standard: Tensor) -> Tensor:
    """The probability flow keeps quantiles: where the flow through `standard` deviations passes this level."""
    alpha, sigma = coefficients(solver, left)
    return alpha * MEAN + (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5 * standard


def error_of(process: NoiseProcess, name: str, num_steps: int) -> float:
    """The largest distance to the exact probability flow, at the last level."""
    standard, seen = torch.linspace(-2, 2, 9, dtype=torch.float64), {}
    solver = Solver(process, num_steps, "log_snr", name)
    begin = quantile(solver, num_steps, standard)
    solver.denoise(true_prediction(process), lambda _: begin, seen.__setitem__)
    return float((seen[1] - quantile(solver, 1, standard)).abs().max())


@every_process
def test_solvers_have_their_order(process: NoiseProcess) -> None:
    """Twice the steps: half the error at first order, a quarter at second."""
    for name, least, most in (("ddim", 1.6, 2.6), ("dpm++", 2.8, 6.0)):
        errors = [error_of(process, name, num_steps) for num_steps in (12, 24, 48)]
        for coarse, fine in itertools.pairwise(errors):
            assert least < coarse / fine < most, (name, errors)
    assert error_of(process, "dpm++", 32) < error_of(process, "ddim", 32) / 10


def moments_of(solver: Solver, left: int) -> tuple[float, float]:
    """Mean and deviation where so many steps are left, exactly.

    Tokens are (mean, share of the first noise, of the next, ...): with the true prediction, every step is affine.
    """
    num_steps, seen = len(solver.levels), {}
    unit = torch.eye(num_steps + 1, dtype=torch.float64)
    alpha, sigma = coefficients(solver, num_steps)
    begin = alpha * MEAN * unit[0] + (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5 * unit[1]
    predict = true_prediction(solver.process, MEAN * unit[0])
    solver.denoise(predict, lambda k: unit[k + 1] if k else begin, seen.__setitem__)
    return float(seen[left][0]), float(seen[left][1:].square().sum().sqrt())


@every_process
def test_the_random_solver_is_of_second_order_in_law(process: NoiseProcess) -> None:
    def error(name: str, num_steps: int) -> float:
        solver = Solver(process, num_steps, "log_snr", name)
        alpha, sigma = coefficients(solver, 1)
        mean, deviation = moments_of(solver, 1)
        assert abs(mean - alpha * MEAN) < 1e-8  # times of a flow are float32
        return abs(deviation - (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5)

    errors = [error("sde-dpm++", num_steps) for num_steps in (25, 50, 100)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.0 < coarse / fine < 6.0, errors
    assert error("sde-dpm++", 25) < error("ddpm", 100)
    assert error("sde-dpm++", 50) < error("ddpm", 250)


@pytest.mark.parametrize("spacing", ["time", "log_snr"])
@every_solver
@every_process
def test_samples_have_the_mean_and_variance_of_the_data(process: NoiseProcess, name: str, spacing: str) -> None:
    mean, deviation = moments_of(Solver(process, 250, spacing, name), 0)
    assert mean == pytest.approx(MEAN, rel=2e-3)
    assert deviation == pytest.approx(DEVIATION, rel=0.03)


@every_solver
def test_pure_noise_at_the_first_level_makes_no_infinities(name: str) -> None:
    for num_steps, spacing in itertools.product((2, 3, 25), ("time", "log_snr")):
        solver = Solver(PROCESSES["flow"], num_steps, spacing, name)
        assert float(solver.levels.alphas_T[-1]) == 0
        drawn = normal(num_steps)
        assert bool(solver.denoise(lambda noised, _: noised, drawn.__getitem__).isfinite().all())

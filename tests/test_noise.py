"""The noise axis beyond the golden numbers: the laws of the forward process and of a denoising step."""

import pytest
import torch

from cfpretrain import noise, seeds


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

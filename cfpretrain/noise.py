"""The noise axis: the DDPM schedule, the forward process, and the update of one denoising step.

Ho, Jain, Abbeel 2020 (arXiv 2006.11239), with the respacing of Nichol, Dhariwal 2021 (arXiv 2102.09672). The model
predicts epsilon. Coefficients are computed in float64 and applied in the dtype of the tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """A noise schedule, or a respaced part of one.

    Attributes:
        timesteps_T: int64 [T], the original index of each level, ascending: what the model is told.
        alphas_cumprod_T: float64 [T], the share of the signal's variance left at each level.
    """

    timesteps_T: Tensor
    alphas_cumprod_T: Tensor

    def __len__(self) -> int:
        return len(self.timesteps_T)


def linear_schedule(num_timesteps: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> Schedule:
    """Betas from `beta_first` to `beta_last`, both scaled by 1000 / num_timesteps, equally spaced."""
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * beta_first, scale * beta_last, num_timesteps, dtype=torch.float64)
    return Schedule(torch.arange(num_timesteps), (1 - betas).cumprod(0))


def respace(schedule: Schedule, num_steps: int) -> Schedule:
    """`num_steps` of the schedule's levels, spread evenly with both ends: level round(i * (T-1) / (n-1)).

    Raises:
        ValueError: fewer than 2 or more than T steps.
    """
    last = len(schedule) - 1
    if not 2 <= num_steps <= last + 1:
        raise ValueError(f"denoising steps: expected 2 to {last + 1}, got {num_steps}")
    kept = torch.tensor([round(i * last / (num_steps - 1)) for i in range(num_steps)])
    return Schedule(schedule.timesteps_T[kept], schedule.alphas_cumprod_T[kept])


def q_sample(schedule: Schedule, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
    """The forward process q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon.

    Args:
        clean: [B, ...].
        noise: as `clean`, standard normal.
        level_B: int64 [B], index into the schedule.
    """
    alpha = schedule.alphas_cumprod_T.to(level_B.device)[level_B].reshape(-1, *[1] * (clean.ndim - 1))
    return alpha.sqrt().to(clean.dtype) * clean + (1 - alpha).sqrt().to(clean.dtype) * noise


def ddpm_update(schedule: Schedule, level: int, noised: Tensor, epsilon: Tensor, noise: Tensor) -> Tensor:
    """One ancestral step from `level` to the level below (or to x_0 from level 0); x_0 is not clipped.

    The variance is "fixed large": beta_t of the respaced chain. `noise` is not used at level 0.

    Args:
        level: index into the schedule; equal for all samples.
        noised: x_t, any shape.
        epsilon: the model's prediction, as `noised`.
        noise: standard normal, as `noised`.
    """
    alpha_bar = float(schedule.alphas_cumprod_T[level])
    alpha_bar_below = float(schedule.alphas_cumprod_T[level - 1]) if level > 0 else 1.0
    alpha = alpha_bar / alpha_bar_below
    beta = 1 - alpha
    clean = (noised - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
    # Equation 7 of arXiv 2006.11239.
    mean = (alpha_bar_below**0.5 * beta * clean + alpha**0.5 * (1 - alpha_bar_below) * noised) / (1 - alpha_bar)
    if level == 0:
        return mean
    return mean + beta**0.5 * noise

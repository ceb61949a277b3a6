"""The noise axis: the DDPM schedule, the forward process, and the solvers that walk from noise to clean tokens.

Ho, Jain, Abbeel 2020 (arXiv 2006.11239), with the respacing of Nichol, Dhariwal 2021 (arXiv 2102.09672); DDIM: Song,
Meng, Ermon 2021 (arXiv 2010.02502); DPM-Solver++(2M) and its stochastic sister: Lu et al. 2022 (arXiv 2211.01095). The
model predicts epsilon.
Coefficients are computed in float64 and applied in the dtype of the tokens.
"""

import math
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


def respace(schedule: Schedule, num_steps: int, spacing: str = "time") -> Schedule:
    """Some of a schedule's levels, both ends among them.

    Args:
        schedule: T levels.
        num_steps: how many of them.
        spacing: "time", evenly in the level, round(i * (T-1) / (n-1)), as DDPM has it; "log_snr", evenly in the
            logarithm of the signal-to-noise ratio, which suits solvers of few steps.

    Raises:
        ValueError: fewer than 2 or more than T steps.
    """
    last = len(schedule) - 1
    if not 2 <= num_steps <= last + 1:
        raise ValueError(f"denoising steps: expected 2 to {last + 1}, got {num_steps}")
    if spacing == "time":
        kept = torch.tensor([round(i * last / (num_steps - 1)) for i in range(num_steps)])
    else:
        assert spacing == "log_snr", spacing
        falling_T = log_snr(schedule)
        wanted = torch.linspace(float(falling_T[0]), float(falling_T[-1]), num_steps, dtype=torch.float64)
        kept = (falling_T[None] - wanted[:, None]).abs().argmin(1)
        kept = _spread(kept.tolist(), last)
    return Schedule(schedule.timesteps_T[kept], schedule.alphas_cumprod_T[kept])


def _spread(levels: list[int], last: int) -> Tensor:
    """The same levels, ascending, each moved up where two would be one."""
    for i in range(1, len(levels)):
        levels[i] = max(levels[i], levels[i - 1] + 1)
    for i in range(len(levels) - 1, -1, -1):
        levels[i] = min(levels[i], last - (len(levels) - 1 - i))
    return torch.tensor(levels)


def log_snr(schedule: Schedule) -> Tensor:
    """log(sqrt(abar) / sqrt(1 - abar)) of each level, float64 [T]: falls as noise grows."""
    alphas_T = schedule.alphas_cumprod_T
    return 0.5 * (alphas_T.log() - (-alphas_T).log1p())


def q_sample(schedule: Schedule, clean: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
    """The forward process q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) epsilon.

    Args:
        clean: [B, ...].
        noise: as `clean`, standard normal.
        level_B: int64 [B], index into the schedule.
    """
    alpha = schedule.alphas_cumprod_T.to(level_B.device)[level_B].reshape(-1, *[1] * (clean.ndim - 1))
    return alpha.sqrt().to(clean.dtype) * clean + (1 - alpha).sqrt().to(clean.dtype) * noise


def predicted_clean(schedule: Schedule, level: int, noised: Tensor, epsilon: Tensor) -> Tensor:
    """The x_0 that a prediction of epsilon amounts to; not clipped."""
    alpha_bar = float(schedule.alphas_cumprod_T[level])
    return (noised - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5


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
    clean = predicted_clean(schedule, level, noised, epsilon)
    # Equation 7 of arXiv 2006.11239.
    mean = (alpha_bar_below**0.5 * beta * clean + alpha**0.5 * (1 - alpha_bar_below) * noised) / (1 - alpha_bar)
    if level == 0:
        return mean
    return mean + beta**0.5 * noise


def ddim_update(schedule: Schedule, level: int, noised: Tensor, epsilon: Tensor) -> Tensor:
    """One DDIM step with eta = 0, equation 12 of arXiv 2010.02502; arguments as for `ddpm_update`."""
    clean = predicted_clean(schedule, level, noised, epsilon)
    if level == 0:
        return clean
    alpha_bar_below = float(schedule.alphas_cumprod_T[level - 1])
    return alpha_bar_below**0.5 * clean + (1 - alpha_bar_below) ** 0.5 * epsilon


def dpm_update(
    schedule: Schedule, level: int, noised: Tensor, clean: Tensor, clean_before: Tensor | None, noise: Tensor | None
) -> Tensor:
    """One step of DPM-Solver++(2M), or with noise of SDE-DPM-Solver++(2M): arXiv 2211.01095, algorithm 2 and section 5.

    At first order they are DDIM, and DDPM with the variance of its posterior.

    Args:
        schedule, level, noised: as for `ddpm_update`.
        clean: `predicted_clean` of this level.
        clean_before: that of the level above; None at the first step, which is of first order.
        noise: standard normal, shaped like `noised`; None for the solver without.
    """
    if level == 0:
        return clean
    log_snr_T = log_snr(schedule)
    step = float(log_snr_T[level - 1] - log_snr_T[level])
    if clean_before is not None:
        ratio = float(log_snr_T[level] - log_snr_T[level + 1]) / step
        clean = clean + (clean - clean_before) / (2 * ratio)
    alpha_bar, alpha_bar_below = (float(schedule.alphas_cumprod_T[i]) for i in (level, level - 1))
    shrink = ((1 - alpha_bar_below) / (1 - alpha_bar)) ** 0.5
    if noise is None:
        return shrink * noised - alpha_bar_below**0.5 * math.expm1(-step) * clean
    share = -math.expm1(-2 * step)
    return (
        shrink * math.exp(-step) * noised
        + alpha_bar_below**0.5 * share * clean
        + ((1 - alpha_bar_below) * share) ** 0.5 * noise
    )


SOLVERS = ("ddpm", "ddim", "dpm++", "sde-dpm++")


class Walk:
    """One way from noise to clean tokens, from the last level of a schedule down to x_0.

    Args:
        schedule: the (respaced) levels.
        solver: one of `SOLVERS`. "ddpm" and "sde-dpm++" draw noise on the way, which heals errors made where noise was
            high; "ddim" and "dpm++" keep them to the end. The two with "dpm++" are of second order, for few steps.
    """

    def __init__(self, schedule: Schedule, solver: str) -> None:
        assert solver in SOLVERS, solver
        self.is_random = solver in ("ddpm", "sde-dpm++")
        self._schedule, self._solver = schedule, solver
        self._clean_before: Tensor | None = None

    def step(self, level: int, noised: Tensor, epsilon: Tensor, noise: Tensor) -> Tensor:
        """From `level` to the level below; levels come in falling order, each once. Arguments as for `ddpm_update`."""
        if self._solver == "ddpm":
            return ddpm_update(self._schedule, level, noised, epsilon, noise)
        if self._solver == "ddim":
            return ddim_update(self._schedule, level, noised, epsilon)
        clean = predicted_clean(self._schedule, level, noised, epsilon)
        drawn = noise if self.is_random else None
        below = dpm_update(self._schedule, level, noised, clean, self._clean_before, drawn)
        self._clean_before = clean
        return below

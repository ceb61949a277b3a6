"""Solvers: from noise to clean tokens, level by level, for every noise process.

A step leads from a level t to the less noised s, by alpha and sigma of both and by the x_0 and epsilon that the
prediction at t means. Where no signal is left (alpha = 0, the first level of flow matching), log SNR is -inf, and the
limits below are finite.
"""

import math
from collections.abc import Callable

from torch import Tensor

from cfpretrain.core.process import NoiseProcess

SOLVERS = ("ddpm", "ddim", "dpm++", "sde-dpm++")


class Solver:
    """A solver with the levels that it passes.

    Args:
        process: that the network was trained with.
        num_steps: denoising steps, one a level.
        spacing: of the levels; see `NoiseProcess.levels`.
        name: one of `SOLVERS`. "ddpm" and "sde-dpm++" draw noise on the way, which heals errors made where noise was
            high; "ddim" and "dpm++" keep them to the end. The two with "dpm++" are of second order, for few steps.

    Raises:
        ValueError: the process has no such number of levels.
    """

    def __init__(self, process: NoiseProcess, num_steps: int, spacing: str = "time", name: str = "ddpm") -> None:
        assert name in SOLVERS, name
        self.process, self.levels, self._name = process, process.levels(num_steps, spacing), name
        self._is_random = name in ("ddpm", "sde-dpm++")
        # By the number of steps that are left: with none, tokens are clean.
        self._alphas = [1.0, *self.levels.alphas_T.tolist()]
        self._sigmas = [0.0, *self.levels.sigmas_T.tolist()]
        self._log_snrs = [math.inf, *self.levels.log_snr().tolist()]

    def denoise(
        self,
        predict: Callable[[Tensor, float], Tensor],
        draw: Callable[[int], Tensor],
        watch: Callable[[int, Tensor], None] = lambda *_: None,
    ) -> Tensor:
        """Clean tokens.

        Args:
            predict: the network at (noised tokens, the time that it is told).
            draw: standard normal noise; 0 for the tokens to begin with, k for what the k-th step adds.
            watch: sees the number of steps left, and the tokens; before each step and after the last.
        """
        noised, clean_before = draw(0), None
        for left in range(len(self.levels), 0, -1):
            watch(left, noised)
            prediction = predict(noised, self.levels.times_T[left - 1].item())
            clean, epsilon = self.process.split(noised, prediction, self._alphas[left], self._sigmas[left])
            drawn = draw(len(self.levels) + 1 - left) if self._is_random and left > 1 else None
            noised = self.step(left, noised, clean, epsilon, clean_before, drawn)
            clean_before = clean
        watch(0, noised)
        return noised

    def step(
        self,
        left: int,
        noised: Tensor,
        clean: Tensor,
        epsilon: Tensor,
        clean_before: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> Tensor:
        """One step from x_t to x_s; it is the first where there is no `clean_before`, and the last where left = 1.

        `drawn` is standard normal noise; None at the last step, and for solvers without.
        """
        if self._name == "ddpm":
            return self._ddpm(left, noised, clean, drawn)
        if self._name == "ddim":
            # Equation 12 of Song, Meng, Ermon 2021 (arXiv 2010.02502), eta = 0; of a flow it is Euler's step.
            return self._alphas[left - 1] * clean + self._sigmas[left - 1] * epsilon
        return self._dpm(left, noised, clean, clean_before, drawn)

    def _ddpm(self, left: int, noised: Tensor, clean: Tensor, drawn: Tensor | None) -> Tensor:
        """An ancestral step (Ho et al. 2020, arXiv 2006.11239), for any alpha and sigma."""
        alpha_t, alpha_s = self._alphas[left], self._alphas[left - 1]
        variance_t, variance_s = self._sigmas[left] ** 2, self._sigmas[left - 1] ** 2
        # q(x_t | x_s) has the mean ratio * x_s and this variance: DDPM's beta_t.
        ratio = alpha_t / alpha_s
        variance = variance_t - ratio**2 * variance_s
        # Equation 7: the mean of q(x_s | x_t, x_0).
        mean = (alpha_s * variance * clean + ratio * variance_s * noised) / variance_t
        if drawn is None:
            return mean
        # Section 3.2: the larger of two variances, that of q(x_s | x_t) for data of unit variance. The factor is 1 for
        # DDPM's own schedule, and what a flow lacks of unit variance.
        variance *= (alpha_s**2 + variance_s) / (alpha_t**2 + variance_t)
        return mean + variance**0.5 * drawn

    def _dpm(
        self, left: int, noised: Tensor, clean: Tensor, clean_before: Tensor | None, drawn: Tensor | None
    ) -> Tensor:
        """DPM-Solver++(2M), or with noise SDE-DPM-Solver++(2M).

        Lu et al. 2022 (arXiv 2211.01095), algorithm 2 and section 5. At first order they are DDIM, and DDPM with the
        variance of its posterior.
        """
        if left == 1:
            return clean
        step = self._log_snrs[left - 1] - self._log_snrs[left]
        if clean_before is not None:
            ratio = (self._log_snrs[left] - self._log_snrs[left + 1]) / step
            clean = clean + (clean - clean_before) / (2 * ratio)
        alpha_s, sigma_s = self._alphas[left - 1], self._sigmas[left - 1]
        shrink = sigma_s / self._sigmas[left]
        if drawn is None:
            return shrink * noised - alpha_s * math.expm1(-step) * clean
        share = -math.expm1(-2 * step)
        return shrink * math.exp(-step) * noised + alpha_s * share * clean + sigma_s * share**0.5 * drawn

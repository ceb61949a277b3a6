"""Solvers: from noise to clean tokens, level by level, for every noise process.

A step leads from a level t to the less noised s, by alpha and sigma of both and by the x_0 and epsilon that the
prediction at t means (`NoiseProcess.split`). With r = alpha_t / alpha_s, h = lambda_s - lambda_t where lambda =
log(alpha / sigma), h' and x_0' of the step before, and z ~ N(0, I):

    ddim       x_s = alpha_s x_0 + sigma_s epsilon
    ddpm       x_s = (alpha_s beta x_0 + r sigma_s^2 x_t) / sigma_t^2 + sqrt(beta) z,   beta = sigma_t^2 - r^2 sigma_s^2
    dpm++      x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D,   D = x_0 + h / (2 h') (x_0 - x_0'), first D = x_0
    sde-dpm++  x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z

The last step ends at alpha = 1, sigma = 0: clean tokens. Where no signal is left (alpha = 0, the first level of flow
matching), lambda is -inf, and the limits are finite.
"""

import math
from collections.abc import Callable

from torch import Tensor

from cfpretrain.core.process import NoiseProcess

SOLVERS = ("ddpm", "ddim", "dpm++", "sde-dpm++")


class Solver:
    """A solver with the levels that it passes, one for each denoising step (`NoiseProcess.levels`).

    "ddpm" and "sde-dpm++" draw noise on the way, which corrects errors made where noise was high; "ddim" and "dpm++"
    keep them to the end. The two with "dpm++" are of second order, for few steps.
    """

    def __init__(self, process: NoiseProcess, num_steps: int, spacing: str = "time", name: str = "ddpm") -> None:
        assert name in SOLVERS, name
        self.process, self.levels, self._name = process, process.levels(num_steps, spacing), name
        self._is_random = name in ("ddpm", "sde-dpm++")
        # By the number of steps that are left: with none, tokens are clean.
        self._alphas = [1.0, *self.levels.alphas_T.tolist()]
        self._sigmas = [0.0, *self.levels.sigmas_T.tolist()]
        self._lambdas = [math.inf, *self.levels.half_log_snr().tolist()]

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
        """An ancestral step (Ho et al. 2020, arXiv 2006.11239), for any alpha and sigma: q(x_s | x_t, x_0)."""
        alpha_t, alpha_s = self._alphas[left], self._alphas[left - 1]
        variance_t, variance_s = self._sigmas[left] ** 2, self._sigmas[left - 1] ** 2
        # q(x_t | x_s) has the mean ratio * x_s and this variance: DDPM's beta_t.
        ratio = alpha_t / alpha_s
        variance = variance_t - ratio**2 * variance_s
        # Equation 7: the mean of q(x_s | x_t, x_0).
        mean = (alpha_s * variance * clean + ratio * variance_s * noised) / variance_t
        if drawn is None:
            return mean
        # Section 3.2: the larger of two variances, that of q(x_s | x_t) for data of unit variance. The factor is 1 in
        # DDPM's own schedule, where alpha^2 + sigma^2 = 1; in a flow it is less than 1 or more.
        variance *= (alpha_s**2 + variance_s) / (alpha_t**2 + variance_t)
        return mean + variance**0.5 * drawn

    def _dpm(
        self, left: int, noised: Tensor, clean: Tensor, clean_before: Tensor | None, drawn: Tensor | None
    ) -> Tensor:
        """DPM-Solver++(2M), or with noise SDE-DPM-Solver++(2M): arXiv 2211.01095, algorithm 2 and section 5.

        At first order they are DDIM, and DDPM with the variance of its posterior.
        """
        if left == 1:
            return clean
        step = self._lambdas[left - 1] - self._lambdas[left]
        if clean_before is not None:
            ratio = (self._lambdas[left] - self._lambdas[left + 1]) / step
            clean = clean + (clean - clean_before) / (2 * ratio)
        alpha_s, sigma_s = self._alphas[left - 1], self._sigmas[left - 1]
        shrink = sigma_s / self._sigmas[left]
        if drawn is None:
            return shrink * noised - alpha_s * math.expm1(-step) * clean
        share = -math.expm1(-2 * step)
        return shrink * math.exp(-step) * noised + alpha_s * share * clean + sigma_s * share**0.5 * drawn

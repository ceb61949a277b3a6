"""The noise axis: how tokens are noised, what the network predicts, and the levels that sampling passes.

The tokens of all AR steps of an image are noised alike, with one time t for each sample (a time for each AR step gained
nothing in the paper):

    q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),   that is x_t = alpha_t x_0 + sigma_t epsilon,   epsilon ~ N(0, I)

| process | alpha_t, sigma_t | t in training | the network predicts |
|---|---|---|---|
| epsilon (the paper's) | sqrt(abar_t), sqrt(1 - abar_t) of DDPM | uniform in {0..T-1} | epsilon |
| v | as epsilon | as epsilon | alpha_t epsilon - sigma_t x_0 |
| flow | 1 - t, t | logit-normal or uniform in (0, 1) | epsilon - x_0 |

Another process is one more class here, its name in `make_process`, and the same name among the choices of
`noise.process` in the config. Coefficients are computed in float64 and applied in the dtype of the tokens.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import increasing

# Between these times levels of flow matching are even in log SNR; beyond them x_t is nearly x_0, or nearly noise.
_FLOW_ENDS = (0.01, 0.99)


@dataclass(frozen=True)
class Levels:
    """Noise levels, the least noised first."""

    times_T: Tensor  # [T], what the network is told: int64, or float32 where times are continuous
    alphas_T: Tensor  # float64 [T], x_t = alpha x_0 + sigma epsilon
    sigmas_T: Tensor

    def __len__(self) -> int:
        return len(self.times_T)

    def half_log_snr(self) -> Tensor:
        """lambda = log(alpha / sigma) = log(SNR) / 2 of each level, float64 [T], where SNR = alpha^2 / sigma^2.

        DPM-Solver's measure of time (arXiv 2206.00927, section 3.1): it falls to -inf, where no signal is left.
        """
        return self.alphas_T.log() - self.sigmas_T.log()


class NoiseProcess(ABC):
    """A way of noising tokens, and what the network predicts of it."""

    num_timesteps: int  # times told to the network lie between 0 (clean, or nearly) and num_timesteps - 1 (noise)
    prediction_type: ClassVar[str]  # diffusers' name of what the network predicts

    @abstractmethod
    def draw_times(self, keys_B: Tensor) -> Tensor:
        """A time of training for each key of `seeds`: [B]."""

    @abstractmethod
    def coefficients(self, times_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at each time: two float64 [B]."""

    @abstractmethod
    def levels(self, num_steps: int, spacing: str = "time") -> Levels:
        """The levels of so many denoising steps, even in "time", or in "log_snr", which suits solvers of few steps.

        Raises ValueError where there are fewer than 2 or more than `num_timesteps`.
        """

    @abstractmethod
    def target(self, clean: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network is to predict; all broadcast."""

    @abstractmethod
    def split(self, noised: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """x_0 and epsilon at a level, solved from x_t = alpha x_0 + sigma epsilon and `target`; x_0 is not clipped."""

    @abstractmethod
    def scheduler_config(self) -> dict[str, Any]:
        """The process as diffusers' schedulers write it down; `process_of_scheduler` reads it."""

    def noise(self, clean: Tensor, epsilon: Tensor, times_B: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, the network's target) of x_0 [B, ...], epsilon of the same shape, and a time for each sample."""
        shape = (-1, *[1] * (clean.ndim - 1))
        alpha, sigma = (one_B.to(clean.dtype).reshape(shape) for one_B in self.coefficients(times_B))
        return alpha * clean + sigma * epsilon, self.target(clean, epsilon, alpha, sigma)

    def _check(self, num_steps: int) -> None:
        if not 2 <= num_steps <= self.num_timesteps:
            raise ValueError(f"denoising steps: expected 2 to {self.num_timesteps}, got {num_steps}")


@dataclass(frozen=True)
class _Ddpm(NoiseProcess):
    """DDPM's schedule (Ho, Jain, Abbeel 2020, arXiv 2006.11239).

    beta_t from beta_start to beta_end in equal steps, abar_t = prod_{s<=t} (1 - beta_s).
    """

    num_timesteps: int
    beta_start: float
    beta_end: float

    @functools.cached_property
    def schedule(self) -> Levels:
        betas_T = torch.linspace(self.beta_start, self.beta_end, self.num_timesteps, dtype=torch.float64)
        # Equation 4: q(x_t | x_0) has the mean sqrt(abar_t) x_0 and the variance 1 - abar_t.
        alphas_bar_T = (1 - betas_T).cumprod(0)
        return Levels(torch.arange(self.num_timesteps), alphas_bar_T.sqrt(), (1 - alphas_bar_T).sqrt())

    def draw_times(self, keys_B: Tensor) -> Tensor:
        return seeds.integers(keys_B, self.num_timesteps)

    def coefficients(self, times_B: Tensor) -> tuple[Tensor, Tensor]:
        alphas_T, sigmas_T = self.schedule.alphas_T.to(times_B.device), self.schedule.sigmas_T.to(times_B.device)
        return alphas_T[times_B], sigmas_T[times_B]

    def levels(self, num_steps: int, spacing: str = "time") -> Levels:
        # Some of the levels of training: the respacing of Nichol, Dhariwal 2021 (arXiv 2102.09672), section 4.
        self._check(num_steps)
        all_levels, last = self.schedule, self.num_timesteps - 1
        if spacing == "time":
            kept = torch.tensor([round(i * last / (num_steps - 1)) for i in range(num_steps)])
        else:
            assert spacing == "log_snr", spacing
            lambda_T = all_levels.half_log_snr()
            wanted = torch.linspace(float(lambda_T[0]), float(lambda_T[-1]), num_steps, dtype=torch.float64)
            kept = torch.tensor(increasing((lambda_T[None] - wanted[:, None]).abs().argmin(1).tolist(), last))
        return Levels(all_levels.times_T[kept], all_levels.alphas_T[kept], all_levels.sigmas_T[kept])

    def scheduler_config(self) -> dict[str, Any]:
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": self.num_timesteps,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "beta_schedule": "linear",
            "prediction_type": self.prediction_type,
            "variance_type": "fixed_large",
            "clip_sample": False,
            "timestep_spacing": "linspace",
        }


class Epsilon(_Ddpm):
    """The network predicts the noise: equation 14 of arXiv 2006.11239."""

    prediction_type = "epsilon"

    def target(self, clean: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return epsilon

    def split(self, noised: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        # Equation 4, solved for x_0.
        return (noised - sigma * prediction) / alpha, prediction


class VPrediction(_Ddpm):
    """The network predicts v, on the same schedule (Salimans, Ho 2022, arXiv 2202.00512, section 4 and appendix D)."""

    prediction_type = "v_prediction"

    def target(self, clean: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        # The derivative of x_t by the angle phi of alpha_t = cos(phi), sigma_t = sin(phi).
        return alpha * epsilon - sigma * clean

    def split(self, noised: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        # Since alpha^2 + sigma^2 = 1.
        return alpha * noised - sigma * prediction, sigma * noised + alpha * prediction


@dataclass(frozen=True)
class Flow(NoiseProcess):
    """Flow matching on straight paths, x_t = (1 - t) x_0 + t epsilon: the network predicts their velocity.

    Lipman et al. 2022 (arXiv 2210.02747), equations 22 and 23 with sigma_min = 0 and time reversed: here t = 0 is clean
    and t = 1 noise, as in Esser et al. 2024 (arXiv 2403.03206), equation 13. The network is told (num_timesteps - 1) t.
    """

    prediction_type = "flow_prediction"
    num_timesteps: int
    times: str = "logit_normal"  # the law of t in training: "uniform", or logit(t) ~ N(0, 1)

    def draw_times(self, keys_B: Tensor) -> Tensor:
        if self.times == "uniform":
            t_B = seeds.uniform(keys_B)
        else:
            assert self.times == "logit_normal", self.times
            t_B = seeds.normal(keys_B, ()).double().sigmoid()  # arXiv 2403.03206, section 3.1
        return ((self.num_timesteps - 1) * t_B).float()

    def coefficients(self, times_B: Tensor) -> tuple[Tensor, Tensor]:
        t_B = times_B.double() / (self.num_timesteps - 1)
        return 1 - t_B, t_B

    def levels(self, num_steps: int, spacing: str = "time") -> Levels:
        self._check(num_steps)
        if spacing == "time":
            t_T = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        else:
            assert spacing == "log_snr", spacing
            first, last = (math.log((1 - t) / t) for t in _FLOW_ENDS)
            # Pure noise comes first in sampling, and is infinitely far from any other level.
            even_T = torch.linspace(first, last, num_steps - 1, dtype=torch.float64)
            t_T = torch.cat([(-even_T).sigmoid(), torch.ones(1, dtype=torch.float64)])
        return Levels(((self.num_timesteps - 1) * t_T).float(), 1 - t_T, t_T)

    def target(self, clean: Tensor, epsilon: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return epsilon - clean  # the derivative of x_t by t

    def split(self, noised: Tensor, prediction: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        # The straight path through x_t, followed to t = 0 and to t = 1.
        return noised - sigma * prediction, noised + alpha * prediction

    def scheduler_config(self) -> dict[str, Any]:
        # Its timesteps are num_train_timesteps * t, ours (num_train_timesteps - 1) * t.
        name = "FlowMatchEulerDiscreteScheduler"
        return {"_class_name": name, "num_train_timesteps": self.num_timesteps, "shift": 1.0}


def make_process(
    process: str = "epsilon",
    num_timesteps: int = 1000,
    beta_first: float = 1e-4,
    beta_last: float = 0.02,
    flow_times: str = "logit_normal",
) -> NoiseProcess:
    """The process that section `noise` of a config describes; arguments are its keys."""
    if process == "flow":
        return Flow(num_timesteps, flow_times)
    scale = 1000 / num_timesteps
    return {"epsilon": Epsilon, "v": VPrediction}[process](num_timesteps, scale * beta_first, scale * beta_last)


def process_of_scheduler(prediction_type: str, scheduler: Mapping[str, Any]) -> NoiseProcess:
    """The process of a network that predicts this, by the config of its scheduler in diffusers.

    Raises:
        ValueError: the scheduler is for another prediction, or its betas are spaced otherwise.
    """
    # Schedulers for flows alone do not say what is predicted.
    predicted, betas = scheduler.get("prediction_type", Flow.prediction_type), scheduler.get("beta_schedule", "linear")
    if (predicted, betas) != (prediction_type, "linear"):
        wanted = f"{prediction_type} and linear betas, as the model was trained"
        raise ValueError(f"scheduler: expected {wanted}, got {predicted} and {betas}")
    if prediction_type == Flow.prediction_type:
        return Flow(scheduler["num_train_timesteps"])
    kind = {one.prediction_type: one for one in (Epsilon, VPrediction)}[prediction_type]
    return kind(scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"])

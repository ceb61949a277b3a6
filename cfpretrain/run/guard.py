"""Tells sick steps from healthy ones: losses and gradient norms that are not finite, or that spike."""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TypedDict

from cfpretrain.base.config import GuardConfig
from cfpretrain.base.typed import Natural, NotNegative

# A normal distribution's standard deviation is so many of its median absolute deviations.
_DEVIATIONS_PER_MAD = 1.4826
# A deviation is at least this share of the median. Large batches have losses and norms that scatter by less than 1 %
# within a window, in which healthy runs drift by more; with it and the default of 20 deviations, nothing below twice
# the median is a spike, and what a step of such a gradient does the clipping bounds.
_MIN_SHARE = 0.05
# No verdict on spikes from fewer steps, nor from less than a quarter of the window.
_MIN_STEPS = 8


class GuardState(TypedDict, total=False):
    """What `Guard.to_plain` says, for JSON."""

    losses: list[NotNegative]
    grad_norms: list[NotNegative]
    num_skips_in_row: Natural


class Guard:
    """Says whether a step may be applied, from the losses and gradient norms of the latest applied steps.

    All values are non-negative. A pure function of the values so far: ranks with the same numbers decide alike. Values
    above 1 + 1.4826 * `spike_deviations` medians are spikes whatever the scatter.
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._min_steps = max(_MIN_STEPS, math.ceil(config.window_steps / 4))
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._grad_norms: deque[float] = deque(maxlen=config.window_steps)
        self.num_skips_in_row = 0

    def problem_of_loss(self, loss: float) -> str | None:
        """What is wrong with a step's loss, the mean over the global batch; None: nothing."""
        return self._problem("loss", loss, self._losses)

    def problem_of_grad_norm(self, norm: float) -> str | None:
        """What is wrong with the norm of a step's gradient before clipping; None: nothing."""
        return self._problem("gradient norm", norm, self._grad_norms)

    def applied(self, loss: float, grad_norm: float) -> None:
        """Adds a step that was applied to the window; it ends a row of skips."""
        assert math.isfinite(loss), loss
        assert math.isfinite(grad_norm), grad_norm
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self.num_skips_in_row = 0

    def skipped(self) -> None:
        """Counts a step that was not applied."""
        self.num_skips_in_row += 1

    @property
    def must_rewind(self) -> bool:
        """Whether so many steps in a row were skipped that the weights themselves must be sick."""
        return self.num_skips_in_row >= self._config.max_skips_in_row

    def to_plain(self) -> GuardState:
        """The state for JSON, exact: a resumed run decides as an uninterrupted one."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "num_skips_in_row": self.num_skips_in_row,
        }

    def restore(self, plain: GuardState) -> None:
        """Restores the state of `to_plain`, or an empty one; of a longer window the latest steps."""
        self._losses.clear()
        self._losses.extend(plain.get("losses", ()))
        self._grad_norms.clear()
        self._grad_norms.extend(plain.get("grad_norms", ()))
        self.num_skips_in_row = plain.get("num_skips_in_row", 0)

    def _problem(self, name: str, value: float, window: Sequence[float]) -> str | None:
        if not math.isfinite(value):
            return f"the {name} is {value}"
        if not self._config.spike_deviations or len(window) < self._min_steps:
            return None
        median = statistics.median(window)
        mad = statistics.median([abs(x - median) for x in window])
        deviation = max(_DEVIATIONS_PER_MAD * mad, _MIN_SHARE * median)
        # Where most values are 0 there is no scale to measure by.
        if deviation == 0 or value <= median + self._config.spike_deviations * deviation:
            return None
        return (
            f"the {name} {value:.4g} is {(value - median) / deviation:.0f} deviations above {median:.4g}, "
            f"the median of {len(window)} steps"
        )

"""What captions say of digits and what is to be seen in digits, each as (digit, thickness, slant, width)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from examples.digits import captions
from examples.digits.classifier import Classifier

NOT_SAID = -1
PARTS = ("digit", *captions.ATTRIBUTES)


def parts_said(texts: Sequence[str]) -> NDArray[np.int64]:
    """What captions say, [N, 4]; `NOT_SAID` where they say nothing of it, or several things."""
    found = (captions.describe(text) for text in texts)
    return np.array([[NOT_SAID if part is None else part for part in (one.digit, *one.levels)] for one in found])


def captions_of(parts_4: Sequence[int]) -> list[str]:
    """The true captions, one for each template."""
    digit, *levels = map(int, parts_4)
    return captions.Description(digit, tuple(levels)).captions()


def never_trained() -> list[tuple[int, ...]]:
    """The combinations that are kept out of training."""
    found = ((digit, *levels) for digit in range(10) for levels in np.ndindex(3, 3, 3))
    return [parts for parts in found if captions.is_held_out(parts[0], parts[1:])]


@dataclass(frozen=True)
class Examiner:
    """Says what is to be seen in digits."""

    classifier: Classifier  # fitted on pixels from -1 to 1
    borders_32: NDArray[np.float64]  # between the words (`captions.terciles`)

    def parts_seen(self, images_B1YX: Tensor) -> NDArray[np.int64]:
        """Of images in [0, 1]: [B, 4]."""
        images_B1YX = images_B1YX.clamp(0, 1)
        digits_B = self.classifier.predict(images_B1YX * 2 - 1)
        return self._with_measures(images_B1YX, digits_B)

    def parts_true(self, images_B1YX: Tensor, labels_B: Tensor) -> NDArray[np.int64]:
        """Of images in [0, 1] whose digits are known: [B, 4]."""
        return self._with_measures(images_B1YX, labels_B.numpy())

    def _with_measures(self, images_B1YX: Tensor, digits_B: NDArray[np.int64]) -> NDArray[np.int64]:
        levels_B3 = captions.levels_of(captions.measure(images_B1YX[:, 0].numpy()), self.borders_32)
        return np.concatenate([digits_B[:, None], levels_B3], 1)


def agreement(found_N4: NDArray[np.int64], wanted_N4: NDArray[np.int64]) -> dict[str, float]:
    """The share of digits of which each part is as wanted, all three measures are, and all four parts."""
    is_right_N4 = found_N4 == wanted_N4
    shares = dict(zip(PARTS, is_right_N4.mean(0).tolist(), strict=True))
    return shares | {
        "all_measures": float(is_right_N4[:, 1:].all(1).mean()),
        "all_four": float(is_right_N4.all(1).mean()),
    }


def guesses(parts_N4: NDArray[np.int64], wanted_N4: NDArray[np.int64]) -> NDArray[np.int64]:
    """What is likeliest of each digit by its class alone, as counted in `parts_N4`: [N, 4]."""
    likeliest = {
        digit: [np.bincount(of_digit[:, k], minlength=3).argmax() for k in (1, 2, 3)]
        for digit in range(10)
        if len(of_digit := parts_N4[parts_N4[:, 0] == digit])
    }
    return np.array([[digit, *likeliest[digit]] for digit in wanted_N4[:, 0].tolist()])

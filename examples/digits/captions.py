"""Captions of handwritten digits that are true by measurement: "a bold narrow seven, leaning right".

Thickness and slant of the strokes and the width of the digit are measured from the pixels. Each is said by one of three
words: which, is decided by the terciles of the images trained on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# For each measure the words of its lowest, middle and highest third.
WORDS = (
    ("thin", "medium", "bold"),  # strokes
    ("leaning left", "upright", "leaning right"),
    ("narrow", "regular", "wide"),
)
ATTRIBUTES = ("thickness", "slant", "width")
TEMPLATES = (
    "a {thickness} {width} {digit}, {slant}",
    "the digit {digit}: {slant}, {thickness} and {width}",
    "{width} handwritten {digit}, {thickness} strokes, {slant}",
    "this {thickness} {digit} is {slant} and {width}",
)
_ENLARGED = 4  # times, so that the distances within a stroke of two pixels are fine enough
_LEAST_PIXELS = 20  # of an enlarged digit; with fewer there is nothing to measure


def measure(pixels_BYX: NDArray[np.floating]) -> NDArray[np.float64]:
    """Measures digits, white (1) on black (0).

    Returns:
        [B, 3]: the thickness of the strokes in pixels, the slant as dx/dy with right positive, width over height.
    """
    return np.array([_measure_one(pixels_YX) for pixels_YX in np.asarray(pixels_BYX, np.float64)]).reshape(-1, 3)


def _measure_one(pixels_YX: NDArray[np.float64]) -> tuple[float, float, float]:
    from scipy import ndimage

    is_stroke = ndimage.zoom(pixels_YX.clip(0, 1), _ENLARGED, order=1) > 0.5
    if is_stroke.sum() < _LEAST_PIXELS:
        return 0.0, 0.0, 1.0
    # In a long stroke of width w distances to its border are uniform from 0 to w / 2: their mean is w / 4.
    thickness = 4 * ndimage.distance_transform_edt(is_stroke)[is_stroke].mean() / _ENLARGED
    y, x = np.nonzero(is_stroke)
    from_middle_y, from_middle_x = y - y.mean(), x - x.mean()
    slant = -(from_middle_y * from_middle_x).mean() / max((from_middle_y**2).mean(), 1e-6)
    return thickness, slant, (np.ptp(x) + 1) / (np.ptp(y) + 1)


def terciles(measured_B3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the words change: [3, 2], for each measure the borders of its thirds."""
    return np.quantile(measured_B3, [1 / 3, 2 / 3], axis=0).T


def levels_of(measured_B3: NDArray[np.float64], borders_32: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which third each measure is in: [B, 3], 0 to 2."""
    return np.stack([np.digitize(measured_B3[:, k], borders_32[k]) for k in range(3)], 1)


@dataclass(frozen=True)
class Description:
    """What a caption says; None for what it does not say, or not clearly."""

    digit: int | None
    levels: tuple[int | None, ...]  # of thickness, slant, width

    def caption(self, template: int) -> str:
        """The description in words, where it is complete."""
        said = {
            name: words[level]
            for name, words, level in zip(ATTRIBUTES, WORDS, self.levels, strict=True)
            if level is not None
        }
        assert self.digit is not None
        return TEMPLATES[template].format(digit=DIGITS[self.digit], **said)

    def captions(self) -> list[str]:
        """In all templates."""
        return [self.caption(i) for i in range(len(TEMPLATES))]


def describe(text: str) -> Description:
    """What a caption says; a kind of word that occurs twice says nothing."""
    words = f" {' '.join(text.lower().replace(',', ' ').replace(':', ' ').split())} "
    return Description(_said(words, DIGITS), tuple(_said(words, kind) for kind in WORDS))


def _said(words: str, kind: Sequence[str]) -> int | None:
    found = [i for i, name in enumerate(kind) for _ in range(words.count(f" {name} "))]
    return found[0] if len(found) == 1 else None


def is_held_out(digit: int, levels: Sequence[int]) -> bool:
    """Whether a combination of digit and levels is kept out of training: picked by a hash, one of about 26."""
    name = f"combination/{digit}/{'/'.join(map(str, levels))}"
    return hashlib.blake2b(name.encode()).digest()[0] < 10

"""Variants of handwritten digits: turned, sheared, stretched and bent a little, with thinner or bolder strokes.

The words that were true of a digit may be false of its variant, so captions are measured afterwards.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from cfpretrain.core import seeds

_ENLARGED = 2  # times, while strokes are made thinner or bolder by at most a pixel: half of one then is one
_SIDE = 20.0  # pixels, of a digit's longer side, as MNIST's are scaled
# The largest changes: draws are uniform from minus to plus these.
_ANGLE = 0.14  # radians
_SHEAR = 0.2  # dx/dy
_LOG_STRETCH = 0.18  # of the natural logarithm of width over height
_THINNER, _BOLDER = 0.7, 1.0  # pixels, of a stroke's thickness
_THIN = 2.2  # pixels; strokes that are thinner would break
# Displacements are normal, with this deviation in pixels, and alike over so many pixels.
_BEND, _BEND_SCALE = 0.6, 4.0
_CONTRAST = 1.5  # about the middle of black and white, where strokes are taken to end: against the blur of all this


def variant(pixels_YX: NDArray[np.uint8], thickness: float, key: Tensor) -> NDArray[np.uint8]:
    """A variant of a digit, white (255) on black (0), in its middle.

    Args:
        pixels_YX: the digit.
        thickness: of its strokes, in pixels (`captions.measure`).
        key: its randomness, see `seeds`.
    """
    angle, shear, stretch, stroke = seeds.uniform(key, (4,)).numpy() * 2 - 1
    large_YX = ndimage.zoom(pixels_YX / 255.0, _ENLARGED, order=1, mode="nearest", grid_mode=True)
    large_YX = _with_stroke(large_YX, max(stroke * (_BOLDER if stroke > 0 else _THINNER), min(0.0, _THIN - thickness)))
    matrix_22 = _matrix(angle * _ANGLE, shear * _SHEAR, stretch * _LOG_STRETCH)
    points_N2 = np.argwhere(large_YX > 0.5) @ matrix_22.T / _ENLARGED
    matrix_22 *= _SIDE / (np.ptp(points_N2, axis=0).max() + 1)

    size = len(large_YX)
    bend_2YX = seeds.normal(seeds.fold(key, 1), (2, size, size)).numpy()
    bend_2YX = ndimage.gaussian_filter(bend_2YX, (0, *[_BEND_SCALE * _ENLARGED] * 2))
    bend_2YX *= _BEND * _ENLARGED / bend_2YX.std()
    from_middle_2YX = np.indices((size, size)) - (size - 1) / 2 + bend_2YX
    centre_2 = np.array(ndimage.center_of_mass(large_YX))
    places_2YX = np.tensordot(np.linalg.inv(matrix_22), from_middle_2YX, 1) + centre_2[:, None, None]
    made_YX = ndimage.map_coordinates(large_YX, places_2YX, order=1)
    rows = size // _ENLARGED
    made_YX = (made_YX.reshape(rows, _ENLARGED, rows, _ENLARGED).mean((1, 3)) - 0.5) * _CONTRAST + 0.5
    return np.rint(made_YX.clip(0, 1) * 255).astype(np.uint8)


def _with_stroke(large_YX: NDArray[np.floating], change: float) -> NDArray[np.floating]:
    """Enlarged digits with strokes bolder by `change`, -1 to 1 pixels: a mix with those that are so by a whole one."""
    cross = ndimage.generate_binary_structure(2, 1)
    whole_YX = (ndimage.grey_dilation if change > 0 else ndimage.grey_erosion)(large_YX, footprint=cross)
    return large_YX + abs(change) * (whole_YX - large_YX)


def _matrix(angle: float, shear: float, log_stretch: float) -> NDArray[np.float64]:
    """(y, x) of a digit -> (y, x) of its variant."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return turn @ np.array([[1.0, 0.0], [-shear, 1.0]]) @ np.diag(np.exp([-log_stretch / 2, log_stretch / 2]))

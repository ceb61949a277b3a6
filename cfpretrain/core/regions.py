"""Regions of the token grid that are regenerated while the others stay: what in-context editing needs of the grid.

Section 6 of arXiv 2412.12095. A region is a row of booleans, true for the tokens (row * grid + column) regenerated.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

NAMES = ("centre", "top", "bottom", "outside")


def parse_region(text: str, grid: int) -> Tensor:
    """A region as a person writes it: bool [L].

    Args:
        text: one of `NAMES`; "box:Y0,X0,Y1,X1", rows Y0 to Y1 - 1 and columns X0 to X1 - 1 of the token grid; or
            "tokens:0,1,17", their numbers.
        grid: rows = columns of the token grid.

    Raises:
        ValueError: it is none of these, or lies outside of the grid, or holds no token.
    """
    kind, _, numbers = text.partition(":")
    if text in NAMES:
        return named_region(text, grid)
    if kind == "box":
        return box_region(_whole_numbers(text, numbers), grid)
    if kind == "tokens":
        return token_region(_whole_numbers(text, numbers), grid)
    raise ValueError(f"expected {', '.join(NAMES)}, box:Y0,X0,Y1,X1 or tokens:NUMBERS, got {text!r:.60}")


def _whole_numbers(text: str, numbers: str) -> list[int]:
    try:
        return [int(number) for number in numbers.split(",")]
    except ValueError as error:
        raise ValueError(f"expected whole numbers with commas between them, got {text!r:.60}") from error


def named_region(name: str, grid: int) -> Tensor:
    """The middle half of the rows and columns ("centre"), what lies around it ("outside"), or a half of the image."""
    if name in ("top", "bottom"):
        rows = torch.arange(grid) < grid // 2 if name == "top" else torch.arange(grid) >= grid - grid // 2
        region_L = rows.repeat_interleave(grid)
    else:
        begin = max(1, round(grid / 4))
        inner = torch.zeros(grid, grid, dtype=torch.bool)
        inner[begin : grid - begin, begin : grid - begin] = True
        region_L = inner.flatten() if name == "centre" else ~inner.flatten()
    if not region_L.any() or region_L.all():
        raise ValueError(f"a grid of {grid} x {grid} tokens has no {name}; name tokens, e.g. tokens:0")
    return region_L


def box_region(corners: list[int], grid: int) -> Tensor:
    """The tokens of a box of the grid, its corners [y0, x0, y1, x1] with the ends left out: bool [L]."""
    if len(corners) != 4:
        raise ValueError(f"expected a box of 4 numbers, box:Y0,X0,Y1,X1, got {len(corners)}")
    y0, x0, y1, x1 = corners
    if not (0 <= y0 < y1 <= grid and 0 <= x0 < x1 <= grid):
        raise ValueError(
            f"expected a box with 0 <= Y0 < Y1 <= {grid} and 0 <= X0 < X1 <= {grid}, the rows and columns of tokens, "
            f"got {y0},{x0},{y1},{x1}"
        )
    region = torch.zeros(grid, grid, dtype=torch.bool)
    region[y0:y1, x0:x1] = True
    return region.flatten()


def token_region(tokens: Iterable[int], grid: int) -> Tensor:
    """The tokens of these numbers, row * grid + column: bool [L]."""
    region_L = torch.zeros(grid**2, dtype=torch.bool)
    for token in tokens:
        if not 0 <= token < grid**2:
            raise ValueError(f"expected tokens 0 to {grid**2 - 1}, got {token}")
        region_L[token] = True
    return region_L


def mask_region(mask_YX: Tensor, grid: int, image_size: int) -> Tensor:
    """The tokens that a mask touches, be it with one of their pixels: bool [L].

    Args:
        mask_YX: bool, true where the image is regenerated: one value a token, or one a pixel of the image.
        grid: rows = columns of the token grid.
        image_size: pixels a side of the image.

    Raises:
        ValueError: it is of another size, or nothing in it is true.
    """
    height, width = mask_YX.shape
    if (height, width) not in ((grid, grid), (image_size, image_size)):
        raise ValueError(
            f"expected a mask of {image_size} x {image_size} pixels, as the image, or {grid} x {grid}, one a token, "
            f"got {width} x {height}"
        )
    if not mask_YX.any():
        raise ValueError("expected a mask that is white where the image is regenerated, got a black one")
    size = height // grid
    return mask_YX.reshape(grid, size, grid, size).any(3).any(1).flatten()


def kept_first(order_BL: Tensor, region_L: Tensor) -> tuple[Tensor, int]:
    """An order in which the tokens that stay come first, as clean context, and the others as they came.

    Args:
        order_BL: int64 [B, L], the order in which the model would make all tokens.
        region_L: bool, those regenerated.

    Returns:
        int64 [B, L], and the number of tokens that stay.
    """
    made_later_BL = region_L[order_BL].to(torch.int8)
    first_BL = made_later_BL.argsort(dim=1, stable=True)
    return order_BL.gather(1, first_BL), int((~region_L).sum())

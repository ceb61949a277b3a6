"""Regions of the token grid that are generated again while the others stay: in-context editing.

Section 6 of arXiv 2412.12095: the tokens that stay are the clean context, as if earlier AR steps had made them, and
those of the region are made by further AR steps. A region is bool [L], true for its tokens (row * grid + column). What
makes one raises a ValueError where there is none.
"""

import torch
from torch import Tensor

NAMES = ("centre", "top", "bottom", "outside")


def parse_region(text: str, grid: int) -> Tensor:
    """A region as a person writes it, on a grid of so many rows and columns.

    It is one of `NAMES`; "box:Y0,X0,Y1,X1", rows Y0 to Y1 - 1 and columns X0 to X1 - 1; or "tokens:0,1,17", their
    numbers.
    """
    if text in NAMES:
        return _named(text, grid)
    kind, _, given = text.partition(":")
    if kind not in ("box", "tokens"):
        raise ValueError(f"expected {', '.join(NAMES)}, box:Y0,X0,Y1,X1 or tokens:NUMBERS, got {text!r:.60}")
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError as error:
        raise ValueError(f"expected whole numbers with commas between them, got {text!r:.60}") from error
    return (_box if kind == "box" else _tokens)(numbers, grid)


def _named(name: str, grid: int) -> Tensor:
    """The middle half of the rows and columns ("centre"), what lies around it ("outside"), or a half of the image."""
    region = torch.zeros(grid, grid, dtype=torch.bool)
    if name == "top":
        region[: grid // 2] = True
    elif name == "bottom":
        region[grid - grid // 2 :] = True
    else:
        begin = max(1, round(grid / 4))
        region[begin : grid - begin, begin : grid - begin] = True
        region = region if name == "centre" else ~region
    if not region.any() or region.all():
        raise ValueError(f"a grid of {grid} x {grid} tokens has no {name}; name tokens, e.g. tokens:0")
    return region.flatten()


def _box(corners: list[int], grid: int) -> Tensor:
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


def _tokens(tokens: list[int], grid: int) -> Tensor:
    region_L = torch.zeros(grid**2, dtype=torch.bool)
    for token in tokens:
        if not 0 <= token < grid**2:
            raise ValueError(f"expected tokens 0 to {grid**2 - 1}, got {token}")
        region_L[token] = True
    return region_L


def mask_region(mask_YX: Tensor, grid: int, image_size: int) -> Tensor:
    """The tokens that a mask touches, be it with one pixel; bool, of the image's pixels a side or the grid's rows."""
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
    """An order with the tokens that stay first, the others as they came (int64 [B, L]), and how many stay."""
    made_later_BL = region_L[order_BL].to(torch.int8)
    first_BL = made_later_BL.argsort(dim=1, stable=True)
    return order_BL.gather(1, first_BL), int((~region_L).sum())

"""Regions of the token grid: names, boxes, token numbers, masks; and the order that keeps the rest first."""

import pytest
import torch

from cfpretrain.core import regions, sampler


def drawn(region: torch.Tensor, grid: int) -> list[str]:
    return ["".join("x" if made else "." for made in row) for row in region.reshape(grid, grid).tolist()]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("centre", ["....", ".xx.", ".xx.", "...."]),
        ("outside", ["xxxx", "x..x", "x..x", "xxxx"]),
        ("top", ["xxxx", "xxxx", "....", "...."]),
        ("bottom", ["....", "....", "xxxx", "xxxx"]),
        ("box:1,0,3,4", ["....", "xxxx", "xxxx", "...."]),
        ("box:0,3,1,4", ["...x", "....", "....", "...."]),
        ("tokens:0,5,5,15", ["x...", ".x..", "....", "...x"]),
    ],
)
def test_what_a_text_means(text, rows) -> None:
    assert drawn(regions.parse_region(text, 4), 4) == rows


@pytest.mark.parametrize("grid", [3, 5, 6, 7, 16, 32])
def test_halves_and_centre_on_any_grid(grid) -> None:
    centre, outside, top, bottom = (regions.parse_region(name, grid) for name in ("centre", "outside", "top", "bottom"))
    assert torch.equal(centre, ~outside)
    square = centre.reshape(grid, grid)
    assert torch.equal(square, square.T)
    assert torch.equal(square, square.flip(0))
    assert not (top & bottom).any()
    assert torch.equal(top, bottom.flip(0))
    assert int(top.sum()) == grid // 2 * grid
    if grid % 4 == 0:
        assert int(centre.sum()) == grid**2 // 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("middle", "expected centre, top, bottom, outside, box:Y0,X0,Y1,X1 or tokens:NUMBERS, got 'middle'"),
        ("box:1,2,3", "expected a box of 4 numbers, box:Y0,X0,Y1,X1, got 3"),
        ("box:a,0,1,1", "expected whole numbers with commas between them, got 'box:a,0,1,1'"),
        ("box:0,0,5,4", "expected a box with 0 <= Y0 < Y1 <= 4 and 0 <= X0 < X1 <= 4, .* got 0,0,5,4"),
        ("box:2,0,2,4", "got 2,0,2,4"),
        ("box:-1,0,2,4", "got -1,0,2,4"),
        ("tokens:3,16", "expected tokens 0 to 15, got 16"),
        ("tokens:", "expected whole numbers"),
    ],
)
def test_what_no_region_is(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        regions.parse_region(text, 4)


@pytest.mark.parametrize(("name", "grid"), [("centre", 2), ("outside", 2), ("top", 1)])
def test_a_grid_that_has_no_such_region(name, grid) -> None:
    with pytest.raises(ValueError, match=f"a grid of {grid} x {grid} tokens has no {name}; name tokens"):
        regions.parse_region(name, grid)


def test_masks_of_tokens_and_of_pixels() -> None:
    of_tokens = torch.tensor([[True, False], [False, False]])
    assert drawn(regions.mask_region(of_tokens, 2, 8), 2) == ["x.", ".."]
    of_pixels = torch.zeros(8, 8, dtype=torch.bool)
    of_pixels[3, 4] = True  # one pixel of the token in the upper right
    of_pixels[7, 0:2] = True
    assert drawn(regions.mask_region(of_pixels, 2, 8), 2) == [".x", "x."]


def test_masks_that_fit_nothing() -> None:
    with pytest.raises(ValueError, match=r"expected a mask of 8 x 8 pixels, as the image, or 2 x 2, .* got 6 x 4"):
        regions.mask_region(torch.ones(4, 6, dtype=torch.bool), 2, 8)
    with pytest.raises(ValueError, match="white where the image is regenerated, got a black one"):
        regions.mask_region(torch.zeros(8, 8, dtype=torch.bool), 2, 8)


def test_what_stays_comes_first_and_the_rest_as_it_came() -> None:
    region = regions.parse_region("tokens:1,4,7,8", 3)
    orders = sampler.sampling_orders(0, torch.arange(50), 9)
    kept_first, num_kept = regions.kept_first(orders, region)
    assert num_kept == 5
    for before, after in zip(orders.tolist(), kept_first.tolist(), strict=True):
        assert after == [t for t in before if not region[t]] + [t for t in before if region[t]]

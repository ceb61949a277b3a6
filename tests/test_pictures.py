import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.pictures import _cut_to, _font, false_colours, grid_layout, sample_grid

BLUE = (37, 99, 168)
RED = (209, 73, 91)
QUIET = (107, 114, 128)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def num_near(path: Path, colour: tuple[int, int, int]) -> int:
    """How many pixels of a picture have about this colour."""
    return int((np.abs(pixels(path) - np.array(colour)).max(-1) < 24).sum())


# Grids of samples


def test_each_cell_shows_its_image_as_crisp_squares(tmp_path: Path) -> None:
    digits = torch.tensor(load_digits().images[:6])[:, None]
    names = ["zero", "one, a longer name"]
    sample_grid(tmp_path / "grid.png", digits / 8 - 1, names, "Step 3\nguidance 2", cell_size=40)
    layout = grid_layout(6, 8, 8, names, 40, "Step 3\nguidance 2")
    shown = pixels(tmp_path / "grid.png")
    assert layout.zoom == 5
    for index in range(6):
        y, x = layout.corner(index // 3, index % 3)
        cell = shown[y : y + 40, x : x + 40]
        expected = np.round(digits[index, 0].numpy() / 16 * 255).repeat(5, 0).repeat(5, 1)
        assert np.abs(cell - expected[..., None]).max() <= 1
    y, x = layout.corner(1, 2)
    assert (y + 40 + 14, x + 40 + 14) == shown.shape[:2]
    assert (shown[y - 1, x : x + 40] == 255).all(), "rows are apart"


def test_names_and_title_are_written(tmp_path: Path) -> None:
    images, names = torch.full((2, 1, 8, 8), -1.0), ["a", "b"]
    sample_grid(tmp_path / "grid.png", images, names, "Step 3")
    layout = grid_layout(2, 8, 8, names, title="Step 3")
    shown = pixels(tmp_path / "grid.png")
    assert (shown[: layout.top] < 128).any(), "title"
    for row in range(2):
        y, x = layout.corner(row, 0)
        assert (shown[y : y + layout.cell_height, :x] < 128).any(), "class name"


def test_texts_are_drawn_as_one_line_whatever_is_in_them(tmp_path: Path) -> None:
    drawn = []
    for text in ("two\nlines\r\x85 of \u2029 a name\udcff", "two lines of a name\udcff"):
        texts = [text, text]
        sample_grid(
            tmp_path / "grid.png", torch.zeros(2, 1, 8, 8), [text], cell_size=80, captions=texts, column_names=texts
        )
        drawn.append(pixels(tmp_path / "grid.png"))
    assert (drawn[0] == drawn[1]).all()


def test_a_caption_is_cut_to_its_width_however_long_it_is() -> None:
    assert _cut_to("a dog", 100) == "a dog"
    assert _cut_to("a dog", 1) == "…"
    cut = _cut_to("many words " * 1_000_000, 100)
    assert cut.startswith("many words m")
    assert cut.endswith("…")
    assert 80 < _font(11).getlength(cut) <= 100


def test_a_long_title_widens_the_picture(tmp_path: Path) -> None:
    for title in ("short", "a title much longer than one column of tiny images"):
        sample_grid(tmp_path / f"{len(title)}.png", torch.zeros(1, 1, 8, 8), ["x"], title)
    assert pixels(tmp_path / "50.png").shape[1] > pixels(tmp_path / "5.png").shape[1] + 200


def test_colours_range_and_broken_pixels(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0] = 1.0
    images[0, :, 0, 0] = torch.tensor([2.0, -7.0, 0.5])
    images[0, 1, 3, 3] = math.nan
    sample_grid(tmp_path / "rgb.png", images, ["red"], value_range=(0.0, 1.0), cell_size=16)
    layout = grid_layout(1, 4, 4, ["red"], 16)
    y, x = layout.corner(0, 0)
    cell = pixels(tmp_path / "rgb.png")[y : y + 16, x : x + 16]
    assert cell[8, 8].tolist() == [255, 0, 0]
    assert cell[0, 0].tolist() == [255, 0, 128]
    assert (cell[12:, 12:] == [255, 0, 255]).all()


def test_false_colours_are_the_first_channels() -> None:
    latents = torch.zeros(2, 16, 4, 4)
    latents[0, 1] = 3.0
    latents[0, 5] = 99.0
    images = false_colours(latents)
    assert images.shape == (2, 3, 4, 4)
    assert images[0, :, 0, 0].tolist() == [0.5, 1.0, 0.5]
    assert (images[1] == 0.5).all()
    assert false_colours(latents[:, :2]).shape == (2, 1, 4, 4)


def test_large_images_are_not_shrunk() -> None:
    layout = grid_layout(2, 100, 60, ["x"], cell_size=56)
    assert (layout.zoom, layout.cell_height, layout.cell_width, layout.num_columns) == (1, 100, 60, 2)


@pytest.mark.parametrize(
    ("shape", "names", "problem"),
    [
        ((4, 16, 8, 8), ["a"], "decode latents"),
        ((4, 8, 8), ["a"], "decode latents"),
        ((5, 1, 8, 8), ["a", "b"], "got 5 images"),
        ((0, 1, 8, 8), ["a", "b"], "got 0 images"),
        ((4, 1, 8, 8), [], "each of 0 classes"),
    ],
)
def test_images_that_make_no_grid_are_refused(
    tmp_path: Path, shape: tuple[int, ...], names: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        sample_grid(tmp_path / "grid.png", torch.zeros(shape), names)
    assert not (tmp_path / "grid.png").exists()

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cfpretrain.console import UserError
from cfpretrain.evaluation.pictures import (
    _column,
    _cut_to,
    _font,
    _skipped_steps,
    _smooth,
    curves,
    false_colours,
    grid_layout,
    loss_map,
    sample_grid,
)

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


# Training curves


def run(num_rows: int) -> list[dict[str, float | None]]:
    return [
        {"step": 10 * i, "loss": 1 / (1 + i), "grad_norm": 2.0, "learning_rate": 1e-3, "num_skipped_steps": 0}
        for i in range(num_rows)
    ]


def test_curves_are_drawn_whole(tmp_path: Path) -> None:
    curves(tmp_path / "curves.png", run(200), "tiny")
    height, width, _ = pixels(tmp_path / "curves.png").shape
    assert width > 1000
    assert height > 700
    assert num_near(tmp_path / "curves.png", BLUE) > 2000
    assert num_near(tmp_path / "curves.png", RED) == 0


def test_losses_that_are_not_finite_leave_a_mark_and_the_rest_of_the_curve(tmp_path: Path) -> None:
    rows = run(200)
    curves(tmp_path / "before.png", rows)
    rows[50]["loss"], rows[51]["grad_norm"], rows[120]["loss"] = math.nan, math.inf, -math.inf
    curves(tmp_path / "after.png", rows)
    assert num_near(tmp_path / "after.png", RED) > 20
    assert num_near(tmp_path / "after.png", BLUE) > 0.9 * num_near(tmp_path / "before.png", BLUE)


def test_skipped_steps_are_marked(tmp_path: Path) -> None:
    rows = run(100)
    for i, row in enumerate(rows):
        row["num_skipped_steps"] = (i >= 20) + (i >= 60)
    curves(tmp_path / "curves.png", rows)
    assert num_near(tmp_path / "curves.png", RED) > 20
    steps = np.array([row["step"] for row in rows])
    assert _skipped_steps(steps, _column(rows, "num_skipped_steps")).tolist() == [200, 600]


def test_a_score_has_a_curve_of_its_own_beside_its_floor(tmp_path: Path) -> None:
    rows = run(100)
    for row in rows[::20]:
        row["fd"] = 100.0 - row["step"] / 20
    pictures = {}
    for name, score in (("none", None), ("score", ("fd", None)), ("floor", ("fd", 60.0)), ("other", ("sfd", None))):
        curves(tmp_path / f"{name}.png", rows, score=score)
        pictures[name] = num_near(tmp_path / f"{name}.png", BLUE), num_near(tmp_path / f"{name}.png", QUIET)
    heights = [len(pixels(tmp_path / f"{name}.png")) for name in ("none", "score")]
    assert heights[1] > 1.3 * heights[0]
    assert pictures["score"][0] > pictures["other"][0] + 200, "a line"
    assert pictures["floor"][1] > pictures["score"][1] + 200, "another"


def test_a_value_that_few_rows_have_is_still_a_line(tmp_path: Path) -> None:
    rows = run(100)
    curves(tmp_path / "without.png", rows)
    for row in rows[::7]:
        row["images_per_second"] = 500.0
    curves(tmp_path / "with.png", rows)
    assert num_near(tmp_path / "with.png", BLUE) > num_near(tmp_path / "without.png", BLUE) + 500


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": 0.5, "grad_norm": None}],
        [{"step": i, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 0.0} for i in range(30)],
        [{"note": "a row without a step"}, {"step": 3, "loss": 0.0}],
    ],
)
def test_poor_rows_still_make_a_picture(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    curves(tmp_path / "curves.png", rows)
    assert pixels(tmp_path / "curves.png").shape[1] > 1000


def test_smoothing_averages_over_gaps_without_bias() -> None:
    assert _smooth(np.full(300, 2.5)) == pytest.approx(2.5)
    straight = np.arange(300.0)
    assert _smooth(straight)[20:-20] == pytest.approx(straight[20:-20])
    rough = np.where(np.arange(300) % 2 == 0, 1.0, -1.0)
    rough[100:103] = np.nan
    smooth = _smooth(rough)
    assert np.isnan(smooth[100:103]).all()
    assert np.nanmax(np.abs(smooth[10:-10])) < 0.4


# The loss over both axes


def test_loss_map_shows_each_cell_on_its_side(tmp_path: Path) -> None:
    # Noise to the right, AR position upward: only the cell of high noise and first position is large.
    loss_TS = np.full((4, 2), 1.0)
    loss_TS[3, 0] = 2.0
    loss_map(tmp_path / "map.png", loss_TS, [0, 250, 500, 750, 1000], [0, 8, 16])
    shown = pixels(tmp_path / "map.png")
    yellow = (np.abs(shown - np.array([253, 231, 37])).max(-1) < 10).nonzero()
    in_map = yellow[1] < 0.87 * shown.shape[1]  # the colour bar is right of it
    assert in_map.sum() > 5000
    assert yellow[0][in_map].min() > 0.4 * shown.shape[0]
    assert yellow[1][in_map].min() > 0.6 * shown.shape[1]


@pytest.mark.parametrize("spread", [1.5, 1000.0])
def test_loss_map_of_small_and_large_ranges_with_gaps(tmp_path: Path, spread: float) -> None:
    loss_TS = np.geomspace(1.0, spread, 60).reshape(10, 6)
    loss_TS[0, 0] = math.nan
    loss_map(tmp_path / "map.png", loss_TS, list(range(11)), list(range(7)))
    # Values that rise evenly, or by an even factor, spread evenly over the colours only on the fitting scale: on a
    # linear one half of the large range would share the darkest purple.
    shown = pixels(tmp_path / "map.png")
    in_map = shown[:, : int(0.87 * shown.shape[1])]
    dark = (np.abs(in_map - np.array([68, 1, 84])).max(-1) < 24).mean()
    assert 0.01 < dark < 0.15


def test_loss_map_without_any_loss(tmp_path: Path) -> None:
    loss_map(tmp_path / "map.png", np.full((2, 2), math.nan), [0, 1, 2], [0, 1, 2])
    assert num_near(tmp_path / "map.png", (236, 239, 243)) > 100_000


def test_loss_map_of_one_constant_value(tmp_path: Path) -> None:
    loss_map(tmp_path / "map.png", np.full((1, 1), 0.5), [0, 1], [0, 1])
    assert pixels(tmp_path / "map.png").shape[1] > 800


def test_edges_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected 3 x 2 values for its edges, got 2 x 2"):
        loss_map(tmp_path / "map.png", np.ones((2, 2)), [0, 1, 2, 3], [0, 1, 2])

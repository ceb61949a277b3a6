import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfpretrain.evaluation import figures
from cfpretrain.evaluation.figures import _smooth, curves
from tests.processes import REPOSITORY
from tests.test_pictures import num_near, pixels

BLUE = (37, 99, 168)
RED = (209, 73, 91)
QUIET = (107, 114, 128)


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


def test_a_title_is_text(tmp_path: Path) -> None:
    """A run's folder may have any name; matplotlib would typeset this one, and fail."""
    curves(tmp_path / "curves.png", run(3), r"runs/$\frac{1$")
    assert pixels(tmp_path / "curves.png").shape[1] > 1000


def test_losses_that_are_not_finite_leave_a_mark_and_the_rest_of_the_curve(tmp_path: Path) -> None:
    rows = run(200)
    curves(tmp_path / "before.png", rows)
    rows[50]["loss"], rows[51]["grad_norm"], rows[120]["loss"] = math.nan, math.inf, -math.inf
    curves(tmp_path / "after.png", rows)
    assert num_near(tmp_path / "after.png", RED) > 20
    assert num_near(tmp_path / "after.png", BLUE) > 0.9 * num_near(tmp_path / "before.png", BLUE)


def test_skipped_steps_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, mark, marked = run(100), figures._mark, []

    def noted(axes: Any, steps: Any, *how: Any) -> None:
        marked.append((how[0], steps.tolist()))
        mark(axes, steps, *how)

    monkeypatch.setattr(figures, "_mark", noted)
    for i, row in enumerate(rows):
        row["num_skipped_steps"] = (i >= 20) + (i >= 60)
    curves(tmp_path / "curves.png", rows)
    assert num_near(tmp_path / "curves.png", RED) > 20
    assert [steps for what, steps in marked if what == "skipped step"] == [[200, 600]] * 2  # on loss and gradient norm


def test_kinds_of_tokens_have_curves_of_their_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, curve, drawn = run(100), figures._curve, {}

    def noted(axes: Any, steps: Any, values: Any, title: str, *how: Any) -> None:
        drawn[title] = values.tolist()
        curve(axes, steps, values, title, *how)

    monkeypatch.setattr(figures, "_curve", noted)
    curves(tmp_path / "one.png", rows)
    assert not any("loss of" in title for title in drawn)
    for i, row in enumerate(rows):
        row |= {"loss_image": 1 / (1 + i), "loss_text": 3 / (1 + i), "num_text_values": 7}
    rows[5]["loss_text"] = None  # of a step without a text
    curves(tmp_path / "both.png", rows)
    assert drawn["loss of the images"][9] == 0.1
    assert drawn["loss of the texts"][9] == pytest.approx(0.3)
    assert math.isnan(drawn["loss of the texts"][5])
    heights = [len(pixels(tmp_path / f"{name}.png")) for name in ("one", "both")]
    assert heights[1] > 1.3 * heights[0]
    assert num_near(tmp_path / "both.png", BLUE) > num_near(tmp_path / "one.png", BLUE) + 500
    curves(tmp_path / "three.png", [row | {"loss_sound": 1.0} for row in rows], score=("fd", None))
    assert "loss of the sounds" in drawn


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


def test_a_backend_for_windows_that_is_not_there_matters_to_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As notebooks set it. Nothing that training imports needs matplotlib, and its files need no window."""
    monkeypatch.setenv("MPLBACKEND", "qt99")
    program = (
        "import sys, cfpretrain.training.trainer\n"
        "assert not any(name.partition('.')[0] == 'matplotlib' for name in sys.modules)\n"
        "import cfpretrain.evaluation.figures\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_settings_in_the_current_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that was given: matplotlib would wait for this one for ever."""
    os.mkfifo(tmp_path / "matplotlibrc")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    ended = subprocess.run(
        [sys.executable, "-c", "import cfpretrain.evaluation.figures"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UserError: " in ended.stderr
    assert "expected no settings of matplotlib in the current folder" in ended.stderr

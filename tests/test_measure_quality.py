"""examples/digits/measure_quality.py: its figures are there and make sense."""

import json
from pathlib import Path

import pytest
import torch

from cfpretrain.base.console import EXIT_USER_ERROR
from examples.digits import measure_quality, summary
from tests.digits import digits
from tests.runs import write_run


def measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: object) -> dict:
    monkeypatch.setattr("sys.argv", ["measure_quality.py", *map(str, command)])
    measure_quality.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path) -> list[object]:
    """A run of random weights, and real digits to score it by."""
    rows = digits(60)
    pixels = torch.stack([torch.from_numpy(pixels * 255).to(torch.uint8) for _, _, pixels in rows])
    labels = torch.tensor([label for _, label, _ in rows])
    monkeypatch.setattr(summary, "read_all_images", lambda folder, key: (pixels, labels))
    return [
        write_run(tmp_path / "run", shards),
        "--images",
        tmp_path,
        "--held-out",
        tmp_path,
        "--num-denoising-steps",
        "2",
    ]


def test_edits(monkeypatch, capsys, scored) -> None:
    found = measure(monkeypatch, capsys, "edits", *scored, "--num-edits", 9, "--num-ar-steps", 2)
    assert (found["num_edits"], found["command"]) == (9, "edits")
    assert [found["regions"][name]["num_edits"] for name in ("top", "bottom")] == [5, 4]
    assert found["old_class_unedited"] == 1.0, "the classifier was fitted on these"
    assert 0 <= found["new_class"] <= 1
    # Random weights make noise, which does not go with a digit.
    assert found["seam_ratio"] > 1.5
    assert found["moved_by_context"] > 0


def test_samples(monkeypatch, capsys, scored) -> None:
    found = measure(monkeypatch, capsys, "samples", *scored, "--num-images", 20, "--batch-size", 20)
    assert [row["num_ar_steps"] for row in found["rows"]] == [1, 4, 16]
    assert {name: one["num_evaluations"] for name, one in found["solvers"].items()} == {"ddpm": 250, "sde-dpm++": 2}
    assert found["frechet_ratio"] > 0
    assert found["classifier_accuracy_on_real"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-ar-steps", "17"], "--num-ar-steps: expected 1 to 16, got 17"),
        (["--num-images", "0"], "--num-images: expected at least 1, got 0"),
        (["--num-denoising-steps", "1"], "--num-denoising-steps: expected at least 2, got 1"),
    ],
)
def test_mistakes(monkeypatch, capsys, scored, options, message) -> None:
    monkeypatch.setattr("sys.argv", ["measure_quality.py", "samples", *map(str, scored), *options])
    with pytest.raises(SystemExit) as ended:
        measure_quality.main()
    assert ended.value.code == EXIT_USER_ERROR
    assert message in capsys.readouterr().err

"""tools/measure_sampling.py: its plain sampler is ours without a cache; its figures are there and make sense."""

import json
from pathlib import Path

import pytest
import torch

from cfpretrain.base.console import EXIT_USER_ERROR
from cfpretrain.core import sampler
from cfpretrain.core.process import make_process
from cfpretrain.core.solvers import Solver
from cfpretrain.data import images
from tests.closeness import disagreement
from tests.digits import digits
from tests.runs import write_run
from tests.test_transformer import small_model
from tools import measure_sampling

QUICK = ["--num-denoising-steps", "2"]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_plain_sampler_makes_the_same_images(guidance) -> None:
    model, ids = small_model(), torch.arange(3)
    given = (
        model,
        ids,
        sampler.sampling_orders(0, ids, 9),
        [2, 3, 4],
        Solver(make_process(), 3),
        sampler.Guidance(guidance),
        sampler.noise_by_image(0, ids, model.patch_values),
    )
    assert disagreement(sampler.generate(*given), measure_sampling.generate_plainly(*given)) < 1e-5


def measure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: object) -> dict:
    monkeypatch.setattr("sys.argv", ["measure_sampling.py", *map(str, command)])
    measure_sampling.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path) -> list[object]:
    """A run of random weights, and real digits to score it by."""
    rows = digits(60)
    pixels = torch.stack([torch.from_numpy(pixels * 255).to(torch.uint8) for _, _, pixels in rows])
    labels = torch.tensor([label for _, label, _ in rows])
    monkeypatch.setattr(images, "read_all_images", lambda folder, key: (pixels, labels))
    return [write_run(tmp_path / "run", shards), "--images", tmp_path, "--held-out", tmp_path, *QUICK]


def test_edits(monkeypatch, capsys, scored) -> None:
    found = measure(monkeypatch, capsys, "edits", *scored, "--num-edits", 9, "--num-ar-steps", 2)
    assert (found["num_edits"], found["command"]) == (9, "edits")
    assert [found["regions"][name]["num_edits"] for name in ("top", "bottom")] == [5, 4]
    assert found["old_class_unedited"] == 1.0, "the classifier was fitted on these"
    assert 0 <= found["new_class"] <= 1
    # Random weights make noise, which does not go with a digit.
    assert found["seam_ratio"] > 1.5
    assert found["moved_by_context"] > 0


def test_quality(monkeypatch, capsys, scored) -> None:
    found = measure(monkeypatch, capsys, "quality", *scored, "--num-images", 20, "--batch-size", 20)
    assert [row["num_ar_steps"] for row in found["rows"]] == [1, 4, 16]
    assert {name: one["num_evaluations"] for name, one in found["solvers"].items()} == {"ddpm": 250, "sde-dpm++": 2}
    assert found["frechet_ratio"] > 0
    assert found["classifier_accuracy_on_real"] == 1.0


def test_speed(monkeypatch, capsys) -> None:
    options = ["--config", "configs/tiny.yaml", "--num-ar-steps", 2, 16, "--pairs", 1, "--batch-size", 2]
    found = measure(monkeypatch, capsys, "speed", *options, *QUICK)
    assert [row["num_ar_steps"] for row in found["rows"]] == [2, 16]
    assert max(row["difference"] for row in found["rows"]) < 1e-4


def test_speed_alone(monkeypatch, capsys) -> None:
    options = ["--config", "configs/tiny.yaml", "--num-ar-steps", 2, "--pairs", 1, "--batch-size", 2]
    found = measure(monkeypatch, capsys, "speed", *options, *QUICK, "--alone", "--precision", "bf16")
    [row] = found["rows"]
    assert row.keys() == {"num_ar_steps", "cached_images_per_second"}
    assert row["cached_images_per_second"] > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["speed", "--config", "configs/tiny.yaml", "--num-ar-steps", "17"],
            "--num-ar-steps: expected 1 to 16, got 17",
        ),
        (["speed", "--pairs", "0"], "--pairs: expected at least 1, got 0"),
        (["speed", "--num-denoising-steps", "1"], "--num-denoising-steps: expected at least 2, got 1"),
    ],
)
def test_mistakes(monkeypatch, capsys, command, message) -> None:
    monkeypatch.setattr("sys.argv", ["measure_sampling.py", *command])
    with pytest.raises(SystemExit) as ended:
        measure_sampling.main()
    assert ended.value.code == EXIT_USER_ERROR
    assert message in capsys.readouterr().err

"""tools/measure.py sampling: its plain sampler is ours without a cache; its figures are there and make sense."""

import json

import pytest
import torch

from cfpretrain.base.console import EXIT_USER_ERROR
from cfpretrain.core import sampler
from cfpretrain.core.process import make_process
from cfpretrain.core.solvers import Solver
from tests.closeness import disagreement
from tests.test_model import small_model
from tools import measure as command
from tools.measuring.sampling import generate_plainly

QUICK = ["--num-denoising-steps", "2"]


@pytest.mark.parametrize(("guidance", "trunk"), [(1.0, "causalfusion"), (2.0, "causalfusion"), (2.0, "llama")])
def test_the_plain_sampler_makes_the_same_images(guidance, trunk) -> None:
    model, ids = small_model(trunk=trunk), torch.arange(3)
    given = (
        model,
        ids,
        sampler.sampling_orders(0, ids, 9),
        [2, 3, 4],
        Solver(make_process(), 3),
        sampler.Guidance(guidance),
        sampler.noise_by_image(0, ids, model.patch_values),
    )
    assert disagreement(sampler.generate(*given), generate_plainly(*given)) < 1e-5


def measure(capsys: pytest.CaptureFixture[str], *options: object) -> dict:
    command.main(["sampling", *map(str, options)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_speed(capsys) -> None:
    options = ["--config", "configs/tiny.yaml", "--num-ar-steps", 2, 16, "--pairs", 1, "--batch-size", 2]
    found = measure(capsys, *options, *QUICK)
    assert [row["num_ar_steps"] for row in found["rows"]] == [2, 16]
    assert max(row["difference"] for row in found["rows"]) < 1e-4


def test_speed_alone(capsys) -> None:
    options = ["--config", "configs/tiny.yaml", "--num-ar-steps", 2, "--pairs", 1, "--batch-size", 2]
    found = measure(capsys, *options, *QUICK, "--alone", "--precision", "bf16")
    [row] = found["rows"]
    assert row.keys() == {"num_ar_steps", "cached_images_per_second"}
    assert row["cached_images_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--config", "configs/tiny.yaml", "--num-ar-steps", "17"],
            "--num-ar-steps: expected 1 to 16, got 17",
        ),
        (["--pairs", "0"], "--pairs: expected at least 1, got 0"),
        (["--num-denoising-steps", "1"], "--num-denoising-steps: expected at least 2, got 1"),
    ],
)
def test_mistakes(capsys, options, message) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["sampling", *options])
    assert ended.value.code == EXIT_USER_ERROR
    assert message in capsys.readouterr().err

"""tools/measure.py attention: every backend computes what it should, and is timed, or it is said why not."""

import json

import pytest
import torch

from tests.test_block_causal import Interpret, interpret  # noqa: F401  # a fixture
from tools import measure as command
from tools.measuring import attention


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "16", "40", "--head-widths", "32", "--num-heads", "2", "--batch-size", "2")
    command.main(["attention", *sizes])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = measured["attention"]
    always = ("naive", "sdpa", "dense flash")  # on any device
    expected = [(length, backend) for length in (64 + 2 * 16, 64 + 2 * 40) for backend in always]
    assert [(row["length"], row["backend"]) for row in rows if row["backend"] in always] == expected
    assert all(row["error"] < 1e-5 for row in rows)
    assert all((row["visible_share"] == 1) == row["backend"].startswith("dense") for row in rows)
    assert all(min(row["forward"], row["kernels"], row["both"]) > 0 for row in rows)
    named = {name.split(",")[0] for name in measured["not_measured"]} | {row["backend"] for row in rows}
    assert named == {"naive", "sdpa", "flex", "triton", "dense flash", "dense cudnn"}


def errors_and_gradients() -> dict[str, tuple[float, float]]:
    intervals_BMI = attention.full_intervals(0, 2, 8, 12)
    runs = attention.make_runs(["naive", "triton"], intervals_BMI, 32, 2, torch.float32)
    found = {}
    for name, run in runs.items():
        run.check()
        assert run.qkv.grad is not None
        found[name] = run.error, run.qkv.grad.double().norm().item()
    return found


def test_our_kernel_is_measured_on_the_same_inputs(interpret: Interpret) -> None:  # noqa: F811
    found = interpret(errors_and_gradients)
    assert max(error for error, _ in found.values()) < 1e-5
    assert found["naive"][1] == pytest.approx(found["triton"][1], rel=1e-5)


def test_a_backend_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such\n  kernel")

    monkeypatch.setattr(attention, "_attend_densely", fail)
    sizes = ["--tokens", "4", "--head-widths", "32", "--num-heads", "1", "--batch-size", "1"]
    command.main(["attention", *sizes])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["not_measured"]["dense flash, head 32, 72 tokens"] == "no such kernel"
    assert [row["backend"] for row in measured["attention"]][:2] == ["naive", "sdpa"]


def test_full_intervals_have_every_clean_token() -> None:
    for seed in range(5):
        assert attention.full_intervals(seed, 3, 8, 12).shape == (3, 8 + 2 * 12, 4)

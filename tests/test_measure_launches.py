"""tools/measure.py launches: settings are tried one by one, and the best over all lengths is named."""

import json
import time
from pathlib import Path

import pytest
import torch

from cfpretrain.core.attention import block_causal
from cfpretrain.core.attention.block_causal import Launch
from tests.test_block_causal import Interpret, interpret  # noqa: F401  # a fixture
from tools import measure as command
from tools.measuring import launches

CPU = torch.device("cpu")
IMPOSSIBLE = Launch(24, 16, 4, 1)  # no power of two


def swept(seconds: float) -> list[dict]:
    launches._NUM_HEADS = launches._TOKENS_IN_A_BATCH = 1
    launches._REPEATS = launches._TURNS = 1
    before = dict(block_causal.LAUNCHES)
    tried = [Launch(16, 16, 4, 1), Launch(32, 16, 4, 1), IMPOSSIBLE]
    rows = launches.sweep([32], [4], tried, time.monotonic() + seconds, CPU)
    assert before == block_causal.LAUNCHES
    return rows


def test_settings_are_timed_and_those_that_fail_left_out(interpret: Interpret) -> None:  # noqa: F811
    rows = interpret(swept, 1000.0)
    assert [(row["kernel"], row["length"]) for row in rows] == [(kernel, 72) for kernel in launches.KERNELS]
    for row in rows:
        assert sorted(one["launch"] for one in row["timed"]) == [[16, 16, 4, 1], [32, 16, 4, 1]]
        assert row["timed"][0]["seconds"] <= row["timed"][1]["seconds"]
    assert [one["lengths"] for one in launches.best_settings(rows)] == [[72]] * 3


def test_a_sweep_ends_with_what_it_has(interpret: Interpret) -> None:  # noqa: F811
    assert interpret(swept, -1.0) == []


def test_a_worker_compiles_its_share(interpret: Interpret) -> None:  # noqa: F811
    interpret(launches.compile_share, 0, 1000, [32], 4, CPU)


def row(kernel: str, length: int, seconds: dict[tuple[int, ...], float]) -> dict:
    timed = [{"launch": list(launch), "seconds": s} for launch, s in sorted(seconds.items(), key=lambda one: one[1])]
    return {"kernel": kernel, "head_width": 64, "value_bytes": 2, "length": length, "timed": timed}


def test_the_best_is_so_over_all_lengths() -> None:
    a, b, c = (64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 2)
    rows = [row("forward", 576, {a: 1.0, b: 1.1, c: 3.0}), row("forward", 2112, {a: 20.0, b: 11.0})]
    rows += [row("forward", 1280, {}), row("backward_q", 576, {c: 2.0})]
    [forward, backward_q] = launches.best_settings(rows)
    assert (forward["launch"], forward["lengths"]) == (list(b), [576, 2112])
    assert forward["of_best"] == pytest.approx(1.05)
    lines = launches.lines_for_launches([forward, backward_q])
    assert lines[0].startswith('    ("forward", 64, 2): Launch(64, 32, 4, 4),  # 1.05 of the best')
    assert eval("{" + lines[1] + "\n}", {"Launch": Launch}) == {("backward_q", 64, 2): Launch(*c)}


def test_a_cpu_is_refused_with_one_line(capsys, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        command.main(["launches", "--out", str(tmp_path / "best.json")])
    assert ended.value.code == 2
    assert "times kernels of a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_command(monkeypatch, capsys, tmp_path: Path) -> None:
    options = ["--seconds", "60", "--tokens", "64", "--head-widths", "64", "--out", str(tmp_path / "best.json")]
    monkeypatch.setattr(launches, "_ROWS", (64,))
    command.main(["launches", *options])
    best = json.loads((tmp_path / "best.json").read_text())
    assert [one["kernel"] for one in best] == list(launches.KERNELS)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["best"] == best

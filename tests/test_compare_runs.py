"""tools/compare_runs.py: what it says of two runs, and by which exit code."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cfpretrain.base.config import to_yaml
from cfpretrain.run.build import CONFIG_FILE, METRICS_FILE
from tests.digits import small_config
from tools import compare_runs

LOSSES = [2.0, 1.5, 1.25, 1.125]


def write(folder: Path, losses: Sequence[float | None], images_per_second: float, first: int = 1) -> Path:
    """A run of these losses, in windows of two steps, which scored itself at its first step."""
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(to_yaml(small_config(Path("shards of ") / folder.name, folder)))
    rows = [{"step": step, "loss": loss, "num_ranks": 2} for step, loss in enumerate(losses, first)]
    for row in rows[1::2]:
        row |= {"images_per_second": images_per_second * row["step"], "data_wait_share": 0.25}
    lines = [{"step": first, "fid": 3.0}, *rows]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """The exit code, and what was said."""
    monkeypatch.setattr("sys.argv", ["compare_runs.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        compare_runs.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), " ".join((said.out + said.err).split())


def test_equal_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    """Of another length: what both have is compared."""
    runs = write(tmp_path / "a", LOSSES, 100), write(tmp_path / "b", [*LOSSES, 9.0, 9.0], 50)
    code, said = compare(monkeypatch, capsys, *runs)
    assert code == 0
    assert said.endswith("losses of the 4 steps that both have, 1 to 4, are equal, bit by bit")
    assert "steps 4 6 ranks 2 2 images/s 300 150 wait for data 25.00% 25.00%" in said
    assert "differs" not in said
    assert f"{runs[1]} makes 0.500 times the images/s of {runs[0]}" in said
    (runs[1] / CONFIG_FILE).write_text(to_yaml(small_config(Path("shards of b"), runs[1], "train.warmup_steps=5")))
    assert " differs train.warmup_steps: 4 and 5 " in compare(monkeypatch, capsys, *runs)[1]


def test_a_difference_counts_by_its_size_and_its_step(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = write(tmp_path / "a", LOSSES, 100), write(tmp_path / "b", [2.0, 1.5, 1.3, 1.126], 100)
    code, said = compare(monkeypatch, capsys, *runs)
    assert code == 1
    assert "1 to 4, differ first at step 3: 1.25 and 1.3 largest" in said
    assert said.endswith("largest relative difference up to step 4: 0.038 MORE than the tolerance of 0 up to step 4")
    assert compare(monkeypatch, capsys, *runs, "--tolerance", "0.03")[0] == 1
    assert compare(monkeypatch, capsys, *runs, "--tolerance", "0.04")[0] == 0
    code, said = compare(monkeypatch, capsys, *runs, "--steps", 2)
    assert code == 0
    assert said.endswith(
        "up to step 2: 0 largest relative difference up to step 4: 0.038 within the tolerance of 0 up to step 2"
    )


def test_runs_that_differ_from_the_start(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = write(tmp_path / "a", LOSSES, 100), write(tmp_path / "b", [2.5, *LOSSES[1:]], 100)
    code, said = compare(monkeypatch, capsys, *runs)
    assert (code, "1 to 4, differ first at step 1: 2.0 and 2.5 largest" in said, "equal" in said) == (1, True, False)


def test_loss_errors_are_relative_and_only_grow() -> None:
    whole, ours = (
        [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        for losses in (LOSSES, (2.0, 1.5 * 1.01, 1.25, None))
    )
    assert compare_runs.loss_errors(ours, whole) == pytest.approx([0, 0.01, 0.01, float("inf")])
    assert compare_runs.loss_errors(whole, whole) == [0.0] * 4


def test_a_loss_that_one_run_lacks_differs_from_any(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = write(tmp_path / "a", LOSSES, 100), write(tmp_path / "b", [2.0, None, 1.25, 1.125], 100)
    code, said = compare(monkeypatch, capsys, *runs, "--tolerance", "1e9")
    assert (code, "differ first at step 2: 1.5 and None" in said) == (1, True)


def test_mistakes(tmp_path: Path, monkeypatch, capsys) -> None:
    runs = write(tmp_path / "a", LOSSES, 100), write(tmp_path / "b", LOSSES, 100, first=5)
    code, said = compare(monkeypatch, capsys, *runs)
    assert (code, "error: RUN, OTHER: expected runs with steps in common" in said) == (2, True)
    assert compare(monkeypatch, capsys, runs[0], tmp_path / "none")[0] == 2
    assert compare(monkeypatch, capsys, *runs, "--tolerance", "nan")[0] == 2
    (runs[1] / METRICS_FILE).unlink()
    code, said = compare(monkeypatch, capsys, *runs)
    assert (code, f"{runs[1] / METRICS_FILE} cannot be read" in said) == (2, True)

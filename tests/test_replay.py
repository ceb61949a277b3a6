"""tools/replay.py: a past step again, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.digits import small_run, write_digits
from tests.processes import run_script

TOOL = "tools/replay.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on 2 ranks with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("replay")
    shards = write_digits(folder / "digits")
    arguments = small_run(shards, folder / "run", "metrics.log_sample_ids=true", "checkpoint.keep_last=10")
    for ended in run_script("cfpretrain/train.py", arguments, 2):
        assert ended.code == 0, ended.err
    return folder / "run"


def logged_row(run: Path, step: int) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[step - 1])


def test_a_step_is_the_logged_one_bit_by_bit(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    first, _ = run_script(TOOL, [str(run), "--step", "11"], 2)
    assert first.code == 0, first.err
    assert "from step 8 to 11" in first.out
    assert first.out.count(" logged: equal") == 2
    made = run / "replay" / "step_00000011"
    result = json.loads((made / "samples.json").read_text())
    row = logged_row(run, 11)
    assert (result["loss"], result["grad_norm"]) == (row["loss"], row["grad_norm"])
    assert sorted(sample["id"] for sample in result["samples"]) == row["sample_ids"]
    assert sum(sample["loss"] for sample in result["samples"]) / 16 == pytest.approx(row["loss"], rel=1e-6)
    for sample in result["samples"]:
        assert sum(sample["ar_step_sizes"]) == 16
        assert 0 <= sample["timestep"] < 1000
    with Image.open(made / "samples.png") as picture:
        assert picture.width > 8 * 50
    # The run itself is only read, and the same command says the same.
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again, _ = run_script(TOOL, [str(run), "--step", "11"], 2)
    digests = [[line for line in out.splitlines() if "digest: " in line] for out in (first.out, again.out)]
    assert digests[0] == digests[1] != []


def test_another_number_of_ranks_is_said_to_differ(run: Path) -> None:
    [ended] = run_script(TOOL, [str(run), "--step", "7"], 1)
    result = json.loads((run / "replay" / "step_00000007" / "samples.json").read_text())
    assert result["loss"] == pytest.approx(logged_row(run, 7)["loss"], rel=1e-5)
    assert ended.code == (0 if result["equal"] else 1)
    assert "digest" in ended.out


def test_a_wrong_number_is_found(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[4]) | {"loss": json.loads(lines[4])["loss"] * (1 + 2e-16)}
    assert row["loss"] != json.loads(lines[4])["loss"]
    lines[4] = json.dumps(row)
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    first, _ = run_script(TOOL, [str(copy), "--step", "5"], 2)
    assert first.code == 1, first.err
    assert "loss: " in first.out
    assert "NOT EQUAL" in first.out


def test_mistakes(run: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([str(tmp_path), "--step", "3"], "holds no config.yaml"),
        ([str(run), "--step", "99"], "--step: expected a step that "),
        ([str(run), "--step", "3"], "(of steps 4, 8, 12), got 3"),
    ):
        [ended] = run_script(TOOL, arguments, 1)
        assert ended.code == 2
        assert message in ended.err
        assert "Traceback" not in ended.err

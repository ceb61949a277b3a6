"""tools/replay.py: a past step again, bit by bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.digits import digits, digits_info, small_run, write_digits, write_latents
from tests.folders import rows
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


@pytest.fixture(scope="module")
def sick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps on 1 rank that takes every upward movement for a spike, with checkpoints at 8, 16, 24, ...

    Sample 40 is no number.
    """
    folder = tmp_path_factory.mktemp("sick")
    shards = folder / "digits"
    lost = np.full((1, 8, 8), np.nan)
    samples = [(i, label, lost if i == 40 else pixels) for i, label, pixels in digits(100)]
    write_latents(shards, digits_info(100), samples)
    overrides = [
        "train.num_steps=40",
        "train.decay_steps=0",
        "engine.zero_stage=1",
        "guard.window_steps=32",
        "guard.spike_deviations=0.5",
        "guard.max_skips_in_row=2",
        "guard.max_rewinds=100",
        "checkpoint.every_steps=8",
        "checkpoint.keep_last=100",
        "metrics.log_sample_ids=true",
    ]
    [ended] = run_script("cfpretrain/train.py", small_run(shards, folder / "run", *overrides))
    assert ended.code == 0, ended.err
    return folder / "run"


def assert_equal(run: Path, step: int) -> dict:
    """Replays a step and finds it to be the logged one."""
    [ended] = run_script(TOOL, [str(run), "--step", str(step)])
    assert ended.code == 0, ended.out + ended.err
    result = json.loads((run / "replay" / f"step_{step:08d}" / "samples.json").read_text())
    row = rows(run)[step - 1]
    assert (result["loss"], result["grad_norm"]) == (row["loss"], row["grad_norm"])
    assert result["skipped"] == row.get("skipped")
    assert sorted(sample["id"] for sample in result["samples"]) == row["sample_ids"]
    return result


def test_a_step_is_the_logged_one_bit_by_bit(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    first, _ = run_script(TOOL, [str(run), "--step", "11"], 2)
    assert first.code == 0, first.err
    assert "from step 8 to 11" in first.out
    assert first.out.count(" logged: equal") == 2
    made = run / "replay" / "step_00000011"
    result = json.loads((made / "samples.json").read_text())
    row = rows(run)[10]
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


def test_a_step_is_made_again_with_the_config_of_its_time(run: Path, tmp_path: Path) -> None:
    """A run that goes on with other knobs: steps before the change and after it, between the same checkpoints."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shards = run.parent / "digits"
    changed = ["train.learning_rate=0.01", "train.decay_steps=0", "order.ar_step_decay=0.5", "train.num_steps=15"]
    kept = ["metrics.log_sample_ids=true", "checkpoint.keep_last=10", "checkpoint.every_steps=7"]
    for ended in run_script("cfpretrain/train.py", small_run(shards, folder, *kept, *changed), 2):
        assert ended.code == 0, ended.err
    # Steps 9 to 12 were made with the old knobs, 13 to 15 with the new ones.
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    assert {path.name for path in (folder / "checkpoints").glob("step_*")} == {
        "step_00000004",
        "step_00000008",
        "step_00000014",
        "step_00000015",
    }
    for step in (11, 15):
        first, _ = run_script(TOOL, [str(folder), "--step", str(step)], 2)
        assert first.code == 0, first.out + first.err
        assert first.out.count(" logged: equal") == 2
    [refused] = run_script(TOOL, [str(folder), "--step", "13"])
    assert refused.code == 2
    assert "between the checkpoint of step 8 and step 13 the run was resumed with other knobs (" in refused.err
    assert "train.learning_rate from 0.001 to 0.01" in refused.err


def test_a_spike(sick_run: Path) -> None:
    found = [row for row in rows(sick_run) if "deviations above" in row.get("skipped", "")]
    assert_equal(sick_run, next(row["step"] for row in found if "rewound_to_step" not in row))


def test_a_sample_that_is_no_number_is_named_first(sick_run: Path) -> None:
    found = [row for row in rows(sick_run) if row.get("skipped") == "the loss is nan"]
    row = next(row for row in found if row["step"] > 8)
    assert row["loss"] is None
    worst, second, *_ = assert_equal(sick_run, row["step"])["samples"]
    assert (worst["id"], worst["loss"]) == (40, None)
    assert second["loss"] > 0


def test_a_step_that_rewinds_and_one_after_it(sick_run: Path) -> None:
    found = rows(sick_run)
    # Not followed by a checkpoint at once: the replay goes back as the run did.
    at = next(row["step"] for row in found if "rewound_to_step" in row and row["step"] % 8 not in (0, 7))
    assert_equal(sick_run, at)
    assert_equal(sick_run, at + 1)


def test_a_rewind_to_a_checkpoint_that_is_gone_is_said(sick_run: Path, tmp_path: Path) -> None:
    found = rows(sick_run)
    row = next(row for row in found if "rewound_to_step" in row and row["rewound_to_step"] > 8)
    copy = tmp_path / "run"
    shutil.copytree(sick_run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{row['rewound_to_step']:08d}")
    last = row["step"] + 1
    for name in (copy / "checkpoints").glob("step_*"):
        if int(name.name.removeprefix("step_")) in range(row["rewound_to_step"], last):
            shutil.rmtree(name)
    [ended] = run_script(TOOL, [str(copy), "--step", str(last)])
    assert ended.code == 2, ended.out
    assert f"at step {row['step']} the run went back to step {row['rewound_to_step']}, and this replay" in ended.err
    assert "Traceback" not in ended.err


def test_a_damaged_checkpoint_leaves_the_one_before_it(sick_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(sick_run, copy)
    steps = sorted(int(path.name.removeprefix("step_")) for path in (copy / "checkpoints").glob("step_*"))
    weights = copy / "checkpoints" / f"step_{steps[1]:08d}" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    [ended] = run_script(TOOL, [str(copy), "--step", str(steps[1] + 1)])
    assert ended.code == 0, ended.err
    assert f"step_{steps[1]:08d} is damaged" in ended.out
    assert f"from step {steps[0]} to {steps[1] + 1}" in ended.out


def test_another_number_of_ranks_is_said_to_differ(run: Path) -> None:
    [ended] = run_script(TOOL, [str(run), "--step", "7"], 1)
    result = json.loads((run / "replay" / "step_00000007" / "samples.json").read_text())
    assert result["loss"] == pytest.approx(rows(run)[6]["loss"], rel=1e-5)
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


def test_a_row_without_numbers_and_a_link_in_the_way(run: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(run, given)
    kept = [json.dumps(row) for row in rows(run) if row["step"] != 6]
    (given / "metrics.jsonl").write_text("\n".join([*kept, '{"step": 6, "loss": "x"}']) + "\n")
    [ended] = run_script(TOOL, [str(given), "--step", "6"])
    assert ended.code == 1, ended.err
    assert "NOT EQUAL" in ended.out
    shutil.rmtree(given / "replay")
    (tmp_path / "victim").mkdir()
    (given / "replay").symlink_to(tmp_path / "victim")
    [ended] = run_script(TOOL, [str(given), "--step", "6"])
    assert ended.code == 2, ended.err
    assert len(ended.err.splitlines()) == 1, ended.err
    assert not list((tmp_path / "victim").iterdir())


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

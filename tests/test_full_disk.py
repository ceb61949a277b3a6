"""A disk that fills, or turns read-only, under a run: what was there stays, and the run goes on or ends with a line."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cfpretrain.run import metrics
from tests.digits import small_run, write_digits
from tests.disks import mount, mounted_disk
from tests.folders import rows
from tests.processes import run_script, start_script, wait_until

TRAIN = "cfpretrain/train.py"
_WAIT_SECONDS = 120


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB of its own; a checkpoint here takes less than one."""
    with mounted_disk(tmp_path / "disk", "16m") as folder:
        yield folder


def fill(disk: Path) -> Path:
    """A file that leaves no byte free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue
    return ballast


def steps(run: Path) -> list[int]:
    return [row["step"] for row in rows(run)]


def started(run: Path, num_rows: int) -> Callable[[], bool]:
    return lambda: (run / "metrics.jsonl").exists() and len(steps(run)) >= num_rows


def test_a_run_survives_a_disk_that_is_full_for_a_while(small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    overrides = ("train.num_steps=120", "checkpoint.every_steps=40", "engine.zero_stage=1")
    ranks = start_script(TRAIN, small_run(write_digits(tmp_path / "digits"), run, *overrides), 2)
    wait_until(started(run, 10), _WAIT_SECONDS, ranks)
    ballast = fill(small_disk)
    full = "step_00000040 cannot be written: No space left on device"
    wait_until(lambda: full in ranks[0].said(), _WAIT_SECONDS, ranks)
    assert f"WARNING: {run / 'metrics.jsonl'} cannot be written now: No space left on device" in ranks[0].said()
    on_disk = steps(run)
    assert on_disk == list(range(1, len(on_disk) + 1))
    ballast.unlink()
    ended = [rank.communicate(timeout=_WAIT_SECONDS) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ended
    assert "metrics.jsonl can be written again: " in ended[0][0]
    assert steps(run) == list(range(1, 121))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000080", "step_00000120"]
    assert json.loads((run / "summary.json").read_text())["num_steps"] == 120


def test_a_disk_that_stays_full_ends_the_run(small_disk: Path, tmp_path: Path) -> None:
    run = small_disk / "run"
    shards = write_digits(tmp_path / "digits")
    overrides = ("train.num_steps=5000", "checkpoint.every_steps=10", "engine.zero_stage=1")
    ranks = start_script(TRAIN, small_run(shards, run, *overrides), 2)
    wait_until(lambda: (run / "checkpoints" / "latest").exists(), _WAIT_SECONDS, ranks)
    ballast = fill(small_disk)
    first, second = (rank.communicate(timeout=_WAIT_SECONDS) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], (first, second)
    errors = [line for line in first[1].splitlines() if "[cfpretrain] error: " in line]
    assert len(errors) == 1
    assert "3 checkpoints in a row failed: checkpoint " in errors[0]
    assert "No space left on device; earlier checkpoints are untouched" in errors[0]
    assert "Traceback" not in first[1] + second[1]
    assert not (run / "requeue").exists()

    # With the space back, the same command goes on where the last checkpoint stands.
    ballast.unlink()
    saved = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    on_disk = steps(run)
    assert on_disk == list(range(1, len(on_disk) + 1))
    assert len(on_disk) >= saved
    shorter = small_run(shards, run, *overrides, f"train.num_steps={saved + 3}")
    [ended] = run_script(TRAIN, shorter)
    assert ended.code == 0, ended.err
    assert f"training from step {saved} to {saved + 3}" in ended.out
    assert steps(run) == list(range(1, saved + 4))


def test_metrics_wait_out_a_read_only_file_system(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = metrics.MetricsFile(small_disk / "metrics.jsonl", resume_step=0)
    file.append([{"step": 1}])
    assert mount("-o", "remount,ro", str(small_disk)).returncode == 0
    file.append([{"step": 2}])
    file.append([{"step": 3}])
    assert steps(small_disk) == [1]
    assert capsys.readouterr().out.count("cannot be written now: Read-only file system") == 1
    assert mount("-o", "remount,rw", str(small_disk)).returncode == 0
    file.append([{"step": 4}])
    assert steps(small_disk) == [1, 2, 3, 4]

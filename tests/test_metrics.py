"""Metrics: FLOPs against published figures, the file across a resume."""

import errno
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cfpretrain.base.config import ModelConfig
from cfpretrain.base.console import UserError
from cfpretrain.core import ar as order
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout
from cfpretrain.core.work import count_work
from cfpretrain.run import metrics


@pytest.mark.parametrize(
    ("width", "depth", "heads", "tera"), [(1024, 24, 16, 0.96), (1280, 32, 20, 1.98), (1408, 48, 22, 3.58)]
)
def test_flops_of_an_image_as_published(width, depth, heads, tera) -> None:
    """At 256 px with the exact mask, in the mean over splits of decay 0.9."""
    model = ModelConfig(width=width, depth=depth, num_heads=heads)
    table = order.last_size_table(256, 0.9)
    keys = torch.arange(2000)
    steps = order.draw_shared_steps
    flops = 0.0
    for i in keys[:200].tolist():
        segments = [class_segment(64), image_segment(steps(torch.tensor(i * 7919 + 1), 1, 256, 0.9))]
        flops += metrics.training_flops(model, count_work(segments, build_layout(segments)))
    assert float(table.sum()) == pytest.approx(1)
    assert flops / 200 / 1e12 == pytest.approx(tera, rel=0.03)


def test_json_has_no_nan() -> None:
    assert [metrics.finite_or_none(value) for value in (1.5, math.nan, math.inf)] == [1.5, None, None]


def test_resume_drops_rows_of_lost_work(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = metrics.MetricsFile(path, resume_step=0)
    first.append([{"step": i, "loss": 1.0 / i} for i in (1, 2, 3)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3]
    again = metrics.MetricsFile(path, resume_step=2)
    again.append([{"step": 3, "loss": 9.0}])
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]


def test_a_score_joins_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = metrics.MetricsFile(path, resume_step=0)
    first.append([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    first.append([{"step": 2, "fd": 3.0}])
    first.append([{"step": 3, "loss": 0.2}, {"step": 3, "fd": 2.0}])
    joined = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "fd": 3.0}]
    assert metrics.read_metrics(path) == [*joined, {"step": 3, "loss": 0.2, "fd": 2.0}]
    metrics.MetricsFile(path, resume_step=2)
    assert metrics.read_metrics(path) == joined


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    metrics.MetricsFile(path, resume_step=0)
    assert metrics.read_metrics(path) == []


@pytest.mark.parametrize("line", [b'{"st', b"\xff\xfe", b"3", b'{"loss": 1}', b'{"step": null}'])
def test_damage_in_the_middle_is_said_and_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(damaged)
    assert metrics.read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert "metrics.jsonl: 1 damaged lines are left out" in capsys.readouterr().out
    metrics.MetricsFile(path, resume_step=3)
    assert metrics.read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


def steps_on_disk(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@contextmanager
def at_most_bytes(num_bytes: int) -> Iterator[None]:
    """No file of this process may become larger: a write goes as far as that and then fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_cannot_be_written_wait_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])
    with at_most_bytes(40):
        for step in (2, 3, 4, 5):
            file.append([{"step": step, "loss": 0.5}])
            # A whole file at every moment: nothing of the row that did not fit.
            assert steps_on_disk(path) == [1, 2]
    said = capsys.readouterr().out
    assert said.count("WARNING: ") == 1
    assert f"{path} cannot be written now: File too large; its rows are kept in memory" in said
    file.append([{"step": 6}])
    assert steps_on_disk(path) == [1, 2, 3, 4, 5, 6]
    assert "can be written again: 3 rows that waited are on disk" in capsys.readouterr().out
    file.append([])
    assert steps_on_disk(path) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == ""


def test_a_copy_by_hard_links_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])
    (tmp_path / "copy.jsonl").hardlink_to(path)
    for step in (2, 3):
        file.append([{"step": step}])
    assert steps_on_disk(path) == [1, 2, 3]
    assert steps_on_disk(tmp_path / "copy.jsonl") == [1]
    assert capsys.readouterr().out == ""


def test_a_call_without_rows_tries_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    with at_most_bytes(5):
        file.append([{"step": 1}])
    assert steps_on_disk(path) == []
    file.append([])
    assert steps_on_disk(path) == [1]


def test_what_could_not_be_taken_back_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails under the write, and again where half a row should be cut off."""
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(metrics.os, "fsync", fail)
    file.append([{"step": 2}])
    with path.open("ab") as half:
        half.write(b'{"step": 2, "lo')
    monkeypatch.undo()
    file.append([{"step": 3}])
    assert steps_on_disk(path) == [1, 2, 3]


def test_a_file_that_cannot_be_begun_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No such file or directory; free some space"):
        metrics.MetricsFile(tmp_path / "gone" / "metrics.jsonl", resume_step=0)

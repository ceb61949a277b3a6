"""The rows of a run: windows that are summed over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cfpretrain.base import runtime
from cfpretrain.run.metrics import MetricsFile, read_metrics
from cfpretrain.run.tracker import Tracker
from tests.digits import small_config
from tests.processes import run_in_processes

CPU = torch.device("cpu")


def close_a_window(folder: Path) -> tuple[list[dict[str, Any]], float]:
    from cfpretrain.training.log import Log
    from cfpretrain.training.step import Counters

    runtime.start(CPU)
    rank, config = runtime.rank(), small_config(folder / "shards", folder)
    log = Log(config, CPU, MetricsFile(folder / "metrics.jsonl", 0), Tracker("disabled", "", folder, None, {}))
    log._begin -= 1e6 * (1 + rank)
    rows = log.rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    log._sample_ids = [[4 + rank, 1 + rank], [9, 8 - rank]]
    log._flops = 40.0
    at = Counters(step=2)
    log.close_window(at, waited_seconds=5e5 * rank)
    assert log.rows == []
    runtime.stop()
    return rows, at.train_seconds


def test_a_window_gathers_sample_ids_and_takes_the_clock_of_rank_zero(tmp_path: Path) -> None:
    (rows, seconds), other = run_in_processes(close_a_window, 2, tmp_path)
    assert other == (rows, seconds)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    assert 1e6 <= seconds < 1.5e6
    assert rows[0] == {"step": 1, "loss": 0.5, "sample_ids": [1, 2, 4, 5]}
    last = rows[1]
    assert last["sample_ids"] == [7, 8, 9, 9]
    assert last["tflops_per_second"] == pytest.approx(40.0 / seconds / 1e12)
    assert last["data_wait_share"] == pytest.approx(5e5 / seconds)  # of the rank that waited longest
    assert (last["mfu"], last["train_seconds"]) == (None, seconds)


def test_a_line_says_the_loss_of_each_kind() -> None:
    from cfpretrain.training.log import describe_loss

    assert describe_loss({"step": 1, "loss": 0.5}) == "loss 0.5000"
    row = {"loss": None, "loss_image": 0.25, "num_image_values": 64, "loss_text": None, "num_text_values": 3}
    assert describe_loss(row) == "loss not finite (image 0.2500, text not finite)"
    assert describe_loss(row | {"num_text_values": 0}) == "loss not finite (image 0.2500, text none)"

"""Ranks: agreement and sums over real processes, and a single process without a launcher."""

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError
from tests.processes import Rank, free_port, launcher_environment, run_in_processes


def exchange() -> dict[str, object]:
    runtime.start(torch.device("cpu"))
    found: dict[str, object] = {
        "rank": runtime.rank(),
        "gathered": runtime.gather(runtime.rank() * 10),
        "sum": runtime.sum_over_ranks(torch.tensor([1.0, runtime.rank()])).tolist(),
    }
    runtime.agree(None)
    try:
        runtime.agree(f"rank {runtime.rank()} has no disk" if runtime.rank() > 0 else None)
    except UserError as error:
        found["problem"] = str(error)
    runtime.barrier()
    runtime.stop()
    return found


def test_ranks_agree() -> None:
    for rank, found in enumerate(run_in_processes(exchange, 3)):
        assert found == {
            "rank": rank,
            "gathered": [0, 10, 20],
            "sum": [3.0, 3.0],
            "problem": "rank 1 has no disk",
        }


def work(fails: bool) -> list[Any]:
    """Three ranks: rank 0 does much, rank 1 little, perhaps it fails, rank 2 nothing."""
    runtime._EXCHANGE_SECONDS = 0.1
    runtime.start(torch.device("cpu"))
    seen: list[Any] = []
    try:
        with runtime.Exchange(seen.append) as ranks:
            for _ in range((1000 if fails else 8, 3, 0)[runtime.rank()]):
                time.sleep(0.05)
                ranks.add(2)
            if runtime.rank() == 1 and fails:
                raise UserError("rank 1 has no disk")
    except UserError as error:
        seen = [str(error)]
    runtime.stop()
    return seen


def test_ranks_hear_of_each_other_and_wait_for_all() -> None:
    seen = run_in_processes(work, 3, False)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == sorted(seen[0])
    assert seen[0][-1] == 2 * (8 + 3)


def test_the_failure_of_one_rank_ends_all() -> None:
    assert run_in_processes(work, 3, True) == [["rank 1 has no disk"]] * 3


def test_one_process_needs_no_others() -> None:
    seen: list[int] = []
    with runtime.Exchange(seen.append) as alone:
        alone.add(3)
        alone.add(4)
    assert seen == [7]
    with pytest.raises(UserError, match="mine"), runtime.Exchange(seen.append):
        raise UserError("mine")


def alone() -> list[object]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    before = [runtime.rank(), runtime.world_size(), runtime.gather("x")]
    runtime.start(torch.device("cpu"))
    after = [runtime.gather("x"), torch.distributed.get_world_size(), os.environ["LOCAL_WORLD_SIZE"]]
    runtime.stop()
    return [*before, *after]


def test_one_process_needs_no_launcher() -> None:
    assert run_in_processes(alone, 1) == [[0, 1, ["x"], ["x"], 1, "1"]]


def listening() -> list[str]:
    """The addresses, as the kernel writes them in hex, on which this process takes connections."""
    own = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


def start_and_listen(launched: bool) -> tuple[list[str], list[str]]:
    if not launched:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    runtime.start(torch.device("cpu"))
    runtime.gather("x")
    found = listening()
    runtime.barrier()
    runtime.stop()
    with socket.create_server(("", 0)):  # else nothing would show that such a one is found
        return found, listening()


@pytest.mark.parametrize(("num_ranks", "launched"), [(1, False), (1, True), (3, True)])
def test_ranks_of_one_machine_listen_on_loopback_alone(num_ranks, launched) -> None:
    for found, after in run_in_processes(start_and_listen, num_ranks, launched):
        assert set(found) == {"0100007F"}
        assert "00000000" in after


def meet_where_another_listens() -> str:
    os.environ["WORLD_SIZE"] = "2"  # the other would come later
    with socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))):
        with pytest.raises(UserError) as raised:
            runtime.start(torch.device("cpu"))
        return str(raised.value)


def test_a_port_in_use_is_one_line_with_a_free_one() -> None:
    [said] = run_in_processes(meet_where_another_listens, 1)
    found = re.fullmatch(
        r"--master_port: (\d+) is in use on this machine, .* start this one with: deepspeed --master_port (\d+) \.\.\.",
        said,
    )
    assert found is not None, said
    assert found[1] != found[2]
    with socket.create_server(("127.0.0.1", int(found[2]))):
        pass  # it is free


TOOL = """
import torch
from cfpretrain.base import runtime
from cfpretrain.base.console import ending_in_one_line

with ending_in_one_line(), runtime.ranks_of_a_tool(torch.device("cpu")):
    if runtime.rank() in {ranks}:
        torch.empty(2**46)
    runtime.barrier()
"""


@pytest.mark.parametrize("ranks", [{1}, {0, 1, 2}])
def test_a_rank_without_memory_ends_a_tool_with_one_line(ranks, tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text(TOOL.format(ranks=ranks))
    started = [
        Rank(str(script), [], launcher_environment(rank, 3, port)) for port in [free_port()] for rank in range(3)
    ]
    ended = [(*rank.communicate(300), rank.returncode) for rank in started]
    assert [code for _, _, code in ended] == [2, 2, 2], ended
    lines = "".join(out + err for out, err, _ in ended).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("[cfpretrain] error: no memory left on rank ")


def test_a_gpu_that_torch_cannot_use_is_refused_unless_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on this machine, or with a wrong driver
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()  # of the driver, without any GPU
    assert runtime.pick_device(tmp_path).type == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match=r"has a GPU \(.*nvidia0\) that torch .* cannot use: .*DS_ACCELERATOR=cpu"):
        runtime.pick_device(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as the deepspeed launcher sets it
    with pytest.raises(UserError, match="cannot use"):
        runtime.pick_device(tmp_path)
    for hidden in ("", "-1", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert runtime.pick_device(tmp_path).type == "cpu"
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(UserError, match="DS_ACCELERATOR in the environment: cuda, and torch finds no GPU"):
        runtime.pick_device(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "tpu")
    with pytest.raises(UserError, match="DS_ACCELERATOR in the environment: expected cpu or cuda, got 'tpu'"):
        runtime.pick_device(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert runtime.pick_device(tmp_path).type == "cpu"


@pytest.mark.parametrize(
    ("theirs", "want"),
    [
        ({}, (None, "expandable_segments:True")),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, (None, "max_split_size_mb:64")),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, ("max_split_size_mb:64", None)),
    ],
)
def test_memory_of_gpus_is_taken_in_growing_segments_unless_set(theirs, want, monkeypatch) -> None:
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # restored after the test, whatever the code sets
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    runtime.pick_device()
    assert tuple(os.environ.get(name) for name in names) == want


def test_without_a_group_a_process_agrees_with_itself() -> None:
    assert runtime.sum_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    with pytest.raises(UserError, match="mine"):
        runtime.agree("mine")


def test_peak_memory_counts_what_was_held() -> None:
    held = torch.ones(64_000_000)
    assert held.sum() > 0
    assert runtime.peak_rss_mb() > held.nbytes / 1e6

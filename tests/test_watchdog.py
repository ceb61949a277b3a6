"""Runs that are asked to stop, and runs that lose a rank: on real ranks."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from cfpretrain.base import runtime, stopping, watchdog
from cfpretrain.base.console import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from cfpretrain.training import folder as run_folder
from tests.digits import small_config, small_run
from tests.folders import rows
from tests.processes import (
    REPOSITORY,
    Rank,
    free_port,
    launcher_environment,
    run_alone,
    run_in_processes,
    run_script,
    set_constants,
    start_script,
    wait_until,
)

TRAIN = "cfpretrain/train.py"
# It would train on for long: what happens to it comes while it does.
LONG = ("train.num_steps=5000", "checkpoint.every_steps=1000")


def wait_for_steps(folder: Path, num_steps: int, ranks: list[Rank]) -> None:
    metrics = folder / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= num_steps, 200, ranks)


def end(ranks: list[Rank]) -> list[tuple[int, str]]:
    outs = [rank.communicate(timeout=120) for rank in ranks]
    return [(rank.returncode or 0, out + err) for rank, (out, err) in zip(ranks, outs, strict=True)]


# ---------------------------------------------------------------------------
# Asked to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_to_any_rank_saves_and_stops_all(shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    ranks = start_script(TRAIN, small_run(shards, folder, *LONG), 2)
    wait_for_steps(folder, 6, ranks)
    ranks[1].send_signal(number)
    ended = end(ranks)
    assert [code for code, _ in ended] == [EXIT_REQUEUE] * 2, ended
    assert (folder / "requeue").read_text() == f"{number.name}\n"
    step = int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert step == rows(folder)[-1]["step"] >= 6
    assert step < 5000
    assert f"stopped at step {step} with a checkpoint ({number.name})" in ended[0][1]
    assert "Traceback" not in ended[0][1] + ended[1][1]

    [again] = run_script(TRAIN, small_run(shards, folder, f"train.num_steps={step + 2}"))
    assert again.code == 0, again.err
    assert f"training from step {step} to {step + 2}" in again.out
    assert not (folder / "requeue").exists()


def test_ctrl_c_counts_as_one_request(shards: Path, tmp_path: Path) -> None:
    """It reaches the whole process group; the launcher makes SIGINT and, milliseconds later, SIGTERM of it."""
    folder = tmp_path / "run"
    [rank] = ranks = start_script(TRAIN, small_run(shards, folder, *LONG, "data.num_workers=1"), 1)
    wait_for_steps(folder, 4, ranks)
    group = [rank.pid, *children(rank.pid)]
    assert len(group) > 1
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in group:
            with suppress(ProcessLookupError):  # it may have ended at the first
                os.kill(process, number)
        wait_until(lambda: "stopping after this step" in rank.said())
    [(code, said)] = end(ranks)
    assert code == EXIT_REQUEUE, said
    assert "Traceback" not in said
    assert (folder / "requeue").read_text() == "SIGINT\n"
    assert not [process for process in group if Path(f"/proc/{process}").exists()]


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


PIPED = """
import os, runpy
os.dup2(os.open({pipe!r}, os.O_WRONLY), 1)
runpy.run_path("cfpretrain/train.py", run_name="__main__")
"""


def test_a_closed_terminal_does_not_cost_the_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Nobody reads what the run says any more, as behind `| tee log` after Ctrl-C."""
    folder, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    rank = Rank(PIPED.format(pipe=str(pipe)), small_run(shards, folder, *LONG), {"DS_ACCELERATOR": "cpu"})
    with pipe.open():
        wait_for_steps(folder, 1, [rank])
    rank.send_signal(signal.SIGINT)
    [(code, said)] = end([rank])
    assert code == EXIT_REQUEUE, said
    assert (folder / "requeue").read_text() == "SIGINT\n"
    step = int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert step == rows(folder)[-1]["step"]


EARLY = """
import os, runpy, signal, sys
class Loading:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Loading())
sys.argv = ["train.py", "--config", "configs/tiny.yaml"]
runpy.run_path("cfpretrain/train.py", run_name="__main__")
"""


def test_a_signal_while_it_loads_is_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", EARLY], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert ended.returncode == EXIT_REQUEUE, ended.stderr
    assert ended.stdout.endswith("[cfpretrain] stopped before training began; the same command starts it\n")
    assert ended.stderr == ""


def test_a_signal_while_it_waits_for_other_ranks_ends_it_at_once(shards: Path, tmp_path: Path) -> None:
    """As where rank 0 has found its port in use, and the launcher ends the others."""
    arguments = ["--local_rank=0", *small_run(shards, tmp_path / "run", *LONG)]
    soon_said = {"base.console._HEARTBEAT_SECONDS": 0.5}
    rank = Rank(TRAIN, arguments, launcher_environment(0, 2, free_port()), constants=soon_said)
    wait_until(lambda: "still waiting for all ranks" in rank.said(), 200, [rank])
    rank.send_signal(signal.SIGTERM)
    [(code, said)] = end([rank])
    assert code == EXIT_REQUEUE, said
    assert said.endswith("[cfpretrain] stopped before training began; the same command starts it\n")


SLEEPER = """
import sys, time
from cfpretrain.base.stopping import StopRequest
stop = StopRequest()
stop.listen()
print("ready", flush=True)
while stop.reason is None:
    time.sleep(0.01)
print(stop.reason, flush=True)
time.sleep(60)
"""


def test_a_later_signal_ends_at_once() -> None:
    process = Rank(SLEEPER, [], {}, constants={"base.stopping._ONE_REQUEST_SECONDS": 0.5})
    wait_until(lambda: process.said() == "ready\n")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)  # at once: the same request
    wait_until(lambda: process.said().count("\n") == 3)
    _, announced, reason = process.said().splitlines()
    assert "SIGUSR1: stopping after this step" in announced
    assert reason == "SIGUSR1"
    assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert out.splitlines() == ["ready", announced, reason]


FORKER = """
import os, signal
from cfpretrain.base.stopping import StopRequest
stop = StopRequest()
stop.listen()
if (child := os.fork()) == 0:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), number)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop.reason, flush=True)
"""


def test_a_worker_leaves_signals_to_the_rank() -> None:
    ended = run_alone(FORKER)
    assert (ended.code, ended.out) == (0, "7 None\n"), ended.err


RANK = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    print(os.getppid(), file=file)
time.sleep(0.5)
from cfpretrain.base.stopping import StopRequest
stop = StopRequest()
stop.listen()
print("watching", flush=True)
deadline = time.monotonic() + 60
while stop.reason is None and time.monotonic() < deadline:
    time.sleep(0.01)
print(stop.reason, flush=True)
"""
# A rank's launcher is two processes, as deepspeed's are.
LAUNCHER = """
import subprocess, sys  # deepspeed
middle = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])  # deepspeed.launcher"
subprocess.run([sys.executable, "-c", middle, *sys.argv[1:]])
"""


@pytest.mark.parametrize("moment", ["while the rank starts", "later"])
def test_a_rank_notices_that_its_launcher_is_gone(tmp_path: Path, moment: str) -> None:
    pid_file = tmp_path / "pid"
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK, str(pid_file)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"CROSS_RANK": "0"},
    ) as runner:
        assert runner.stdout is not None
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            assert runner.poll() is None
            time.sleep(0.01)
        if moment == "later":
            assert runner.stdout.readline() == "watching\n"
            runner.kill()  # the runner alone: its child and the rank live on
        else:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
        said = runner.stdout.read()
    assert "the launcher is gone: stopping" in said
    assert "\nthe launcher is gone\n" in f"\n{said}"


ASKED = """
import subprocess, sys
from cfpretrain.base.stopping import Launcher
print(Launcher().is_there())
"""


def test_a_launcher_is_found_above_a_wrapper_and_a_variable_alone_is_none() -> None:
    wrapped = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ASKED!r}])  # deepspeed.launcher"
    for command in (f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wrapped!r}])", ASKED):
        ended = subprocess.run(
            [sys.executable, "-c", command],
            env=os.environ | {"CROSS_RANK": "0"},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ended.stdout == "True\n"


def test_a_launcher_that_goes_is_no_second_signal(tmp_path: Path) -> None:
    """It ends once its ranks were told to stop, while they still write their checkpoint."""
    stop = stopping.StopRequest()
    stop.reason = "SIGUSR1"
    stop._first_signal_at = time.monotonic() - 10 * stopping._ONE_REQUEST_SECONDS

    class Gone:
        def is_there(self) -> bool:
            return False

    stop._watch(Gone())  # type: ignore[arg-type]  # were it a signal, this process would end
    assert stop.reason == "SIGUSR1"


# ---------------------------------------------------------------------------
# Lost ranks


SOON_SEEN = {"base.watchdog._POLL_SECONDS": 0.25}
# The rank that is left keeps its store for nobody, and takes no rank that lives for a dead one.
ONE_IS_LEFT = SOON_SEEN | {
    "base.runtime._KEEP_STORE_SECONDS": 0.25,
    "base.runtime._STORE_TIMEOUT": timedelta(seconds=1),
}


def test_a_killed_rank_ends_the_run_by_name(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_script(TRAIN, small_run(shards, folder, *LONG), 2, constants=ONE_IS_LEFT)
    wait_for_steps(folder, 4, ranks)
    ranks[1].kill()
    (code, said), _ = end(ranks)
    assert code == EXIT_REQUEUE, said
    assert (folder / "requeue").read_text() == "rank 1 died\n"
    assert "rank 1 died: the run ends; the same command goes on" in said


def test_a_killed_rank_zero_ends_the_run_too(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ranks = start_script(TRAIN, small_run(shards, folder, *LONG), 2, constants=ONE_IS_LEFT)
    wait_for_steps(folder, 4, ranks)
    ranks[0].kill()
    _, (code, said) = end(ranks)
    assert code == EXIT_REQUEUE, said
    assert (folder / "requeue").read_text() == "rank 0 died\n"
    assert "rank 0 died" in said


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run(shards: Path, tmp_path: Path, stopped: int) -> None:
    """SIGSTOP: the process is there and says nothing, as behind a broken network."""
    folder = tmp_path / "run"
    arguments = small_run(shards, folder, *LONG, "guard.rank_timeout_seconds=5")
    ranks = start_script(TRAIN, arguments, 2, constants=SOON_SEEN)
    wait_for_steps(folder, 4, ranks)
    ranks[stopped].send_signal(signal.SIGSTOP)
    other = ranks[1 - stopped]
    out, err = other.communicate(timeout=120)
    assert other.returncode == EXIT_REQUEUE, out + err
    assert (folder / "requeue").read_text().startswith(("rank 0 has been silent", "rank 1 died or lost")[stopped])


def train_with_a_sleeper(shards: Path, folder: Path, timeout_s: int, is_asked_to_stop: bool) -> None:
    """Rank 1 sleeps at step 3, when rank 0 may be asked to stop."""
    from cfpretrain.training import trainer

    config = small_config(shards, folder, *LONG, f"guard.rank_timeout_seconds={timeout_s}")
    set_constants(SOON_SEEN | {"base.watchdog._STOP_SECONDS": 3.0})
    device = torch.device("cpu")
    stop = stopping.StopRequest()
    stop.listen()
    runtime.start(device)
    real = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> None:
        if self.at.step == 3:
            if runtime.rank() == 1:
                time.sleep(200)
            if is_asked_to_stop:
                os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    trainer.Trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.run(config, device, stop)


def test_a_rank_that_sleeps_past_the_timeout_ends_the_run(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"died with exit code {EXIT_REQUEUE}"):
        run_in_processes(train_with_a_sleeper, 2, shards, tmp_path / "run", 5, False)
    assert (tmp_path / "run" / "requeue").read_text().startswith("rank 1 did not arrive for ")


def train_with_a_bug(shards: Path, folder: Path, ranks: tuple[int, ...]) -> None:
    from cfpretrain.training import trainer

    set_constants({"base.runtime._KEEP_STORE_SECONDS": 1.0})
    device = torch.device("cpu")
    stop = stopping.StopRequest()
    stop.listen()
    runtime.start(device)
    real = trainer.Trainer.train_step

    def train_step(self: trainer.Trainer) -> None:
        if self.at.step == 3 and runtime.rank() in ranks:
            raise ZeroDivisionError("a bug")
        real(self)

    trainer.Trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        trainer.run(small_config(shards, folder, *LONG), device, stop)
    finally:
        (folder / f"ended_{runtime.rank()}").touch()


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1)], ids=str)
def test_a_bug_is_no_reason_to_run_again(shards: Path, tmp_path: Path, ranks: tuple[int, ...]) -> None:
    folder = tmp_path / "run"
    # Of the ranks without the bug, each raises its broken collective or ends with code 1.
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: a bug|died with exit code 1|closed"):
        run_in_processes(train_with_a_bug, 2, shards, folder, ranks)
    assert any((folder / f"ended_{rank}").exists() for rank in ranks)
    assert not (folder / "requeue").exists()


@pytest.mark.parametrize("disk", ["refuses", "hangs"])
def test_a_lost_disk_does_not_keep_a_run_alive(disk: str) -> None:
    """The reason cannot be written: the process ends all the same."""
    ended = run_alone(f"from tests import test_watchdog\ntest_watchdog.leave({disk!r})\n", timeout_s=120)
    assert ended.code == EXIT_REQUEUE, ended.err
    assert "rank 1 died: the run ends" in ended.err


def leave(disk: str) -> None:
    def on_lost(reason: str) -> None:
        if disk == "refuses":
            raise OSError(30, "Read-only file system")
        time.sleep(600)

    set_constants(SOON_SEEN)
    watchdog.Watchdog(5.0, on_lost, stopping.StopRequest())._leave((EXIT_REQUEUE, "rank 1 died"))


# ---------------------------------------------------------------------------
# One run a folder


def hold(folder: Path) -> int:
    run_folder.take(folder)
    with pytest.raises(UserError, match=rf"{folder} is in use by another run \(process \d+ on "):
        _in_another_process(folder)
    worker = os.fork()
    if worker == 0:
        time.sleep(600)
        os._exit(0)
    return worker


def _in_another_process(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(_take, (folder,))


def _take(folder: Path) -> None:
    run_folder._locks.clear()  # of the process that this one is a fork of
    run_folder._LOCK_SECONDS = 0.3
    run_folder.take(folder)


def test_a_folder_is_used_by_one_run(tmp_path: Path) -> None:
    [worker] = run_in_processes(hold, 1, tmp_path)
    try:
        _in_another_process(tmp_path)  # a worker that outlives its rank does not hold the lock
    finally:
        os.kill(worker, signal.SIGKILL)


def hold_beside_a_copy(folder: Path, copy: Path) -> None:
    run_folder.take(folder)
    (copy / "lock").hardlink_to(folder / "lock")
    message = rf"{copy} is in use by .*; or, where this is a copy of that run by hard links, remove {copy}/lock$"
    with pytest.raises(UserError, match=message):
        _in_another_process(copy)
    (copy / "lock").unlink()
    _in_another_process(copy)


def test_a_copy_by_hard_links_has_the_lock_of_the_original(tmp_path: Path) -> None:
    folder, copy = tmp_path / "run", tmp_path / "copy"
    folder.mkdir()
    copy.mkdir()
    run_in_processes(hold_beside_a_copy, 1, folder, copy)
    (folder / "lock").write_text("of another file")
    (folder / "other").hardlink_to(folder / "lock")
    _in_another_process(folder)  # it may be used, and the other file stays as it is
    assert (folder / "other").read_text() == "of another file"


# ---------------------------------------------------------------------------
# Ranks without memory

# What is replaced only asks for memory that no machine has: the error is the allocator's, in the middle of a step.
GREEDY = """
import runpy, sys, time
import torch
from cfpretrain.base import runtime
from cfpretrain.training.trainer import Trainer

step_as_it_is = Trainer.train_step

def train_step(self):
    if self.at.step == 2 and runtime.rank() in {ranks}:
        time.sleep(0.5 * runtime.rank())  # rank 0 fails first where it does, and ends before the others
        torch.empty(2**46)
    step_as_it_is(self)

Trainer.train_step = train_step
sys.argv[0] = "cfpretrain/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("ranks", [{1}, {0, 1}])
def test_a_rank_without_memory_ends_the_run_with_one_line(shards: Path, tmp_path: Path, ranks: set[int]) -> None:
    folder, script, port = tmp_path / "run", tmp_path / "greedy.py", free_port()
    script.write_text(GREEDY.format(ranks=ranks))
    arguments = small_run(shards, folder)
    # A silent rank outlives the one that speaks by 4 s, as in earnest.
    outlives = {"base.runtime._LET_SPEAK_SECONDS": 5.0, "base.runtime._KEEP_STORE_SECONDS": 1.0}
    started = [
        Rank(str(script), [f"--local_rank={rank}", *arguments], launcher_environment(rank, 2, port), constants=outlives)
        for rank in range(2)
    ]
    outs = [rank.communicate(timeout=120) for rank in started]
    assert [rank.returncode for rank in started] == [EXIT_USER_ERROR] * 2, outs
    lines = "".join(err for _, err in outs).splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("[cfpretrain] error: no memory left on rank ")
    assert "train.micro_batch_size=2" in lines[0]
    assert f"tools/estimate_memory.py --config {folder}/config.yaml --num-gpus 2" in lines[0]
    assert not (folder / "requeue").exists()

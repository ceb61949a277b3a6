"""Runs that are asked to stop as people ask: Ctrl-C in a terminal, a closed one, in the middle of a wait."""

import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cfpretrain.base.console import EXIT_REQUEUE, EXIT_USER_ERROR
from tests import image_files
from tests.digits import digits, digits_info, small_run, write_latents
from tests.folders import rows
from tests.image_files import encoded, write_images
from tests.object_store import ObjectStore, running_store
from tests.processes import (
    REPOSITORY,
    Rank,
    free_port,
    launcher_environment,
    run_alone,
    run_in_processes,
    start_script,
    wait_until,
)
from tests.test_watchdog import LONG, TRAIN, end, train_with_a_sleeper, wait_for_steps


def latest_step(folder: Path) -> int:
    return int((folder / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


def assert_nothing_is_lost(folder: Path) -> None:
    """The checkpoint is of the last step that was made, and the same command should be given again."""
    assert latest_step(folder) == rows(folder)[-1]["step"]
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert (folder / "requeue").exists()


# ---------------------------------------------------------------------------
# In a terminal


class Terminal:
    """The deepspeed launcher with a run on two ranks, wandb among them, in a pseudo-terminal of its own."""

    def __init__(self, shards: Path, folder: Path) -> None:
        options = ["--num_accelerators", "2", "--master_port", str(free_port()), TRAIN]
        arguments = small_run(shards, folder, *LONG, "metrics.wandb=auto", "data.num_workers=1")
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        self.folder, self.said = folder, b""
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.chdir(REPOSITORY)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
            home = {"HOME": str(folder.parent), "WANDB_API_KEY": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            os.execve(launcher, [launcher, *options, *arguments], os.environ | home)

    def wait_for_a_step(self, after: int) -> None:
        """Until the metrics have a step behind `after`."""
        metrics = self.folder / "metrics.jsonl"
        wait_until(
            lambda: self._is_open() and metrics.exists() and any(row["step"] > after for row in rows(self.folder)),
            timeout_s=240,
        )

    def close(self) -> None:
        os.close(self._end)

    def press_ctrl_c(self) -> None:
        os.write(self._end, b"\x03")

    def wait(self) -> str:
        """Waits for the end of the launcher and all below it; what they said."""
        below = self.below()
        wait_until(lambda: not self._is_open())
        os.waitpid(self.pid, 0)
        psutil.wait_procs(below, timeout=60)
        assert not [process for process in below if process.is_running()]
        return self.said.decode()

    def below(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def end(self) -> None:
        for process in [*self.below(), psutil.Process(self.pid)] if psutil.pid_exists(self.pid) else []:
            process.kill()

    def _is_open(self) -> bool:
        """Reads what is there, so that nobody waits to write."""
        try:
            while select.select([self._end], [], [], 0)[0]:
                self.said += os.read(self._end, 1 << 16)
        except OSError:  # nobody has it open any more, or we have closed it
            return False
        return True


def stop_in_a_terminal(shards: Path, folder: Path, how: str, pause: float, after: int = 0) -> str:
    """Starts a run, asks it to stop `pause` seconds after its first step behind `after`, and waits for its end."""
    terminal = Terminal(shards, folder)
    try:
        terminal.wait_for_a_step(after)
        time.sleep(pause)
        if how == "Ctrl-C":
            terminal.press_ctrl_c()
        elif how == "SIGTERM":  # to what starts the ranks
            launcher = next(one for one in terminal.below() if "deepspeed.launcher.launch" in one.cmdline())
            launcher.terminate()
        elif how == "SIGHUP":
            os.kill(terminal.pid, signal.SIGHUP)
        else:
            terminal.close()
        return terminal.wait()
    finally:
        terminal.end()


@pytest.mark.parametrize("how", ["Ctrl-C", pytest.param("SIGTERM", marks=pytest.mark.slow), "a closed terminal"])
def test_a_stop_in_a_terminal_loses_no_step(shards: Path, tmp_path: Path, how: str) -> None:
    said = stop_in_a_terminal(shards, tmp_path / "run", how, pause=0.5)
    assert_nothing_is_lost(tmp_path / "run")
    assert ("stopping after this step" in said) == (how != "a closed terminal"), said
    assert "cfpretrain/" not in said.partition("stopping after this step")[2], said  # of a traceback of ours
    assert "WARNING: wandb" not in said, said


@pytest.mark.slow
def test_stops_at_random_moments_lose_no_step(shards: Path, tmp_path: Path) -> None:
    """One run, stopped and started again; CFPRETRAIN_STOPS says how often."""
    chance, folder, step = random.Random(0), tmp_path / "run", 0
    for _ in range(int(os.environ.get("CFPRETRAIN_STOPS", "4"))):
        how = chance.choice(["Ctrl-C", "SIGTERM", "SIGHUP", "a closed terminal"])
        said = stop_in_a_terminal(shards, folder, how, chance.uniform(0, 3), after=step)
        assert_nothing_is_lost(folder)
        assert latest_step(folder) > step, said
        step = latest_step(folder)
        print(f"{how}: stopped at step {step}")
    assert [row["step"] for row in rows(folder)] == list(range(1, step + 1))


# ---------------------------------------------------------------------------
# While it waits


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with running_store() as store:
        yield store


# What a run waits for is said after 5 s.
SOON_SAID = {"base.console._HEARTBEAT_SECONDS": 0.5}


def write_shards(folder: Path, kind: str) -> Path:
    """A hundred digits as they are or as images, in five shards."""
    if kind == "latents":
        return write_latents(folder, digits_info(100), digits(100), samples_per_shard=20)
    files = [encoded(image[..., 0]) for image in image_files.digits(0, 100)]
    names, labels = tuple("0123456789"), [place % 10 for place in range(100)]
    shards = [files[begin : begin + 20] for begin in range(0, 100, 20)]
    return write_images(folder, shards, 8, labels=labels, class_names=names, channels=1)


@pytest.mark.parametrize(
    ("kind", "num_workers"),
    [("latents", 0), ("latents", 1), ("images", 0), pytest.param("images", 1, marks=pytest.mark.slow)],
)
def test_a_request_to_one_rank_ends_the_others_wait_for_data(
    store: ObjectStore, tmp_path: Path, kind: str, num_workers: int
) -> None:
    """The storage is away for good, and patience and the ranks' timeout are long."""
    shards = write_shards(tmp_path / "shards", kind)
    smallest_cache = 2.5 * max(path.stat().st_size for path in shards.glob("*.mds")) / 1e9
    arguments = small_run(
        shards,
        tmp_path / "run",
        *LONG,
        f"data.shards={store.upload(shards, f'waiting{num_workers}')}",
        f"data.cache_folder={tmp_path / 'cache'}",
        f"data.cache_limit_gb={smallest_cache}",
        "data.download_patience_seconds=500",
        f"data.num_workers={num_workers}",
        "data.shuffle_block_size=27",
    )
    port, alone = free_port(), {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment = alone | store.environment()
    ranks = [
        Rank(TRAIN, arguments, launcher_environment(rank, 2, port) | environment, constants=SOON_SAID)
        for rank in range(2)
    ]
    wait_for_steps(tmp_path / "run", 2, ranks)
    store.kill()
    wait_until(lambda: "still waiting for data" in ranks[0].said() or "asking again" in ranks[0].said())
    ranks[1].send_signal(signal.SIGTERM)
    ended = end(ranks)
    assert [code for code, _ in ended] == [EXIT_REQUEUE] * 2, ended
    assert_nothing_is_lost(tmp_path / "run")
    assert (tmp_path / "run" / "requeue").read_text() == "SIGTERM\n"


def test_a_worker_that_hangs_keeps_nobody_who_was_asked_to_stop(shards: Path, tmp_path: Path) -> None:
    """It has promised batches that only it can hand over."""
    folder = tmp_path / "run"
    soon = SOON_SAID | {"data.reader._CLOSE_SECONDS": 1.0}
    ranks = start_script(TRAIN, small_run(shards, folder, *LONG, "data.num_workers=1"), 1, constants=soon)
    wait_for_steps(folder, 3, ranks)
    [worker] = psutil.Process(ranks[0].pid).children()
    worker.suspend()
    wait_until(lambda: "still waiting for data" in ranks[0].said())
    ranks[0].send_signal(signal.SIGTERM)
    [(code, said)] = end(ranks)
    assert code == EXIT_REQUEUE, said
    assert_nothing_is_lost(folder)


def test_a_rank_that_hangs_keeps_nobody_who_was_asked_to_stop(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"died with exit code {EXIT_REQUEUE}"):
        run_in_processes(train_with_a_sleeper, 2, shards, tmp_path / "run", 600, True, timeout_s=120)
    assert (tmp_path / "run" / "requeue").read_text().startswith("rank 1 did not arrive for ")
    assert "asked to stop" in (tmp_path / "run" / "requeue").read_text()


def test_a_request_before_the_first_step_ends_it_at_once(shards: Path, tmp_path: Path) -> None:
    """While the engine is built, or the first step compiles, there is nothing to save."""
    [rank] = start_script(TRAIN, small_run(shards, tmp_path / "run", *LONG), 1)
    wait_until(lambda: "building the model" in rank.said())
    rank.send_signal(signal.SIGTERM)
    [(code, said)] = end([rank])
    assert code == EXIT_REQUEUE, said
    assert "stopped before training began; the same command starts it" in said
    assert "stopping after this step" not in said
    assert (tmp_path / "run" / "requeue").exists()


# ---------------------------------------------------------------------------
# Faults that would come again


def test_shards_that_vanish_cost_no_step(tmp_path: Path) -> None:
    shards = write_latents(tmp_path / "shards", digits_info(100), digits(100), samples_per_shard=20)
    folder = tmp_path / "run"
    ranks: list[Rank] = start_script(TRAIN, small_run(shards, folder, *LONG), 2)
    wait_for_steps(folder, 4, ranks)
    shutil.rmtree(shards)
    ended = end(ranks)
    assert [code for code, _ in ended] == [EXIT_USER_ERROR] * 2, ended
    assert "data.shards: " in ended[0][1]
    assert latest_step(folder) == rows(folder)[-1]["step"] >= 4
    assert not (folder / "requeue").exists()


def test_an_error_ends_a_run_whose_wandb_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shards = write_latents(tmp_path / "shards", digits_info(100), digits(100), samples_per_shard=20)
    folder = tmp_path / "run"
    arguments = small_run(shards, folder, *LONG, "metrics.wandb=offline")
    ranks = start_script(TRAIN, arguments, 1, constants={"run.tracker._END_SECONDS": 2.0})
    wait_for_steps(folder, 2, ranks)
    [service] = [child for child in psutil.Process(ranks[0].pid).children() if child.name() == "wandb-core"]
    service.suspend()
    shutil.rmtree(shards)
    [(code, said)] = end(ranks)
    assert code == EXIT_USER_ERROR, said
    assert "WARNING: wandb has not ended" in said
    assert "Traceback" not in said


CLOSED = """
import os, signal, sys, time
os.close(1)
os.close(2)
from cfpretrain.base.stopping import StopRequest
stop = StopRequest()
stop.listen()
for number in (signal.SIGHUP, signal.SIGTERM):
    os.kill(os.getpid(), number)
end = time.monotonic() + 30
while stop.reason is None and time.monotonic() < end:
    time.sleep(0.01)
os._exit(7 if stop.reason else 1)
"""


def test_a_closed_terminal_is_heard_without_one() -> None:
    assert subprocess.run([sys.executable, "-c", CLOSED], cwd=REPOSITORY).returncode == 7


SMALL_MEMORY = """
import ctypes, runpy, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:
    sys.exit(99)
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]).returncode:
    sys.exit(99)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("kind", ["latents", "images"])
def test_shared_memory_that_is_too_small_is_one_line(tmp_path: Path, kind: str) -> None:
    """As docker gives it, in the proportions of a small model."""
    if os.geteuid() != 0:
        pytest.skip("a small /dev/shm needs root")
    arguments = small_run(
        write_shards(tmp_path / "shards", kind),
        tmp_path / "run",
        *LONG,
        "data.num_workers=2",
        "train.micro_batch_size=16",
    )
    ended = run_alone(SMALL_MEMORY, [TRAIN, *arguments])
    if ended.code == 99:
        pytest.skip(f"mounting a small /dev/shm was refused: {ended.err}")
    assert ended.code == EXIT_USER_ERROR, ended.err
    [line] = ended.err.strip().splitlines()
    assert line.startswith("[cfpretrain] error: data.num_workers: /dev/shm (0.06554 MB")
    assert "--shm-size" in line
    assert "--ipc=host" in line
    assert not (tmp_path / "run" / "requeue").exists()

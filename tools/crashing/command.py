"""One start of the training command: it is watched and killed, and what it leaves running is found."""

import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from cfpretrain.base import files
from tools.crashing.accounts import Attempt, CampaignError

TARGETS = ("rank", "ranks", "launcher", "node")
QUICK_POLL_SECONDS = 0.002  # for what is over in a moment: a checkpoint of a small model

_MARKER = "CFPRETRAIN_CRASH_TEST"  # in the environment of everything we start, so that orphans are found as well
_START = "CFPRETRAIN_CRASH_TEST_START"  # of one start of the command, which orphans of the one before do not carry
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 900.0  # without a new step, or an end that is due
_ORPHAN_SECONDS = 90.0  # as long a rank may outlive the run that it belonged to
_READ_SECONDS = 2.0  # for the last lines of a command that has ended


class Command:
    """The training command under way: a thread reads its output, `watch` looks at its run folder.

    Args:
        arguments: the command line.
        folder: its run folder.
        marker: goes into the environment.
        num_ranks: noted.
        log: the output's copy.
    """

    def __init__(self, arguments: list[str], folder: Path, marker: str, num_ranks: int, log: Path) -> None:
        self.folder = folder
        self.attempt = Attempt(num_ranks, time.monotonic())
        self.lines: list[str] = []
        self.num_samplings = 0  # that have begun
        self._start = uuid.uuid4().hex
        self._log = os.fdopen(files.open_to_change(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w")
        self._log.write(f"--- {' '.join(arguments)}\n")
        self._process = subprocess.Popen(
            arguments,
            env=os.environ | {_MARKER: marker, _START: self._start},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._sampling_since: float | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Goes on after the command's end for as long as orphans of it write.
        with self._log, self._process.stdout as stream:
            for line in stream:
                self._log.write(line)
                self._log.flush()
                self._note(line.rstrip())

    def _note(self, line: str) -> None:
        entered = re.search(r"training from step (\d+) to", line)
        if entered:
            self.attempt.from_step = self.attempt.last_step = int(entered[1])
            self.attempt.trained = time.monotonic()
        if "resuming from" in line or "initialising the weights" in line:
            self.attempt.built = self.attempt.built or time.monotonic()
        if "[cfpretrain] sampling" in line:
            self._sampling_since = time.monotonic()
            self.num_samplings += 1
        self.lines.append(line)

    def is_complete(self) -> bool:
        """Whether the command, which has ended, has ended its run."""
        self._reader.join(_READ_SECONDS)
        ends = ("done: step", "nothing to do: ")
        return self.attempt.code == 0 and any(end in line for line in list(self.lines) for end in ends)

    def watch(self) -> bool:
        """Looks once: notes new steps; False when the command has ended."""
        attempt, now = self.attempt, time.monotonic()
        step = last_step_on_disk(self.folder) if attempt.trained else 0
        if step > attempt.last_step:
            attempt.last_step, attempt.last_row = step, now
            attempt.first_step = attempt.first_step or now
            if self._sampling_since is not None:
                attempt.sampling_seconds.append(now - self._sampling_since)
                self._sampling_since = None
        if self._process.poll() is None:
            if now - (attempt.killed or attempt.last_row or attempt.began) > _PATIENCE_SECONDS:
                raise CampaignError(f"no new step and no end for {_PATIENCE_SECONDS:.0f} s{self.tail()}")
            return True
        if attempt.code is None:
            attempt.code, attempt.ended = self._process.returncode, now
        return False

    def wait_until(self, condition: Callable[[], bool], poll_seconds: float = _POLL_SECONDS) -> bool:
        """Watches until a condition holds; False where the command ended before."""
        while not condition():
            if not self.watch():
                return False
            time.sleep(poll_seconds)
        return True

    def wait_for_end(self) -> None:
        """Watches until the command has ended."""
        self.wait_until(lambda: False)

    def strike(self, moment: str, target: str, share: float) -> None:
        """Kills one rank, all of them, the launcher or all (one of TARGETS); all where there is no rank yet.

        Args:
            moment: noted.
            target: what is killed.
            share: in [0, 1), says which rank.
        """
        ranks, launchers = our_processes(self._start, _START)
        target = target if ranks else "node"
        self.attempt.killed, self.attempt.kill = time.monotonic(), (moment, target)
        pids = {"ranks": ranks, "launcher": launchers, "node": launchers + ranks}
        kill([ranks[int(share * len(ranks))]] if target == "rank" else pids[target])

    def tail(self) -> str:
        """The end of the output."""
        self._reader.join(_READ_SECONDS)
        return "".join(f"\n    | {line}" for line in self.lines[-25:])


def last_step_on_disk(folder: Path) -> int:
    """The step of the last whole row of a run's metrics; 0 without one."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(-min(1 << 16, file.seek(0, os.SEEK_END)), os.SEEK_END)
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    found = re.findall(rb'"step": (\d+)', whole.rpartition(b"\n")[2])
    return int(found[0]) if found else 0


def our_processes(marker: str, variable: str = _MARKER) -> tuple[list[int], list[int]]:
    """Process ids of ranks (in the order of ranks) and of launchers among everything started with a marker."""
    ranks: dict[int, tuple[int, int]] = {}
    launchers = []
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):  # it has just ended, or is another user's
            # A third of the time of psutil's: kills must not come late. That of a zombie is empty.
            environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            if f"{variable}={marker}" in environment:
                rank = next((line.removeprefix("RANK=") for line in environment if line.startswith("RANK=")), None)
                if rank is None:
                    launchers.append(pid)
                else:
                    ranks[pid] = int(rank), psutil.Process(pid).ppid()
    # A rank's own children (workers, wandb) carry its environment too.
    own = [(rank, pid) for pid, (rank, parent) in ranks.items() if parent not in ranks]
    return [pid for _, pid in sorted(own)], launchers


def kill(pids: Iterable[int]) -> None:
    """Kills processes that may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def count_orphans(marker: str) -> int:
    """Processes of the run that outlive it for longer than they may."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while (left := sum(map(len, our_processes(marker)))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left

"""How a run learns that it must stop: signals, a launcher that is gone, ranks that died or do not arrive.

Threads of their own watch, since the main thread may be inside a collective that never returns.
"""

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cfpretrain.base import runtime
from cfpretrain.base.console import EXIT_REQUEUE, stop_signals

# A launcher turns one Ctrl-C into SIGINT and, milliseconds later, SIGTERM.
_ONE_REQUEST_SECONDS = 2.0
_POLL_SECONDS = 1.0
# A rank that does not say that it lives for so long is dead: its process, its machine or the network between.
_SILENCE_SECONDS = 30.0
_STORE_TIMEOUT = timedelta(seconds=10)
_WORKER_POLL_SECONDS = 2
# How long a rank may keep the others from finishing their last step, where no step has taken so long.
_STOP_SECONDS = 10.0
_STEPS_TO_STOP = 3
# Building the engine and reading a checkpoint: before the first step, ranks may wait at least as long.
_START_SECONDS = 600.0
EXIT_FAILED = 1  # as after a traceback
_LAST_WORDS_SECONDS = 5.0

_rank_of_worker = 0


# ---------------------------------------------------------------------------
# Requests to stop


class StopRequest:
    """Whether the run was asked to stop: by a signal to any rank, or because this rank's launcher is gone.

    The run then finishes its step, saves and ends. Signals within 2 s of the first count as one; a later one ends the
    process at once.

    Attributes:
        reason: what asked it to stop; None where nothing has.
        leave: ends the process at the first request, as long as there is nothing to save; None once there is.
        end_waiting: called at the first request, from a thread: the main thread may wait for what is needed no longer.
        is_in_step: ranks are on their way to the end of a step, where they agree to stop, and none writes to a disk.
        longest_step: in seconds, without the first.
    """

    def __init__(self, leave: Callable[[], None] | None = None) -> None:
        """Takes the signals over, for the life of the process; on the main thread."""
        self.reason: str | None = None
        self.leave = leave
        self.end_waiting: Callable[[], None] | None = None
        self.is_in_step = False
        self.longest_step = 0.0
        self._step_began: float | None = None
        self._lock = threading.Lock()
        self._first_signal_at: float | None = None
        self._signals = stop_signals()
        self._launcher = Launcher()
        # Python runs handlers between its own instructions only; the pipe is written in the middle of a collective too.
        self._read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        for number in self._signals:
            signal.signal(number, _do_nothing)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_leave_signals_to_the_rank)
        threading.Thread(target=self._read_signals, name="signals", daemon=True).start()
        threading.Thread(target=self._watch_launcher, name="launcher", daemon=True).start()

    def ask(self, reason: str) -> None:
        """Asks this rank to stop, unless it was asked before; from any thread."""
        leave = self.leave
        if leave is not None:  # the main thread may wait for other ranks, where no handler is called
            leave()
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        if self.end_waiting is not None:
            self.end_waiting()
        if runtime.rank() == 0:
            _write_line(f"{reason}: stopping after this step, with a checkpoint; a further signal ends it at once")

    def begin_step(self) -> None:
        """Notes that a step begins."""
        self.is_in_step, self._step_began = True, time.monotonic()

    def end_step(self) -> None:
        """Notes that the ranks stand together behind a step."""
        if self.is_in_step and self.leave is None and self._step_began is not None:
            self.longest_step = max(self.longest_step, time.monotonic() - self._step_began)
        self.is_in_step = False

    def _read_signals(self) -> None:
        while True:
            for number in os.read(self._read_end, 64):
                if number in self._signals:
                    self._follow(signal.Signals(number))

    def _follow(self, number: signal.Signals) -> None:
        now = time.monotonic()
        self.ask(number.name)
        if number == signal.SIGHUP:
            _leave_terminal()
        if self._first_signal_at is None:
            self._first_signal_at = now
        elif now - self._first_signal_at > _ONE_REQUEST_SECONDS:
            os._exit(128 + number)

    def _watch_launcher(self) -> None:
        while self._launcher.is_there():
            time.sleep(_POLL_SECONDS)
        self.ask("the launcher is gone")


class Launcher:
    """The two processes of the deepspeed launcher above this one; without them nobody would end the ranks.

    Others may stand between: a profiler, a script that sets the environment.
    """

    def __init__(self) -> None:
        above = _ancestors()
        found = [i for i, process in enumerate(above) if b"deepspeed.launcher" in _read_proc(process, "cmdline")]
        # The launcher alone sets it. Where it was killed while this process was starting, the first process is in its
        # place, or in that of the one above it; else it is left over from another command.
        is_expected = "CROSS_RANK" in os.environ
        self._chain = above[: found[0] + 2] if found and is_expected else []
        is_orphan = self._chain[-1:] == [1] if found else above[:1] == [1]
        self._is_gone = is_expected and is_orphan and b"deepspeed" not in _read_proc(1, "cmdline")

    def is_there(self) -> bool:
        return not self._is_gone and _ancestors()[: len(self._chain)] == self._chain


def _ancestors() -> list[int]:
    """Parent, grandparent and so on, as far as this process may see."""
    found = [os.getppid()]
    while found[-1] > 1:
        found.append(_parent_of(found[-1]))
    return found


def _read_proc(process: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{process}/{name}").read_bytes()
    except OSError:
        return b""


def _parent_of(process: int) -> int:
    # "pid (name) state ppid ...", and a name may hold anything.
    fields = _read_proc(process, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _leave_terminal() -> None:
    """Writes nowhere what a terminal would get that was closed: each write to it would fail."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # noqa: TID251


def _do_nothing(*_: object) -> None:
    """A handler in python, without which the pipe is not written."""


def _leave_signals_to_the_rank() -> None:
    """In a forked child (a loader's worker): signals to a whole process group are the rank's to obey."""
    global _rank_of_worker
    _rank_of_worker = os.getppid()
    signal.set_wakeup_fd(-1)
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def leave_signals_to_the_rank(_: int) -> None:
    """The same for torch's workers, which set handlers of their own after the fork."""
    _leave_signals_to_the_rank()


def _end_later(*_: object) -> None:
    """The rank still needs batches for its last step: a worker ends when its rank has."""
    signal.signal(signal.SIGALRM, _end_later)
    if os.getppid() == _rank_of_worker:
        signal.alarm(_WORKER_POLL_SECONDS)
    else:
        os._exit(0)


# ---------------------------------------------------------------------------
# Ranks that are lost


class Watch:
    """Ends the run when a rank died, or keeps the others waiting for too long.

    Every rank says each second that it lives, and how far it is (`runtime.tick`), in the store of the process group.
    Rank 0 reads that of all; what it finds, or its own silence, ends every rank with `EXIT_REQUEUE`. A rank that was
    asked to stop says so there as well: another may wait for data, and never come to where ranks agree.

    Args:
        timeout_seconds: the longest that a rank may keep the others waiting; less once the run was asked to stop.
        on_lost: called with the reason before this rank ends.
        stop: this rank's request.
    """

    def __init__(self, timeout_seconds: float, on_lost: Callable[[str], None], stop: StopRequest | None = None) -> None:
        self._timeout, self._on_lost, self._stop = timeout_seconds, on_lost, stop
        self._silence = min(_SILENCE_SECONDS, timeout_seconds)
        self._rank, self._world_size = runtime.rank(), runtime.world_size()
        self._ended = threading.Event()
        self._beats = 0
        self._ticks = (runtime.num_ticks(), time.monotonic())
        self._heard: dict[int, tuple[int, float]] = {}
        self._rank_zero_failed = False
        if self._world_size == 1:
            return
        # A connection of its own: the group's may be waiting inside a collective.
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT
        )
        self._beat()
        runtime.barrier()
        self._answered_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        if self._rank != 0:
            threading.Thread(target=self._watch_rank_zero, name="watch of rank 0", daemon=True).start()

    def end(self) -> None:
        """Stops watching; the ranks may leave one after another."""
        self._ended.set()
        if self._world_size > 1:
            self._thread.join(5 * _POLL_SECONDS)

    def leave_if_ranks_are_lost(self, code: int = EXIT_FAILED) -> None:
        """After an exception that ends this rank with `code`: ends it here where other ranks died; takes seconds.

        Otherwise the failure is this rank's own, and the others are told, so that they do not take it for a machine's;
        or it comes of the failure of another, which speaks, and this process ends in silence.
        """
        if self._world_size == 1:
            return
        # At once: a rank hears of another's failure only after that has come here. It takes seconds on rank 0, whose
        # store the others ask.
        first, code = runtime.first_to_fail(code)
        lost = self._find_lost()
        if lost:
            self._leave(EXIT_REQUEUE, f"{_name(lost)} died", speaker=min(set(range(self._world_size)) - set(lost)))
        if first != self._rank:
            runtime.leave_after_the_first(code)

    def _find_lost(self) -> list[int]:
        """The other ranks that say no longer that they live, and have not said that they failed by themselves."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            self._store.set(_key("failed", self._rank), "1")
            before = self._read(others)
            time.sleep(2 * _POLL_SECONDS)
            after = self._read(others)
            return [rank for rank in others if before[rank][0] == after[rank][0] and not self._has_failed(rank)]
        except RuntimeError:
            return [] if self._rank_zero_failed else [0]  # who keeps the store

    # ------------------------------------------------------------------

    def _watch_rank_zero(self) -> None:
        # A question to a store that does not answer never returns, whatever its time limit: another thread must count.
        while not self._ended.wait(_POLL_SECONDS):
            verdict = self._judge_rank_zero(time.monotonic() - self._answered_at)
            if verdict is not None and not self._ended.is_set():
                self._leave(*verdict, speaker=1)

    def _run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self._beat()
                self._share_request()
                verdict = self._judge() if self._rank == 0 else self._verdict()
                self._answered_at = time.monotonic()
            except RuntimeError:
                continue  # `_watch_rank_zero` counts
            if verdict is not None and not self._ended.is_set():
                self._leave(*verdict)

    def _judge_rank_zero(self, silence: float) -> tuple[int, str] | None:
        if self._rank_zero_failed:
            # It says why first: the launcher ends all ranks with the first that ends.
            return (EXIT_FAILED, "rank 0 failed") if silence > _LAST_WORDS_SECONDS else None
        if silence > self._longest_silence():
            return EXIT_REQUEUE, f"rank 0 has been silent for {silence:.0f} s"
        return None

    def _is_finishing_a_step(self) -> bool:
        return self._stop is not None and self._stop.reason is not None and self._stop.is_in_step

    def _longest_silence(self) -> float:
        return min(self._silence, _STOP_SECONDS) if self._is_finishing_a_step() else self._silence

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(_key("alive", self._rank), f"{self._beats} {runtime.num_ticks()}")

    def _share_request(self) -> None:
        if self._stop is None:
            return
        key = _key("stop", 0)
        if self._stop.reason is not None:
            self._store.set(key, self._stop.reason)
        elif self._store.check([key]):
            self._stop.ask(self._store.get(key).decode())

    def _read(self, ranks: list[int]) -> dict[int, tuple[int, int]]:
        """(beats, ticks) of each rank."""
        answers = self._store.multi_get([_key("alive", rank) for rank in ranks])
        return {rank: tuple(map(int, text.split())) for rank, text in zip(ranks, answers, strict=True)}  # type: ignore[misc]

    def _has_failed(self, rank: int) -> bool:
        return bool(self._store.check([_key("failed", rank)]))

    def _judge(self) -> tuple[int, str] | None:
        """What rank 0 finds wrong, told to all: the exit code and the reason."""
        state, now = self._read(list(range(self._world_size))), time.monotonic()
        for rank, (beats, _) in state.items():
            if self._heard.get(rank, (-1, 0.0))[0] != beats:
                self._heard[rank] = (beats, now)
        silent = [rank for rank, (_, heard_at) in self._heard.items() if now - heard_at > self._longest_silence()]
        failed = [rank for rank in silent if self._has_failed(rank)]
        if failed:
            verdict = EXIT_FAILED, f"{_name(failed)} failed"
        elif silent:
            verdict = EXIT_REQUEUE, f"{_name(silent)} died or lost the network"
        elif (late := self._find_late(state, now)) is not None:
            verdict = EXIT_REQUEUE, late
        else:
            return None
        self._store.set(_key("verdict", 0), f"{verdict[0]} {verdict[1]}")
        return verdict

    def _find_late(self, state: dict[int, tuple[int, int]], now: float) -> str | None:
        ticks = {rank: ticks for rank, (_, ticks) in state.items()}
        has_begun, waited = min(ticks.values()) > 0, now - self._ticks[1]
        if sum(ticks.values()) != self._ticks[0]:
            self._ticks, waited = (sum(ticks.values()), now), 0.0
        limit, why = self._timeout if has_begun else max(self._timeout, _START_SECONDS), "guard.rank_timeout_seconds"
        if self._stop is not None and self._is_finishing_a_step():
            limit, why = min(limit, max(_STOP_SECONDS, _STEPS_TO_STOP * self._stop.longest_step)), "asked to stop"
        if waited <= limit:
            return None
        late = [rank for rank in ticks if ticks[rank] == min(ticks.values())]
        if len(late) == self._world_size:
            return f"no rank has gone on for {waited:.0f} s ({why})"
        return f"{_name(late)} did not arrive for {waited:.0f} s ({why})"

    def _verdict(self) -> tuple[int, str] | None:
        self._rank_zero_failed |= self._has_failed(0)
        key = _key("verdict", 0)
        if not self._store.check([key]):
            return None
        code, _, reason = self._store.get(key).decode().partition(" ")
        return int(code), reason

    def _leave(self, code: int, reason: str, speaker: int = 0) -> None:
        if code == EXIT_REQUEUE:
            # Beside this thread: a file system that is gone may never answer.
            threading.Thread(target=self._tell, args=(reason,), daemon=True).start()
        if self._rank == speaker:
            what_next = "; the same command goes on from the latest checkpoint" if code == EXIT_REQUEUE else ""
            _write_line(f"{reason}: the run ends{what_next}")
        time.sleep(2 * _POLL_SECONDS)  # for the file, and for the others to read rank 0's verdict
        os._exit(code)

    def _tell(self, reason: str) -> None:
        with suppress(OSError):
            self._on_lost(reason)


def _key(kind: str, rank: int) -> str:
    return f"cfpretrain/{kind}/{rank}"


def _name(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _write_line(text: str) -> None:
    """A line from any thread, also while the main thread is in the middle of one."""
    with suppress(OSError):  # whoever read it may be gone
        os.write(sys.stdout.fileno(), f"[cfpretrain] {text}\n".encode())

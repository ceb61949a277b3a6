"""How a process learns that it must stop: by a signal, or the end of its launcher. Listens before torch is loaded.

Threads of their own listen, since the main thread may be inside a collective that never returns.
"""

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from cfpretrain.base.console import EXIT_REQUEUE, say

# A launcher turns one Ctrl-C into SIGINT and, milliseconds later, SIGTERM.
_ONE_REQUEST_SECONDS = 2.0
_POLL_SECONDS = 1.0


class StopRequest:
    """Whether the run was asked to stop: by a signal to any rank, or because this rank's launcher is gone.

    The run then finishes its step, saves and ends. Signals within 2 s of the first count as one; a later one ends the
    process at once.
    """

    def __init__(self, leave: Callable[[str], None] | None = None) -> None:
        self.reason: str | None = None  # what asked it to stop; None where nothing has
        self.leave = leave  # ends the process at the first request; None once there is something to save
        self.end_waiting: Callable[[], None] | None = None  # ends a wait of the main thread for data
        self.is_in_step = False  # ranks are on their way to where they agree to stop, and none writes to a disk
        self.longest_step = 0.0  # seconds, without the first
        self._lock = threading.Lock()
        self._first_signal_at: float | None = None

    def listen(self) -> None:
        """Takes the signals over, for the life of the process, and watches its launcher; on the main thread."""
        # Python runs handlers between its own instructions only; the pipe is written in the middle of a collective too.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signals = stop_signals()
        for number in signals:
            signal.signal(number, lambda *_: None)  # without a handler in python the pipe is not written
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=leave_signals_to_the_rank)
        threading.Thread(target=self._read_signals, args=(read_end, signals), name="signals", daemon=True).start()
        threading.Thread(target=self._watch, args=(Launcher(),), name="launcher", daemon=True).start()

    def ask(self, reason: str) -> None:
        """Asks this rank to stop, unless it was asked before; from any thread."""
        leave = self.leave
        if leave is not None:
            leave(reason)
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        if self.end_waiting is not None:
            self.end_waiting()
        say(f"{reason}: stopping after this step, with a checkpoint; a further signal ends it at once")

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step, at whose end the ranks stand together; after the first there is something to save."""
        self.is_in_step, begin = True, time.monotonic()
        try:
            yield
            if self.leave is None:
                self.longest_step = max(self.longest_step, time.monotonic() - begin)
            self.leave = None
        finally:
            self.is_in_step = False

    def _read_signals(self, read_end: int, signals: tuple[signal.Signals, ...]) -> None:
        while True:
            for number in os.read(read_end, 64):
                if number in signals:
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

    def _watch(self, launcher: "Launcher") -> None:
        while launcher.is_there():
            time.sleep(_POLL_SECONDS)
        self.ask("the launcher is gone")


def leave_before_training(_: str = "") -> None:
    """Ends this process at a request that comes before training: there is nothing to finish and nothing to save."""
    say("stopped before training began; the same command starts it")
    os._exit(EXIT_REQUEUE)


def leave_when_asked() -> None:
    """From here on a request to stop ends this process: what is written stays, the rest is cheap to do again."""

    def leave(reason: str) -> None:
        say(f"stopped ({reason}); the same command goes on")
        os._exit(EXIT_REQUEUE)

    StopRequest(leave).listen()


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to stop; SIGHUP, of a closed terminal, is one unless `nohup` has it ignored."""
    always = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def leave_signals_to_the_rank(*_: object) -> None:
    """In a forked child (a loader's worker): ignores signals to the process group; the rank still needs the child.

    Torch's workers call it too, since torch sets handlers of its own after the fork.
    """
    rank = os.getppid()
    signal.set_wakeup_fd(-1)
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None if os.getppid() == rank else os._exit(0))


def _leave_terminal() -> None:
    """Discards output to a terminal that was closed: each write to it would fail."""
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # noqa: TID251


class Launcher:
    """The two processes of the deepspeed launcher above this one; without them nothing would end the ranks.

    There may be others between them: a profiler, a script that sets the environment.
    """

    def __init__(self) -> None:
        above = _ancestors()
        found = [i for i, process in enumerate(above) if "deepspeed.launcher" in _command(process)]
        # The launcher alone sets CROSS_RANK. Where it was killed while this process was starting, process 1 has taken
        # its place, or that of the one above it; without that, the variable is left over from another command.
        is_expected = "CROSS_RANK" in os.environ
        self._chain = above[: found[0] + 2] if found and is_expected else []
        is_orphan = self._chain[-1:] == [1] if found else above[:1] == [1]
        self._is_gone = is_expected and is_orphan and "deepspeed" not in _command(1)

    def is_there(self) -> bool:
        return not self._is_gone and _ancestors()[: len(self._chain)] == self._chain


def _ancestors() -> list[int]:
    """Parent, grandparent and so on, as far as this process may see."""
    found = [os.getppid()]
    with suppress(psutil.Error):
        while found[-1] > 1:
            found.append(psutil.Process(found[-1]).ppid())
    return found


def _command(process: int) -> str:
    try:
        return " ".join(psutil.Process(process).cmdline())
    except psutil.Error:
        return ""

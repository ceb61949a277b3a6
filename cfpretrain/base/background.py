"""Work beside the training thread, and how a process beside it ended."""

import ctypes
import signal
import threading
from collections.abc import Callable


class Task(threading.Thread):
    """Work in a thread, which begins at once; the exception that ended it is in `error`.

    A process that ends does not wait for it.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self._ending, self._has_ended = threading.Lock(), False
        self.start()

    def run(self) -> None:
        try:
            try:
                self._work()
            except BaseException as error:
                self.error = error
            with self._ending:
                self._has_ended = True
        except StoppedError as error:  # raised as the work ended
            self.error = error

    def stop(self) -> None:
        """Raises `StoppedError` in the thread at its next line of Python, unless it has ended; called once at most.

        A system call is not interrupted.
        """
        # The identifier of a thread that has ended may be given to another.
        with self._ending:
            if not self._has_ended and self.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(StoppedError))


class StoppedError(Exception):
    """Raised in a task whose result is not needed any more."""


def how_it_ended(exit_code: int | None) -> str:
    """Of a process, for messages: "with exit code 3" or "by SIGSEGV"."""
    if exit_code is None or exit_code >= 0:
        return f"with exit code {exit_code}"
    reason = ", as the system does where memory is short" if exit_code == -signal.SIGKILL else ""
    return f"by {signal.Signals(-exit_code).name}{reason}"

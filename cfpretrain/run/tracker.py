"""The door to wandb, which may fail or hang at any moment without ending or delaying a run."""

import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cfpretrain.base import files, runtime
from cfpretrain.base.background import Task
from cfpretrain.base.console import one_line, phase, say, visible

_ID_BYTES = 8
_MOST_WAITING = 100_000  # rows
_START_SECONDS = 5.0
_END_SECONDS = 8.0
_DEATH_SECONDS = 2.0
_SIGNAL_SECONDS = 2.0
_SERVICE = "wandb-core"


class Tracker:
    """Logs a run to wandb from a thread: training never waits for it, and its first error is reported once.

    Every method does nothing on ranks but 0 and where `mode` is "disabled".

    Args:
        mode: "online", "offline", "disabled", or "auto": online where a key is found, else offline.
        project: the project's name.
        folder: where its files go.
        run_id: the run to go on with; None begins one. As an attribute: of wandb's run; None where there is none.
        config: the resolved config, logged with the run.
    """

    def __init__(self, mode: str, project: str, folder: Path, run_id: str | None, config: Mapping[str, Any]) -> None:
        self.run_id = run_id
        self._folder = folder
        self._task: Task | None = None
        self._end_is_expected, self._is_over = threading.Event(), False
        if mode == "disabled" or runtime.rank() != 0:
            return
        problem = _problem_of(folder)
        if problem is not None:
            self._report(problem)
            return
        try:
            import wandb
        except Exception as error:
            self._report(f"cannot be loaded ({one_line(error):.200})")
            return
        self._wandb = wandb
        # Known before wandb's service answers, so that the first checkpoint holds it.
        self.run_id = run_id or secrets.token_hex(_ID_BYTES)
        self._options: dict[str, Any] = {
            "mode": _resolve_mode(mode),
            "project": _visible(project),
            "dir": str(folder),
            "id": self.run_id,
            "resume": "allow" if run_id else None,
            "config": _visible(config),
            "settings": wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        }
        # What to do with wandb's run; None: end it.
        self._jobs: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_MOST_WAITING)
        self._has_begun = threading.Event()  # or failed
        self._task = Task(self._work, "wandb")
        with phase("starting wandb", announce=False):
            # Usually it has its threads before the loader forks; a service that does not answer is not waited for.
            self._has_begun.wait(_START_SECONDS)

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs the numbers of a row at its step."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        self._hand_over(lambda run: run.log(numbers, step=row["step"]))

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Logs a PNG."""
        self._hand_over(lambda run: run.log({name: self._wandb.Image(str(path))}, step=step))

    def expect_end(self) -> None:
        """The run was asked to stop: a launcher or terminal may have ended wandb's process with the same signal."""
        self._end_is_expected.set()

    def close(self, seconds: float = _END_SECONDS) -> None:
        """Ends wandb's run; what has not ended after `seconds` is left to `wandb sync`."""
        if self._task is None:
            return
        self._hand_over(None)
        with phase("waiting for wandb", announce=False):
            self._task.join(seconds)
            if self._task.is_alive():
                self._report(f"has not ended in {seconds:g} s")
                _end_service()  # which the end of this process would wait for
                self._task.join(_DEATH_SECONDS)
        self._task = None

    def _hand_over(self, job: Callable[[Any], None] | None) -> None:
        if self._task is None or self._is_over or not self._task.is_alive():
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._report("does not take any more")

    def _work(self) -> None:
        try:
            run = self._wandb.init(**self._options)
            self._has_begun.set()
            while (job := self._jobs.get()) is not None:
                job(run)
            run.finish()
        except ConnectionError:
            # The signal that ends wandb's process may reach this one a moment later.
            if not self._end_is_expected.wait(_SIGNAL_SECONDS):
                self._report("has lost its process")
        except Exception as error:  # of wandb's many
            self._report(f"failed ({one_line(error):.200})")
        self._has_begun.set()
        with suppress(Exception):
            self._wandb.teardown()  # here, since at the end of the process its errors are printed

    def _report(self, what: str) -> None:
        if not self._is_over:
            self._is_over = True
            say(
                f"WARNING: wandb {what}; all goes on without it, and `wandb sync` sends what it has left in "
                f"{self._folder / 'wandb'}"
            )


def _visible(plain: Any) -> Any:
    """Plain values with control characters escaped, for a browser or a terminal: they may come from anywhere."""
    if isinstance(plain, Mapping):
        return {visible(str(key)): _visible(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_visible(value) for value in plain]
    return visible(plain) if isinstance(plain, str) else plain


def _problem_of(folder: Path) -> str | None:
    """Why wandb must not be started for a run folder."""
    for name in ("wandb", ".wandb"):  # one of which it writes in
        try:
            if os.path.lexists(folder / name):
                files.check_folder(folder / name)
        except OSError as error:
            return f"cannot write in {error.filename} ({error.strerror})"
        # It would say where the user's key is sent, and the current folder may be one that was given.
        settings = Path(name, "settings")
        if os.path.lexists(settings):
            return (
                f"is not started: it would read {settings.absolute()}; move that to ~/.config/wandb/settings, or start "
                "elsewhere"
            )
    return None


def _end_service() -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if child.name() == _SERVICE:
                child.kill()


def _resolve_mode(mode: str) -> str:
    if mode != "auto":
        return mode
    with suppress(OSError, ValueError, netrc.NetrcParseError):
        if os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators("api.wandb.ai"):
            return "online"
    return "offline"

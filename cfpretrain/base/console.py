"""What rank 0 prints for the user. Standard library only: the first line comes before torch is imported."""

import argparse
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category

# Exit codes besides 0.
EXIT_FAILED = 1  # as after a traceback
EXIT_USER_ERROR = 2  # a mistake of the user's: a bad config, missing shards, an unwritable folder
EXIT_SICK = 3  # training that does not recover by itself: the same command would not help
EXIT_REQUEUE = 75  # stopped to be continued by the same command: asked to stop, or a rank was lost (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # by Ctrl-C, where the same command starts over (128 + SIGINT)
_HEARTBEAT_SECONDS = 5.0
# The launcher ends all ranks within a second of the first that ends: the others wait until rank 0 has printed.
_LINGER_SECONDS = 5.0

# In what a RuntimeError of torch, CUDA, its libraries or the C++ library says, in small letters.
_SIGNS_OF_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
_LONGEST_CAUSE, _LONGEST_ERROR = 300, 2_500  # characters
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # of Unicode's categories
_LESS_MEMORY = "give a smaller batch (--batch-size, train.micro_batch_size), or end what else is in that memory"


class UserError(ValueError):
    """A mistake of the user's, shown as one line without a traceback; secrets in it are masked.

    The message names the key or file, what was expected, what came, and how to fix it. What raises it seldom says so.
    """

    def __init__(self, text: object = "") -> None:
        super().__init__(masked(str(text)))


class SickRunError(RuntimeError):
    """Training that does not recover by itself, shown as one line without a traceback."""


_hidden: dict[str, str] = {}  # secrets, with the text that is shown for each
_FEWEST_HIDDEN = 4  # characters: a shorter text is no secret, and occurs in many others


def hide(value: str, shown: str) -> None:
    """From here on shows `shown` in place of a value of the environment that may be a secret: not short, no number."""
    if re.fullmatch(r"[-+.\deE]*|true|false", value, re.IGNORECASE):
        return
    for form in (value, repr(value)[1:-1], " ".join(value.split()), value.rstrip("/"), os.path.expanduser(value)):
        if len(form) >= _FEWEST_HIDDEN:
            _hidden[form] = shown


def masked(text: str) -> str:
    """A text with each secret in it replaced by its name."""
    for value in sorted(_hidden, key=len, reverse=True):
        text = text.replace(value, _hidden[value])
    return text


def excerpt(text: str, most: int | None = None) -> str:
    """A text for a message, masked, then cut to `most` characters: part of a secret would not be recognised."""
    return masked(text)[:most]


def one_line(error: BaseException) -> str:
    """The text of an error on one line; the name of its class where it has none."""
    return excerpt(" ".join(str(error).split())) or type(error).__name__


def reason_of(error: BaseException) -> str:
    """The text of an error; of a system error, its reason and file."""
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"


@contextmanager
def explaining(message: str) -> Iterator[None]:
    """Turns a system error into a `UserError` with this message, its reason in the place of "{reason}"."""
    try:
        yield
    except UserError:  # which may be a system error too
        raise
    except OSError as error:
        raise UserError(message.replace("{reason}", str(error.strerror or error))) from error


def path_argument(text: str) -> Path:
    """A path of the command line, with `~` expanded: after `--out=` a shell does not."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"expected a path of this machine, got the address {text}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def address_argument(text: str) -> str:
    """As `path_argument`, of what may also be an address such as s3://bucket/folder; the empty name stays empty."""
    return text if "://" in text or not text else str(path_argument(text))


_rank = 0


def speak_as(rank: int) -> None:
    """Sets the rank of this process, since rank 0 alone speaks."""
    global _rank
    _rank = rank


def is_rank_zero() -> bool:
    """Whether this process speaks for the run."""
    return _rank == 0


def say(text: str) -> None:
    """Prints one line from rank 0, at once; silent once stdout is closed."""
    if is_rank_zero():
        try:
            # As one write: threads speak too.
            print(printable(masked(f"[cfpretrain] {text}")) + "\n", end="", flush=True)
        except OSError:
            # The rest of the line is flushed at the end of the process, and must not fail there.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # noqa: TID251


def print_error(text: str) -> None:
    """Prints one line to stderr, whatever the rank."""
    with suppress(OSError):  # stderr is closed
        sys.stdout.flush()
        print(printable(masked(f"[cfpretrain] {text}")) + "\n", end="", file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """A text on one line; control characters and marks of direction are escaped as in a literal."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if category(c) in _UNSEEN else c for c in text)


def count(number: int, noun: str, plural: str = "") -> str:
    """ "1 image", "2 images"; `plural` where an s does not make it."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def printable(text: str) -> str:
    """A text as stdout takes it, `visible`: the name of a file need not be in its encoding."""
    text = visible(text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def ending_in_one_line() -> Iterator[None]:
    """The context of a command: an error that its user can fix, or Ctrl-C, ends it with one line."""
    try:
        yield
    except (UserError, SickRunError) as error:
        exit_with(error)
    except KeyboardInterrupt:
        if is_rank_zero():
            print_error("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name:  # a package that is there, and lacks a part
            raise
        exit_with(
            UserError(
                f"{error.name} is not installed here; pip install --editable . in a checkout of cfpretrain brings all "
                "that it needs"
            )
        )
    except Exception as error:
        explained = explain_no_memory(error)
        if explained is None:
            raise
        exit_with(explained, speaks=True)


def explain_no_memory(error: Exception) -> UserError | None:
    """What a user can do about an error of too little memory, on a GPU or the host; None for all other errors.

    The error, or one of its causes, may be torch's, CUDA's, Python's or the system's. Its notes
    (`BaseException.add_note`) are the advice, where there are any.
    """
    cause: BaseException | None = error
    while cause is not None and not _says_no_memory(cause):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    # The rest is advice of torch's, about settings that are made already.
    said = one_line(cause).partition(" If reserved but unallocated")[0][:_LONGEST_CAUSE]
    advice = "; ".join(getattr(error, "__notes__", [])) or _LESS_MEMORY
    return UserError(f"no memory left on rank {os.environ.get('RANK', '0')} ({said}); {advice}")


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_NO_MEMORY)
    )


def exit_with(error: UserError | SickRunError, speaks: bool | None = None) -> NoReturn:
    """Ends this process with an error on one line; rank 0 prints it and ends first, or whoever `speaks`."""
    if is_rank_zero() if speaks is None else speaks:
        # Cut twice, since escaping makes a text longer.
        text = printable(excerpt(f"error: {error}", _LONGEST_ERROR + 1))
        print_error(text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]} ...")
    else:
        time.sleep(_LINGER_SECONDS)
    sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_SICK)


def linger() -> None:
    """Lets rank 0 be the first to end."""
    if not is_rank_zero():
        time.sleep(_LINGER_SECONDS)


# Seconds of the phases that have ended in this process, to measure starts.
phase_seconds: dict[str, float] = {}


@contextmanager
def phase(name: str, announce: bool = True) -> Iterator[None]:
    """Prints the name of some work as it begins, unless it is usually short, and again every 5 s until it ends."""
    if announce:
        say(f"{name} ...")
    if not is_rank_zero():
        yield
        return
    begin = time.monotonic()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_SECONDS):
            say(f"still {name} ({time.monotonic() - begin:.0f} s)")

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        phase_seconds[name] = phase_seconds.get(name, 0.0) + time.monotonic() - begin


def _has_terminal() -> bool:
    """Whether stderr is a terminal with room for a bar."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # it is gone, or a stream of python's alone
        return False


class Progress:
    """How far some work is: a bar on a terminal, else a line every few seconds; rank 0 only.

    Args:
        total: of units, such as images.
        done: by earlier runs.
    """

    def __init__(self, total: int, done: int, unit: str = "step") -> None:
        self._total, self._first, self._unit = total, done, unit
        self._begin = time.monotonic()
        self._said_at = 0.0
        self._bar: Any = None
        if is_rank_zero() and _has_terminal():
            from tqdm import tqdm

            # The text has a rate and the time left already.
            shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, bar_format=shape)

    def show(self, done: int, text: str = "", seconds_left: float | None = None) -> None:
        """Shows how many units are done, those of earlier runs included, with a text such as loss and speed.

        `seconds_left` None: counted from the rate so far, which is shown before the text; silent without one.
        """
        if seconds_left is None:
            rate = (done - self._first) / max(time.monotonic() - self._begin, 1e-3)
            if rate <= 0:
                return
            text = f"{rate:.{0 if rate >= 10 else 2}f} {self._unit}s/s{text and f', {text}'}"
            seconds_left = (self._total - done) / rate
        left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
        if self._bar is not None:
            try:
                self._bar.set_postfix_str(f"{text}, {left}", refresh=False)
                self._bar.update(done - self._bar.n)
            except OSError:  # the terminal is gone
                self._bar = None
        elif time.monotonic() - self._said_at >= _HEARTBEAT_SECONDS:
            self._said_at = time.monotonic()
            say(f"{self._unit} {done}/{self._total}  {text}  {left}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.close()

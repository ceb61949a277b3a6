"""Reading, making, moving and removing files in folders that may be a stranger's, or that other processes write.

The project writes everything through here, and reads through here whatever a user gave it. No change follows a link:
the link itself is replaced or removed, or the call is refused. A file to read may be behind links, but it is a regular
file (a pipe would keep its reader waiting, a device has no end), and no larger than the caller allows.

Errors are `OSError`, whose `strerror` is the reason in a few words, and `ValueError` for content.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader, FileIO
from pathlib import Path
from typing import IO, Any

# Larger than any real JSON, YAML or table of settings.
MAX_TEXT_BYTES = 64 * 2**20
# Values in JSON, and in the header of a safetensors file: each takes hundreds of bytes and a microsecond or more.
_MAX_VALUES, MAX_HEADER_VALUES = 2_000_000, 1_000_000
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
_MAX_DEPTH = 32  # of JSON: what shows, copies and compares values calls itself for each level
_COPY_BYTES = 2**20
_WRITING = ".writing."  # before the name of a file, until it is whole
_SUFFIX_LETTERS = 8  # behind it


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_to_read(file: Path, max_bytes: int | None = None, follow: bool = True) -> BufferedReader:
    """Opens a regular file of any size, or of at most `max_bytes`; `follow`: its path may end in a link."""
    opened = os.fdopen(_open(file, os.O_RDONLY | (0 if follow else os.O_NOFOLLOW)), "rb")
    num_bytes = os.fstat(opened.fileno()).st_size
    if max_bytes is not None and num_bytes > max_bytes:
        opened.close()
        raise OSError(errno.EFBIG, f"{num_bytes} bytes, at most {max_bytes} are read", str(file))
    return opened


def open_unbuffered(file: Path) -> FileIO:
    """As `open_to_read`, for reading at places."""
    return FileIO(_open(file, os.O_RDONLY))


def check_safetensors(file: Path) -> None:
    """ValueError where a file has no header of safetensors that fits it, before their own reader maps the file."""
    with open_to_read(file) as opened:
        num_header_bytes, size = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size
        if not 2 <= num_header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("no safetensors file, or a part of one")
        # Its metadata may be other text than JSON: Latin-1 reads any.
        _check_num_values(opened.read(num_header_bytes).decode("latin-1"), MAX_HEADER_VALUES)


def read_bytes(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True) -> bytes:
    """The content of a regular file."""
    with open_to_read(file, max_bytes, follow) as opened:
        # No more than there is: `read` takes memory for all that it is asked for.
        content = opened.read(min(os.fstat(opened.fileno()).st_size, max_bytes) + 1)
    if len(content) > max_bytes:  # it grew since
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(file))
    return content


def read_text(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True) -> str:
    """The content of a regular file as UTF-8; ValueError where it is none."""
    return read_bytes(file, max_bytes, follow).decode()


def _check_num_values(text: str, max_values: int) -> None:
    # Counted in the text: the values themselves would take the memory.
    if len(text) > max_values and sum(map(text.count, "[{,")) > max_values:
        raise ValueError(f"it holds more than {max_values:,} values")


def parse_json(
    text: str | bytes, of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None, max_values: int = _MAX_VALUES
) -> Any:
    """The value of a JSON text; ValueError where it is none, nests too deep or holds more than `max_values` values.

    Args:
        of_pairs: makes each object from its (name, value) pairs; None: a dict.
    """
    text = text.decode() if isinstance(text, bytes) else text
    _check_num_values(text, max_values)
    try:
        value = json.loads(text, object_pairs_hook=of_pairs)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    groups = (dict, list, tuple)
    level = [value] if isinstance(value, groups) else []
    for _ in range(_MAX_DEPTH if of_pairs is None else 2 * _MAX_DEPTH):
        if not level:
            return value
        parts = (group.values() if isinstance(group, dict) else group for group in level)
        level = [one for part in parts for one in part if isinstance(one, groups)]
    raise ValueError("it nests too deep")


def read_json(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True, max_values: int = _MAX_VALUES) -> Any:
    """The value in a JSON file; ValueError as of `read_text` and `parse_json`."""
    return parse_json(read_text(file, max_bytes, follow), max_values=max_values)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def create(file: Path) -> IO[bytes]:
    """Opens a file that this call makes; FileExistsError where anything is there, a link among them."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def open_lock(file: Path) -> int:
    """A descriptor to lock a file by, which is made where it is not there; OSError where it is a link, or no file.

    It may have other names (hard links, in a copy of the folder): whoever writes into it checks that.
    """
    return _open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)


def open_to_change(file: Path, flags: int) -> int:
    """A descriptor of a file that is changed where it is, as one that grows; OSError where it has a second name.

    Args:
        flags: of `os.open`, without O_TRUNC, which acts before anything is checked.
    """
    descriptor = _open(file, flags | os.O_NOFOLLOW)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "it has another name (a hard link), which would change with it", str(file))
    return descriptor


@contextmanager
def opened(file: Path, flags: int) -> Iterator[int]:
    """Opens a file that is no link, to change it or to read it as the flags say, and closes it at the end."""
    is_changed = flags & (os.O_WRONLY | os.O_RDWR)
    descriptor = open_to_change(file, flags) if is_changed else _open(file, flags | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Writes all of `data` at a byte of a file."""
    left = memoryview(data)
    while left:
        num_written = os.pwrite(descriptor, left, position)
        left, position = left[num_written:], position + num_written


def try_lock(file: Path) -> int | None:
    """Takes a lock, which is free once the descriptor is closed or its process ends.

    Returns:
        The descriptor; None where another process holds the lock, or the file has lost its name meanwhile.
    """
    descriptor = open_lock(file)
    with ExitStack() as closing, suppress(BlockingIOError, FileNotFoundError):
        closing.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Since it was opened, its last holder may have finished, and moved or removed the folder.
        if os.path.samestat(os.fstat(descriptor), os.lstat(file)):
            closing.pop_all()
            return descriptor
    return None


@contextmanager
def locked(file: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock, as of `try_lock`; where another process has it, calls `wait` before it is tried again."""
    while (descriptor := try_lock(file)) is None:
        wait()
    try:
        yield
    finally:
        os.close(descriptor)


def replace(file: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Writes a file, or replaces one or a link, that is never there in part: under its name it is on the disk.

    Any number of processes may; each writes under a name of its own (`remove_leftovers`).

    Args:
        content: text is written as UTF-8; a function puts bytes into the open file.
    """
    writing, made = _create_beside(file)
    try:
        with made:
            if callable(content):
                content(made)
            else:
                write_fully(made.fileno(), content.encode() if isinstance(content, str) else content, 0)
            made.flush()
            os.fsync(made.fileno())
        os.replace(writing, file)
    except BaseException:
        with suppress(OSError):  # the first error says more
            remove(writing)
        raise


def hidden_beside(path: Path) -> Path:
    """A new name beside a path for a file or folder that will be moved there once it is whole."""
    return path.with_name(f"{_WRITING}{path.name}.{os.urandom(_SUFFIX_LETTERS // 2).hex()}")


def _create_beside(file: Path) -> tuple[Path, IO[bytes]]:
    """Makes a file under such a name, locked as long as its writer lives."""
    while True:
        writing = hidden_beside(file)
        made = create(writing)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(made, fcntl.LOCK_EX)
        if os.path.lexists(writing):
            return writing, made
        made.close()  # taken for a leftover before it was locked


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes files and folders that killed writers left under names of `hidden_beside`, where it can.

    A file of `replace` stays while its writer lives. Folders go, so that only their sole writer may call this.

    Args:
        folder: one that is not there, or is a link, is left alone.
        name: of the file or folder that was written; None: any.
    """
    for path in [] if folder.is_symlink() else list(folder.glob(f"{_WRITING}*")):
        if name is not None and path.name[: -_SUFFIX_LETTERS - 1] != f"{_WRITING}{name}":
            continue
        with suppress(OSError):
            if path.is_symlink() or not path.is_file():
                remove(path)
                continue
            # Open to write: network file systems lock no other.
            with os.fdopen(_open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as opened:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def copy(
    source: Path, target: Path, is_right: Callable[[bytes], bool], max_bytes: int | None = None, follow: bool = False
) -> None:
    """Copies a regular file of a folder that was given to where nothing is yet.

    Args:
        is_right: whether the first kilobyte is of the expected kind.
        max_bytes: the largest size that is copied; None: any.
        follow: whether the source may be a link, which may lead to any file of this machine.
    """
    with open_to_read(source, max_bytes, follow) as given:
        if not is_right(given.read(1024)):
            raise OSError(errno.EINVAL, "not a file of the expected kind", str(source))
        given.seek(0)
        with create(target) as made:
            shutil.copyfileobj(given, made, _COPY_BYTES)


def is_png(begin: bytes) -> bool:
    """Whether a file with these first bytes is a PNG."""
    return begin.startswith(PNG_BEGIN)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def make_folder(folder: Path, private: bool = False, follow: bool = False, parents: bool = True) -> None:
    """Makes a folder and those above it; an existing one is accepted where it is this user's.

    Args:
        folder: those above it may be links.
        private: others may not enter a folder that is made; `publish` opens it.
        follow: a link to a folder, or another user's, is accepted too: for a path that the user gave.
        parents: make missing folders above it; else they are an error.
    """
    try:
        os.mkdir(folder, 0o700 if private else 0o777)
    except FileNotFoundError:
        if not parents:
            raise
        os.makedirs(folder.parent, exist_ok=True)
        make_folder(folder, private, follow)
    except FileExistsError:
        if not (follow and folder.is_dir()):
            check_folder(folder)


def check_folder(folder: Path) -> None:
    """FileExistsError where a path is no folder, a link to one, or that of a user who is not its parent's."""
    status = os.lstat(folder)
    # In a container, root works in folders of the machine's users.
    if stat.S_ISLNK(status.st_mode):
        found = "a link"
    elif not stat.S_ISDIR(status.st_mode):
        found = "no folder"
    elif status.st_uid not in (os.geteuid(), os.stat(folder.absolute().parent).st_uid):
        found = "another user's folder"
    else:
        return
    raise FileExistsError(errno.EEXIST, f"expected a folder of your own, got {found}", str(folder))


def publish(unfinished: Path, target: Path) -> None:
    """Gives a file or folder its name, on the disk once this returns, open to others as this user's files are.

    Args:
        unfinished: its content is on the disk already.
        target: nothing may be there, or an empty folder that a folder replaces.
    """
    if unfinished.is_dir():
        open_to_others(unfinished)
    elif os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    flush(unfinished)
    os.rename(unfinished, target)
    flush(target.parent)


def open_to_others(path: Path) -> None:
    """Gives a file or folder that was made for this user alone the permissions of this user's others."""
    mode = os.stat(path).st_mode
    os.chmod(path, stat.S_IMODE(mode) | (0o777 if stat.S_ISDIR(mode) else 0o666) & ~_umask())


def move(path: Path, target: Path) -> None:
    """Renames a file, link or folder; a file or link at the target is replaced."""
    os.replace(path, target)


def remove(path: Path) -> None:
    """Deletes a file, a link (never what it leads to) or a folder with all in it, where one is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # a read-only folder refuses to delete even a file that is not there
        path.unlink(missing_ok=True)


def clear(folder: Path, *kept: str) -> None:
    """Empties a folder but for some names; NotADirectoryError where the folder is a link."""
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a link, where a folder is expected", str(folder))
    names = set(kept)
    for leftover in folder.iterdir():
        if leftover.name not in names:
            remove(leftover)


def remove_locked(folder: Path, lock: str) -> None:
    """Removes a folder whose lock, a file in it, is held; leaves what cannot be removed."""
    with suppress(OSError):
        clear(folder, lock)
        # The lock last: once it is gone another process may begin, and the files there are its own.
        (folder / lock).unlink()
        folder.rmdir()


def flush(path: Path) -> None:
    """Brings a file, or the names in a folder, down to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep names safe by themselves and refuse the call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _open(file: Path, flags: int) -> int:
    """A descriptor of a regular file."""
    # A pipe without a writer would keep `open` waiting.
    descriptor = os.open(file, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    raise OSError(errno.EINVAL, "not a regular file", str(file))


def _umask() -> int:
    # It can only be asked for by setting it, which other threads would see.
    with open("/proc/self/status") as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), 0o022)

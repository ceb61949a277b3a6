"""Reading, making, moving and removing files, where the folder may be a stranger's or another process may write it.

All that the project writes goes through here, and all that it reads of folders that were given to it. A path is changed
only as what it is itself: where it is a link, the link is replaced or removed, or the call is refused; what it leads to
is never touched. What is read may be behind links, but it is a regular file (a pipe would keep its reader waiting, a
device has no end), and no larger than the caller allows.

Errors are `OSError`, whose `strerror` says in a few words what is wrong, and `ValueError` for content.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

# Larger than any JSON, YAML or table of settings that was written in earnest.
MAX_TEXT_BYTES = 64 * 2**20
_MAX_DEPTH = 32  # of JSON: what shows, copies and compares values calls itself for each level
_COPY_BYTES = 2**20
_PARTIAL = ".partial"


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def open_to_read(file: Path, max_bytes: int | None = None, follow: bool = True) -> IO[bytes]:
    """Opens a regular file.

    Args:
        file: behind links, where `follow` allows it.
        max_bytes: the largest size that is accepted; None: any.
        follow: whether the last name of the path may be a link.

    Raises:
        OSError: it cannot be opened, is something else than a regular file, or is larger.
    """
    return os.fdopen(_open_regular(file, max_bytes, follow), "rb")


def open_unbuffered(file: Path) -> FileIO:
    """As `open_to_read`, for reading at places."""
    return FileIO(_open_regular(file, None, True))


def _open_regular(file: Path, max_bytes: int | None, follow: bool) -> int:
    # A pipe without a writer would keep `open` waiting.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        status = _check_regular(descriptor, file)
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, at most {max_bytes} are read", str(file))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def check_safetensors(file: Path) -> None:
    """For safetensors' own reader, which takes a path and maps what is there, whatever its size.

    Raises:
        OSError: as `open_to_read`.
        ValueError: it is no file of tensors, or a part of one.
    """
    with open_to_read(file) as opened:
        num_header_bytes, size = int.from_bytes(opened.read(8), "little"), opened.seek(0, os.SEEK_END)
    if not 2 <= num_header_bytes <= size - 8:
        raise ValueError("no safetensors file, or a part of one")


def read_bytes(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True) -> bytes:
    """The content of a regular file; errors as of `open_to_read`."""
    with open_to_read(file, max_bytes, follow) as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:  # it grew since
        raise OSError(errno.EFBIG, f"more than {max_bytes} bytes", str(file))
    return content


def read_text(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True) -> str:
    """The content of a regular file as UTF-8; ValueError where it is none, other errors as of `open_to_read`."""
    return read_bytes(file, max_bytes, follow).decode()


def parse_json(text: str | bytes, of_pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value that JSON says, with `of_pairs` of each object's (name, value) in place of a dict.

    Raises:
        ValueError: it is none, or nests too deep to be read.
    """
    try:
        value = json.loads(text, object_pairs_hook=of_pairs)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        groups = [
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list | tuple)
        ]
        if not groups:
            return value
        level = [one for group in groups for one in group]
    raise ValueError("it nests too deep")


def read_json(file: Path, max_bytes: int = MAX_TEXT_BYTES, follow: bool = True) -> Any:
    """The value in a JSON file; errors as of `read_text` and `parse_json`."""
    return parse_json(read_text(file, max_bytes, follow))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def create(file: Path) -> IO[bytes]:
    """Opens a file that this call makes; FileExistsError where anything is there, a link among them."""
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")


def open_to_change(file: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """A descriptor of a file that is changed where it is: a lock, or one that grows.

    Raises:
        OSError: it cannot be opened, is a link or no regular file, or has other names (hard links) that would change.
    """
    descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        if _check_regular(descriptor, file).st_nlink > 1:
            raise OSError(errno.EMLINK, "it has another name (a hard link), which would change with it", str(file))
        return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def replace(file: Path, content: bytes | str | Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is never there in part, on the disk once this returns.

    Args:
        file: what is there is replaced, were it a link; one process at a time.
        content: text is written as UTF-8; a function puts bytes into the open file.

    Raises:
        OSError: it cannot be written, or a folder is there.
    """
    partial = file.with_name(f".{file.name}{_PARTIAL}")
    remove(partial)
    try:
        with create(partial) as opened:
            if callable(content):
                content(opened)
            else:
                opened.write(content.encode() if isinstance(content, str) else content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except BaseException:
        remove(partial)
        raise


def copy(source: Path, target: Path, is_right: Callable[[bytes], bool], max_bytes: int) -> None:
    """Copies a file of a folder that was given.

    Args:
        source: a regular file, and no link, which may lead to any file of this machine.
        target: nothing may be there.
        is_right: whether the first kilobyte is of the expected kind.
        max_bytes: the largest size that is copied.

    Raises:
        OSError: it cannot be copied, or is something else.
    """
    with open_to_read(source, max_bytes, follow=False) as opened:
        if not is_right(opened.read(1024)):
            raise OSError(errno.EINVAL, "not a file of the expected kind", str(source))
        opened.seek(0)
        with create(target) as made:
            shutil.copyfileobj(opened, made, _COPY_BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def make_folder(folder: Path, private: bool = False) -> None:
    """Makes a folder and those above it; what is there already is accepted where it is a folder of this user's.

    Args:
        folder: its last name may not be a link.
        private: others may not enter it; `publish` opens it.

    Raises:
        OSError: it cannot be made, or is a link, no folder, or another user's.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700 if private else 0o777)
    except FileExistsError:
        check_folder(folder)


def check_folder(folder: Path) -> None:
    """Raises OSError where a path is no folder, is a link to one, or belongs to a user who is not its parent's."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        kind = "a link" if stat.S_ISLNK(status.st_mode) else "no folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{kind}, where a folder is expected", str(folder))
    # In a container, root works in folders of the machine's users.
    if status.st_uid not in (os.geteuid(), os.stat(folder.absolute().parent).st_uid):
        raise PermissionError(errno.EPERM, "a folder of another user", str(folder))


def publish(unfinished: Path, target: Path) -> None:
    """Gives a file or folder its name, on the disk once this returns, open to others as this user's files are.

    Args:
        unfinished: what lies in it is on the disk.
        target: nothing may be there.

    Raises:
        OSError: it cannot be renamed, or something is at the target.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if unfinished.is_dir():
        os.chmod(unfinished, 0o777 & ~_umask())
    os.rename(unfinished, target)
    flush(target.parent)


def move(path: Path, target: Path) -> None:
    """Renames a file, link or folder; a file or link at the target is replaced."""
    os.replace(path, target)


def remove(path: Path) -> None:
    """Deletes a file, a link (never what it leads to) or a folder with all in it, where one is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):  # a read-only folder refuses to delete even what is not there
        path.unlink(missing_ok=True)


def clear(folder: Path, *kept: str) -> None:
    """Removes all that lies in a folder but some names; OSError where the folder is a link."""
    check_folder(folder)
    for leftover in folder.iterdir():
        if leftover.name not in kept:
            remove(leftover)


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


@contextmanager
def opened(file: Path, flags: int) -> Iterator[int]:
    """The descriptor of `open_to_change`, or one to read, closed at the end; a link is refused."""
    if flags & (os.O_WRONLY | os.O_RDWR):
        descriptor = open_to_change(file, flags)
    else:
        descriptor = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        _check_regular(descriptor, file)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _check_regular(descriptor: int, file: Path) -> os.stat_result:
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return status


def _umask() -> int:
    # It can only be read by setting it, which other threads would see.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))

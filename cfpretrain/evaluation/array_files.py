"""Numpy's .npy and .npz files, read from untrusted sources: no pickles, and no memory that a header only claims.

The size in a header is checked against the bytes in the file before an array is allocated. Errors are `OSError`, and
`ValueError` for invalid content.
"""

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cfpretrain.base.console import one_line
from cfpretrain.base.files import open_to_read

Header = tuple[tuple[int, ...], bool, np.dtype[Any]]  # shape, is it in Fortran's order, type
# Statistics of 8,000 features in float64. What deflate makes of a small file may be a thousand times as large.
_MAX_MEMBER_BYTES = 2**29
_PART_BYTES = 2**20


@contextmanager
def reading() -> Iterator[None]:
    """What the readers of damaged archives and arrays raise becomes ValueError; OSError stays."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:  # of zipfile's, its decompressors' and the parser of headers' own
        raise ValueError(one_line(error)) from error


def read_header(stream: IO[bytes], num_bytes: int) -> Header:
    """Reads the header of an array, of whose header and values there are `num_bytes`; the stream is then at the values.

    Raises:
        ValueError: it is none, says another size, or that the values are pickled.
    """
    with reading():
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(stream)
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"values of type {dtype}, which are pickled, or none")
    expected, got = math.prod(shape) * dtype.itemsize, num_bytes - stream.tell()
    if expected != got or min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {list(shape)} and type {dtype} takes {expected} bytes, not {got}")
    return shape, is_fortran, dtype


def load(file: Path, is_mapped: bool = False) -> npt.NDArray[Any]:
    """The array in a .npy file; errors as above. Mapped, values are read when used; writing changes memory alone."""
    with open_to_read(file) as opened:
        num_bytes = opened.seek(0, 2)
        opened.seek(0)
        shape, is_fortran, dtype = read_header(opened, num_bytes)
        order: Any = "F" if is_fortran else "C"
        num_values: int = math.prod(shape)
        if is_mapped and num_values:  # nothing cannot be mapped
            return np.memmap(opened, dtype, "c", opened.tell(), shape, order)
        return np.fromfile(opened, dtype, num_values).reshape(shape, order=order)


@contextmanager
def open_archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """The archive in an .npz file, a regular one, closed at the end; errors as above."""
    with open_to_read(file) as opened:
        with reading():
            archive = zipfile.ZipFile(opened)
        with archive:
            yield archive


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int = _MAX_MEMBER_BYTES) -> npt.NDArray[Any]:
    """An array of an archive that takes at most `max_bytes`, by its name without .npy.

    Raises:
        KeyError: there is none of this name.
        OSError or ValueError: see above.
    """
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > max_bytes:
        raise ValueError(f"{name} takes {info.file_size} bytes, at most {max_bytes} are read")
    with reading(), archive.open(info) as stream:
        shape, is_fortran, dtype = read_header(stream, info.file_size)
        values = np.empty(info.file_size - stream.tell(), np.uint8)  # memory is taken where bytes are written
        place = 0
        # Of a larger part, `readinto` would hold all of it a second time.
        while num_read := stream.readinto(values[place : place + _PART_BYTES].data):  # type: ignore[attr-defined]
            place += num_read
        if place != len(values):
            raise ValueError(f"{name} ends after {place} of {len(values)} bytes")
        return values.view(dtype).reshape(shape, order="F" if is_fortran else "C")


def read_members(file: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz file, by name; errors as above."""
    with open_archive(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        return {name: read_member(archive, name) for name in names}


def write_npy(opened: IO[bytes], values: npt.NDArray[Any]) -> None:
    """Writes an array as .npy; OSError where that fails."""
    # Into a file itself numpy writes by C, which does not say why it fails, or that closing the file did.
    buffer: Any = SimpleNamespace(write=opened.write)
    np.save(buffer, values, allow_pickle=False)

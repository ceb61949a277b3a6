"""Safetensors files of fp32 tensors that many ranks write and read at once, each its own flat ranges.

Every byte of a tensor leaves through `write_ranges`, which hashes it, and is held against its hash by `verify_ranges`
or `read_whole`. A header is fully determined by the tensors' names and shapes and the metadata, so that ranks can write
their ranges before the header is there, and a reader can say whether it is the one that was written.
"""

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfpretrain.base.console import UserError, reason_of
from cfpretrain.base.files import MAX_HEADER_VALUES, opened, parse_json, write_fully

VALUE_BYTES = 4
CHUNK_VALUES = 1 << 24  # values hashed or staged at once: 64 MiB

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_MOST_AXES, _MOST_VALUES = 64, 2**48  # of a tensor
_PRODUCER = "cfpretrain"

Shapes = Mapping[str, tuple[int, ...]]  # of whole tensors, by name
PlainHashes = dict[str, list[list[Any]]]  # [begin, end, sha256] of each range by tensor: what JSON holds

if sys.byteorder != "little":
    raise RuntimeError("safetensors files are little-endian, and this machine is not")


@dataclass(frozen=True, eq=False)
class Fragment:
    """What this rank holds of one parameter: a contiguous range of its flattened values, in fp32.

    All tensors are views: writing into them changes the engine, and after writing `values` the engine must be told by
    `Engine.refresh`.
    """

    name: str  # as in module.named_parameters()
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # where the range begins in the flattened parameter
    values: Tensor  # [numel], the weights that the optimizer updates
    state: dict[str, Tensor]  # the optimizer's, each [numel], under torch's names: exp_avg, exp_avg_sq of Adam
    replicated: bool  # every rank holds the same range (ZeRO stage 0)
    is_frozen: bool = False  # training never changes the values; then there is no state


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what was written; an earlier one may still be whole."""


def remedy(file: Path) -> str:
    """What a person can do about a damaged file of a checkpoint."""
    return f"restore it, or delete {file.parent} to resume from an earlier checkpoint"


def unreadable(task: str, error: Exception, fix: str) -> UserError:
    """The error for a file of a checkpoint that cannot be read; a damaged one where another may be whole."""
    # Where a permission is missing, an earlier checkpoint is no answer.
    kind = UserError if isinstance(error, PermissionError) else DamagedCheckpointError
    reason = reason_of(error)
    if isinstance(error, OSError) and error.filename and str(error.filename) in task:
        reason = str(error.strerror)
    return kind(f"{task}: {reason}; {fix}")


# ---------------------------------------------------------------------------------------------------------------------
# Headers


@dataclass(frozen=True)
class Header:
    """Where the tensors of one file lie."""

    shapes: dict[str, tuple[int, ...]]
    begins: dict[str, int]  # byte of the file at which each tensor's first value lies
    metadata: dict[str, str]
    num_bytes: int  # of the whole file

    def position(self, name: str, value: int) -> int:
        """The byte of the file at which a flat value of a tensor lies."""
        return self.begins[name] + VALUE_BYTES * value


def make_header(shapes: Shapes, content: str, step: int) -> tuple[bytes, Header]:
    """The first bytes of a file of fp32 tensors, which follow sorted by name, and what they say.

    `content` says what the tensors are; it is the stem of the file's name.
    """
    metadata = {"format": "pt", "producer": _PRODUCER, "content": content, "step": str(step)}
    in_order = {name: tuple(shapes[name]) for name in sorted(shapes)}
    first_bytes = encode_header(in_order, metadata)
    begins, end = {}, len(first_bytes)
    for name, shape in in_order.items():
        begins[name], end = end, end + VALUE_BYTES * math.prod(shape)
    return first_bytes, Header(in_order, begins, metadata, end)


def encode_header(
    shapes: Shapes, metadata: Mapping[str, str], dtype: str = "F32", value_bytes: int = VALUE_BYTES
) -> bytes:
    """The first bytes of a safetensors file of any dtype, which its tensors follow in the order of `shapes`."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, shape in shapes.items():
        end = begin + value_bytes * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(file: Path) -> Header:
    """Reads and checks the header of one of our files.

    Raises:
        DamagedCheckpointError: it is none, or its size is another, or a byte of the header is.
    """
    with opened(file, os.O_RDONLY) as descriptor:
        num_bytes = os.fstat(descriptor).st_size
        size = memoryview(bytearray(min(8, num_bytes)))
        _read_fully(descriptor, size, 0)
        num_header_bytes = int.from_bytes(size, "little")
        if num_header_bytes > min(_MAX_HEADER_BYTES, num_bytes - 8):
            raise DamagedCheckpointError(
                f"{file}: expected a safetensors file, got something else or a part; {remedy(file)}"
            )
        text = memoryview(bytearray(num_header_bytes))
        _read_fully(descriptor, text, 8)
    try:
        entries = parse_json(bytes(text), max_values=MAX_HEADER_VALUES)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
        for shape in shapes.values():
            if len(shape) > _MOST_AXES or min(shape, default=0) < 0:
                raise ValueError(f"a shape of {len(shape)} axes, or below 0")
            if math.prod(max(1, size) for size in shape) > _MOST_VALUES:
                raise ValueError("a shape that no file holds")
        first_bytes, header = make_header(shapes, file.stem, int(metadata.get("step", 0)))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DamagedCheckpointError(
            f"{file}: expected a safetensors header, got {error!r:.120}; {remedy(file)}"
        ) from error
    if metadata != header.metadata:
        raise DamagedCheckpointError(
            f"{file}: expected {file.stem} written by {_PRODUCER}, "
            f"got a safetensors file with metadata {metadata!r:.80}; {remedy(file)}"
        )
    if first_bytes[:8] != size or first_bytes[8:] != text:
        raise DamagedCheckpointError(f"{file}: expected the header of its tensors, got another; {remedy(file)}")
    if header.num_bytes != num_bytes:
        raise DamagedCheckpointError(f"{file}: expected {header.num_bytes} bytes, got {num_bytes}; {remedy(file)}")
    return header


# ---------------------------------------------------------------------------------------------------------------------
# Ranges and their hashes


class HashedRange(NamedTuple):
    """Flat values `begin` to `end` of a tensor, and the sha256 of their bytes."""

    name: str
    begin: int
    end: int
    sha256: str


def write_ranges(
    file: Path,
    shapes: Shapes,
    step: int,
    ranges: Iterable[tuple[str, int, memoryview]],
    with_header: bool,
    on_progress: Callable[[], None] = lambda: None,
) -> PlainHashes:
    """Writes flat ranges of tensors to their place in a file, which is made where it is missing, down to the disk.

    Args:
        file: its stem says what the tensors are.
        shapes: of all tensors of the file.
        step: of the checkpoint.
        ranges: name of the tensor, first flat value, and the bytes of the values.
        with_header: write the header and set the size too; one of the writers of a file does.
        on_progress: called after each hash, and at the end.

    Returns:
        A hash for at most `CHUNK_VALUES` values each, in the order of the values.
    """
    first_bytes, header = make_header(shapes, file.stem, step)
    hashes: PlainHashes = {name: [] for name in header.shapes}
    with opened(file, os.O_WRONLY | os.O_CREAT) as descriptor:
        if with_header:
            os.ftruncate(descriptor, header.num_bytes)
            write_fully(descriptor, first_bytes, 0)
        for name, begin, data in ranges:
            for at in range(0, len(data), VALUE_BYTES * CHUNK_VALUES):
                chunk = data[at : at + VALUE_BYTES * CHUNK_VALUES]
                first = begin + at // VALUE_BYTES
                write_fully(descriptor, chunk, header.position(name, first))
                hashes[name].append([first, first + len(chunk) // VALUE_BYTES, _sha256(chunk)])
                on_progress()
        os.fsync(descriptor)
    on_progress()
    return hashes


def checked_hashes(plain: Any, header: Header, source: Path) -> list[HashedRange]:
    """The hashes of a file's values, from what `write_ranges` returned: each value of each tensor has one.

    Raises:
        DamagedCheckpointError: it is something else, or does not cover each value once.
    """
    try:
        ranges = [HashedRange(name, *row) for name, rows in plain.items() for row in rows]
    except (TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{source}: expected lists of [begin, end, sha256] by tensor, got {error!r:.120}; {remedy(source)}"
        ) from error
    for _, begin, end, sha256 in ranges:
        if (type(begin), type(end), type(sha256)) != (int, int, str) or begin >= end:
            raise DamagedCheckpointError(f"{source}: expected ranges with begin < end and a sha256; {remedy(source)}")
    covered = dict.fromkeys(header.shapes, 0)
    strange = sorted(covered.keys() ^ plain.keys())
    for place in sorted(ranges, key=lambda place: place.begin):
        if covered.get(place.name) == place.begin:
            covered[place.name] = place.end
        else:
            strange.append(place.name)
    strange += [name for name, shape in header.shapes.items() if covered[name] != math.prod(shape)]
    if strange:
        raise DamagedCheckpointError(
            f"{source}: expected hashes of each value of {header.metadata['content']} once, "
            f"got others of {strange[0]}; {remedy(source)}"
        )
    return ranges


def verify_ranges(file: Path, header: Header, ranges: Iterable[HashedRange]) -> None:
    """Streams ranges of a file and holds each against its hash.

    Raises:
        DamagedCheckpointError: names the first range that is not what was written.
    """
    buffer = memoryview(bytearray())
    with opened(file, os.O_RDONLY) as descriptor:
        for place in ranges:
            left = VALUE_BYTES * (place.end - place.begin)
            position = header.position(place.name, place.begin)
            if len(buffer) < min(left, VALUE_BYTES * CHUNK_VALUES):
                buffer = memoryview(bytearray(min(left, VALUE_BYTES * CHUNK_VALUES)))
            found = hashlib.sha256(usedforsecurity=False)
            while left:
                chunk = buffer[: min(left, len(buffer))]
                _read_fully(descriptor, chunk, position)
                found.update(chunk)
                left, position = left - len(chunk), position + len(chunk)
            _compare(file, place, found.hexdigest())


def read_values(descriptor: int, position: int, values: Tensor) -> None:
    """Fills a 1-D fp32 tensor of any device from a byte of a file, through a bounded buffer."""
    buffer = torch.empty(min(values.numel(), CHUNK_VALUES), dtype=torch.float32)
    for chunk in torch.split(values.detach(), CHUNK_VALUES):
        staged = buffer[: chunk.numel()]
        _read_fully(descriptor, bytes_of(staged), position)
        chunk.copy_(staged)
        position += VALUE_BYTES * chunk.numel()


def read_whole(file: Path, header: Header, ranges: Iterable[HashedRange]) -> dict[str, Tensor]:
    """All tensors of a header on the CPU, each byte held against its hash; errors as of `verify_ranges`."""
    tensors = {name: torch.empty(shape, dtype=torch.float32) for name, shape in header.shapes.items()}
    with opened(file, os.O_RDONLY) as descriptor:
        for place in ranges:
            data = bytes_of(tensors[place.name].view(-1)[place.begin : place.end])
            _read_fully(descriptor, data, header.position(place.name, place.begin))
            _compare(file, place, _sha256(data))
    return tensors


def _compare(file: Path, place: HashedRange, found: str) -> None:
    if found != place.sha256:
        raise DamagedCheckpointError(
            f"{file}: values {place.begin} to {place.end} of {place.name} are not those that were written "
            f"(expected sha256 {place.sha256:.12}..., got {found:.12}...); {remedy(file)}"
        )


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data, usedforsecurity=False).hexdigest()


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = values.numpy()
    # An empty array cannot be cast.
    return memoryview(array).cast("B") if array.size else memoryview(b"")


def _read_fully(descriptor: int, left: memoryview, position: int) -> None:
    while left:
        num_read = os.preadv(descriptor, [left], position)
        if num_read == 0:
            raise OSError(errno.EIO, "a tensor file became shorter while it was read")
        left, position = left[num_read:], position + num_read

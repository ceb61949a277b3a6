"""Tensor files: safetensors that anyone reads, and no byte of them changes unnoticed."""

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfpretrain.run import tensor_files
from cfpretrain.run.tensor_files import (
    DamagedCheckpointError,
    HashedRange,
    Header,
    bytes_of,
    checked_hashes,
    make_header,
    opened,
    read_header,
    read_values,
    read_whole,
    verify_ranges,
    write_ranges,
)

SHAPES = {"b.w": (4, 6), "b.ä": (6,), "scale": (), "empty": (0,)}


def random_bits(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Any bits, not-a-numbers and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
        for name, shape in shapes.items()
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def write(file: Path, tensors: dict[str, Tensor], cuts: Sequence[int] = ()) -> tuple[Header, list[HashedRange]]:
    """Writes a file as `len(cuts) + 1` ranks would, each its part of every tensor, and the header last."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    hashes: dict[str, list[list[Any]]] = {name: [] for name in tensors}
    for part in range(len(cuts) + 1):
        ranges = []
        for name, tensor in tensors.items():
            bounds = [0, *sorted(min(cut, tensor.numel()) for cut in cuts), tensor.numel()]
            ranges.append((name, bounds[part], bytes_of(tensor.reshape(-1)[bounds[part] : bounds[part + 1]])))
        written = write_ranges(file, shapes, 7, ranges, with_header=part == len(cuts))
        for name, rows in written.items():
            hashes[name] += rows
    _, header = make_header(shapes, file.stem, step=7)
    return header, checked_hashes(hashes, header, file)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    chunk_values=st.integers(1, 200),
)
def test_what_ranks_write_in_pieces_anyone_reads_whole(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, ...]], cuts: list[int], chunk_values: int
):
    file = tmp_path_factory.mktemp("files") / "ema.safetensors"
    tensors = random_bits({f"p.{i}": shape for i, shape in enumerate(shapes)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "CHUNK_VALUES", chunk_values)
        header, ranges = write(file, tensors, cuts)
        assert read_header(file) == header
        verify_ranges(file, header, ranges)
        ours = read_whole(file, header, ranges)
    theirs = safetensors.torch.load_file(file)
    for found in (ours, theirs):
        assert set(found) == set(tensors)
        assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert all(place.end - place.begin <= chunk_values for place in ranges)
    with safetensors.safe_open(file, "pt") as theirs_opened:
        assert theirs_opened.metadata()["step"] == "7"


def test_a_hash_is_the_sha256_of_the_values(file: Path):
    tensors = random_bits(SHAPES)
    _, ranges = write(file, tensors)
    assert {place.name for place in ranges} == {"b.w", "b.ä", "scale"}
    for place in ranges:
        assert (place.begin, place.end) == (0, tensors[place.name].numel())
        assert place.sha256 == hashlib.sha256(tensors[place.name].numpy().tobytes()).hexdigest()


def is_noticed(file: Path, step: int, ranges: Sequence[HashedRange]) -> bool:
    """Whether a reader who knows the step and the hashes refuses the file."""
    try:
        header = read_header(file)
        plain = {name: [place[1:] for place in ranges if place.name == name] for name in SHAPES}
        verify_ranges(file, header, checked_hashes(plain, header, file))
    except DamagedCheckpointError:
        return True
    return header.metadata["step"] != str(step)


def test_any_flipped_bit_is_noticed(file: Path):
    header, ranges = write(file, random_bits(SHAPES), cuts=[3])
    good = file.read_bytes()
    assert not is_noticed(file, 7, ranges)
    for at, bit in itertools.product(range(len(good)), (0, 5)):
        damaged = bytearray(good)
        damaged[at] ^= 1 << bit
        file.write_bytes(damaged)
        assert is_noticed(file, 7, ranges), f"bit {bit} of byte {at}"
        if at >= min(header.begins.values()):
            with pytest.raises(DamagedCheckpointError, match="not those that were written"):
                read_whole(file, header, ranges)


def test_the_damaged_values_are_named(file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_files, "CHUNK_VALUES", 10)
    header, ranges = write(file, random_bits(SHAPES))
    with open(file, "r+b") as damaged:
        damaged.seek(header.position("b.w", 17))
        damaged.write(b"??")
    with pytest.raises(DamagedCheckpointError, match=r"weights.safetensors: values 10 to 20 of b\.w are not those"):
        verify_ranges(file, header, ranges)


def test_a_file_that_is_cut_while_it_is_read(file: Path):
    header, ranges = write(file, random_bits(SHAPES))
    os.truncate(file, header.num_bytes - 1)
    with pytest.raises(OSError, match="became shorter"):
        verify_ranges(file, header, ranges)
    with pytest.raises(OSError, match="became shorter"):
        read_whole(file, header, ranges)


@pytest.mark.parametrize("num_bytes", [0, 3, 7, 8, 20, -1, +1])
def test_a_file_of_another_size_is_refused(file: Path, num_bytes: int):
    header, _ = write(file, random_bits(SHAPES))
    os.truncate(file, num_bytes if num_bytes not in (-1, 1) else header.num_bytes + num_bytes)
    with pytest.raises(
        DamagedCheckpointError, match=r"weights\.safetensors: expected .* got .*; restore it, or delete"
    ):
        read_header(file)


@pytest.mark.parametrize("shape", [(0, 2**70), (0, 2**40, 2**40), (-1, 0), (0,) * 100])
def test_a_shape_that_no_file_holds_is_refused(file: Path, shape: tuple[int, ...]):
    file.write_bytes(make_header({"p": shape}, file.stem, 7)[0])
    with pytest.raises(DamagedCheckpointError, match="expected a safetensors header, got ValueError"):
        read_header(file)


def test_a_link_is_followed_neither_in_reading_nor_in_writing(file: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere.safetensors"
    write(elsewhere, random_bits(SHAPES))
    good = elsewhere.read_bytes()
    file.symlink_to(elsewhere)
    with pytest.raises(OSError, match="symbolic links"):
        read_header(file)
    with pytest.raises(OSError, match="symbolic links"):
        write(file, random_bits(SHAPES, seed=1))
    assert elsewhere.read_bytes() == good


def test_short_writes_and_reads_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, left, at: preadv(fd, [left[0][:5]], at))
    tensors = random_bits(SHAPES)
    header, ranges = write(file, tensors)
    assert read_header(file) == header
    verify_ranges(file, header, ranges)
    assert all(same_bits(t, tensors[name]) for name, t in read_whole(file, header, ranges).items())
    part = torch.empty(5)
    with opened(file, os.O_RDONLY) as descriptor:
        read_values(descriptor, header.position("b.w", 9), part)
    assert same_bits(part, tensors["b.w"].reshape(-1)[9:14])


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {"p": None},
        {"p": [[0, 1]]},
        {"p": [[0, 1, "x", 2]]},
        {"p": [[0, 1, None]]},
        {"p": [[0.0, 1, "x"]]},
        {"p": [[1, 1, "x"]]},
        {"p": [[True, 2, "x"]]},
        {"p": ["abc"]},
    ],
)
def test_strange_hashes_are_refused(file: Path, plain: Any):
    with pytest.raises(DamagedCheckpointError, match=r"weights\.safetensors: expected"):
        checked_hashes(plain, make_header({"p": (2,)}, "weights", 1)[1], file)


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ({"p": [(0, 4)]}, "q"),  # a tensor without hashes
        ({"p": [(0, 4)], "q": [(0, 2)], "r": []}, "r"),
        ({"p": [(0, 3)], "q": [(0, 2)]}, "p"),
        ({"p": [(0, 5)], "q": [(0, 2)]}, "p"),
        ({"p": [(0, 2), (3, 4)], "q": [(0, 2)]}, "p"),
        ({"p": [(0, 3), (2, 4)], "q": [(0, 2)]}, "p"),
        ({"p": [(0, 4), (0, 4)], "q": [(0, 2)]}, "p"),
        ({"p": [(-1, 4)], "q": [(0, 2)]}, "p"),
    ],
)
def test_hashes_must_cover_each_value_once(file: Path, rows: dict[str, list[tuple[int, int]]], name: str):
    _, header = make_header({"p": (2, 2), "q": (2,)}, "weights", 1)
    plain = {tensor: [[begin, end, "0"] for begin, end in places] for tensor, places in rows.items()}
    with pytest.raises(DamagedCheckpointError, match=rf"each value of weights once, got others of {name};"):
        checked_hashes(plain, header, file)


def test_hashes_in_any_order_cover(file: Path):
    _, header = make_header({"p": (2, 2), "none": (0,)}, "weights", 1)
    plain = {"p": [[3, 4, "0"], [0, 3, "0"]], "none": []}
    assert checked_hashes(plain, header, file) == [HashedRange("p", 3, 4, "0"), HashedRange("p", 0, 3, "0")]

"""Images that are there already, for scoring: a folder of files, image shards, or an `.npz` as ADM's evaluation reads.

All of a set have one size; they are read in a fixed order, as they are, in RGB: nothing is cropped or resized. What is
transparent is composited on a background.
"""

import functools
import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.data.images import (
    WHITE,
    Colour,
    RejectedImageError,
    centre_crop,
    describe_changes,
    read_file,
    read_image,
)
from cfpretrain.data.listing import ImageFinder
from cfpretrain.data.shards import INFO_FILE, ImagesInfo, Shards
from cfpretrain.evaluation import array_files

IMAGES, MEAN = "arr_0", "mu"  # keys of archives
_MOST_BYTES_AT_ONCE = 2**30  # of an array in Fortran's order, whose images lie in no piece
_MOST_PIXELS = 2**22  # of an image to score: features are of a few hundred a side


class GivenImages(Protocol):
    """A set of images.

    Attributes:
        name: where they come from, for people.
        fingerprint: changes when they do.
        size: width and height of each.
        background: behind what is transparent.
        changes: images read by this process that lost something, by what; see `describe_changes`.
    """

    name: str
    fingerprint: str
    size: tuple[int, int]
    background: Colour
    changes: Counter[str]

    def __len__(self) -> int:
        """How many."""

    def read(self, places: Sequence[int]) -> Tensor:
        """Some of them, uint8 [B, 3, Y, X]; UserError where one cannot be read or has another size."""


def is_archive(path: Path) -> bool:
    """Whether a path is called as an .npz."""
    return path.suffix.lower() == ".npz"


def open_images(path: Path, key: str, background: Colour = WHITE) -> GivenImages:
    """Opens a set of images; says it where a folder holds others that are not read.

    Args:
        path: a folder of image files, one of image shards, or an archive with `arr_0`, uint8 [N, Y, X, 3].
        key: option that gave it, for messages.
        background: behind what is transparent in a folder of image files.
    """
    images: GivenImages
    if path.is_file() and is_archive(path):
        images = _Archive(path, key)
    elif (path / INFO_FILE).is_file():
        images = _FromShards(path, key)
    elif path.is_dir():
        images = _Folder(path, key, background)
    else:
        got = "another file" if path.is_file() else "nothing: it does not exist"
        raise UserError(f"{key}: expected a folder of images, image shards or an .npz, got {path}, which is {got}")
    if len(images) < 2:
        raise UserError(f"{key}: expected at least 2 images in {path}, got {len(images)}; give more")
    return images


def say_changes(images: GivenImages, key: str) -> None:
    """Says what the images that all ranks have read lost; all ranks call it."""
    counts = sum(runtime.gather(images.changes), Counter[str]())
    for line in describe_changes(counts, images.background, min(images.size)):
        say(f"{key}: of the images read now, {line}")


def say_sizes(size: tuple[int, int], reference: tuple[int, int] | None) -> None:
    """Says it where scored images have another size, [width, height], than those of the reference."""
    if reference is not None and size != reference:
        scored, real = (f"{width} x {height}" for width, height in (size, reference))
        shape = "" if size[0] * reference[1] == size[1] * reference[0] else " and squeezed to one shape"
        say(
            f"WARNING: the images to score are {scored}, those of the reference {real}; for the features all are "
            f"resized{shape}, and the scores show that, too"
        )


def _check_pixels(size: tuple[int, int], name: str, key: str) -> None:
    """UserError where a batch of such images, [width, height], would take gigabytes, were they a few bytes packed."""
    width, height = size
    if width * height > _MOST_PIXELS:
        raise UserError(
            f"{key}: expected images of at most {_MOST_PIXELS} pixels, got {width} x {height} in {name}; make them "
            "smaller, as tools/make_shards.py does"
        )


def _as_tensor(images_BYXC: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_BYXC.transpose(0, 3, 1, 2)))


class _Files:
    """What folders and shards share: images that are decoded one by one."""

    def __init__(self, name: str, key: str, background: Colour) -> None:
        self.name, self._key, self.background = name, key, background
        self.size: tuple[int, int] = (0, 0)  # of none read yet
        self.changes: Counter[str] = Counter()

    def _decode(self, data: bytes, image_name: str, crop: int | None = None) -> npt.NDArray[np.uint8]:
        try:
            if crop is not None:
                image = centre_crop(read_image(data, background=self.background, changes=self.changes), crop)
                self._check_size(image_name, image.size)
            else:
                check_size = functools.partial(self._check_size, image_name)
                image = read_image(data, background=self.background, changes=self.changes, check_size=check_size)
        except RejectedImageError as error:
            raise UserError(f"{self._key}: {image_name}: {error}; remove it or get it again") from error
        return np.asarray(image, np.uint8)

    def _check_size(self, image_name: str, size: tuple[int, int]) -> None:
        if not any(self.size):
            _check_pixels(size, image_name, self._key)
            self.size = size
        if size != self.size:
            raise UserError(
                f"{self._key}: expected images of one size, got {size[0]} x {size[1]} in {image_name} and "
                f"{self.size[0]} x {self.size[1]} in others; tools/make_shards.py crops them to one"
            )


class _Folder(_Files):
    def __init__(self, folder: Path, key: str, background: Colour) -> None:
        super().__init__(str(folder), key, background)
        finder = ImageFinder()
        try:
            self._paths = [folder / name for name, _ in finder.images_below(folder)]
        except UserError as error:
            raise UserError(str(error).replace("images:", f"{key}:", 1)) from error
        for text in finder.warnings():
            say(f"WARNING: {key}: {text}")
        digest = hashlib.blake2b(f"{background}\0".encode(), digest_size=16)
        for path in self._paths:
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(
                    f"{key}: {path} cannot be read ({error.strerror}); remove it or get it again"
                ) from error
            digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        self.fingerprint = digest.hexdigest()
        if self._paths:  # whichever rank reads an image holds it against the same size
            self.read([0])
            self.changes.clear()  # it is read again

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, places: Sequence[int]) -> Tensor:
        images = []
        for path in (self._paths[place] for place in places):
            try:
                images.append(self._decode(read_file(path), str(path)))
            except RejectedImageError as error:
                raise UserError(f"{self._key}: {path}: {error}; remove it or get it again") from error
        return _as_tensor(np.stack(images))


class _FromShards(_Files):
    def __init__(self, folder: Path, key: str) -> None:
        self._shards = Shards(folder, key)
        info = self._shards.info
        if not isinstance(info, ImagesInfo):
            raise UserError(f"{key}: expected shards of images, got latents in {folder}; give those they were made of")
        super().__init__(str(folder), key, info.background)
        self._crop = info.image_size if info.store == "original" else None
        self.fingerprint = self._shards.fingerprint
        self.read([0])
        self.changes.clear()

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, places: Sequence[int]) -> Tensor:
        samples = self._shards.samples(list(places))
        names = [f"{self.name}, image of id {sample['id']}" for sample in samples]
        pairs = zip(samples, names, strict=True)
        return _as_tensor(np.stack([self._decode(sample["image"], name, self._crop) for sample, name in pairs]))


class _Archive:
    """Reads the images it is asked for, never the whole array: 50,000 of 256 pixels would be 10 GB in memory.

    In Fortran's order the bytes of an image lie apart; such an array is read whole.
    """

    background = WHITE  # of nothing

    def __init__(self, file: Path, key: str) -> None:
        self.name, self._key = str(file), key
        self._whole: npt.NDArray[np.uint8] | None = None
        self.changes: Counter[str] = Counter()
        with _undamaged(file, key), ExitStack() as stack:
            self._open(stack.enter_context(array_files.open_archive(file)), file, stack)
            self._opened = stack.pop_all()  # nothing was wrong: they stay open as long as this does

    def _open(self, archive: zipfile.ZipFile, file: Path, stack: ExitStack) -> None:
        names = archive.namelist()
        if f"{IMAGES}.npy" not in names:
            keys = ", ".join(name.removesuffix(".npy") for name in names)
            raise UserError(
                f"{self._key}: expected an .npz with {IMAGES} (images) or {MEAN} and sigma (statistics), got {file} "
                f"with {keys or 'nothing'}; write the images as {IMAGES}"
            )
        info = archive.getinfo(f"{IMAGES}.npy")
        with array_files.reading():
            self._member: IO[bytes] = stack.enter_context(archive.open(info))
        self._shape, is_fortran, dtype = array_files.read_header(self._member, info.file_size)
        if dtype != np.uint8 or len(self._shape) != 4 or self._shape[3] not in (1, 3):
            raise UserError(
                f"{self._key}: expected uint8 images [N, Y, X, 3] as {IMAGES} of {file}, got {dtype} "
                f"{list(self._shape)}; write them so"
            )
        self.size = (int(self._shape[2]), int(self._shape[1]))
        _check_pixels(self.size, str(file), self._key)
        self._begin = self._member.tell()
        if is_fortran and info.file_size > _MOST_BYTES_AT_ONCE:
            raise UserError(
                f"{self._key}: expected {IMAGES} of {file} in C order, got Fortran's, of which all is read at once; "
                "write it with numpy.ascontiguousarray"
            )
        if is_fortran:
            self._whole = array_files.read_member(archive, IMAGES, _MOST_BYTES_AT_ONCE)
        self.fingerprint = hashlib.blake2b(f"{info.CRC} {info.file_size}".encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._shape[0])

    def read(self, places: Sequence[int]) -> Tensor:
        shape = self._shape[1:]
        num_bytes = int(np.prod(shape))
        images: list[npt.NDArray[np.uint8]] = []
        with _undamaged(Path(self.name), self._key):
            for place in places:
                if self._whole is not None:
                    images.append(self._whole[place])
                    continue
                with array_files.reading():
                    self._member.seek(self._begin + place * num_bytes)
                    data = self._member.read(num_bytes)
                images.append(np.frombuffer(data, np.uint8).reshape(shape))
        return _as_tensor(np.broadcast_to(np.stack(images), (len(images), *shape[:2], 3)))


def read_arrays(file: Path, key: str, names: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], set[str]]:
    """Those of the arrays that an archive holds, and the names of all that it holds; no pickles."""
    with _undamaged(file, key), array_files.open_archive(file) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        return {name: array_files.read_member(archive, name) for name in names if name in there}, there


@contextmanager
def _undamaged(file: Path, key: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: expected an .npz archive, got {file}, which is none or damaged ({one_line(error):.120}); get it "
            "again"
        ) from error

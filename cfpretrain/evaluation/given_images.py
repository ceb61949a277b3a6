"""Existing images, for scoring: a folder of files, image shards, or an `.npz` as ADM's evaluation reads it.

All of a set have one size; they are read in a fixed order, in RGB, and are neither cropped nor resized. Transparent
pixels are composited on a background.
"""

import functools
import hashlib
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

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
from cfpretrain.data.interleaved import refuse_interleaved
from cfpretrain.data.listing import ImageFinder
from cfpretrain.data.shards import INFO_FILE, ImagesInfo, Shards
from cfpretrain.evaluation import array_files

IMAGES, MEAN = "arr_0", "mu"  # keys of archives
BATCH_SIZE = 32
_MOST_BYTES_AT_ONCE = 2**30  # of an array in Fortran's order, whose images lie in no piece
_MOST_PIXELS = 2**22  # of an image to score: features are of a few hundred a side

Pixels = npt.NDArray[np.uint8]  # [Y, X, 3]


class GivenImages(ABC):
    """A set of images, opened by `open_images`."""

    fingerprint: str  # changes when they do

    def __init__(self, place: Path, key: str, background: Colour = WHITE) -> None:
        self.name, self._key = str(place), key
        self.background = background  # behind transparent pixels
        self.size: tuple[int, int] = (0, 0)  # width and height of each; 0 before the first is read
        self.changes: Counter[str] = Counter()  # images read by this process that lost something (`describe_changes`)

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def _images(self, places: Sequence[int]) -> Iterator[Pixels]:
        """Some of them; UserError where one cannot be read or has another size."""

    def read(self, places: Sequence[int]) -> Tensor:
        """Some of them, uint8 [B, 3, Y, X]; errors as `_images`."""
        images_BYXC = np.stack(list(self._images(places)))
        return torch.from_numpy(np.ascontiguousarray(images_BYXC.transpose(0, 3, 1, 2)))

    def batches(self, numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
        """This rank's share of some batches, with their numbers."""
        for number in numbers[runtime.rank() :: runtime.world_size()]:
            yield number, self.read(range(len(self))[number * BATCH_SIZE : (number + 1) * BATCH_SIZE])

    def _learn_size(self) -> None:
        """Whichever rank reads an image holds it against the size of the first."""
        if len(self):
            self.read([0])
            self.changes.clear()  # it is read again

    def _decode(self, data: bytes, image_name: str, crop: int | None = None) -> Pixels:
        check_size = functools.partial(self._check_size, image_name)
        before = check_size if crop is None else lambda _: None
        image = read_image(data, background=self.background, changes=self.changes, check_size=before)
        if crop is not None:
            image = centre_crop(image, crop)
            check_size(image.size)
        return np.asarray(image, np.uint8)

    @contextmanager
    def _naming(self, image_name: str) -> Iterator[None]:
        try:
            yield
        except RejectedImageError as error:
            raise UserError(f"{self._key}: {image_name}: {error}; remove it or get it again") from error

    def _check_size(self, image_name: str, size: tuple[int, int]) -> None:
        width, height = size
        # A batch of larger ones would take gigabytes, were they a few bytes packed.
        if width * height > _MOST_PIXELS:
            raise UserError(
                f"{self._key}: expected images of at most {_MOST_PIXELS} pixels, got {width} x {height} in "
                f"{image_name}; make them smaller, as tools/make_shards.py does"
            )
        if not any(self.size):
            self.size = size
        if size != self.size:
            raise UserError(
                f"{self._key}: expected images of one size, got {width} x {height} in {image_name} and "
                f"{self.size[0]} x {self.size[1]} in others; tools/make_shards.py crops them to one"
            )


def is_archive(path: Path) -> bool:
    """Whether a path is called as an .npz."""
    return path.suffix.lower() == ".npz"


def open_images(path: Path, key: str, background: Colour = WHITE) -> GivenImages:
    """Opens a set of images; warns of files in a folder that are not read.

    Args:
        path: a folder of image files, one of image shards, or an archive with `arr_0`, uint8 [N, Y, X, 3].
        key: option that gave it, for messages.
        background: behind transparent pixels in a folder of image files.
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
    """Says what was lost in reading the images, summed over all ranks; all ranks call it."""
    counts = sum(runtime.gather(images.changes), Counter[str]())
    for line in describe_changes(counts, images.background, min(images.size)):
        say(f"{key}: of the images read now, {line}")


def say_sizes(size: tuple[int, int], reference: tuple[int, int] | None) -> None:
    """Warns if scored images have another size, (width, height), than those of the reference."""
    if reference is not None and size != reference:
        scored, real = (f"{width} x {height}" for width, height in (size, reference))
        shape = "" if size[0] * reference[1] == size[1] * reference[0] else " and squeezed to one shape"
        say(
            f"WARNING: the images to score are {scored}, those of the reference {real}; for the features all are "
            f"resized{shape}, and the scores show that, too"
        )


class _Folder(GivenImages):
    def __init__(self, folder: Path, key: str, background: Colour) -> None:
        super().__init__(folder, key, background)
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
        self._learn_size()

    def __len__(self) -> int:
        return len(self._paths)

    def _images(self, places: Sequence[int]) -> Iterator[Pixels]:
        for path in (self._paths[place] for place in places):
            with self._naming(str(path)):
                yield self._decode(read_file(path), str(path))


class _FromShards(GivenImages):
    def __init__(self, folder: Path, key: str) -> None:
        self._shards = Shards(folder, key)
        info = self._shards.info
        if not isinstance(info, ImagesInfo):
            raise UserError(f"{key}: expected shards of images, got latents in {folder}; give those they were made of")
        refuse_interleaved(info.most_segments, f"{key}: {folder}")
        super().__init__(folder, key, info.background)
        self._crop = info.image_size if info.store == "original" else None
        self.fingerprint = self._shards.fingerprint
        self._learn_size()

    def __len__(self) -> int:
        return len(self._shards)

    def _images(self, places: Sequence[int]) -> Iterator[Pixels]:
        for sample in self._shards.samples(list(places)):
            name = f"{self.name}, image of id {sample['id']}"
            with self._naming(name):
                yield self._decode(sample["image"], name, self._crop)


class _Archive(GivenImages):
    """Reads the images it is asked for, never the whole array: 50,000 of 256 pixels would be 10 GB in memory.

    In Fortran's order the bytes of an image lie apart; such an array is read whole.
    """

    def __init__(self, file: Path, key: str) -> None:
        super().__init__(file, key)
        self._whole: npt.NDArray[np.uint8] | None = None
        with _undamaged(file, key), ExitStack() as stack:
            self._open(stack.enter_context(array_files.open_archive(file)), stack)
            self._opened = stack.pop_all()  # nothing was wrong: they stay open as long as this does

    def _open(self, archive: zipfile.ZipFile, stack: ExitStack) -> None:
        names = archive.namelist()
        if f"{IMAGES}.npy" not in names:
            keys = ", ".join(name.removesuffix(".npy") for name in names)
            raise UserError(
                f"{self._key}: expected an .npz with {IMAGES} (images) or {MEAN} and sigma (statistics), got "
                f"{self.name} with {keys or 'nothing'}; write the images as {IMAGES}"
            )
        info = archive.getinfo(f"{IMAGES}.npy")
        self._member: IO[bytes] = stack.enter_context(archive.open(info))
        self._shape, is_fortran, dtype = array_files.read_header(self._member, info.file_size)
        if dtype != np.uint8 or len(self._shape) != 4 or self._shape[3] not in (1, 3):
            raise UserError(
                f"{self._key}: expected uint8 images [N, Y, X, 3] as {IMAGES} of {self.name}, got {dtype} "
                f"{list(self._shape)}; write them so"
            )
        self._check_size(self.name, (int(self._shape[2]), int(self._shape[1])))
        self._begin = self._member.tell()
        if is_fortran:
            if info.file_size > _MOST_BYTES_AT_ONCE:
                raise UserError(
                    f"{self._key}: expected {IMAGES} of {self.name} in C order, got Fortran's, of which all is read at "
                    "once; write it with numpy.ascontiguousarray"
                )
            self._whole = array_files.read_member(archive, IMAGES, _MOST_BYTES_AT_ONCE)
        self.fingerprint = hashlib.blake2b(f"{info.CRC} {info.file_size}".encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return int(self._shape[0])

    def _images(self, places: Sequence[int]) -> Iterator[Pixels]:
        shape = self._shape[1:]
        num_bytes = int(np.prod(shape))
        for place in places:
            if self._whole is not None:
                image = self._whole[place]
            else:
                with _undamaged(Path(self.name), self._key):
                    self._member.seek(self._begin + place * num_bytes)
                    image = np.frombuffer(self._member.read(num_bytes), np.uint8).reshape(shape)
            yield np.broadcast_to(image, (*shape[:2], 3))


def read_arrays(file: Path, key: str, names: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], set[str]]:
    """Those of the arrays that an archive holds, and the names of all that it holds; no pickles."""
    with _undamaged(file, key), array_files.open_archive(file) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        return {name: array_files.read_member(archive, name) for name in names if name in there}, there


@contextmanager
def _undamaged(file: Path, key: str) -> Iterator[None]:
    try:
        with array_files.reading():
            yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: expected an .npz archive, got {file}, which is none or damaged ({one_line(error):.120}); get it "
            "again"
        ) from error

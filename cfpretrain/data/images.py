"""Image files: which there are, whether they decode, and the crop that is stored. The door to PIL in the data plane.

The crop is ADM's: of the RGB image, PIL's box filter halves it while its short side is at least twice the wanted one,
the bicubic filter does the rest, and the middle is cut out. EXIF rotation and alpha are ignored, as ADM does.
"""

import csv
import errno
import hashlib
import io
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import cfpretrain
from cfpretrain.console import UserError, one_line
from cfpretrain.data.shards import ImagesInfo, Shards

PNG_LEVEL = 2  # of photos: a third of the time of PIL's own choice, and a tenth more bytes
UNLABELLED = "unlabelled"  # the one class of a table without labels

# What is decoded, with the suffixes under which a folder tree is searched for it. PIL knows more kinds, one of which
# runs an interpreter on the file.
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
Image.init()  # else PIL knows a kind by name only after it met a file of it
_KINDS = [kind for kind in _SUFFIXES if kind in Image.OPEN]
# What DALI decodes as PIL does, within 2 of 255, where that is not every mode of a kind.
_DALI_MODES = {"GIF": (), "AVIF": (), "TIFF": ("L", "RGB", "RGBA"), "JPEG2000": ("L", "RGB", "RGBA")}
_OF_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_TABLES = (".csv", ".jsonl")
_COLUMNS = ("path", "label", "caption")
# What cannot be written as UTF-8; of a path, which need not be, what no file has in its name.
_UNFIT = dict.fromkeys(_COLUMNS, re.compile("[\ud800-\udfff]")) | {"path": re.compile("[\0\ud800-\udc7f\udd00-\udfff]")}
# PIL converts others, 16-bit grey among them, by cutting off what exceeds 255: to white.
_EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 27)  # where PIL refuses to decode


# ---------------------------------------------------------------------------------------------------------------------
# Which images there are


class Row(NamedTuple):
    """An image to store; its id is its place in the listing."""

    path: str  # below the listing's root, or absolute
    label: int
    caption: str


@dataclass(frozen=True)
class Listing:
    """The images of a folder tree or a table, in a fixed order."""

    root: Path
    rows: Sequence[Row]
    class_names: tuple[str, ...]
    digest: str  # of paths, sizes of the files, labels, captions and class names
    ignored: str  # what was left out, for people; "" where nothing was


def list_images(images: Path, root: Path | None = None) -> Listing:
    """Lists a tree of class folders, or a table.

    A tree: each visible folder directly below `images` is a class, in the order of their names; its images are all
    visible files with an image's suffix, however deep, in the order of their paths. A table, .csv or .jsonl: the column
    `path` and, where wanted, `label` (a name or a number) and `caption`; the order is its own, and classes are in the
    order of their names; where all are numbers, these are the classes' places, from 0 on.

    Args:
        images: the tree's folder, or the table.
        root: what paths in a table are relative to; None: the table's folder.

    Raises:
        UserError: there is nothing of the kind, or it is not clear what an image's class is.
    """
    if os.path.isdir(images):
        if root is not None:
            raise UserError(f"--root: expected only with a table, got {root} with the folder {images}; leave it out")
        return _list_tree(images)
    if not os.path.exists(images):
        raise UserError(f"images: {images} does not exist; give a folder of class folders or a table (.csv, .jsonl)")
    if images.suffix.lower() not in _TABLES or not images.is_file():
        raise UserError(f"images: expected a folder of class folders or a table (.csv, .jsonl), got the file {images}")
    return _list_table(images, root or images.parent)


def _list_tree(root: Path) -> Listing:
    visible = sorted(entry.name for entry in _scan(root) if not entry.name.startswith("."))
    class_names = tuple(name for name in visible if (root / name).is_dir())
    stray = [name for name in visible if name not in set(class_names) and is_image_name(name)]
    if stray:
        raise UserError(
            f"images: expected images in class folders, got {root / stray[0]}{_and_more(stray)} in no class folder; "
            "move it into one, or give a table"
        )
    rows, sizes, num_ignored = [], [], 0
    for label, name in enumerate(class_names):
        found = sorted(files_below(root / name, f"{name}/"))
        of_class = [(path, size) for path, size in found if is_image_name(path)]
        if not of_class:
            raise UserError(f"images: class folder {root / name} holds no images; fill or remove it")
        rows += [Row(path, label, "") for path, _ in of_class]
        sizes += [size for _, size in of_class]
        num_ignored += len(found) - len(of_class)
    if not rows:
        raise UserError(f"images: expected class folders in {root}, got none; make one folder a class, or give a table")
    ignored = f"{num_ignored} files without an image's suffix" if num_ignored else ""
    return Listing(root, rows, class_names, _digest(rows, sizes, class_names), ignored)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"images: folder {folder} cannot be read ({error.strerror}); mend or remove it") from error


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by its suffix."""
    return any(Path(name).suffix.lower() in known for known in _SUFFIXES.values())


def files_below(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, int]]:
    """(path with the prefix, bytes) of the visible files below a folder; links are followed.

    Raises:
        UserError: a folder cannot be read, or links to one above itself.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise UserError(f"images: {folder} links to a folder above itself; remove the link")
    for entry in _scan(folder):
        if entry.name.startswith("."):
            continue
        is_link = entry.is_symlink()  # perhaps to itself, of which os.DirEntry.is_dir raises
        if os.path.isdir(entry) if is_link else entry.is_dir():
            yield from files_below(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
        elif is_link or entry.is_file():  # a broken link is an image that cannot be read
            yield prefix + entry.name, _size(entry)


def _size(entry: "os.DirEntry[str] | Path") -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _list_table(table: Path, root: Path) -> Listing:
    if not root.is_dir():
        raise UserError(f"--root: expected the folder that paths in {table} begin at, got {root}; correct it")
    records = list(_read_table(table))
    if not records:
        raise UserError(f"images: expected a row for each image in {table}, got none")
    columns = sorted({name for _, record in records for name in record})
    paths = [_text(table, line, record, "path") for line, record in records]
    for (line, _), path in zip(records, paths, strict=True):
        if not path:
            raise UserError(f"images: {table}, line {line}: expected a path, got none; add the column `path`")
    labels, class_names = _classes(table, records)
    captions = [_text(table, line, record, "caption") for line, record in records]
    rows = list(map(Row, paths, labels, captions))
    ignored = [name for name in columns if name not in _COLUMNS]
    return Listing(
        root,
        rows,
        class_names,
        _digest(rows, [_size(root / path) for path in paths], class_names),
        f"columns {', '.join(ignored)}" if ignored else "",
    )


def _read_table(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, columns) of each row."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_csv(table, file) if table.suffix.lower() == ".csv" else _read_jsonl(table, file)
    except OSError as error:
        raise UserError(f"images: {table} cannot be read ({error.strerror}); mend it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"images: {table}: expected UTF-8 text ({error}); save it so") from error


def _read_csv(table: Path, file: io.TextIOBase) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        if "path" not in (reader.fieldnames or ()):
            got = ", ".join(reader.fieldnames or ()) or "nothing"
            raise UserError(f"images: {table}: expected a first line that names the column path, got {got:.80}; add it")
        for record in reader:
            if None in record or None in record.values():
                wanted = len(reader.fieldnames or ())
                raise UserError(
                    f"images: {table}, line {reader.line_num}: expected {wanted} values, as the first line names, "
                    f"got {'more' if None in record else 'fewer'}; mend it (quote texts that hold commas)"
                )
            yield reader.line_num, record
    except csv.Error as error:
        raise UserError(f"images: {table}, line {reader.line_num}: expected CSV ({error}); mend it") from error


def _read_jsonl(table: Path, file: io.TextIOBase) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"images: {table}, line {line}: expected one JSON object ({error}); mend it") from error
        if not isinstance(record, dict):
            raise UserError(f"images: {table}, line {line}: expected one JSON object, got {text.strip():.40}; mend it")
        yield line, record


def _text(table: Path, line: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str | None) or _UNFIT[column].search(value or ""):
        raise UserError(f"images: {table}, line {line}: expected a text as {column}, got {value!r:.40}; mend it")
    return value or ""


def _classes(table: Path, records: list[tuple[int, dict[str, Any]]]) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row, and the class names."""
    given = [_label(table, line, record) for line, record in records]
    if not any(given):
        return [0] * len(given), (UNLABELLED,)
    if not all(given):
        line = records[given.index("")][0]
        raise UserError(f"images: {table}, line {line}: expected a label, as in other rows, got none; add it")
    if all(re.fullmatch("[0-9]+", label) for label in given):
        labels = list(map(int, given))
        return labels, _numbered(table, labels)
    class_names = sorted(set(given))
    number_of = {name: number for number, name in enumerate(class_names)}
    return [number_of[label] for label in given], tuple(class_names)


def _numbered(table: Path, labels: Sequence[int]) -> tuple[str, ...]:
    """The names of classes that are numbered; UserError where a number is left out, since all would move up."""
    num_classes, found = max(labels) + 1, set(labels)
    if len(found) < num_classes:
        missing = next(number for number in range(num_classes) if number not in found)
        more = num_classes - len(found) - 1
        raise UserError(
            f"images: {table}: expected images of every class from 0 to {num_classes - 1}, since all labels are "
            f"numbers, got none of {missing}{f' and {more} more' if more else ''}; number the classes from 0 on "
            f"without gaps, or give them names, such as class{num_classes - 1}"
        )
    return tuple(map(str, range(num_classes)))


def _label(table: Path, line: int, record: dict[str, Any]) -> str:
    value = record.get("label")
    if value is None:
        return ""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    text = str(value)
    is_wrong = re.fullmatch("-[0-9]+|[0-9]{1000,}", text) or _UNFIT["label"].search(text)
    if not (isinstance(value, str) or is_number) or is_wrong:
        raise UserError(
            f"images: {table}, line {line}: expected a name or a number from 0 on as label, got {value!r:.40}; mend it"
        )
    return text


def _digest(rows: Sequence[Row], sizes: Sequence[int], class_names: Sequence[str]) -> str:
    digest = hashlib.blake2b(json.dumps(class_names).encode(), digest_size=16)
    for row, size in zip(rows, sizes, strict=True):
        digest.update(json.dumps([*row, size]).encode())
    return digest.hexdigest()


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# What is stored of an image


class RejectedImageError(Exception):
    """An image that cannot be stored; the message says why, and is the same for the same file."""


@dataclass(frozen=True)
class Storing:
    """How images are stored.

    Attributes:
        store: "lossless", a PNG of the crop, or "original", the bytes of the file, which DALI decodes and crops later.
        image_size: pixels a side of the crop.
        is_grey: of one channel instead of RGB.
    """

    store: str
    image_size: int
    is_grey: bool = False

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.is_grey else 3


def read_samples(
    listing: Listing, ids: Iterable[int], how: Storing, on_image: Callable[[int], None], rejected: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The samples of image shards, without their checksums.

    Args:
        listing: the images.
        ids: which of them.
        how: how they are stored.
        on_image: called with the id of each image before it is read.
        rejected: id, path and reason of each image that cannot be stored are added here.
    """
    for id in ids:
        row = listing.rows[id]
        on_image(id)
        try:
            stored = stored_image(read_file(listing.root / row.path), how)
        except RejectedImageError as error:
            rejected.append({"id": id, "path": row.path, "reason": str(error)})
            continue
        yield {"id": id, "label": row.label, "caption": row.caption, "image": stored}


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        RejectedImageError: it is not there, no file, or cannot be read, and that is the file's own fault.
        UserError: the disk or the network fails.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may never end
            raise RejectedImageError("the file cannot be read: it is no regular file")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        # A disk that goes away for a moment must not cost images for good.
        if error.errno not in _OF_THE_FILE or not path.parent.is_dir():
            raise UserError(
                f"images: {path} cannot be read ({reason}); mend that, and the same command goes on"
            ) from error
        raise RejectedImageError(f"the file cannot be read: {reason}") from error


def stored_image(data: bytes, how: Storing) -> bytes:
    """What is stored of an image file, which is decoded in any case.

    Raises:
        RejectedImageError: it cannot be decoded, or DALI could not decode or crop it later.
    """
    image, kind, mode = _decode(data, how.is_grey)
    if how.store == "lossless":
        return _png(centre_crop(image, how.image_size))
    _scaled(image, how.image_size)
    if mode not in _DALI_MODES.get(kind, _EIGHT_BIT_MODES):
        raise RejectedImageError(f"DALI does not decode {kind} of mode {mode} as PIL does; --store lossless stores it")
    return data


def read_image(data: bytes, is_grey: bool = False) -> Image.Image:
    """Decodes the bytes of an image file: its first frame, in mode RGB, or of that the grey values in mode L.

    Raises:
        RejectedImageError: it is empty, cut short, damaged, of an unknown kind, or too large for PIL.
    """
    return _decode(data, is_grey)[0]


def _decode(data: bytes, is_grey: bool) -> tuple[Image.Image, str, str]:
    """The image, its kind, and its mode in the file."""
    if not data:
        raise RejectedImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of images above half of PIL's limit
            with Image.open(io.BytesIO(data), formats=_KINDS) as file:
                if file.mode not in _EIGHT_BIT_MODES:
                    raise ValueError(f"its values (mode {file.mode}) do not fit 8 bits; scale them first")
                image, kind, mode = file.convert("RGB"), str(file.format), file.mode
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise RejectedImageError(f"no image of a known kind, or a damaged one (known: {', '.join(_KINDS)})") from error
    except Exception as error:
        # Decoders trip over damaged files with whatever exception comes.
        raise RejectedImageError(f"it cannot be decoded: {one_line(error):.200}") from error
    if not min(image.size):
        raise RejectedImageError(f"it has no pixels: {image.width} x {image.height}")
    return image.convert("L") if is_grey else image, kind, mode


def centre_crop(image: Image.Image, image_size: int) -> Image.Image:
    """ADM's centre crop: `image_size` pixels a side.

    Raises:
        RejectedImageError: the image is so thin that it would exceed PIL's limit once its short side fits.
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = _scaled(image, image_size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))


def _scaled(image: Image.Image, image_size: int) -> tuple[int, int]:
    """Width and height once the short side is `image_size`."""
    scale = image_size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_PIXELS:
        raise RejectedImageError(
            f"it is too thin: {image.width} x {image.height} would become {width} x {height} for the crop"
        )
    return width, height


def _png(image: Image.Image) -> bytes:
    image.info.clear()  # colour profile and transparency would be written too
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def versions() -> dict[str, str]:
    """Of what decides the pixels and bytes that are stored."""
    return {"cfpretrain": cfpretrain.__version__, "pillow": PIL.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# Reading what was stored


def read_all_images(folder: str | Path, key: str) -> tuple[Tensor, Tensor]:
    """Reads a whole folder of lossless image shards into memory: for small sets, as evaluation wants them.

    Args:
        folder: of image shards.
        key: config key or option that gave it, for messages.

    Returns:
        images_BCYX uint8, labels_B int64.

    Raises:
        UserError: as `Shards`; or they are not lossless images.
    """
    shards = Shards(folder, key)
    info = shards.info
    if not isinstance(info, ImagesInfo) or info.store != "lossless":
        got = f"images stored as {info.store}" if isinstance(info, ImagesInfo) else "latents"
        raise UserError(
            f"{key}: expected shards of images, written by tools/make_shards.py with --store lossless, got {got} in "
            f"{folder}"
        )
    images_BCYX = np.empty((len(shards), info.channels, info.image_size, info.image_size), np.uint8)
    labels_B = np.empty(len(shards), np.int64)
    for i in range(len(shards)):
        sample = shards.sample(i)
        pixels = np.asarray(read_image(sample["image"], info.channels == 1))
        images_BCYX[i] = pixels.reshape(info.image_size, info.image_size, info.channels).transpose(2, 0, 1)
        labels_B[i] = sample["label"]
    return torch.from_numpy(images_BCYX), torch.from_numpy(labels_B)

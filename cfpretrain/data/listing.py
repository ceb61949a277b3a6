"""The images of a tree of class folders or of a table, in a fixed order; and which of them are held out."""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from cfpretrain.base.console import UserError, count
from cfpretrain.data.images import SUFFIXES
from cfpretrain.data.tables import TABLES, UNLABELLED, read_table

# Suffixes of images that PIL does not read, or not as they look.
_OTHER_KINDS = """
    .heic .heif .hif .avif .jxl .jxr .bpg .psd .psb .xcf .kra .svg .svgz .eps .ai .exr .hdr .tga .dds .ico .icns .pcx
    .dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .orf .rw2 .raf .pef .srw .3fr .iiq .raw .dcm .dicom .nii
"""
_UNREAD = frozenset(_OTHER_KINDS.split()) - SUFFIXES
# Names, in small letters, that operating systems, disk stations and archivers put beside people's files.
_OF_SYSTEMS = frozenset(
    (
        *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx", "lost+found", "thumbs.db"),
        *("ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "recycler", "__pycache__"),
    )
)
_SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"))
_NO_NAMES = frozenset(("nan", "none", "null", "na", "n/a", "<na>", "?"))
_MOST_NAMED = 5


class Row(NamedTuple):
    """An image to store, or the images of an interleaved sample; its id is its place in the listing."""

    path: str  # below the listing's root, or absolute; of the first image
    label: int
    caption: str
    num_bytes: int  # of the file; -1 where that is not known
    segments: str = ""  # of an interleaved sample, as a shard has them
    others: tuple[tuple[str, int], ...] = ()  # path and bytes of its further images

    @property
    def paths(self) -> list[str]:
        """Of all of its images."""
        return [self.path, *(path for path, _ in self.others)]


@dataclass(frozen=True)
class Listing:
    """The images of a folder tree or a table, in a fixed order."""

    root: Path
    rows: Sequence[Row]
    class_names: tuple[str, ...]
    ignored: str = ""  # for people; "" where nothing was left out
    warnings: tuple[str, ...] = ()  # of possible mistakes, for people
    part: str = "all"  # of the images: see `hold_out`

    def identity(self) -> dict[str, Any]:
        """All that the shards depend on, JSON-able: counts, and a hash of each column."""
        interleaved = {"segments": _digest([f"{row.segments} {row.others}" for row in self.rows])}
        return {
            "part": self.part,
            "images": len(self.rows),
            "classes": len(self.class_names),
            "class_names": _digest(self.class_names),
            "paths": _digest([row.path for row in self.rows]),
            "file_sizes": _digest([row.num_bytes for row in self.rows]),
            "labels": _digest([row.label for row in self.rows]),
            "captions": _digest([f"{i} {row.caption}" for i, row in enumerate(self.rows) if row.caption]),
            **(interleaved if self.is_interleaved else {}),
        }

    @property
    def is_interleaved(self) -> bool:
        """Whether rows are interleaved samples, which all are or none."""
        return any(row.segments for row in self.rows[:1])


def _digest(value: str | Sequence[str | int]) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def list_images(images: Path, root: Path | None = None, ignore_columns: Sequence[str] = ()) -> Listing:
    """Lists a tree of class folders, or a table.

    A tree: each folder directly below `images` is a class; its images are all files with an image's suffix, however
    deep, in the order of their paths. Hidden files and what systems put there are left out. A table, .csv or .jsonl:
    see `tables`; the order is its own. Classes are in the order of their names: as numbers, where all are; in a table
    these are the classes' places, from 0 on.

    Args:
        images: the tree's folder, or the table.
        root: what paths in a table are relative to; None: the table's folder.
        ignore_columns: of a table.
    """
    if os.path.isdir(images):
        for option, value in (("--root", root), ("--ignore-columns", " ".join(ignore_columns))):
            if value:
                raise UserError(
                    f"{option}: expected only with a table, got {value} with the folder {images}; leave it out"
                )
        return _list_tree(images)
    if not os.path.exists(images):
        raise UserError(f"images: {images} does not exist; give a folder of class folders or a table (.csv, .jsonl)")
    if images.suffix.lower() not in TABLES or not images.is_file():
        raise UserError(
            f"images: expected a folder of class folders or a table (.csv, .jsonl), got the file {images}; save it as "
            "one of these"
        )
    return _list_table(images, root or images.parent, ignore_columns)


# ---------------------------------------------------------------------------------------------------------------------
# Trees


def _list_tree(root: Path) -> Listing:
    finder = ImageFinder()
    entries = sorted(entry.name for entry in finder.visible(root))
    folders = [name for name in entries if (root / name).is_dir()]
    files = sorted(set(entries) - set(folders))
    stray = [name for name in files if _suffix(name) in SUFFIXES or _suffix(name) in _UNREAD]
    if stray:
        raise UserError(
            f"images: expected images in class folders, got {root / stray[0]}{_and_more(stray)} in no class folder; "
            "move it into one, or give a table"
        )
    finder.leave_out(files)
    _refuse_splits(root, folders)
    class_names = _in_order(root, folders)
    rows: list[Row] = []
    for label, name in enumerate(class_names):
        found = finder.images_below(root / name, f"{name}/")
        if not found:
            of_class = ImageFinder()
            of_class.images_below(root / name)
            raise UserError(f"images: class folder {root / name} holds no images{of_class}; fill or remove it")
        rows += [Row(path, label, "", size) for path, size in found]
    if not rows:
        raise UserError(
            f"images: expected class folders in {root}, got none{finder}; make one folder a class, or give a table"
        )
    warnings = [*finder.warnings(), *_odd_folders(root, rows, class_names), *_odd_names(class_names)]
    return Listing(root, rows, class_names, finder.ignored(), tuple(warnings))


class ImageFinder:
    """Finds image files in folders, and counts what it leaves out."""

    def __init__(self) -> None:
        self._unread: Counter[str] = Counter()  # by suffix
        self._others: Counter[str] = Counter()  # by suffix
        self._hidden = 0
        self._of_systems: Counter[str] = Counter()  # by name

    def visible(self, folder: Path) -> "Iterator[os.DirEntry[str]]":
        """The entries of a folder, without hidden ones and those of systems."""
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError as error:
            raise UserError(f"images: folder {folder} cannot be read ({error.strerror}); fix or remove it") from error
        for entry in entries:
            if entry.name.lower() in _OF_SYSTEMS:
                self._of_systems[entry.name] += 1
            elif entry.name.startswith("."):
                self._hidden += 1
            else:
                yield entry

    def images_below(self, folder: Path, prefix: str = "") -> list[tuple[str, int]]:
        """(path with the prefix, bytes) of the images below a folder, in order; links are followed."""
        found: list[tuple[str, int]] = []
        for path, size in self._files_below(folder, prefix, ()):
            if _suffix(path) in SUFFIXES:
                found.append((path, size))
            else:
                self.leave_out([path])
        return sorted(found)

    def _files_below(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, int]]:
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(f"images: {folder} links to a folder above itself; remove the link")
        for entry in self.visible(folder):
            is_link = entry.is_symlink()  # perhaps to itself, of which os.DirEntry.is_dir raises
            if os.path.isdir(entry) if is_link else entry.is_dir():
                yield from self._files_below(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            elif is_link or entry.is_file():  # a broken link is an image that cannot be read
                yield prefix + entry.name, _size(entry)

    def leave_out(self, names: Iterable[str]) -> None:
        """Counts files that are no images to read."""
        for name in names:
            suffix = _suffix(name)
            (self._unread if suffix in _UNREAD else self._others)[suffix] += 1

    def warnings(self) -> list[str]:
        """A warning where images of kinds that are not read are left out."""
        unread, kinds = self._unread.total(), _by_kind(self._unread)
        text = f"{unread} images of a kind that is not read here ({kinds}) are left out: convert them, e.g. to PNG"
        return [text] if unread else []

    def ignored(self) -> str:
        """The other files that are left out; "" where there are none."""
        parts = []
        if self._others:
            parts.append(f"{self._others.total()} files without an image's suffix ({_by_kind(self._others)})")
        if self._hidden:
            parts.append(f"{self._hidden} hidden ones")
        if self._of_systems:
            parts.append(f"what systems put there ({_by_kind(self._of_systems, str)})")
        return ", ".join(parts)

    def __str__(self) -> str:
        """The files that were found instead of images, in brackets."""
        said = [*self.warnings(), self.ignored()]
        return f" ({'; '.join(text for text in said if text)})" if any(said) else ""


def _by_kind(counts: Counter[str], show: Any = lambda suffix: suffix[1:].upper() or "none") -> str:
    named = [f"{show(kind)}: {count}" for kind, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]
    return ", ".join(named[:_MOST_NAMED]) + ", ..." * (len(named) > _MOST_NAMED)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _size(path: "os.DirEntry[str] | Path") -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _in_order(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Class folders, in the order of numbers where all are numbers."""
    if not all(re.fullmatch("[0-9]+", name) for name in folders):
        return tuple(folders)
    of_number: dict[int, str] = {}
    for name in folders:
        other = of_number.setdefault(int(name), name)
        if other != name:
            raise UserError(
                f"images: expected a number for one class folder only, got {root / other} and {name}; rename one"
            )
    return tuple(of_number[number] for number in sorted(of_number))


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    """UserError for the parent of train/ and val/, which would become the classes."""
    splits = [name for name in folders if name.lower() in _SPLITS]
    if len(splits) == len(folders) == 1 and not any(map(os.path.isdir, ImageFinder().visible(root / splits[0]))):
        return  # the one class may be called so
    if len(splits) > 1 or (splits and len(folders) == 1):
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise UserError(
            f"images: expected class folders in {root}, got parts of a data set ({', '.join(splits)}); give one, such "
            f"as {root / first}, or a table where they are classes"
        )


def _odd_folders(root: Path, rows: Sequence[Row], class_names: Sequence[str]) -> Iterator[str]:
    below = {tuple(row.path.split("/")[:2]) for row in rows if row.path.count("/") > 1}
    is_deep = below and all(row.path.count("/") > 1 for row in rows)
    if is_deep and len(below) > len(class_names):
        yield (
            f"the classes are the folders of {root}, {', '.join(class_names[:_MOST_NAMED])}"
            f"{', ...' * (len(class_names) > _MOST_NAMED)}, and not the {len(below)} folders inside of them, such as "
            f"{'/'.join(min(below))}; where those are meant, give the folder that holds them"
        )
    elif len(class_names) == 1:
        yield f"all {len(rows)} images are of one class, {class_names[0]}, the only folder in {root}"


def _odd_names(class_names: Sequence[str]) -> Iterator[str]:
    """Warnings of names that may be meant for one class."""
    alike: dict[str, str] = {}
    for name in class_names:
        other = alike.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            yield f"{other!r} and {name!r} are two classes, whose names differ in case, spaces or accents alone"


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _list_table(file: Path, root: Path, ignore_columns: Sequence[str]) -> Listing:
    if not root.is_dir():
        raise UserError(f"--root: expected the folder that paths in {file} begin at, got {root}; correct it")
    table = read_table(file, ignore_columns)
    files = [[(path, _size(root / path)) for path in paths] for paths in table.paths]
    columns = zip(files, table.labels, table.captions, table.segments, strict=True)
    rows = [
        Row(first, label, caption, num_bytes, segments, tuple(others))
        for ((first, num_bytes), *others), label, caption, segments in columns
    ]
    ignored = f"columns {', '.join(table.ignored)}" if table.ignored else ""
    return Listing(root, rows, table.class_names, ignored, tuple(_odd_rows(rows, table.class_names)))


def _odd_rows(rows: Sequence[Row], class_names: Sequence[str]) -> Iterator[str]:
    kind = "samples" if any(row.segments for row in rows) else "images"
    if class_names == (UNLABELLED,):
        yield f"no row has a label: all {len(rows)} {kind} are of one class, {UNLABELLED}"
    elif len(class_names) == 1:
        yield f"all {len(rows)} {kind} are of one class, {class_names[0]}"
    if num_repeated := len(rows) - len(set(rows)):
        yield f"{count(num_repeated, 'row repeats', 'rows repeat')} an earlier one: each counts as one more image"
    labels: dict[str, int] = {}
    alone = [row for row in rows if not row.segments]
    contradicted = [row.path for row in alone if labels.setdefault(row.path, row.label) != row.label]
    if contradicted:
        yield f"{contradicted[0]} has more than one label{_and_more(contradicted)}: each row counts as one image"
    yield from _odd_names(class_names)
    for name in class_names:
        if name.lower() in _NO_NAMES and len(class_names) > 1:  # a program may have written it for no label
            yield f"{name!r} is a class like the others; where it stands for no label, leave out its images"


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def hold_out(listing: Listing, share: float) -> tuple[Listing, Listing]:
    """Splits a listing: the rest, and a share of each class.

    The hashes of paths alone decide, so other options and the order of rows change nothing, and few images change sides
    when more are added. Rows of one path go together; of an interleaved sample, that of its first image.

    Args:
        listing: of all.
        share: above 0, below 1; of each class at least one image is held out, where it has two, and one is left.
    """
    of_class: dict[int, set[str]] = {}
    for row in listing.rows:
        of_class.setdefault(row.label, set()).add(row.path)
    held: set[str] = set()
    for paths in of_class.values():
        count = min(max(1, math.floor(share * len(paths) + 0.5)), len(paths) - 1)
        held.update(sorted(paths, key=_digest)[:count])
    if not held:
        raise UserError("--hold-out: expected some class of two images or more, got none; leave it out")
    rest = [row for row in listing.rows if row.path not in held]
    if len({row.label for row in rest}) < len(of_class):
        raise UserError(
            "--hold-out: expected images left in each class, got none in one, since paths have several labels"
        )
    rows = [row for row in listing.rows if row.path in held]
    return (
        replace(listing, rows=rest, part=f"all but {share:g} of each class"),
        replace(listing, rows=rows, part=f"{share:g} of each class"),
    )

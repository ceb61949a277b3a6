"""Generated images as files: all of them or nothing, made by any number of ranks, resumable after a kill.

Either a folder of PNG, or one `.npz` as ADM's evaluation reads it: `arr_0`, uint8 [N, Y, X, 3], and `arr_1`, the
classes, int64 [N]; of prompts these are numbers, and `arr_2` has the text of each image. Until all images are there
they lie in a hidden folder beside, `.NAME.unfinished`, in files that are whole; the bytes of the result depend neither
on ranks nor on kills.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from cfpretrain.base import files, outputs
from cfpretrain.base.console import UserError
from cfpretrain.base.differences import differences
from cfpretrain.base.files import open_to_read, read_bytes, read_text
from cfpretrain.data.tables import as_cell
from cfpretrain.evaluation import array_files
from cfpretrain.evaluation.given_images import is_archive
from cfpretrain.evaluation.pictures import to_rgb, write_png

_TABLE_FILE = "labels.csv"
_JOINED_FILE = "joined.npz"  # until it has the name of the result
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class ImageSet:
    """Images in the making.

    Args:
        out: the result; a name that ends in .npz is one file, others are folders of PNG.
        labels: the class of each image, or the number of its prompt; image i has id i.
        names: one for each class; or the prompts.
        batch_size: images that are made together: ids n * batch_size to (n + 1) * batch_size - 1 are batch n.
        plan: JSON-able; whose images these are and how they are made. Work done under another plan is refused.
        has_prompts: labels are numbers of prompts.
    """

    def __init__(
        self,
        out: Path,
        labels: Sequence[int],
        names: Sequence[str],
        batch_size: int,
        plan: Mapping[str, Any],
        has_prompts: bool = False,
    ) -> None:
        self.out, self.labels, self.names, self.batch_size = out, labels, names, batch_size
        self._has_prompts = has_prompts
        self._work = outputs.Unfinished(out, "--out", plan)
        self.unfinished = self._work.folder
        self._is_damaged = False
        self._is_archive = is_archive(out)

    def is_complete(self) -> bool:
        """Whether the result is there, made by the same plan, and no file of it is missing or cut short."""
        if not os.path.lexists(self.out):
            return False
        advice = "delete it, or choose another --out"
        try:
            found = outputs.parse_plan(self._plan_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--out: {self.out} is there already and is none of these images; {advice}") from error
        different = differences(found, self._work.plan)
        if different:
            raise UserError(f"--out: {self.out} holds images of other settings already ({different}); {advice}")
        if not self._is_archive:
            with suppress(OSError):
                files.remove(self.out / outputs.LOCK_FILE)  # of a kill while it got its name
            self._is_damaged = bool(self._missing_from(self.out)) or not self._has_table()
            if self._is_damaged:
                return False
        with suppress(OSError):
            files.remove(self.unfinished)
        return True

    def _plan_text(self) -> str:
        if self._is_archive:
            with array_files.open_archive(self.out) as archive:
                return archive.comment.decode()
        return read_text(self.out / self._work.plan_file.name)

    def begin(self) -> None:
        """Makes the unfinished folder, or goes on with it, or with a result that `is_complete` found damaged.

        One process calls it, before any `write`; it keeps others away until it ends.
        """
        with self._work.writing():
            if self._is_damaged and not os.path.lexists(self.unfinished):
                files.move(self.out, self.unfinished)
        self._work.begin()
        if os.path.lexists(self.out):
            raise UserError(f"--out: {self.out} is there, and so is {self.unfinished}; delete one of them")

    def missing(self) -> list[int]:
        """The batches that are missing."""
        return self._missing_from(self.unfinished)

    def _missing_from(self, folder: Path) -> list[int]:
        with os.scandir(folder) as entries:
            there = {entry.name for entry in entries if not entry.name.endswith(".png") or _is_whole_png(entry.path)}
        num_batches = -(-len(self.labels) // self.batch_size)
        return [number for number in range(num_batches) if not there.issuperset(self._files(number))]

    def count(self, numbers: Iterable[int]) -> int:
        """Images of these batches."""
        return sum(len(self._ids(number)) for number in numbers)

    def _ids(self, number: int) -> range:
        return range(len(self.labels))[number * self.batch_size : (number + 1) * self.batch_size]

    def _files(self, number: int) -> list[str]:
        if self._is_archive:
            return [f"batch_{number:06d}.npy"]
        return [_png_name(i) for i in self._ids(number)]

    def write(self, ids: Tensor, images_BCYX: Tensor) -> None:
        """Writes one batch, the images of its ids in [0, 1], grey ones as RGB; any process may."""
        images_BYXC = to_rgb(images_BCYX, (0.0, 1.0))
        with self._work.writing():
            if self._is_archive:
                (name,) = self._files(int(ids[0]) // self.batch_size)
                files.replace(self.unfinished / name, lambda opened: array_files.write_npy(opened, images_BYXC))
                return
            for i, image_YXC in zip(ids.tolist(), images_BYXC, strict=True):
                write_png(self.unfinished / _png_name(i), image_YXC)

    def finish(self) -> None:
        """Gives the result its name; one process calls it, once nothing is missing."""
        missing = self.missing()
        if missing:
            raise RuntimeError(
                f"{self.out}: batches {missing[:5]} of {len(missing)} that are missing: it is not finished"
            )
        with self._work.writing():
            if self._is_archive:
                joined = self.unfinished / _JOINED_FILE
                files.replace(joined, self._join)
                self._work.publish(joined)
            else:
                files.replace(self.unfinished / _TABLE_FILE, self._table())
                self._work.publish()

    def _has_table(self) -> bool:
        try:
            table = self._table()
            return read_bytes(self.out / _TABLE_FILE, max_bytes=len(table)) == table
        except OSError:
            return False

    def _table(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        # The number too: several classes may have one name, and a name may look like the number of another.
        writer.writerow(["path", "label", "index"])
        writer.writerows((_png_name(i), as_cell(self.names[label]), label) for i, label in enumerate(self.labels))
        return text.getvalue().encode(errors="surrogateescape")  # names of folders need not be UTF-8

    def _join(self, opened: IO[bytes]) -> None:
        """All batches as one array, of which one at a time is in memory."""
        parts = [self.unfinished / self._files(number)[0] for number in range(-(-len(self.labels) // self.batch_size))]
        shape = (len(self.labels), *array_files.load(parts[0], is_mapped=True).shape[1:])
        # Members without a time of their own: the bytes depend on the images alone.
        with zipfile.ZipFile(opened, "w") as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(array_files.load(part).data)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, np.asarray(self.labels, np.int64), version=(1, 0))
            if self._has_prompts:
                prompts = np.asarray([self.names[label] for label in self.labels])
                with archive.open(zipfile.ZipInfo("arr_2.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, prompts, version=(1, 0))
            archive.comment = json.dumps(self._work.plan).encode()


def _png_name(i: int) -> str:
    return f"{i:06d}.png"


def _is_whole_png(path: str) -> bool:
    try:
        with open_to_read(Path(path)) as file:
            begin = file.read(len(files.PNG_BEGIN))
            file.seek(max(0, os.fstat(file.fileno()).st_size - len(_PNG_END)))
            return (begin, file.read()) == (files.PNG_BEGIN, _PNG_END)
    except OSError:
        return False

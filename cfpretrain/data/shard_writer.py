"""Writing a shard folder, shard by shard: by any number of processes, over any number of kills, all of it or nothing.

Every shard is made of a fixed slice of the input, so its bytes depend neither on who writes it nor on when. Until all
are there they lie in a hidden folder beside the final one, `.NAME.unfinished`, with a record of each; the folder gets
its name once everything is on disk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.base.files import read_json
from cfpretrain.base.plans import differences
from cfpretrain.data.mosaic import MDSWriter
from cfpretrain.data.shards import (
    HASH,
    INDEX_FILE,
    INFO_FILE,
    INFO_HASH,
    MAX_ID,
    Info,
    Shards,
    checksum,
    info_text,
    read_plan,
)

_PLAN_FILE, _LOCK_FILE, _RECORDS = "plan.json", "lock", "records"
_MAX_SHARD_BYTES = (1 << 32) - (1 << 24)  # MDS counts in 32 bits; the rest is left for its head

Record = Mapping[str, Any]


class ShardWriter:
    """A shard folder in the making.

    Args:
        folder: the final folder.
        columns: name -> MDS encoding, e.g. `shards.image_columns()`.
        plan: JSON-able; says what is made of what, and how. Work done under another plan is refused.
    """

    def __init__(self, folder: str | Path, columns: Mapping[str, str], plan: Mapping[str, Any]) -> None:
        self.folder, self.columns = Path(folder), dict(columns)
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))  # as it will be read
        self.unfinished = self.folder.parent / f".{self.folder.name}.unfinished"
        self._lock: int | None = None

    def is_complete(self) -> bool:
        """Whether the final folder is there already, made by the same plan.

        Raises:
            UserError: something else lies there, or a folder can never lie there.
        """
        with self._writing():
            if self.folder.exists() and not self.folder.is_dir():
                raise UserError(f"{self.folder} is a file; give the name of a folder to write shards to")
            if not self.folder.is_dir() or not any(self.folder.iterdir()):
                self._check_place()
                return False
        advice = "delete it or choose another folder"
        try:
            Shards(self.folder, key=str(self.folder))
        except UserError as error:
            raise UserError(
                f"folder {self.folder} is not empty and holds no complete shards ({error}); {advice}"
            ) from error
        different = differences(read_plan(self.folder), self.plan)
        if different:
            raise UserError(f"folder {self.folder} holds other shards already ({different}); {advice}")
        with suppress(OSError):  # complete shards need no room
            self._clean_up()
        return True

    def _check_place(self) -> None:
        """Refuses, before the work, what the finished folder could not take the place of after it."""
        if self.folder.is_symlink() or self.folder.is_mount() or self.folder.name in ("", ".."):
            raise UserError(
                f"{self.folder} is a link, a mount point, `.` or `..`, whose place no finished folder can take; give "
                "the plain name of a new folder"
            )

    def begin(self) -> None:
        """Makes the unfinished folder, or goes on with it; one process calls it, before any `write`, and holds it.

        A plan of which nothing was written yet gives way to another.

        Raises:
            UserError: another process holds it, it belongs to another plan, or it cannot be written.
        """
        with self._writing():
            try:
                files.make_folder(self.unfinished, private=True)
            except FileExistsError as error:
                raise UserError(
                    f"{error.filename} is in the way of {self.folder}: {error.strerror}; remove it"
                ) from error
            self._lock = files.try_lock(self.unfinished / _LOCK_FILE)
            if self._lock is None:
                raise UserError(f"{self.folder} is being written by another process; wait for its end, or stop it")
            plan_file = self.unfinished / _PLAN_FILE
            if plan_file.exists() and self._has_written():
                different = differences(self._read(plan_file), self.plan)
                if different:
                    raise UserError(
                        f"{self.unfinished} is the unfinished work of other settings ({different}); give those, or "
                        "delete it to begin again"
                    )
            files.make_folder(self.unfinished / _RECORDS)
            for folder in (self.unfinished, self.unfinished / _RECORDS):
                files.remove_leftovers(folder)
            files.replace(plan_file, json.dumps(self.plan))

    def _has_written(self) -> bool:
        return any(any(self.unfinished.glob(kind)) for kind in ("shard.*", f"{_RECORDS}/[0-9]*"))

    def missing(self, num_shards: int) -> list[int]:
        """The shards that are yet to be written, of `num_shards`."""
        return [number for number in range(num_shards) if not self._record_file(number).exists()]

    def write(
        self, number: int, samples: Iterable[Mapping[str, Any]], record: Callable[[], Record] | None = None
    ) -> None:
        """Writes one shard, whole or not at all; any process may, once `begin` was called.

        Args:
            number: of the shard.
            samples: in order; all columns but the checksum. None at all makes a shard without a file.
            record: called after the last sample; what it returns is kept for `records`.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with self._writing():
            temporary = files.hidden_beside(self.unfinished / f"{number:05d}")
            try:
                entry, num_samples, max_label = self._write_file(temporary, number, samples)
            finally:
                with suppress(OSError):
                    files.remove(temporary)
            kept = {"entry": entry, "num_samples": num_samples, "max_label": max_label}
            files.replace(self._record_file(number), json.dumps({**kept, "record": dict(record()) if record else {}}))

    def _write_file(
        self, temporary: Path, number: int, samples: Iterable[Mapping[str, Any]]
    ) -> tuple[dict[str, Any] | None, int, int]:
        writer = MDSWriter(columns=self.columns, out=str(temporary), hashes=[HASH], size_limit=None, max_workers=1)
        num_samples, num_bytes, max_label = 0, 0, -1
        try:
            for sample in samples:
                if sample.keys() != self.columns.keys() - {"checksum"} or not 0 <= sample["id"] < MAX_ID:
                    raise RuntimeError(f"shard {number}: sample {sample['id']} has columns {sorted(sample)}")
                writer.write({**sample, "checksum": np.uint32(checksum(sample))})
                num_samples, max_label = num_samples + 1, max(max_label, int(sample["label"]))
                num_bytes += len(writer.new_samples[-1])
                if num_bytes > _MAX_SHARD_BYTES:
                    raise UserError(
                        f"shard {number}: expected less than 4 GiB of samples in a shard; put fewer into one "
                        "(--images-per-shard)"
                    )
        except BaseException:
            # Leaving through the writer's own context manager would finish half a shard.
            writer.cancel_future_jobs()
            raise
        writer.finish()
        if not num_samples:
            return None, 0, -1
        (entry,) = read_json(temporary / INDEX_FILE)["shards"]
        written, entry["raw_data"]["basename"] = entry["raw_data"]["basename"], f"shard.{number:05d}.mds"
        files.flush(temporary / written)
        files.move(temporary / written, self.unfinished / f"shard.{number:05d}.mds")
        return entry, num_samples, max_label

    def record(self, number: int) -> dict[str, Any]:
        """What `write` was given to keep with a shard that is written."""
        kept: dict[str, Any] = self._kept(number)["record"]
        return kept

    def records(self, num_shards: int) -> list[dict[str, Any]]:
        """What `write` was given to keep, in the order of the shards."""
        return [self.record(number) for number in range(num_shards)]

    def num_samples(self, num_shards: int) -> int:
        """Samples in the shards written."""
        return sum(self._kept(number)["num_samples"] for number in range(num_shards))

    def finish(self, info: Info, num_shards: int, extra_files: Mapping[str, str] | None = None) -> None:
        """Gives the folder its name; a kill in the middle leaves something that `finish` ends.

        Args:
            info: description of all of it.
            num_shards: all of which were written.
            extra_files: further text files of the folder, name -> content.

        Raises:
            UserError: there are no samples, or not those that `info` says; the disk cannot be written.
        """
        kept = [self._kept(number) for number in range(num_shards)]
        num_samples = sum(one["num_samples"] for one in kept)
        if num_samples != info.num_samples:
            raise RuntimeError(f"{self.folder}: {num_samples} samples were written and {info.num_samples} announced")
        if not num_samples:
            raise UserError(f"{self.folder}: expected some samples, got none")
        if max(one["max_label"] for one in kept) >= len(info.class_names):
            raise RuntimeError(f"{self.folder}: a label is beyond the {len(info.class_names)} classes")
        description = info_text(info, self.plan)
        entries = [one["entry"] for one in kept if one["entry"] is not None]
        index = {
            "version": 2,
            "shards": entries,
            INFO_HASH: hashlib.new(HASH, description.encode()).hexdigest(),
        }
        texts = {**(extra_files or {}), INDEX_FILE: json.dumps(index), INFO_FILE: description}
        with self._writing():
            # Nothing that others put there gets the name.
            shards = [entry["raw_data"]["basename"] for entry in entries]
            files.clear(self.unfinished, *shards, _RECORDS, _PLAN_FILE, _LOCK_FILE)
            for name, text in texts.items():
                files.replace(self.unfinished / name, text)
            files.publish(self.unfinished, self.folder)
            self._clean_up()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clean_up(self) -> None:
        """Removes what a finished folder does not need; a kill may have come between."""
        for name in (_RECORDS, _PLAN_FILE, _LOCK_FILE):
            files.remove(self.folder / name)

    def _record_file(self, number: int) -> Path:
        return self.unfinished / _RECORDS / f"{number:05d}.json"

    def _kept(self, number: int) -> dict[str, Any]:
        return self._read(self._record_file(number))

    def _read(self, path: Path) -> dict[str, Any]:
        """A file of the unfinished folder."""
        try:
            return dict(read_json(path))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete {self.unfinished} to begin again") from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror or error}); fix that, and the same command goes on"
            ) from error


def merged_versions(records: Sequence[Record]) -> dict[str, str]:
    """The `versions` that the records of all shards name: another version may have begun than the one that ended."""
    names = records[0]["versions"]
    return {name: ", ".join(sorted({record["versions"][name] for record in records})) for name in names}

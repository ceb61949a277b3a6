"""Writing a shard folder, shard by shard: by any number of processes, over any number of kills, all of it or nothing.

A shard is made of a fixed slice of the input, so its bytes depend neither on its writer nor on the time. Until all
shards are written they are in the hidden folder of `outputs.Unfinished`, with a record of each.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.base.differences import differences
from cfpretrain.base.files import read_json
from cfpretrain.base.outputs import LOCK_FILE, Unfinished
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

_PLAN_FILE, _RECORDS = "plan.json", "records"
_MAX_SHARD_BYTES = (1 << 32) - (1 << 24)  # MDS counts in 32 bits; the rest is left for its head

Record = Mapping[str, Any]


class ShardWriter:
    """A shard folder in the making.

    Args:
        folder: the final folder.
        columns: name -> MDS encoding, e.g. `shards.image_columns()`.
        plan: JSON-able, all inputs and settings that the shards depend on. Work under another plan is refused.
    """

    def __init__(self, folder: str | Path, columns: Mapping[str, str], plan: Mapping[str, Any]) -> None:
        self.folder, self.columns = Path(folder), dict(columns)
        self.unfinished = Unfinished(self.folder, plan=plan, plan_file=_PLAN_FILE)

    def is_complete(self) -> bool:
        """Whether the final folder is there already, made by the same plan.

        UserError where it has other content, or could not be put in place after the work.
        """
        folder = self.folder
        with self.unfinished.writing():
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file; give the name of a folder to write shards to")
            if not folder.is_dir() or not any(folder.iterdir()):
                if folder.is_symlink() or folder.is_mount() or folder.name in ("", ".."):
                    raise UserError(
                        f"{folder} is a link, a mount point, `.` or `..`, whose place no finished folder can take; "
                        "give the plain name of a new folder"
                    )
                return False
        advice = "delete it or choose another folder"
        try:
            Shards(folder, key=str(folder))
        except UserError as error:
            raise UserError(f"folder {folder} is not empty and holds no complete shards ({error}); {advice}") from error
        different = differences(read_plan(folder), self.unfinished.plan)
        if different:
            raise UserError(f"folder {folder} holds other shards already ({different}); {advice}")
        self._clean_up()
        return True

    def begin(self) -> None:
        """Makes the unfinished folder, or goes on with it; one process calls it, before any `write`, and holds it.

        Another plan is accepted as long as no shard is written.
        """
        folder, records = self.unfinished.folder, self.unfinished.folder / _RECORDS
        self.unfinished.begin(lambda _: not any(folder.glob("shard.*")) and not any(records.glob("[0-9]*")))
        with self.unfinished.writing():
            files.make_folder(records)
            files.remove_leftovers(records)

    def missing(self, num_shards: int) -> list[int]:
        """The numbers of the shards that are not written yet."""
        return [number for number in range(num_shards) if not self._record_file(number).exists()]

    def write(
        self, number: int, samples: Iterable[Mapping[str, Any]], record: Callable[[], Record] | None = None
    ) -> None:
        """Writes one shard, whole or not at all; any process may call it after `begin`.

        Args:
            number: of the shard.
            samples: in order; all columns but the checksum. None at all makes a shard without a file.
            record: called after the last sample; its result is kept for `records`.
        """
        with self.unfinished.writing():
            temporary = files.hidden_beside(self.unfinished.folder / f"{number:05d}")
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
        files.move(temporary / written, self.unfinished.folder / f"shard.{number:05d}.mds")
        return entry, num_samples, max_label

    def record(self, number: int) -> dict[str, Any]:
        """The record of a shard that is written."""
        return dict(self._kept(number)["record"])

    def records(self, num_shards: int) -> list[dict[str, Any]]:
        """The records of all shards, in order."""
        return [self.record(number) for number in range(num_shards)]

    def finish(self, info: Info, num_shards: int, extra_files: Mapping[str, str] | None = None) -> None:
        """Gives the folder its name; after a kill in between, another call completes it.

        Args:
            info: description of all of it.
            num_shards: all are written.
            extra_files: further text files of the folder, name -> content.
        """
        kept = [self._kept(number) for number in range(num_shards)]
        num_samples = sum(one["num_samples"] for one in kept)
        if num_samples != info.num_samples:
            raise RuntimeError(f"{self.folder}: {num_samples} samples were written and {info.num_samples} announced")
        if not num_samples:
            raise UserError(f"{self.folder}: expected some samples, got none")
        if max(one["max_label"] for one in kept) >= len(info.class_names):
            raise RuntimeError(f"{self.folder}: a label is beyond the {len(info.class_names)} classes")
        description = info_text(info, self.unfinished.plan)
        entries = [one["entry"] for one in kept if one["entry"] is not None]
        info_hash = hashlib.new(HASH, description.encode()).hexdigest()
        index = {"version": 2, "shards": entries, INFO_HASH: info_hash}
        texts = {**(extra_files or {}), INDEX_FILE: json.dumps(index), INFO_FILE: description}
        with self.unfinished.writing():
            # The finished folder gets no file that others put there.
            shards = [entry["raw_data"]["basename"] for entry in entries]
            files.clear(self.unfinished.folder, *shards, _RECORDS, _PLAN_FILE, LOCK_FILE)
            for name, text in texts.items():
                files.replace(self.unfinished.folder / name, text)
        self.unfinished.publish()
        self._clean_up()

    def _clean_up(self) -> None:
        """Removes what a finished folder does not need, if possible; a kill may have prevented it before."""
        with suppress(OSError):
            for name in (_RECORDS, _PLAN_FILE, LOCK_FILE):
                files.remove(self.folder / name)

    def _record_file(self, number: int) -> Path:
        return self.unfinished.folder / _RECORDS / f"{number:05d}.json"

    def _kept(self, number: int) -> dict[str, Any]:
        file = self._record_file(number)
        with self.unfinished.reading(file):
            return dict(read_json(file))


def merged_versions(records: Sequence[Record]) -> dict[str, str]:
    """The `versions` in the records of all shards: they may differ, where a run was continued after an upgrade."""
    names = records[0]["versions"]
    return {name: ", ".join(sorted({record["versions"][name] for record in records})) for name in names}

"""Images -> image shards, by any number of worker processes and over any kills: same images, same shards.

A worker writes whole shards, one at a time. An image that cannot be stored is rejected with a reason, and images that
lose something are counted; the shard's record keeps both, so that the final description covers all runs.
"""

import ctypes
import json
import math
import mmap
import multiprocessing
import os
import queue
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from cfpretrain.base.background import how_it_ended
from cfpretrain.base.console import Progress, UserError, count, reason_of, say
from cfpretrain.base.stopping import leave_signals_to_the_rank
from cfpretrain.core import seeds
from cfpretrain.data.images import (
    ImageFormat,
    RejectedImageError,
    colour_name,
    describe_changes,
    read_file,
    stored_image,
    versions,
)
from cfpretrain.data.interleaved import columns_of_files, parse_column
from cfpretrain.data.listing import Listing, Row
from cfpretrain.data.shard_writer import ShardWriter, merged_versions
from cfpretrain.data.shards import ImagesInfo, image_columns, read_info

REJECTED_FILE = "rejected.jsonl"
_POLL_SECONDS = 0.25
_DEATH_SECONDS = 1.0
_NUM_SHOWN = 3  # rejected images named on the terminal
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def write_image_shards(
    parts: Sequence[tuple[Listing, Path]],
    image_format: ImageFormat,
    source: str,
    images_per_shard: int = 1024,
    num_workers: int = 1,
    max_rejected_share: float = 0.01,
) -> None:
    """Writes folders of image shards with worker processes, or the shards that are missing.

    Args:
        parts: the images of each folder, and the folder; all are checked before the first is written.
        image_format: how they are stored.
        source: where they come from, for people.
        images_per_shard: of the listing; rejected ones count.
        num_workers: processes.
        max_rejected_share: of all images of all parts.
    """
    begun = []
    for listing, out in parts:
        folder = _Folder(listing, out, image_format, images_per_shard)
        is_complete = folder.writer.is_complete()
        if not is_complete:
            folder.writer.begin()
        begun.append((folder, is_complete))
    rejected = _Rejected(sum(len(listing.rows) for listing, _ in parts), max_rejected_share)
    for folder, is_complete in begun:
        if is_complete:
            info = _report(folder.writer.folder, ": already there")
            rejected.add_finished(info.num_rejected, folder.writer.folder / REJECTED_FILE)
        else:
            rate = _write_missing(folder, num_workers, rejected)
            folder.finish(source)
            _report(folder.writer.folder, "", f", {rate:.0f} images/s")


def deal_images(num_images: int, images_per_shard: int) -> list[list[int]]:
    """The ids of each shard: dealt at random, the same for every listing of that length.

    Cut as listed, a shard would hold one class, and training, which mixes near shards only, batches of few classes.
    """
    dealt = seeds.permutation(seeds.key(0, "shards of images"), num_images).tolist()
    return [sorted(dealt[begin : begin + images_per_shard]) for begin in range(0, num_images, images_per_shard)]


def _report(folder: Path, before: str, behind: str = "") -> ImagesInfo:
    """Prints the content of a finished folder and what its images lost; returns its description."""
    info = read_info(folder, str(folder))
    assert isinstance(info, ImagesInfo)
    for line in describe_changes(info.changes, info.background, info.image_size):
        say(f"{folder}: {line}")
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    named = f" ({folder / REJECTED_FILE})" if info.num_rejected else ""
    kind = "interleaved sample" if info.most_segments else "image"
    say(
        f"{folder}{before}: {count(info.num_samples, kind)} of {count(len(info.class_names), 'class', 'classes')}, "
        f"{info.channels} x {info.image_size} x {info.image_size}, {info.store}; {info.num_rejected} rejected{named}; "
        f"{megabytes:.1f} MB{behind}"
    )
    return info


class _Rejected:
    """The images that could not be stored, of `num_images` in all folders."""

    def __init__(self, num_images: int, max_share: float) -> None:
        self._num_images, self._max_share = num_images, max_share
        self._images: list[dict[str, Any]] = []  # of folders in the making
        self._finished: dict[Path, int] = {}  # how many each file of a finished folder names

    @property
    def count(self) -> int:
        """Of all folders together."""
        return len(self._images) + sum(self._finished.values())

    def add_finished(self, num_images: int, file: Path) -> None:
        """Adds those of a finished folder, which `file` names; errors as of `add`."""
        if num_images:
            self._finished[file] = num_images
        self._check()

    def add(self, images: Sequence[dict[str, Any]]) -> None:
        """Adds those of a shard; UserError where they become too many."""
        self._images += images
        self._check()

    def _check(self) -> None:
        if self.count > self._max_share * self._num_images:
            self._images.sort(key=lambda image: image["id"])
            shown = [f"{image['path']}: {image['reason']}" for image in self._images[:_NUM_SHOWN]]
            shown += ["..."] if len(self._images) > _NUM_SHOWN else []
            shown += [f"{num} in {file}" for file, num in self._finished.items()]
            raise UserError(
                f"--max-rejected-share: expected at most {self._max_share:g} of {self._num_images} images to be "
                f"rejected, got {self.count} already: {'; '.join(shown)}. Raise the share to "
                f"{math.ceil(1000 * self.count / self._num_images) / 1000:g} or more, and it goes on; repair or "
                "remove them, and it begins again"
            )


class _Folder:
    """A folder of image shards in the making; workers are forked with it."""

    def __init__(self, listing: Listing, out: Path, image_format: ImageFormat, images_per_shard: int) -> None:
        self.listing, self._format = listing, image_format
        self.slices = deal_images(len(listing.rows), images_per_shard)
        plan = {
            **listing.identity(),
            "store": image_format.store,
            "image_size": image_format.image_size,
            "channels": image_format.channels,
            "background": colour_name(image_format.background),
            "upright": image_format.is_upright,
            "images_per_shard": images_per_shard,
            "dealt": "by hash",
        }
        self.writer = ShardWriter(out, image_columns(listing.is_interleaved), plan)
        # Of each shard: images begun, the id of the one being read, the process that reads it. Workers share it.
        self.states = np.frombuffer(mmap.mmap(-1, len(self.slices) * 24), np.int64).reshape(-1, 3)

    def write(self, number: int) -> None:
        """Writes a shard; its record has the rejected images and counts of changed ones."""
        state = self.states[number]
        rejected: list[dict[str, Any]] = []
        changes: Counter[str] = Counter()

        def samples() -> Iterator[dict[str, Any]]:
            for id in self.slices[number]:
                row = self.listing.rows[id]
                state[:] = state[0] + 1, id, os.getpid()
                stored = []
                for path in row.paths:
                    try:
                        stored.append(stored_image(read_file(self.listing.root / path), self._format, changes))
                    except RejectedImageError as error:
                        rejected.append({"id": id, "path": path, "reason": str(error)})
                        break
                else:
                    yield {"id": id, "label": row.label, "caption": row.caption, **_image_columns_of(row, stored)}

        try:
            record = {"rejected": rejected, "changes": changes, "versions": versions()}
            self.writer.write(number, samples(), lambda: record)
        except MemoryError:
            path = self.listing.rows[state[1]].path
            raise UserError(f"there is not enough memory for {path}; give fewer --workers, and it goes on") from None

    def describe_death(self, worker: BaseProcess) -> str:
        """The message for a worker that died: how, and at which image."""
        states = self.states[self.states[:, 2] == worker.pid]  # of its shards; it wrote them in this order
        reading = f" that was reading {self.listing.rows[states[-1, 1]].path}" if len(states) else ""
        is_killed = worker.exitcode == -signal.SIGKILL
        advice = "give fewer --workers" if is_killed else "if it happens again, remove that image"
        return f"a worker{reading} ended {how_it_ended(worker.exitcode)}: {advice}; the same command goes on"

    def finish(self, source: str) -> None:
        """Gives the folder its name, once all shards are written."""
        num_shards = len(self.slices)
        records = self.writer.records(num_shards)
        rejected = sorted((one for record in records for one in record["rejected"]), key=lambda one: one["id"])
        info = ImagesInfo(
            class_names=self.listing.class_names,
            num_samples=len(self.listing.rows) - len(rejected),
            num_rejected=len(rejected),
            store=self._format.store,
            image_size=self._format.image_size,
            channels=self._format.channels,
            source=source if self.listing.part == "all" else f"{source}, {self.listing.part}",
            versions=merged_versions(records),
            background=self._format.background,
            changes=dict(sorted(sum((Counter(record["changes"]) for record in records), Counter[str]()).items())),
            most_segments=max(
                (len(parse_column(row.segments)) for row in self.listing.rows if row.segments), default=0
            ),
        )
        lines = "".join(json.dumps(one) + "\n" for one in rejected)
        self.writer.finish(info, num_shards, {REJECTED_FILE: lines} if rejected else {})


def _image_columns_of(row: Row, stored: Sequence[bytes]) -> dict[str, Any]:
    return {"segments": row.segments, **columns_of_files(stored)} if row.segments else {"image": stored[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


def _write_missing(folder: _Folder, num_workers: int, rejected: _Rejected) -> float:
    """Has the missing shards written; returns images per second."""
    num_before, num_images = rejected.count, len(folder.listing.rows)
    missing = folder.writer.missing(len(folder.slices))
    for number in sorted(set(range(len(folder.slices))) - set(missing)):
        rejected.add(folder.writer.record(number)["rejected"])
    if not missing:
        return 0.0
    begin = time.monotonic()
    num_missing = sum(len(folder.slices[number]) for number in missing)
    with _workers(folder, min(num_workers, len(missing))) as pool:
        finished: queue.SimpleQueue[Future[int]] = queue.SimpleQueue()
        for number in missing:
            pool.submit(_write_shard, number).add_done_callback(finished.put)
        progress = Progress(num_images, num_images - num_missing, "image")  # its thread begins after the forks
        num_left = len(missing)
        try:
            while num_left:
                with suppress(queue.Empty):
                    number = finished.get(timeout=_POLL_SECONDS).result()
                    rejected.add(folder.writer.record(number)["rejected"])
                    num_left -= 1
                num_rejected = rejected.count - num_before
                done = num_images - num_missing + int(folder.states[:, 0].sum())
                progress.show(done, f"{num_rejected} rejected" if num_rejected else "")
        finally:
            progress.close()
    return num_missing / max(time.monotonic() - begin, 1e-3)


@contextmanager
def _workers(folder: _Folder, num_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `_write_shard`, which are killed at the end of the block; UserError where one dies before."""
    others = set(multiprocessing.active_children())
    fork = multiprocessing.get_context("fork")  # it has imported everything already
    try:
        pool = ProcessPoolExecutor(num_workers, fork, _begin_worker, (folder, os.getpid()))
    except OSError as error:
        raise UserError(f"no locks can be made for workers ({reason_of(error)}); free room in /dev/shm") from error
    try:
        pool.submit(os.getpid)  # the first call forks them all
        workers = [worker for worker in multiprocessing.active_children() if worker not in others]
        yield pool
    except BrokenProcessPool:
        # The pool ends the others by SIGTERM, which one that has just begun ignores.
        for worker in workers:
            worker.join(_DEATH_SECONDS)
        dead = next((worker for worker in workers if worker.exitcode not in (None, -signal.SIGTERM)), workers[0])
        raise UserError(folder.describe_death(dead)) from None
    finally:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        pool.shutdown()


_folder: _Folder  # of this worker


def _begin_worker(folder: _Folder, parent: int) -> None:
    global _folder
    _folder = folder
    # The kernel ends this process with its parent, even after kill -9: else it would still write beside a restart.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    leave_signals_to_the_rank()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends workers


def _write_shard(number: int) -> int:
    _folder.write(number)
    return number

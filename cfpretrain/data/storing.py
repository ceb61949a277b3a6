"""Images -> image shards, by worker processes: same images, same shards, whatever their number and whatever is killed.

A worker makes whole shards, one at a time. What cannot be stored is rejected with a reason, and what is changed by it
is counted; the shard's record keeps both, so that they are of all runs. The parent counts, shows and ends the workers.
"""

import ctypes
import json
import math
import mmap
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfpretrain.base.console import Progress, UserError, count, one_line, say
from cfpretrain.base.files import open_to_read, parse_json
from cfpretrain.core import seeds
from cfpretrain.data.images import (
    RejectedImageError,
    Storing,
    colour_name,
    describe_changes,
    read_file,
    stored_image,
    versions,
)
from cfpretrain.data.listing import Listing
from cfpretrain.data.shard_writer import ShardWriter, merged_versions
from cfpretrain.data.shards import ImagesInfo, image_columns, read_info

REJECTED_FILE = "rejected.jsonl"
_POLL_SECONDS = 0.25
_NUM_SHOWN = 3  # rejected images named on the terminal
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def store_images(
    parts: Sequence[tuple[Listing, Path]],
    how: Storing,
    source: str,
    images_per_shard: int = 1024,
    num_workers: int = 1,
    max_rejected_share: float = 0.01,
) -> None:
    """Writes folders of image shards with worker processes, or the rest of them.

    Args:
        parts: the images of each folder, and the folder; all are checked before the first is written.
        how: they are stored.
        source: where they come from, for people.
        images_per_shard: of the listing; rejected ones count.
        num_workers: processes.
        max_rejected_share: of all images of all parts.

    Raises:
        UserError: too many images are rejected, a folder holds something else or cannot be written, or a worker died.
    """
    begun = []
    for listing, out in parts:
        plan = {
            **listing.identity(),
            "store": how.store,
            "image_size": how.image_size,
            "channels": how.channels,
            "background": colour_name(how.background),
            "upright": how.is_upright,
            "images_per_shard": images_per_shard,
            "dealt": "by hash",
        }
        writer = ShardWriter(out, image_columns(), plan)
        is_complete = writer.is_complete()
        if not is_complete:
            writer.begin()
        begun.append((listing, writer, is_complete))
    rejected = _Rejected(sum(len(listing.rows) for listing, _ in parts), max_rejected_share)
    for listing, writer, is_complete in begun:
        if is_complete:
            _say_of(writer.folder, ": already there")
            rejected.add(_rejected_in(writer.folder))
        else:
            slices = deal_images(len(listing.rows), images_per_shard)
            _store(_Work(listing, how, writer, slices), source, num_workers, rejected)


def _store(work: "_Work", source: str, num_workers: int, rejected: "_Rejected") -> None:
    """One of the folders."""
    writer, num_shards = work.writer, len(work.slices)
    missing = writer.missing(num_shards)
    num_before = len(rejected.images)
    for number in sorted(set(range(num_shards)) - set(missing)):
        rejected.add(writer.record(number)["rejected"])
    begin = time.monotonic()
    num_missing = _write_missing(work, missing, num_workers, rejected, num_before)
    rate = num_missing / max(time.monotonic() - begin, 1e-3)
    _finish(work, source)
    _say_of(writer.folder, "", f", {rate:.0f} images/s")


def deal_images(num_images: int, images_per_shard: int) -> list[list[int]]:
    """The ids of each shard: dealt at random, the same for every listing of that length.

    Cut as listed, a shard would hold one class, and training, which mixes near shards only, batches of few classes.
    """
    dealt = seeds.permutation(seeds.key(0, "shards of images"), num_images).tolist()
    return [sorted(dealt[begin : begin + images_per_shard]) for begin in range(0, num_images, images_per_shard)]


def _finish(work: "_Work", source: str) -> None:
    writer, listing, how, num_shards = work.writer, work.listing, work.how, len(work.slices)
    records = writer.records(num_shards)
    rejected = sorted((one for record in records for one in record["rejected"]), key=lambda one: one["id"])
    info = ImagesInfo(
        class_names=listing.class_names,
        num_samples=len(listing.rows) - len(rejected),
        num_rejected=len(rejected),
        store=how.store,
        image_size=how.image_size,
        channels=how.channels,
        source=source if listing.part == "all" else f"{source}, {listing.part}",
        versions=merged_versions(records),
        background=how.background,
        changes=dict(sorted(sum((Counter(record["changes"]) for record in records), Counter[str]()).items())),
    )
    lines = "".join(json.dumps(one) + "\n" for one in rejected)
    writer.finish(info, num_shards, {REJECTED_FILE: lines} if rejected else {})


def _say_of(folder: Path, before: str, behind: str = "") -> None:
    """What a finished folder holds, and what its images lost."""
    info = read_info(folder, str(folder))
    assert isinstance(info, ImagesInfo)
    for line in describe_changes(info.changes, info.background, info.image_size):
        say(f"{folder}: {line}")
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    named = f" ({folder / REJECTED_FILE})" if info.num_rejected else ""
    say(
        f"{folder}{before}: {count(info.num_samples, 'image')} of {count(len(info.class_names), 'class', 'classes')}, "
        f"{info.channels} x "
        f"{info.image_size} x {info.image_size}, {info.store}; {info.num_rejected} rejected{named}; "
        f"{megabytes:.1f} MB{behind}"
    )


def parse_rejected(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The rejected images that the lines of rejected.jsonl name: id, path and reason; ValueError where one does not."""
    for line in lines:
        one = parse_json(line)
        try:
            image = {"id": int(one["id"]), "path": str(one["path"]), "reason": str(one["reason"])}
        except (LookupError, TypeError, OverflowError) as error:
            raise ValueError(f"expected id, path and reason of an image, got {line!r:.80}") from error
        yield image


def _rejected_in(folder: Path) -> list[dict[str, Any]]:
    file = folder / REJECTED_FILE
    try:
        with open_to_read(file) as lines:  # a line for each image, of any number
            return list(parse_rejected(lines))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error):.200}); remove {folder} to make it again") from error


class _Rejected:
    """The images that could not be stored so far.

    Args:
        num_images: of all parts.
        max_share: how much of them may be rejected.
    """

    def __init__(self, num_images: int, max_share: float) -> None:
        self._num_images, self._max_share = num_images, max_share
        self.images: list[dict[str, Any]] = []

    def add(self, images: Iterable[dict[str, Any]]) -> None:
        """Adds those of a shard; UserError where they become too many."""
        self.images += images
        if len(self.images) > self._max_share * self._num_images:
            self.images.sort(key=lambda image: image["id"])
            shown = "; ".join(f"{image['path']}: {image['reason']}" for image in self.images[:_NUM_SHOWN])
            more = "; ..." if len(self.images) > _NUM_SHOWN else ""
            raise UserError(
                f"--max-rejected-share: expected at most {self._max_share:g} of {self._num_images} images to be "
                f"rejected, got {len(self.images)} already: {shown}{more}. Raise the share to "
                f"{math.ceil(1000 * len(self.images) / self._num_images) / 1000:g} or more, and it goes on; repair "
                "or remove them, and it begins again"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


@dataclass
class Outcome:
    """What became of images that were not stored as they are."""

    rejected: list[dict[str, Any]] = field(default_factory=list)  # id, path and reason of each
    changes: Counter[str] = field(default_factory=Counter)  # images, by what they lose: see `describe_changes`


def read_samples(
    listing: Listing, ids: Iterable[int], how: Storing, on_image: Callable[[int], None], outcome: Outcome
) -> Iterator[dict[str, Any]]:
    """The samples of image shards, without their checksums.

    Args:
        listing: the images.
        ids: which of them.
        how: they are stored.
        on_image: called with the id of each image before it is read.
        outcome: of the images read is added here.
    """
    for id in ids:
        row = listing.rows[id]
        on_image(id)
        try:
            stored = stored_image(read_file(listing.root / row.path), how, outcome.changes)
        except RejectedImageError as error:
            outcome.rejected.append({"id": id, "path": row.path, "reason": str(error)})
            continue
        yield {"id": id, "label": row.label, "caption": row.caption, "image": stored}


@dataclass(frozen=True)
class _Work:
    """What workers are forked with."""

    listing: Listing
    how: Storing
    writer: ShardWriter
    slices: Sequence[Sequence[int]]  # ids of images, by shard

    def make(self, number: int, state: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Writes a shard, and notes in `state` how many images were begun and which is being read; the rejected."""
        outcome = Outcome()

        def note(id: int) -> None:
            state[:] = state[0] + 1, id

        samples = read_samples(self.listing, self.slices[number], self.how, note, outcome)
        self.writer.write(
            number,
            samples,
            lambda: {"rejected": outcome.rejected, "changes": outcome.changes, "versions": versions()},
        )
        return outcome.rejected


class _Worker:
    """A process that writes the shards it is told to, one at a time.

    Args:
        work: what there is to do.
        state: [2], shared with the process: images begun, and the id of the one being read.
    """

    def __init__(self, work: _Work, state: NDArray[np.int64]) -> None:
        context = multiprocessing.get_context("fork")  # it has imported everything already
        self.state = state
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, state, theirs, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, number: int) -> None:
        """Tells the process to write a shard."""
        with suppress(OSError):  # it died: that is found where its answer is awaited
            self.pipe.send(number)

    def end(self) -> None:
        """Ends the process, wherever it is."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(work: _Work, state: NDArray[np.int64], pipe: Any, parent: int) -> None:
    # When its parent is gone, be it by kill -9, the kernel ends this process too: nobody writes on behind a restart.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for number in iter(pipe.recv, None):
            pipe.send(work.make(number, state))
    except UserError as error:
        pipe.send(error)
    except MemoryError:
        path = work.listing.rows[int(state[1])].path
        pipe.send(UserError(f"there is not enough memory for {path}; give fewer --workers, and it goes on"))
    except Exception:
        pipe.send(RuntimeError(f"a worker failed:\n{traceback.format_exc()}"))


def _write_missing(work: _Work, missing: Sequence[int], num_workers: int, rejected: _Rejected, num_before: int) -> int:
    """Has the missing shards written; the number of their images. `num_before` were rejected of other folders."""
    num_workers = min(num_workers, len(missing))
    if not num_workers:
        return 0
    num_images = len(work.listing.rows)
    num_missing = sum(len(work.slices[number]) for number in missing)
    shared = mmap.mmap(-1, num_workers * 16)
    states = np.frombuffer(shared, np.int64).reshape(num_workers, 2)
    workers = [_Worker(work, state) for state in states]
    # Its thread begins after the forks.
    progress = Progress(num_images, num_images - num_missing, "image")
    try:
        for answer in _results(work, workers, iter(missing)):
            if answer is not None:
                rejected.add(answer)
            done = num_images - num_missing + int(states[:, 0].sum())
            num_rejected = len(rejected.images) - num_before
            progress.show(done, f"{num_rejected} rejected" if num_rejected else "")
    finally:
        progress.close()
        for worker in workers:
            worker.end()
    return num_missing


def _results(work: _Work, workers: list[_Worker], waiting: Iterator[int]) -> Iterator[list[dict[str, Any]] | None]:
    """What each shard rejected, as soon as it is written; None now and then."""
    busy: dict[Any, _Worker] = {}
    for worker, number in zip(workers, waiting, strict=False):
        worker.begin(number)
        busy[worker.pipe] = worker
    while busy:
        yield None
        for pipe in connection.wait(list(busy), _POLL_SECONDS):
            worker = busy.pop(pipe)
            yield _answer(work, worker)
            following = next(waiting, None)
            if following is not None:
                worker.begin(following)
                busy[worker.pipe] = worker


def _answer(work: _Work, worker: _Worker) -> list[dict[str, Any]]:
    try:
        answer = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        raise UserError(_how_it_died(worker.process.exitcode, work.listing.rows[int(worker.state[1])].path)) from None
    if isinstance(answer, Exception):
        raise answer
    rejected: list[dict[str, Any]] = answer
    return rejected


def _how_it_died(code: int | None, path: str) -> str:
    if code == -signal.SIGKILL:
        reason = "was killed, perhaps for want of memory: give fewer --workers"
    elif code is not None and code < 0:
        reason = f"was ended by {signal.Signals(-code).name}: if it happens again, remove that image"
    else:
        reason = f"ended with exit code {code}: if it happens again, remove that image"
    return f"a worker that was reading {path} {reason}; the same command goes on"

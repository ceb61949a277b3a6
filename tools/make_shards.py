"""Images -> image shards: a folder of class folders, or a table of paths, labels and captions.

    python tools/make_shards.py imagenet/train --out data/imagenet-train --size 256
    python tools/make_shards.py pictures.csv --out data/pictures --size 512 --store original

`--store lossless` keeps ADM's centre crop, bit by bit PIL's, as PNG: the crop that published scores rest on.
`--store original` keeps the bytes of the files, for decoding on GPUs: the crop then is DALI's, and only near ADM's.

Every image is decoded. What cannot be stored is named in rejected.jsonl, with the reason. Same images and options, same
shards, whatever the number of workers. The command may be stopped or killed at any moment; run again, it goes on.
Exit code 2: a mistake, or too many images rejected; 75: it was asked to stop.
"""

import argparse
import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.console import EXIT_REQUEUE, ItemProgress, UserError, exit_with, phase, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cfpretrain.data.images import Listing, Storing
    from cfpretrain.data.shard_writer import ShardWriter

_POLL_SECONDS = 0.25
_NUM_SHOWN = 3  # rejected images named on the terminal
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def main() -> None:
    """The command."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(arguments)
    except UserError as error:
        exit_with(error)
    except KeyboardInterrupt:
        say("stopped; the same command goes on")
        sys.exit(EXIT_REQUEUE)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write shards of images, for tools/encode_latents.py.")
    parser.add_argument("images", type=Path, help="a folder of class folders; or a table, .csv or .jsonl, with columns "
                        "path and, where wanted, label and caption")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--size", type=_positive, required=True, help="pixels a side of the centre crop, e.g. 256")
    parser.add_argument("--store", choices=("lossless", "original"), default="lossless",
                        help="PNG of the crop (default), or the bytes of the files")  # fmt: skip
    parser.add_argument("--grey", action="store_true", help="one channel instead of RGB")
    parser.add_argument("--root", type=Path, help="what a table's paths begin at (default: the table's folder)")
    parser.add_argument("--workers", type=_positive, help="processes (default: one a CPU core)")
    parser.add_argument("--images-per-shard", type=_positive, default=1024, help="default 1024")
    parser.add_argument("--max-rejected-share", type=_share, default=0.01,
                        help="stop when more of all images than this share are rejected (default 0.01)")  # fmt: skip
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Lists the images and makes the shards that are missing."""
    with phase("loading torch and streaming"):
        from cfpretrain.data.images import Storing, list_images
    if arguments.out.resolve().is_relative_to(arguments.images.resolve()):
        raise UserError(f"--out: expected a folder outside of the images, got {arguments.out}; choose another")
    with phase(f"listing {arguments.images}"):
        listing = list_images(arguments.images, arguments.root)
    ignored = f"; ignored: {listing.ignored}" if listing.ignored else ""
    say(f"{len(listing.rows)} images of {len(listing.class_names)} classes in {arguments.images}{ignored}")
    make_shards(
        listing,
        Storing(arguments.store, arguments.size, arguments.grey),
        arguments.out,
        source=str(arguments.images),
        images_per_shard=arguments.images_per_shard,
        num_workers=arguments.workers or len(os.sched_getaffinity(0)),
        max_rejected_share=arguments.max_rejected_share,
    )


def make_shards(
    listing: "Listing",
    how: "Storing",
    out: Path,
    source: str,
    images_per_shard: int = 1024,
    num_workers: int = 1,
    max_rejected_share: float = 0.01,
) -> None:
    """Writes a folder of image shards with worker processes, or the rest of it.

    Args:
        listing: the images.
        how: how they are stored.
        out: the folder.
        source: where they come from, for people.
        images_per_shard: of the listing; rejected ones count.
        num_workers: processes.
        max_rejected_share: of all images.

    Raises:
        UserError: too many images are rejected, the folder holds something else or cannot be written, or a worker died.
    """
    from cfpretrain.data.shard_writer import ShardWriter
    from cfpretrain.data.shards import image_columns

    plan = {
        "images": listing.digest,
        "store": how.store,
        "image_size": how.image_size,
        "channels": how.channels,
        "images_per_shard": images_per_shard,
        "dealt": "by hash",
    }
    writer = ShardWriter(out, image_columns(), plan)
    if writer.is_complete():
        say(f"{out}: already there: {_describe(out)}")
        return
    writer.begin()
    slices = _slices(len(listing.rows), images_per_shard)
    rejected = Rejected(len(listing.rows), max_rejected_share)
    missing = writer.missing(len(slices))
    for number in sorted(set(range(len(slices))) - set(missing)):
        rejected.add(writer.record(number)["rejected"])
    begin = time.monotonic()
    num_missing = _write_missing(Work(listing, how, writer, slices), missing, num_workers, rejected)
    rate = num_missing / max(time.monotonic() - begin, 1e-3)
    _finish(writer, listing, how, source, len(slices))
    say(f"{out}: {_describe(out)}, {rate:.0f} images/s")


def _slices(num_images: int, images_per_shard: int) -> list[list[int]]:
    """The ids of each shard: dealt at random, the same for every listing of that length.

    Cut as listed, a shard would hold one class, and training, which mixes near shards only, batches of few classes.
    """
    from cfpretrain import seeds

    dealt = seeds.permutation(seeds.key(0, "shards of images"), num_images)
    return [sorted(ids.tolist()) for ids in dealt.split(images_per_shard)]


def _finish(writer: "ShardWriter", listing: "Listing", how: "Storing", source: str, num_shards: int) -> None:
    import json

    from cfpretrain.data.shards import ImagesInfo

    records = writer.records(num_shards)
    rejected = sorted((one for record in records for one in record["rejected"]), key=lambda one: one["id"])
    names = records[0]["versions"]
    info = ImagesInfo(
        class_names=listing.class_names,
        num_samples=len(listing.rows) - len(rejected),
        num_rejected=len(rejected),
        store=how.store,
        image_size=how.image_size,
        channels=how.channels,
        source=source,
        # Another version may have begun.
        versions={name: ", ".join(sorted({record["versions"][name] for record in records})) for name in names},
    )
    lines = "".join(json.dumps(one) + "\n" for one in rejected)
    writer.finish(info, num_shards, {"rejected.jsonl": lines} if rejected else {})


def _describe(folder: Path) -> str:
    from cfpretrain.data.shards import ImagesInfo, read_info

    info = read_info(folder, str(folder))
    assert isinstance(info, ImagesInfo)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    named = f" ({folder / 'rejected.jsonl'})" if info.num_rejected else ""
    return (
        f"{info.num_samples} images of {len(info.class_names)} classes, {info.channels} x {info.image_size} x "
        f"{info.image_size}, {info.store}; {info.num_rejected} rejected{named}; {megabytes:.1f} MB"
    )


class Rejected:
    """The images that could not be stored so far.

    Args:
        num_images: of the listing.
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
                f"rejected, got {len(self.images)} already: {shown}{more}. Raise the share, and it goes on; mend "
                "or remove them, and it begins again"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes


@dataclass(frozen=True)
class Work:
    """What workers are forked with."""

    listing: "Listing"
    how: "Storing"
    writer: "ShardWriter"
    slices: Sequence[Sequence[int]]  # ids of images, by shard

    def make(self, number: int, state: "NDArray[np.int64]") -> list[dict[str, Any]]:
        """Writes a shard, and notes in `state` how many images were begun and which is being read; the rejected."""
        from cfpretrain.data.images import read_samples, versions

        rejected: list[dict[str, Any]] = []

        def note(id: int) -> None:
            state[:] = state[0] + 1, id

        samples = read_samples(self.listing, self.slices[number], self.how, note, rejected)
        self.writer.write(number, samples, lambda: {"rejected": rejected, "versions": versions()})
        return rejected


class Worker:
    """A process that writes the shards it is told to, one at a time.

    Args:
        work: what there is to do.
        state: [2], shared with the process: images begun, and the id of the one being read.
    """

    def __init__(self, work: Work, state: "NDArray[np.int64]") -> None:
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


def _serve(work: Work, state: "NDArray[np.int64]", pipe: Any, parent: int) -> None:
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


def _write_missing(work: Work, missing: Sequence[int], num_workers: int, rejected: Rejected) -> int:
    """Has the missing shards written; the number of their images."""
    import numpy as np

    num_workers = min(num_workers, len(missing))
    if not num_workers:
        return 0
    num_images = len(work.listing.rows)
    num_missing = sum(len(work.slices[number]) for number in missing)
    shared = mmap.mmap(-1, num_workers * 16)
    states = np.frombuffer(shared, np.int64).reshape(num_workers, 2)
    workers = [Worker(work, state) for state in states]
    # Its thread begins after the forks.
    progress = ItemProgress(num_images, num_images - num_missing, "image")
    try:
        for answer in _results(work, workers, iter(missing)):
            if answer is not None:
                rejected.add(answer)
            done = num_images - num_missing + int(states[:, 0].sum())
            progress.show(done, f"{len(rejected.images)} rejected" if rejected.images else "")
    finally:
        progress.close()
        for worker in workers:
            worker.end()
    return num_missing


def _results(work: Work, workers: list[Worker], waiting: Iterator[int]) -> Iterator[list[dict[str, Any]] | None]:
    """What each shard rejected, as soon as it is written; None now and then."""
    busy = {}
    for worker, number in zip(workers, waiting, strict=False):
        worker.begin(number)
        busy[worker.pipe] = worker
    while busy:
        yield None
        for pipe in connection.wait(list(busy), _POLL_SECONDS):
            worker = busy.pop(pipe)
            yield _answer(work, worker)
            number = next(waiting, None)
            if number is not None:
                worker.begin(number)
                busy[worker.pipe] = worker


def _answer(work: Work, worker: Worker) -> list[dict[str, Any]]:
    try:
        answer = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        raise UserError(_how_it_died(worker.process.exitcode, work.listing.rows[int(worker.state[1])].path)) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _how_it_died(code: int | None, path: str) -> str:
    if code == -signal.SIGKILL:
        reason = "was killed, perhaps for want of memory: give fewer --workers"
    elif code is not None and code < 0:
        reason = f"was ended by {signal.Signals(-code).name}: if it happens again, remove that image"
    else:
        reason = f"ended with exit code {code}: if it happens again, remove that image"
    return f"a worker that was reading {path} {reason}; the same command goes on"


if __name__ == "__main__":
    main()

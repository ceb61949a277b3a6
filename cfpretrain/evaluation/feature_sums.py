"""Features of many images reduced to sums, on any number of ranks, resumable after a kill.

Images are seen in batches of fixed ids. Until all are done, the work folder holds done.npz, the sums of earlier starts
of the command; a file of sums for each rank of this start, replaced every half a minute; and the features that nearest
neighbours need, a file a batch. Sums lie with the numbers of their batches, so another number of ranks goes on.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.console import UserError
from cfpretrain.base.outputs import Unfinished
from cfpretrain.evaluation import array_files
from cfpretrain.evaluation.features import FeatureExtractor, Features
from cfpretrain.evaluation.frechet import moments_of
from cfpretrain.evaluation.inception_score import class_sums, splits_of

# All that Frechet distances and the Inception Score need of a set, by name; they add up over batches and ranks.
Sums = dict[str, Tensor]
# Numbers of batches -> this rank's share of them, each with its number: images, uint8 [B, 3, Y, X].
Batches = Callable[[list[int]], Iterator[tuple[int, Tensor]]]

MOST_KEPT = 50_000  # images behind precision and recall
_DONE_FILE = "done.npz"
_SAVE_SECONDS = 30.0


def sums_of(features: Features, splits_N: Tensor) -> Sums:
    """The sums of one batch, on the CPU; `splits_N` has the split of each image for the Inception Score."""
    parts = {"pooled": moments_of(features.pooled_BF.cpu())}
    if features.spatial_BF is not None:
        parts["spatial"] = moments_of(features.spatial_BF.cpu())
    if features.logits_BK is not None:
        parts["classes"] = class_sums(features.logits_BK.cpu(), splits_N)
    return prefixed(parts)


def add(first: Sums, second: Sums) -> Sums:
    """The sums of two sets together, of the same features; {} are the sums of no image."""
    return {name: first[name] + second[name] for name in first} if first and second else first or second


def over_ranks(sums: Sums) -> Sums:
    """The sums of what all ranks have seen, on each of them."""
    return {name: runtime.sum_over_ranks(value) for name, value in sums.items()}


def prefixed(parts: Mapping[str, Sums]) -> Sums:
    """Several sums as one."""
    return {f"{part}/{name}": value for part, sums in parts.items() for name, value in sums.items()}


def part_of(sums: Sums, part: str) -> Sums:
    """One of `prefixed`; {} where it is not there."""
    return {name.removeprefix(f"{part}/"): value for name, value in sums.items() if name.startswith(f"{part}/")}


class Work:
    """Images to be summed, by all ranks: `sum_up`, then `total` and `kept`; `remove` once the result lies elsewhere.

    Args:
        out: what is made of the sums; unfinished work lies beside it, in a hidden folder that all ranks see.
        option: that gave `out`, for messages.
        plan: JSON-able; all that features and batches depend on. Work done under another plan is refused.
        num_images: N.
        batch_size: images n * batch_size to (n + 1) * batch_size - 1 are batch n.
        groups_N: the group of each image, 0, 1, ...; each has sums of its own. None: one group.
        is_kept_N: bool; the images whose pooled features are kept for precision and recall. None: the first ones.
        save_seconds: the most that a kill costs, beside one batch.
    """

    def __init__(
        self,
        out: Path,
        option: str,
        plan: Mapping[str, Any],
        num_images: int,
        batch_size: int,
        groups_N: Tensor | None = None,
        is_kept_N: Tensor | None = None,
        save_seconds: float = _SAVE_SECONDS,
    ) -> None:
        self._unfinished = Unfinished(out, option, plan)
        self.folder = self._unfinished.folder
        self.num_images, self._batch_size = num_images, batch_size
        self._groups_N = torch.zeros(num_images, dtype=torch.int64) if groups_N is None else groups_N
        self._is_kept_N = torch.arange(num_images) < MOST_KEPT if is_kept_N is None else is_kept_N
        self._splits_N = splits_of(num_images)
        self._num_groups, self._num_batches = int(self._groups_N.max()) + 1, -(-num_images // batch_size)
        self.start = 0  # of the command, counted from 1
        self._numbers: list[int] = []
        self._sums: Sums = {}
        self._save_seconds, self._saved_at = save_seconds, time.monotonic()

    def sum_up(
        self,
        batches: Batches,
        extractor: FeatureExtractor,
        on_begin: Callable[[int], None] = lambda _: None,
        on_done: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Does all batches that are missing; all ranks call it.

        Args:
            batches: gives them.
            extractor: of their features.
            on_begin: called on every rank with how many images are done already.
            on_done: called every few seconds with how many are done.

        Raises:
            LostRankError: another rank is gone.
        """
        with runtime.together():
            begun = self.begin() if runtime.rank() == 0 else None
        self.start, missing = runtime.gather(begun)[0]
        num_done = self.num_images - sum(len(self.ids(number)) for number in missing)
        on_begin(num_done)
        with runtime.Exchange(lambda num_now: on_done(num_done + num_now)) as exchange:
            for number, images in batches(missing):
                self.add(number, extractor(images))
                exchange.add(len(images))
            self.save()

    def ids(self, number: int) -> range:
        """The images of a batch."""
        return range(self.num_images)[number * self._batch_size : (number + 1) * self._batch_size]

    def begin(self) -> tuple[int, list[int]]:
        """Makes the folder on rank 0, or goes on with it, under a lock.

        Work on images that have changed since starts over: one that could not be read may have been repaired.

        Returns:
            The number of this start of the command, and the batches that are missing.
        """
        self._unfinished.begin(lambda there: there.get("images") != self._unfinished.plan.get("images"))
        last, numbers, sums = 0, list[int](), Sums()
        if (self.folder / _DONE_FILE).exists():
            last, numbers, sums = self._read(self.folder / _DONE_FILE)
        # Others are of earlier starts: one's rank may live on and write its file again.
        for file in sorted(self.folder.glob(f"sums_{last:06d}_*.npz")):
            _, more_numbers, more = self._read(file)
            numbers, sums = numbers + more_numbers, add(sums, more)
        self.start = last + 1
        self._write(self.folder / _DONE_FILE, numbers, sums)
        with self._unfinished.writing():
            for file in self.folder.glob("sums_*.npz"):
                files.remove(file)
        return self.start, sorted(set(range(self._num_batches)) - set(numbers))

    def remove(self) -> None:
        """Removes the folder, on rank 0."""
        self._unfinished.remove()

    def add(self, number: int, features: Features) -> None:
        """Adds a batch of this rank's, and saves from time to time."""
        ids = torch.tensor(self.ids(number))
        assert len(ids) == len(features.pooled_BF)
        groups_B = self._groups_N[ids]
        batch = {
            str(group): sums_of(features.some(groups_B == group), self._splits_N[ids[groups_B == group]])
            for group in range(self._num_groups)
        }
        self._sums = add(self._sums, prefixed(batch))
        self._numbers.append(number)
        rows_BF = features.pooled_BF.cpu()[self._is_kept_N[ids]].numpy()
        with self._unfinished.writing():
            files.replace(self.folder / _rows_name(number), lambda opened: array_files.write_npy(opened, rows_BF))
        if time.monotonic() - self._saved_at >= self._save_seconds:
            self.save()

    def save(self) -> None:
        """Writes what this rank has summed in this start."""
        if self._numbers:
            name = f"sums_{self.start:06d}_{runtime.rank():05d}.npz"
            self._write(self.folder / name, self._numbers, self._sums)
            self._saved_at = time.monotonic()

    def total(self) -> list[Sums]:
        """The sums of each group over all images, on every rank, once nothing is missing."""
        found = [self.folder / _DONE_FILE, *sorted(self.folder.glob(f"sums_{self.start:06d}_*.npz"))]
        found = runtime.gather(found)[0]  # one rank's list: a file may appear later on another machine
        with runtime.together():
            # Of no image, for a rank without a file; the first file may have no sums.
            total = {name: torch.zeros_like(value) for name, value in self._read(found[-1])[2].items()}
            for file in found[runtime.rank() :: runtime.world_size()]:
                total = add(total, self._read(file)[2])
        total = over_ranks(total)
        totals = [part_of(total, str(group)) for group in range(self._num_groups)]
        if (count := sum(int(one["pooled/count"]) for one in totals)) != self.num_images:
            raise UserError(
                f"{self.folder} is damaged: expected sums over {self.num_images} images, got {count}; delete it to "
                "begin again"
            )
        return totals

    def kept(self) -> Tensor:
        """The features kept, float32 [K, F], in the order of the images."""
        with runtime.together():
            kept_KF, end = torch.empty(0), 0
            for number in range(self._num_batches):
                file = self.folder / _rows_name(number)
                with self._unfinished.reading(file):
                    rows_BF = torch.from_numpy(array_files.load(file))
                if number == 0:
                    kept_KF = torch.empty(int(self._is_kept_N.sum()), rows_BF.shape[1])  # held once: maybe 400 MB
                begin, end = end, end + len(rows_BF)
                kept_KF[begin:end] = rows_BF
            return kept_KF

    def _write(self, file: Path, numbers: list[int], sums: Sums) -> None:
        arrays = {name: value.numpy() for name, value in sums.items()}
        with self._unfinished.writing():
            files.replace(file, lambda opened: np.savez(opened, start=self.start, numbers=numbers, **arrays))

    def _read(self, file: Path) -> tuple[int, list[int], Sums]:
        with self._unfinished.reading(file):
            arrays = array_files.read_members(file)
            start, numbers = int(arrays.pop("start")), [int(number) for number in arrays.pop("numbers")]
            return start, numbers, {name: torch.from_numpy(array) for name, array in arrays.items()}


def _rows_name(number: int) -> str:
    return f"rows_{number:08d}.npy"

"""Features of many images reduced to sums, on any number of ranks and over any number of kills.

Images are seen in batches of fixed ids. What a rank has summed lies in the work folder, in a file that it writes anew
every half a minute; the features that nearest neighbours need lie beside, in files that are only added. A file's name
says which start of the command and which rank wrote it, and it lists its batches, so another number of ranks goes on.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfpretrain.base import files, plans, runtime
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.base.files import read_text
from cfpretrain.evaluation import array_files
from cfpretrain.evaluation.features import Features
from cfpretrain.evaluation.frechet import Moments
from cfpretrain.evaluation.inception_score import ClassSums
from cfpretrain.run import outputs

_PLAN_FILE, _START_FILE = "settings.json", "start"
SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class FeatureSums:
    """All that Frechet distances and the Inception Score need of a set; adds up over batches and ranks."""

    pooled: Moments
    spatial: Moments | None = None
    classes: ClassSums | None = None

    @classmethod
    def of(cls, features: Features, splits_N: Tensor) -> "FeatureSums":
        """The sums of one batch, on the CPU.

        Args:
            features: of the images, on any device.
            splits_N: the split of each for the Inception Score.
        """
        spatial, logits = features.spatial_BF, features.logits_BK
        return cls(
            Moments.of(features.pooled_BF.cpu()),
            None if spatial is None else Moments.of(spatial.cpu()),
            None if logits is None else ClassSums.of(logits.cpu(), splits_N),
        )

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """The sums of both sets together, which are of the same features."""
        return FeatureSums(
            self.pooled + other.pooled,
            None if self.spatial is None or other.spatial is None else self.spatial + other.spatial,
            None if self.classes is None or other.classes is None else self.classes + other.classes,
        )

    def over_ranks(self) -> "FeatureSums":
        """The sums of what all ranks have seen, on each of them."""
        return FeatureSums(
            self.pooled.over_ranks(),
            None if self.spatial is None else self.spatial.over_ranks(),
            None if self.classes is None else self.classes.over_ranks(),
        )

    def to_arrays(self, prefix: str) -> dict[str, Any]:
        """For `from_arrays`, under names that begin with `prefix`."""
        arrays: dict[str, Any] = {}
        for name, moments in (("pooled", self.pooled), ("spatial", self.spatial)):
            if moments is not None:
                parts = {"count": moments.count, "sum": moments.sum_F.numpy(), "outer": moments.outer_FF.numpy()}
                arrays |= {f"{prefix}{name}_{part}": value for part, value in parts.items()}
        if self.classes is not None:
            arrays |= {f"{prefix}classes_{name}": value.numpy() for name, value in vars(self.classes).items()}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], prefix: str, factor: int = 1) -> "FeatureSums":
        """What `to_arrays` gave, times a factor: 0 makes the sums of no images."""

        def read(name: str) -> Tensor:
            return torch.from_numpy(arrays[f"{prefix}{name}"]) * factor

        def moments(name: str) -> Moments | None:
            if f"{prefix}{name}_sum" not in arrays:
                return None
            count = int(arrays[f"{prefix}{name}_count"]) * factor
            return Moments(count, read(f"{name}_sum"), read(f"{name}_outer"))

        pooled, names = moments("pooled"), ("count_S", "probability_SK", "negentropy_S")
        assert pooled is not None
        has_classes = f"{prefix}classes_{names[0]}" in arrays
        classes = ClassSums(*(read(f"classes_{name}") for name in names)) if has_classes else None
        return cls(pooled, moments("spatial"), classes)


@dataclass
class Work:
    """Images to be summed.

    Attributes:
        out: what is made of the sums; unfinished work lies beside it, in a hidden folder that all ranks see.
        option: that gave `out`, for messages.
        plan: JSON-able; all that features and batches depend on. Work done under another plan is refused.
        batch_size: images n * batch_size to (n + 1) * batch_size - 1 are batch n.
        groups_N: the group of each image; each has sums of its own, and they are 0, 1, ...
        splits_N: the split of each image for the Inception Score.
        is_kept_N: bool; the images whose pooled features are kept for precision and recall.
        save_seconds: the most that a kill costs, beside one batch.
    """

    out: Path
    option: str
    plan: Mapping[str, Any]
    batch_size: int
    groups_N: Tensor
    splits_N: Tensor
    is_kept_N: Tensor
    save_seconds: float = SAVE_SECONDS
    _lock: int | None = field(default=None, init=False)
    _start: int = field(default=0, init=False)

    @property
    def folder(self) -> Path:
        """Where unfinished work lies."""
        return self.out.with_name(f".{self.out.name}.unfinished")

    @property
    def num_images(self) -> int:
        """All that are to be summed."""
        return len(self.groups_N)

    @property
    def num_groups(self) -> int:
        """Groups that have sums of their own."""
        return int(self.groups_N.max()) + 1

    @property
    def num_batches(self) -> int:
        """Batches that they fill."""
        return -(-self.num_images // self.batch_size)

    def ids(self, number: int) -> range:
        """The images of a batch."""
        return range(self.num_images)[number * self.batch_size : (number + 1) * self.batch_size]

    def begin(self) -> tuple[int, list[int]]:
        """Makes the folder, or goes on with it, under a lock; called on one process, before any `Summing`.

        Work on other images that were given is begun anew: one that could not be read may have been mended.

        Returns:
            The number of this start of the command, and the batches that are yet to be done.

        Raises:
            UserError: it is of another plan, is damaged, cannot be written, or another process works there.
        """
        plan = json.loads(json.dumps(self.plan))
        try:
            self._lock = outputs.take_hidden(self.folder, self.out, self.option)
            file = self.folder / _PLAN_FILE
            if file.exists():
                with _undamaged(file):
                    there = outputs.parse_plan(read_text(file))
                different = plans.differences(there, plan)
                if different and there.get("images") != plan.get("images"):
                    say(f"{self.folder}: the images have changed; beginning anew")
                    files.clear(self.folder, outputs.LOCK_FILE)
                elif different:
                    raise UserError(
                        f"{self.folder}: expected work of these settings, got unfinished work of others ({different}); "
                        "give those, or delete the folder to begin again"
                    )
            text = json.dumps(plan, indent=2) + "\n"
            files.replace(file, text)
            self._take_over()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        done = {number for file in self._files() for number in _numbers(file)}
        return self._start, [n for n in range(self.num_batches) if n not in done]

    def _take_over(self) -> None:
        """Gives this start its number, and what the last one has done another name.

        A rank of an earlier start may live on and write its file anew: nobody looks at that.
        """
        file = self.folder / _START_FILE
        with _undamaged(file):
            last = int(read_text(file)) if file.exists() else 0
        self._start = last + 1
        files.replace(file, f"{self._start}\n")
        for sums in self.folder.glob("sums_*_*.npz"):
            if sums.name.startswith(_sums_name(last)):
                files.move(sums, sums.with_name(f"done_{sums.name}"))
            else:
                files.remove(sums)

    def _files(self) -> list[Path]:
        return sorted([*self.folder.glob("done_*.npz"), *self.folder.glob(f"{_sums_name(self._start)}*.npz")])

    def total(self) -> list[FeatureSums]:
        """The sums of each group over all images, on every rank; all ranks call it, once nothing is missing."""
        # One rank's list: a file may appear later on another machine.
        files = runtime.gather(self._files())[0]
        with runtime.together():
            with _arrays(files[0]) as arrays:
                totals = [FeatureSums.from_arrays(arrays, f"{g}_", factor=0) for g in range(self.num_groups)]
            for file in files[runtime.rank() :: runtime.world_size()]:
                with _arrays(file) as arrays:
                    totals = [total + FeatureSums.from_arrays(arrays, f"{g}_") for g, total in enumerate(totals)]
        totals = [total.over_ranks() for total in totals]
        if (found := sum(total.pooled.count for total in totals)) != self.num_images:
            raise UserError(
                f"{self.folder} is damaged: expected sums over {self.num_images} images, got {found}; delete it to "
                "begin again"
            )
        return totals

    def kept(self) -> Tensor:
        """The features kept, float32 [K, F], in the order of the images; all ranks call it."""
        with runtime.together():
            first = self._rows(0)
            kept_KF = torch.empty(int(self.is_kept_N.sum()), first.shape[1])  # held once: it may be 400 MB
            end = 0
            for number in range(self.num_batches):
                rows_BF = self._rows(number)
                begin, end = end, end + len(rows_BF)
                kept_KF[begin:end] = rows_BF
            return kept_KF

    def _rows(self, number: int) -> Tensor:
        file = self.folder / _rows_name(number)
        with _undamaged(file):
            return torch.from_numpy(array_files.load(file))

    def remove(self) -> None:
        """Removes the folder; called on the process that began, once the result lies elsewhere."""
        assert self._lock is not None
        outputs.remove_hidden(self.folder)
        os.close(self._lock)


class Summing:
    """One rank's part of some work, in one start of the command; a context whose end saves what is done."""

    def __init__(self, work: Work, start: int) -> None:
        self._work = work
        self._file = work.folder / f"{_sums_name(start)}{runtime.rank():05d}.npz"
        self._numbers: list[int] = []
        self._sums: list[FeatureSums] | None = None
        self._saved_at = time.monotonic()

    def add(self, number: int, features: Features) -> None:
        """Adds a batch; UserError where the disk is full or cannot be written."""
        work, ids = self._work, torch.tensor(self._work.ids(number))
        assert len(ids) == len(features.pooled_BF)
        groups_B = work.groups_N[ids]
        batch = [
            FeatureSums.of(_some(features, groups_B == group), work.splits_N[ids[groups_B == group]])
            for group in range(work.num_groups)
        ]
        self._sums = batch if self._sums is None else [a + b for a, b in zip(self._sums, batch, strict=True)]
        self._numbers.append(number)
        try:
            rows_BF = features.pooled_BF.cpu()[work.is_kept_N[ids]]
            files.replace(work.folder / _rows_name(number), lambda opened: np.save(opened, rows_BF.numpy()))
            if time.monotonic() - self._saved_at >= work.save_seconds:
                self._save_sums()
        except OSError as error:
            raise _unwritable(work.folder, error) from error

    def _save_sums(self) -> None:
        if self._sums is None:
            return
        arrays: dict[str, Any] = {"numbers": np.array(self._numbers)}
        for group, sums in enumerate(self._sums):
            arrays |= sums.to_arrays(f"{group}_")
        files.replace(self._file, lambda opened: np.savez(opened, **arrays))
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Summing":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self._save_sums()
            except OSError as error:
                raise _unwritable(self._work.folder, error) from error


def _some(features: Features, is_wanted_B: Tensor) -> Features:
    return Features(
        *(None if part is None else part.cpu()[is_wanted_B] for part in vars(features).values())  # type: ignore[arg-type]
    )


def _sums_name(start: int) -> str:
    return f"sums_{start:06d}_"


def _rows_name(number: int) -> str:
    return f"rows_{number:08d}.npy"


def _numbers(file: Path) -> list[int]:
    with _undamaged(file), array_files.open_archive(file) as archive:
        return [int(number) for number in array_files.read_member(archive, "numbers")]


@contextmanager
def _arrays(file: Path) -> Iterator[Mapping[str, Any]]:
    with _undamaged(file):
        yield array_files.read_members(file)


@contextmanager
def _undamaged(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}); delete {file.parent} to begin again") from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror or error}); mend that, and the same command goes on")

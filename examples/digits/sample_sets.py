"""Several sets of images from models, made by all ranks and kept batch by batch until what they are for is complete.

Sets lie side by side, each in a folder named by a hash of its plan: all that its images depend on. So a command that is
given again with other options finds those that it shares with the one before. Files hold float32, since small
differences count where images are scored, and are whole or not there.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import Progress, count, say
from cfpretrain.base.outputs import writing
from cfpretrain.core.sampler import Model
from cfpretrain.evaluation import array_files
from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator
from examples.digits.summary import LabelledImages


@dataclasses.dataclass(frozen=True)
class SampleSet:
    """Images of one setting; image i has id i."""

    name: str  # for people, e.g. "AR steps 4"
    make_model: Callable[[], Model]  # gives the network; called where images are missing
    labels: Sequence[int]  # the class of each image
    settings: GenerationSettings  # how they are made
    folder: Path  # of all sets
    plan: Mapping[str, Any]  # JSON-able; all that the images depend on, but the labels (see `generation.plan_of`)

    @functools.cached_property
    def place(self) -> Path:
        """The folder of this set."""
        text = json.dumps([self.plan, list(self.labels)], sort_keys=True)
        return self.folder / hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def num_steps(self) -> int:
        """Denoising steps of a batch."""
        return self.settings.num_ar_steps * self.settings.num_denoising_steps

    @property
    def work(self) -> int:
        """Forwards of the network for a batch: two a step where it is guided."""
        return self.num_steps * (1 if self.settings.guidance.scale == 1 else 2)

    def missing(self) -> list[int]:
        """The batches that are yet to be written."""
        return [number for number, size in enumerate(self._sizes()) if not _holds(self._file(number), size)]

    def count(self, numbers: Sequence[int]) -> int:
        """Images of these batches."""
        sizes = self._sizes()
        return sum(sizes[number] for number in numbers)

    def write(self, ids_B: Tensor, images_BCYX: Tensor) -> None:
        """Writes one batch, float32; UserError where it cannot be written."""
        file = self._file(int(ids_B[0]) // self.settings.batch_size)
        with writing(str(file)):
            files.make_folder(file.parent)
            files.replace(file, lambda opened: array_files.write_npy(opened, images_BCYX.numpy()))

    def read(self) -> Tensor:
        """All images, float32 [N, C, Y, X], not clamped, once none is missing."""
        numbers = range(len(self._sizes()))
        return torch.cat([torch.from_numpy(array_files.load(self._file(number))) for number in numbers])

    def labelled(self) -> LabelledImages:
        """All images in the scale that scores are made in."""
        return LabelledImages(self.read() * 2 - 1, torch.tensor(self.labels))

    def _sizes(self) -> list[int]:
        size, num_images = self.settings.batch_size, len(self.labels)
        return [min(size, num_images - first) for first in range(0, num_images, size)]

    def _file(self, number: int) -> Path:
        return self.place / f"batch_{number:06d}.npy"


def _holds(file: Path, num_images: int) -> bool:
    try:
        return len(array_files.load(file, is_mapped=True)) == num_images
    except (OSError, ValueError, TypeError):  # it is not there, or is cut short
        return False


def make_missing(config: Config, sets: Sequence[SampleSet], device: torch.device) -> None:
    """Makes the missing images of the sets, which are alike on all ranks, and shows the progress."""
    missing = runtime.gather([one.missing() for one in sets] if runtime.rank() == 0 else None)[0]
    num_images = sum(len(one.labels) for one in sets)
    num_missing = sum(one.count(numbers) for one, numbers in zip(sets, missing, strict=True))
    there = f"; {num_images - num_missing} of {num_images} are there already" * (num_missing < num_images)
    say(f"sampling {count(num_missing, 'image')} of {len(sets)} settings{there}")
    work = sum(one.settings.num_batches(len(one.labels)) * one.work for one in sets)
    done: float = work - sum(len(numbers) * one.work for one, numbers in zip(sets, missing, strict=True))
    with closing(Progress(work, int(done), "forward")) as bar, runtime.Exchange() as exchange:
        for one, numbers in zip(sets, missing, strict=True):
            if not numbers:
                continue
            # Each step of this rank stands for those of all ranks.
            num_rounds = -(-len(numbers) // runtime.world_size())
            a_step = len(numbers) * one.work / (num_rounds * one.num_steps)

            def on_step(name: str = one.name, a_step: float = a_step) -> None:
                nonlocal done
                done += a_step
                bar.show(round(done), f"{done / work:.0%} of all samples, now {name}")

            generator = ImageGenerator(config, one.make_model(), one.settings, device)
            for ids_B, images_BCYX in generator.batches(one.labels, None, numbers, on_step):
                one.write(ids_B, images_BCYX)
                exchange.add(len(ids_B))

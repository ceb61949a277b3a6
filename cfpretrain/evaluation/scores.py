"""The scores of a set of images beside a reference: what `tools/evaluate_fid.py` reports."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError
from cfpretrain.evaluation.feature_sums import SAVE_SECONDS, Sums, Work, part_of
from cfpretrain.evaluation.features import FeatureExtractor
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from cfpretrain.evaluation.given_images import GivenImages
from cfpretrain.evaluation.inception_score import NUM_SPLITS, inception_score, splits_of
from cfpretrain.evaluation.neighbours import precision_recall

NUM_NEIGHBOURS = 3  # k of precision and recall
MOST_KEPT = 50_000  # images behind precision and recall
BATCH_SIZE = 32  # of given images; generated ones are seen in the batches they are made in

# Batches of images with their numbers, this rank's share of those asked for.
Batches = Callable[[list[int]], Iterator[tuple[int, Tensor]]]


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics by which sets of images are compared; None for those that are not known."""

    num_images: int | None  # behind all but the neighbours
    pooled: Gaussian  # for the Frechet distance
    spatial: Gaussian | None = None  # for sFID
    inception_score: tuple[float, float] | None = None  # mean and standard deviation over the splits
    neighbours_KF: Tensor | None = None  # features for precision and recall

    @classmethod
    def of(cls, sums: Sums, neighbours_KF: Tensor | None, with_score: bool = True) -> "ImageStatistics":
        """Of the sums over all images; UserError for fewer than two, or too few for the Inception Score."""
        spatial, classes = part_of(sums, "spatial"), part_of(sums, "classes")
        return cls(
            int(sums["pooled/count"]),
            gaussian_of(part_of(sums, "pooled")),
            gaussian_of(spatial) if spatial else None,
            inception_score(classes) if classes and with_score else None,
            neighbours_KF,
        )


def compare(scored: ImageStatistics, reference: ImageStatistics, name: str, together: bool = False) -> dict[str, float]:
    """The scores that both sets' statistics allow.

    Args:
        scored: generated images.
        reference: real ones, of the same features.
        name: of the Frechet distance; see `FeatureExtractor`.
        together: whether all ranks call this, to share the work.

    Returns:
        By name: the Frechet distance; "sfid" or NAME_spatial; "inception_score" and its "_std", with "_LABEL" at the
        end where the weights are not the published ones; "precision" and "recall".
    """
    is_fid = name == "fid"
    scores = {name: frechet_distance(reference.pooled, scored.pooled)}
    if scored.spatial is not None and reference.spatial is not None:
        scores["sfid" if is_fid else f"{name}_spatial"] = frechet_distance(reference.spatial, scored.spatial)
    if scored.inception_score is not None:
        label = "" if is_fid else f"_of_{name}"
        scores |= dict(
            zip((f"inception_score{label}", f"inception_score_std{label}"), scored.inception_score, strict=True)
        )
    if scored.neighbours_KF is not None and reference.neighbours_KF is not None:
        sets = (reference.neighbours_KF, scored.neighbours_KF)
        scores |= dict(
            zip(("precision", "recall"), precision_recall(*sets, NUM_NEIGHBOURS, together=together), strict=True)
        )
    return scores


def check_enough(num_images: int, extractor: FeatureExtractor, key: str) -> None:
    """UserError, before any work, where a set of so many images, of an option `key`, has not all of these scores."""
    least = NUM_SPLITS if extractor.none().logits_BK is not None else NUM_NEIGHBOURS + 1
    if num_images < least:
        raise UserError(f"{key}: expected at least {least} images for all scores, got {num_images}; give more")


def given_batches(images: GivenImages, batch_size: int = BATCH_SIZE) -> Batches:
    """How images that are there already are read."""

    def read(numbers: list[int]) -> Iterator[tuple[int, Tensor]]:
        for number in numbers[runtime.rank() :: runtime.world_size()]:
            yield number, images.read(range(len(images))[number * batch_size : (number + 1) * batch_size])

    return read


def sum_up(
    work: Work,
    batches: Batches,
    extractor: FeatureExtractor,
    on_begin: Callable[[int], None] = lambda _: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> None:
    """Sees to it that all batches of some work are done; all ranks call it.

    Args:
        work: which images, and where their sums lie.
        batches: gives them.
        extractor: of their features.
        on_begin: called on every rank with how many images are done already.
        on_done: called every few seconds with how many are done.

    Raises:
        LostRankError: another rank is gone.
    """
    with runtime.together():
        begun = work.begin() if runtime.rank() == 0 else None
    work.start, missing = runtime.gather(begun)[0]
    num_done = work.num_images - sum(len(work.ids(number)) for number in missing)
    on_begin(num_done)
    with runtime.Exchange(lambda num_now: on_done(num_done + num_now)) as exchange:
        for number, images in batches(missing):
            work.add(number, extractor(images))
            exchange.add(len(images))
        work.save()


def make_work(
    out: Path,
    option: str,
    plan: Mapping[str, Any],
    num_images: int,
    batch_size: int,
    save_seconds: float = SAVE_SECONDS,
) -> Work:
    """The work of one set: all of its images together, the first `MOST_KEPT` for precision and recall; see `Work`."""
    groups_N = torch.zeros(num_images, dtype=torch.int64)
    is_kept_N = torch.arange(num_images) < MOST_KEPT
    return Work(out, option, plan, batch_size, groups_N, splits_of(num_images), is_kept_N, save_seconds)


def statistics_of(work: Work) -> ImageStatistics:
    """The statistics of one set, once its work is done; all ranks call it."""
    (sums,) = work.total()
    return ImageStatistics.of(sums, work.kept())

"""The real images that generated ones are compared with, reduced to statistics once and cached.

A reference is a set of images (see `given_images`), an archive of statistics (`mu`, `sigma`, and for sFID `mu_s`,
`sigma_s`), or ADM's, which holds both: there the Frechet distances take the statistics, made of all training images,
and precision and recall the images, as ADM's evaluator does.

Statistics that we made name their features, and are refused with others. Those of other tools name none, and are taken
for the FID Inception's, as all published ones are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cfpretrain
from cfpretrain.base import files, outputs, runtime
from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.files import parse_json
from cfpretrain.core import seeds
from cfpretrain.data.images import WHITE, Colour
from cfpretrain.evaluation import array_files
from cfpretrain.evaluation.feature_sums import MOST_KEPT, Work, add
from cfpretrain.evaluation.features import FeatureExtractor
from cfpretrain.evaluation.frechet import Gaussian
from cfpretrain.evaluation.given_images import (
    BATCH_SIZE,
    IMAGES,
    GivenImages,
    is_archive,
    open_images,
    read_arrays,
    say_changes,
)
from cfpretrain.evaluation.inception_score import NUM_SPLITS
from cfpretrain.evaluation.scores import ImageStatistics, check_enough, compare

STATISTICS_FILE, NEIGHBOURS_FILE = "statistics.npz", "neighbours.npy"
_OWN_KEY = "cfpretrain"  # of the note by which our archives say of which features they are
_FEWEST_FOR_FLOOR = 2 * NUM_SPLITS
_KEY = "--reference"


@dataclass(frozen=True)
class Reference:
    """A reference."""

    statistics: ImageStatistics  # of all of it
    # Scores of one random half against the other, what a perfect model of half as many images would get; its Inception
    # Score is that of both. None where there are statistics alone, or too few images.
    floor: dict[str, float] | None
    record: dict[str, Any]  # where the statistics come from, JSON-able; its `fingerprint` changes when they do
    image_size: tuple[int, int] | None = None  # width and height; None where there are no images

    @property
    def floor_num_images(self) -> int:
        """Images in a half; a distance of fewer is larger by that alone."""
        return int(self.record.get("num_images", 0)) // 2


def load_reference(
    path: Path,
    extractor: FeatureExtractor,
    cache: Path,
    on_begin: Callable[[int, int], None] = lambda *_: None,
    on_done: Callable[[int], None] = lambda _: None,
    background: Colour = WHITE,
) -> Reference:
    """The statistics of a reference: from the cache where they are there; all ranks call it.

    Args:
        path: a folder of images, image shards or an .npz.
        extractor: whose features they are to be of.
        cache: folder in which statistics of images are kept, by data, features and code; all ranks see it.
        on_begin: called on every rank with how many images are done, of how many, where there is work to do.
        on_done: called every few seconds with how many images are done.
        background: behind transparent pixels in a folder of images.
    """
    with runtime.together():
        given = _given_statistics(path, extractor) if path.is_file() and is_archive(path) else None
        images = open_images(path, _KEY, background) if given is None or given.has_images else None
    if images is None:
        assert given is not None
        assert given.statistics is not None
        record = {"reference": str(path), "statistics": "given", "fingerprint": given.fingerprint}
        return Reference(given.statistics, None, record)
    with runtime.together():
        check_enough(len(images), extractor, _KEY)
    reference = _of_images(images, extractor, cache, on_begin, on_done)
    if given is None or given.statistics is None:
        return reference
    # ADM's statistics are of many more images than the archive holds: distances between halves of these are no floor.
    both = replace(given.statistics, neighbours_KF=reference.statistics.neighbours_KF)
    floor = {name: value for name, value in (reference.floor or {}).items() if name in ("precision", "recall")}
    fingerprint = f"{reference.record['fingerprint']} {given.fingerprint}"
    record = {**reference.record, "statistics": "given", "fingerprint": fingerprint}
    return Reference(both, floor or None, record, images.size)


@dataclass(frozen=True)
class _Given:
    statistics: ImageStatistics | None
    has_images: bool
    fingerprint: str = ""
    note: Mapping[str, Any] | None = None  # of ours


def _given_statistics(file: Path, extractor: FeatureExtractor) -> _Given:
    arrays, names = read_arrays(file, _KEY, ["mu", "sigma", "mu_s", "sigma_s", _OWN_KEY])
    has_images = IMAGES in names
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        there = [name for name in (mean, covariance) if name in arrays]
        if len(there) == 1:
            raise UserError(
                f"{_KEY}: expected both {mean} and {covariance} in {file}, got {there[0]} alone; add the other"
            )
    if "mu" not in arrays:
        return _Given(None, True)  # `open_images` says what is missing
    num_images, note = None, None
    if _OWN_KEY in arrays:
        note = _note(file, str(arrays.pop(_OWN_KEY)))
        if note["features"] != extractor.fingerprint:
            raise UserError(
                f"{_KEY}: expected statistics of {extractor.name} by this version, got {file}, of {note['name']} by "
                f"{note['made_by']} (features {note['features'][:8]}, wanted {extractor.fingerprint[:8]}); "
                "give the images"
            )
        num_images = int(note["num_images"])
    elif not extractor.is_fid:
        if has_images:
            return _Given(None, True)
        raise UserError(
            f"{_KEY}: expected images, or statistics of {extractor.name}, got {file}, whose statistics are those of "
            "the FID Inception or of unknown features; give the images, or --features inception and its weights"
        )
    pooled = _gaussian(file, arrays, "mu", "sigma")
    spatial = _gaussian(file, arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None
    shapes = extractor.none()
    for gaussian, none in ((pooled, shapes.pooled_BF), (spatial, shapes.spatial_BF)):
        if gaussian is not None and none is not None and len(gaussian.mean_F) != none.shape[1]:
            raise UserError(
                f"{_KEY}: expected statistics of {none.shape[1]} features, as {extractor.name} has, got "
                f"{len(gaussian.mean_F)} in {file}, which are another network's; give the images"
            )
    fingerprint = hashlib.blake2b(b"".join(a.tobytes() for _, a in sorted(arrays.items())), digest_size=12).hexdigest()
    return _Given(ImageStatistics(num_images, pooled, spatial), has_images, fingerprint, note)


def _note(file: Path, text: str) -> dict[str, Any]:
    try:
        note: dict[str, Any] = parse_json(text)
        if not 0 <= int(note["num_images"]) < 2**63:
            raise ValueError("no number of images")
        return note | {name: str(note[name]) for name in ("features", "name", "made_by")}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{_KEY}: {file} does not say of which features it is; give the images") from error


def _gaussian(file: Path, arrays: Mapping[str, Any], mean: str, covariance: str) -> Gaussian:
    try:
        mean_F, covariance_FF = (torch.from_numpy(np.asarray(arrays[name], np.float64)) for name in (mean, covariance))
    except (ValueError, TypeError) as error:
        raise UserError(f"{_KEY}: expected numbers {mean} and {covariance} in {file} ({one_line(error)})") from error
    F = len(mean_F) if mean_F.ndim == 1 else 0
    if F == 0 or covariance_FF.shape != (F, F) or not (mean_F.isfinite().all() and covariance_FF.isfinite().all()):
        raise UserError(
            f"{_KEY}: expected a finite vector {mean} and its square {covariance} in {file}, got shapes "
            f"{list(mean_F.shape)} and {list(covariance_FF.shape)}, or values that are not finite; get it again"
        )
    return Gaussian(mean_F, (covariance_FF + covariance_FF.T) / 2)


# ---------------------------------------------------------------------------
# Of images, through the cache


def _of_images(
    images: GivenImages,
    extractor: FeatureExtractor,
    cache: Path,
    on_begin: Callable[[int, int], None],
    on_done: Callable[[int], None],
) -> Reference:
    plan = {
        "images": images.fingerprint,
        "num_images": len(images),
        "features": extractor.fingerprint,
        "batch_size": BATCH_SIZE,
    }
    entry = cache / hashlib.blake2b(json.dumps(plan).encode(), digest_size=12).hexdigest()
    if not runtime.gather((entry / STATISTICS_FILE).is_file())[0]:
        _make_entry(entry, plan, images, extractor, on_begin, on_done)
    with runtime.together():
        return _read_entry(entry, plan, images, extractor)


def _make_entry(
    entry: Path,
    plan: dict[str, Any],
    images: GivenImages,
    extractor: FeatureExtractor,
    on_begin: Callable[[int, int], None],
    on_done: Callable[[int], None],
) -> None:
    num_images = len(images)
    order_N = seeds.permutation(seeds.key(0, "reference halves"), num_images)
    groups_N, is_kept_N = torch.zeros(num_images, dtype=torch.int64), torch.zeros(num_images, dtype=torch.bool)
    groups_N[order_N[num_images // 2 :]] = 1
    # As many of each half, where there are more than are kept.
    kept = min(MOST_KEPT, num_images) // 2
    is_kept_N[order_N[num_images // 2 - kept : num_images // 2]] = True
    is_kept_N[order_N[num_images // 2 : num_images // 2 + (kept if num_images > MOST_KEPT else num_images)]] = True
    work = Work(entry, "--cache", plan, num_images, BATCH_SIZE, groups_N, is_kept_N)
    work.sum_up(images.batches, extractor, lambda done: on_begin(done, num_images), on_done)
    say_changes(images, _KEY)
    halves, kept_KF = work.total(), work.kept()
    group_K = groups_N[is_kept_N]
    whole = ImageStatistics.of(add(*halves), kept_KF)
    floor = None
    if num_images >= _FEWEST_FOR_FLOOR:
        # A half may have no image in a split of the Inception Score.
        first, second = (
            ImageStatistics.of(half, kept_KF[group_K == group], with_score=False) for group, half in enumerate(halves)
        )
        second = replace(second, inception_score=whole.inception_score)
        floor = compare(second, first, extractor.name, together=True)
    with runtime.together():
        if runtime.rank() == 0:
            note = {
                "features": extractor.fingerprint,
                "name": extractor.name,
                "num_images": num_images,
                "made_by": f"cfpretrain {cfpretrain.__version__}",
                "reference": images.name,
                "statistics": "of the images",
                "inception_score": whole.inception_score,
                "floor": floor,
                "plan": plan,
            }
            _write_entry(entry, note, whole, kept_KF)
            work.remove()


def _write_entry(entry: Path, note: dict[str, Any], whole: ImageStatistics, kept_KF: Tensor) -> None:
    arrays = {"mu": whole.pooled.mean_F, "sigma": whole.pooled.covariance_FF}
    if whole.spatial is not None:
        arrays |= {"mu_s": whole.spatial.mean_F, "sigma_s": whole.spatial.covariance_FF}
    of_numpy = {name: value.numpy() for name, value in arrays.items()}
    with suppress(OSError):
        files.remove(entry)  # without its statistics
    with outputs.whole_or_nothing(entry, "--cache") as writing:
        files.make_folder(writing)
        with files.create(writing / STATISTICS_FILE) as opened:
            np.savez(opened, **{_OWN_KEY: np.array(json.dumps(note))}, **of_numpy)
        with files.create(writing / NEIGHBOURS_FILE) as opened:
            array_files.write_npy(opened, kept_KF.numpy())


def _read_entry(entry: Path, plan: dict[str, Any], images: GivenImages, extractor: FeatureExtractor) -> Reference:
    advice = f"delete {entry}, and it is made again"
    try:
        given = _given_statistics(entry / STATISTICS_FILE, extractor)
        if given.note is None or given.statistics is None:
            raise ValueError("not made by cfpretrain")
        record, floor, score = given.note, given.note["floor"], given.note["inception_score"]
        if floor is not None:
            floor = {name: float(value) for name, value in floor.items()}
        if score is not None:
            mean, deviation = score
            score = float(mean), float(deviation)
        is_of_these = record["plan"] == plan and record["num_images"] == plan["num_images"]
        # Mapped: who needs none of them reads none.
        neighbours_KF = torch.from_numpy(array_files.load(entry / NEIGHBOURS_FILE, is_mapped=True))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # UserError, too
        raise UserError(f"--cache: {entry} is damaged ({one_line(error):.100}); {advice}") from error
    if not is_of_these:
        raise UserError(f"--cache: {entry} holds statistics of other images or features; {advice}")
    statistics = replace(given.statistics, neighbours_KF=neighbours_KF, inception_score=score)
    record = {**record, "reference": images.name, "cache": str(entry), "fingerprint": entry.name}
    return Reference(statistics, floor, record, images.size)

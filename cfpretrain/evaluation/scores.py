"""The scores of a set of images beside a reference: what `tools/evaluate_fid.py` reports."""

from dataclasses import dataclass

from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.feature_sums import Sums, Work, part_of
from cfpretrain.evaluation.features import FeatureExtractor
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from cfpretrain.evaluation.inception_score import NUM_SPLITS, inception_score
from cfpretrain.evaluation.neighbours import precision_recall

NUM_NEIGHBOURS = 3  # k of precision and recall


@dataclass(frozen=True)
class ImageStatistics:
    """The statistics by which sets of images are compared; None: not known."""

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
    """The scores of generated images that both sets' statistics allow.

    Args:
        scored: of generated images.
        reference: of real ones, by the same features.
        name: of the Frechet distance; see `FeatureExtractor`.
        together: whether all ranks call this, to share the work.

    Returns:
        By name: the Frechet distance; "sfid" or NAME_spatial; "inception_score" and "inception_score_std", with
        "_of_NAME" at the end where the weights are not the published ones; "precision" and "recall".
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


def statistics_of(work: Work) -> ImageStatistics:
    """The statistics of one set, once its work is done; all ranks call it."""
    (sums,) = work.total()
    return ImageStatistics.of(sums, work.kept())

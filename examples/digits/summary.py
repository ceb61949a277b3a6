"""The scores of report.json: the model's, beside the real images' own and the cheat's.

How the three are made comparable. Frechet distance, precision and recall all depend on how many images they see, and
a small held-out part would say more about its size (and its writers) than about the model. So all real images, training
and held-out, are put together and split at random into two halves with equal shares of each class. One half is the
reference. Against it stand, with the same number of images each, half and half of every class alike:
    real_against_real  the other half: the value of a perfect model, bias of the sample size included
    value              generated images, drawn from the sets given with equal shares of each class
    cheat              class means of the training images with the noise that pleases this reference best
Repeated over `num_splits` splits and averaged, since one split of 1 797 digits varies by a tenth of real_against_real.
A model that copies its training images is not punished here, as in the usual FID against the training set.

Pixels must be in the scale where black is -1 and white 1: the distance grows with the square of the unit.
scikit-learn's 8x8 digits as value / 8 - 1 give 0.23 to 0.27 for real_against_real and 3.4 to 3.5 for the best cheat
(precision and recall 0.9 each; the cheat's 0.3 and 0.06). Nothing is clamped: samples go in as the sampler made them,
and the cheat's noise is left whole too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.evaluation.frechet import frechet_distance, gaussian_of, moments_of
from cfpretrain.evaluation.neighbours import precision_recall
from examples.digits import classifier
from examples.digits.cheat import best_cheat
from examples.digits.pixels import pixel_features, read_all_images

_WHO = ("value", "real_against_real", "cheat")
_METRICS = ("precision", "recall", "frechet_pixel")


@dataclass(frozen=True)
class LabelledImages:
    """Images [N, C, Y, X] with pixels in [-1, 1], and their classes, int64 [N]: those asked for where generated."""

    images: Tensor
    labels_N: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels_N):
            raise UserError(
                f"labelled images: expected one label an image, got {len(self.labels_N)} labels "
                f"for {len(self.images)} images"
            )


def read_labelled(folder: Path, option: str) -> LabelledImages:
    """All images of image shards."""
    pixels, labels_N = read_all_images(folder, option)
    return LabelledImages(pixels.float() / 127.5 - 1, labels_N)


def table(rows: Sequence[Sequence[object]]) -> str:
    """Lines of a name and values each, floats with three digits; an empty row is an empty line."""
    lines = []
    for name, *values in (row or ("",) for row in rows):
        cells = (f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)
        lines.append(f"  {name:<38}{''.join(f'{cell:>12}' for cell in cells)}".rstrip())
    return "\n".join(lines)


def summarise(
    real_train: LabelledImages,
    real_held_out: LabelledImages,
    guided: Mapping[int, LabelledImages],
    unguided: Mapping[int, LabelledImages],
    seed: int = 0,
    num_splits: int = 4,
) -> dict[str, Any]:
    """The quality part of report.json.

    Args:
        real_train: the model was trained on them, and the classifier is fitted on them.
        real_held_out: the model never saw them.
        guided: images generated with guidance, by their number of AR steps; classes evenly spread.
        unguided: the same without guidance. Precision, recall and Frechet distance are those of its smallest number of
            AR steps.
        seed: of the splits and the cheat's noise.
        num_splits: random halvings to average over.

    Returns:
        `class_accuracy` and `class_accuracy_unguided` {AR steps: share}; `precision`, `recall`, `frechet_pixel`, each
        {"value", "real_against_real", "cheat"}; `classifier_accuracy_on_real`; `num_scored`, the images behind each
        class accuracy (the fewest, where they differ); `num_compared`, the images of each set in the other three;
        `cheat_strength`, the mean of the best noise strengths. Plain numbers, ready for JSON.
    """
    if not unguided:
        raise UserError("unguided samples: expected at least one number of AR steps, got none; generate some to score")
    assert num_splits >= 1
    judge = classifier.fit(real_train.images, real_train.labels_N)
    real = LabelledImages(
        torch.cat([real_train.images, real_held_out.images]), torch.cat([real_train.labels_N, real_held_out.labels_N])
    )
    return {
        "class_accuracy": _accuracies(judge, guided),
        "class_accuracy_unguided": _accuracies(judge, unguided),
        **_compare(real_train, real, unguided[min(unguided)], seed, num_splits),
        "classifier_accuracy_on_real": judge.accuracy(real_held_out.images, real_held_out.labels_N),
        "num_scored": min(len(one.images) for one in (*guided.values(), *unguided.values())),
    }


def _accuracies(judge: classifier.Classifier, generated: Mapping[int, LabelledImages]) -> dict[str, float]:
    return {str(steps): judge.accuracy(one.images, one.labels_N) for steps, one in sorted(generated.items())}


def _compare(
    real_train: LabelledImages, real: LabelledImages, generated: LabelledImages, seed: int, num_splits: int
) -> dict[str, Any]:
    """Precision, recall and Frechet distance of the three, averaged over the splits."""
    real_NF = pixel_features(real.images, "real images")
    generated_NF = pixel_features(generated.images, "generated images")
    smaller_half = int((real.labels_N.bincount() // 2).sum())
    num_compared = min(smaller_half, len(generated_NF))
    totals = {metric: dict.fromkeys(_WHO, 0.0) for metric in _METRICS}
    strength = 0.0
    for split in range(num_splits):
        reference_R, other_R = _halves(real.labels_N, seeds.fold(seeds.key(seed, "real halves"), split))
        drawn_G, _ = _balanced_order(generated.labels_N, seeds.fold(seeds.key(seed, "generated drawn"), split))
        reference_RF, other_RF = real_NF[reference_R], real_NF[other_R[:num_compared]]
        reference = gaussian_of(moments_of(reference_RF))
        cheat = best_cheat(real_train.images, real_train.labels_N, reference, num_compared, seed + split)
        strength += cheat.strength / num_splits
        candidates = (generated_NF[drawn_G[:num_compared]], other_RF, pixel_features(cheat.images, "cheat"))
        for who, candidate_GF in zip(_WHO, candidates, strict=True):
            distance = frechet_distance(reference, gaussian_of(moments_of(candidate_GF)))
            scores = (*precision_recall(reference_RF, candidate_GF), distance)
            for metric, score in zip(_METRICS, scores, strict=True):
                totals[metric][who] += score / num_splits
    return {**totals, "num_compared": num_compared, "cheat_strength": strength}


def _balanced_order(labels_N: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """A random order in which the classes take turns while they last, and each place's turn: two int64 [N].

    Any beginning of the order holds the classes in equal numbers, as far as there are enough.
    """
    shuffled_N = seeds.permutation(key, len(labels_N))
    turn_N = torch.empty(len(labels_N), dtype=torch.int64)
    for number in sorted(set(labels_N.tolist())):
        of_class = labels_N[shuffled_N] == number
        turn_N[of_class] = torch.arange(int(of_class.sum()))
    by_turn_N = turn_N.argsort(stable=True)
    return shuffled_N[by_turn_N], turn_N[by_turn_N]


def _halves(labels_N: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Two random halves of the images, as indices; the first has one more of each class with an odd number."""
    order_N, turn_N = _balanced_order(labels_N, key)
    return order_N[turn_N % 2 == 0], order_N[turn_N % 2 == 1]

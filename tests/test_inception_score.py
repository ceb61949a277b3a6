import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.feature_sums import add
from cfpretrain.evaluation.inception_score import class_sums, inception_score, splits_of


def logits_of(num_images: int, num_classes: int = 1008, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(num_images, num_classes, generator=torch.Generator().manual_seed(0))


def by_definition(logits_NK: np.ndarray, splits_N: np.ndarray) -> list[float]:
    p_NK = np.exp(logits_NK.astype(np.float64))
    p_NK /= p_NK.sum(1, keepdims=True)
    scores = []
    for split in range(10):
        p = p_NK[splits_N == split]
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    return scores


@pytest.mark.parametrize("num_images", [10, 103, 1000])
def test_agrees_with_torch_fidelity_and_the_definition(num_images: int) -> None:
    logits_NK, splits_N = logits_of(num_images), splits_of(num_images)
    mean, deviation = inception_score(class_sums(logits_NK, splits_N))
    theirs = isc_features_to_metric(logits_NK)
    assert mean == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert deviation == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-6, abs=1e-9)
    scores = by_definition(logits_NK.numpy(), splits_N.numpy())
    assert (mean, deviation) == (pytest.approx(np.mean(scores), rel=1e-9), pytest.approx(np.std(scores), abs=1e-9))


def test_parts_add_up() -> None:
    logits_NK, splits_N = logits_of(97), splits_of(97)
    whole = inception_score(class_sums(logits_NK, splits_N))
    parts = [class_sums(logits_NK[part], splits_N[part]) for part in (slice(0, 1), slice(1, 60), slice(60, 97))]
    assert inception_score(add(add(parts[2], parts[0]), parts[1])) == pytest.approx(whole, rel=1e-12)


def test_the_two_ends_of_the_scale() -> None:
    sure = torch.eye(10).repeat(10, 1) * 1e4
    spread = torch.zeros(100, dtype=torch.int64)
    assert inception_score(class_sums(sure, spread, 1)) == (pytest.approx(10.0, rel=1e-12), 0.0)
    constant = class_sums(logits_of(1).expand(100, -1), splits_of(100))
    assert inception_score(constant) == (pytest.approx(1.0, rel=1e-12), pytest.approx(0.0, abs=1e-12))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least an image in each of 10 splits, got 9"):
        inception_score(class_sums(logits_of(9), splits_of(9)))


def test_splits_are_equal_and_fixed() -> None:
    splits_N = splits_of(1003)
    assert sorted(splits_N.bincount().tolist()) == [100] * 7 + [101] * 3
    assert math.isclose(float(splits_N[:500].double().mean()), 4.5, abs_tol=0.5), "mixed, as sorted images need it"

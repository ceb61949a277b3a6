import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from cfpretrain.base.console import UserError
from cfpretrain.evaluation.feature_sums import add
from cfpretrain.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, moments_of
from examples.digits.pixels import frechet_between, pixel_features


def correlated(count: int, num_features: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix_FF = torch.randn(num_features, num_features, generator=generator, dtype=torch.float64)
    return torch.randn(count, num_features, generator=generator, dtype=torch.float64) @ mix_FF + shift


def by_general_root(first_NF: Tensor, second_NF: Tensor) -> float:
    one, two = first_NF.numpy(), second_NF.numpy()
    cov_one, cov_two = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(cov_one @ cov_two).real
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(cov_one + cov_two - 2 * root))


@pytest.mark.parametrize("num_features", [2, 7, 30])
def test_agrees_with_the_general_matrix_root(num_features: int) -> None:
    first, second = correlated(400, num_features, 0), correlated(300, num_features, 1, shift=0.3)
    assert frechet_between(first, second) == pytest.approx(by_general_root(first, second), rel=1e-9)


def decaying(count: int, num_features: int, seed: int) -> Tensor:
    """Features with a spectrum as networks have it: the largest variance is 1e6 times the smallest; all positive."""
    deviations_F = torch.logspace(0, -3, num_features, dtype=torch.float64)
    return 3 + correlated(count, num_features, seed) / num_features**0.5 * deviations_F


def by_torch_fidelity(first_NF: Tensor, second_NF: Tensor) -> float:
    return float(
        fid_statistics_to_metric(*map(fid_features_to_statistics, (first_NF, second_NF)), verbose=False)[KEY_METRIC_FID]
    )


@pytest.mark.parametrize("make", [correlated, decaying])
@pytest.mark.parametrize("num_features", [64, 300])
def test_agrees_with_torch_fidelity_and_scipy(make: Callable[..., Tensor], num_features: int) -> None:
    first, second = make(2000, num_features, 0), 1.1 * make(1500, num_features, 1)
    distance = frechet_between(first, second)
    assert distance == pytest.approx(by_torch_fidelity(first, second), rel=1e-6)
    assert distance == pytest.approx(by_general_root(first, second), rel=1e-6)


def by_singular_values(first_NF: Tensor, second_NF: Tensor) -> float:
    """Exact for covariances without an inverse: of centred features X and Y, tr((C1 C2)^(1/2)) is |X Y^T| nuclear."""
    x, y = ((one - one.mean(0)).numpy() / np.sqrt(len(one) - 1) for one in (first_NF, second_NF))
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    means = (first_NF.mean(0) - second_NF.mean(0)).square().sum()
    return float(means + (x**2).sum() + (y**2).sum() - 2 * overlap)


@pytest.mark.parametrize("make", [correlated, decaying])
@pytest.mark.parametrize("counts", [(50, 40), (50, 2000), (301, 300), (2, 2)])
def test_agrees_with_the_closed_form_for_fewer_images_than_features(
    make: Callable[..., Tensor], counts: tuple[int, int]
) -> None:
    first, second = (make(count, 300, seed) for seed, count in enumerate(counts))
    assert frechet_between(first, second) == pytest.approx(by_singular_values(first, second), rel=1e-6)


def test_one_image_many_times_is_a_point() -> None:
    real, constant = correlated(100, 20, 0), torch.full((100, 20), 0.5, dtype=torch.float64)
    expected = (real.mean(0) - 0.5).square().sum() + real.var(0).sum()
    assert frechet_between(real, constant) == pytest.approx(float(expected), rel=1e-12)
    assert frechet_between(constant, constant) == 0.0


def diagonal(mean_F: list[float], deviations_F: list[float]) -> Gaussian:
    return Gaussian(torch.tensor(mean_F).double(), torch.diag(torch.tensor(deviations_F).double() ** 2))


def test_closed_form_of_diagonal_gaussians() -> None:
    # (mean difference)^2 + (difference of standard deviations)^2 on each axis: 9 + 1, 0 + 4, 16 + 0.
    distance = frechet_distance(diagonal([0.0, 5.0, -1.0], [1.0, 3.0, 0.5]), diagonal([3.0, 5.0, 3.0], [2.0, 1.0, 0.5]))
    assert distance == pytest.approx(30.0, abs=1e-10)


def test_closed_form_of_scaled_images() -> None:
    # Doubling every pixel doubles mean and standard deviations, so the distance is tr(C) + |mean|^2.
    images = correlated(500, 12, 2).reshape(500, 3, 2, 2)
    features = images.flatten(1)
    expected = features.var(0).sum() + features.mean(0).square().sum()
    assert frechet_between(images, 2 * images) == pytest.approx(float(expected), rel=1e-10)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), seed=st.integers(0, 1000))
def test_moments_of_parts_add_up_to_the_whole(cuts: list[int], seed: int) -> None:
    features_NF = correlated(60, 5, seed)
    edges = [0, *sorted(cuts), 60]
    merged = moments_of(features_NF[:0])
    for begin, end in itertools.pairwise(edges):
        merged = add(moments_of(features_NF[begin:end]), merged)
    assert merged["count"] == 60
    gaussian = gaussian_of(merged)
    torch.testing.assert_close(gaussian.mean_F, features_NF.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gaussian.covariance_FF, features_NF.T.cov(), rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(num_first=st.integers(2, 12), num_second=st.integers(2, 12), seed=st.integers(0, 1000))
def test_symmetric_and_never_negative_with_fewer_images_than_features(
    num_first: int, num_second: int, seed: int
) -> None:
    first, second = correlated(num_first, 10, seed), correlated(num_second, 10, seed + 1)
    forth, back = frechet_between(first, second), frechet_between(second, first)
    assert forth >= 0
    assert math.isclose(forth, back, rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize("count", [2, 5, 500])
def test_identical_sets_are_at_zero(count: int) -> None:
    images = correlated(count, 40, 3)
    assert frechet_between(images, images.flip(0)) == pytest.approx(0.0, abs=1e-8 * float(images.square().sum()))


def test_constant_features_add_the_difference_of_their_means_alone() -> None:
    first, second = correlated(200, 6, 4), correlated(200, 6, 5)
    border_first, border_second = torch.full((200, 3), -1.0), torch.full((200, 3), 1.0)
    with_border = frechet_between(torch.cat([first, border_first], 1), torch.cat([second, border_second], 1))
    assert with_border == pytest.approx(frechet_between(first, second) + 3 * 2.0**2, rel=1e-6)
    assert frechet_between(border_first, border_second) == 12.0


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"at least 2 images.*got {count}"):
        frechet_between(correlated(5, 3, 0), correlated(5, 3, 0)[:count])


def test_pixels_that_are_not_finite_are_refused_by_name() -> None:
    images = torch.zeros(4, 1, 2, 2)
    images[1, 0, 0, 0], images[3, 0, 1, 1] = math.nan, math.inf
    with pytest.raises(UserError, match=r"generated images.*2 of 4"):
        pixel_features(images, "generated images")

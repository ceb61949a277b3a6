"""The Frechet distance between two sets of images, each taken as one Gaussian in feature space.

For means m1, m2 and covariances C1, C2 it is |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^(1/2) C2 C1^(1/2))^(1/2))
(Dowson and Landau 1982; Heusel et al. 2017). With factors C1 = W1 W1^T and C2 = W2 W2^T from symmetric
eigendecompositions, the last trace is the sum of the singular values of W1^T W2: no general matrix root, no complex
numbers, nothing that diverges, and no root of a small eigenvalue that is rounding alone.

What the degenerate cases give:
    fewer images than features  the covariance is singular; the distance is finite and exact for that covariance
    constant features           they add only the difference of their means
    identical sets              0 up to rounding; never negative
    fewer than two images       no covariance: UserError
The estimate is biased upward, the more the fewer images: compare distances only between equal numbers of images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cfpretrain.base.console import UserError


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set's features, float64 [F] and [F, F]."""

    mean_F: Tensor
    covariance_FF: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """W with covariance W W^T, [F, rank]; kept, since a reference meets many other sets."""
        values_F, vectors_FF = torch.linalg.eigh(self.covariance_FF)
        # Below this, rounding alone can have made an eigenvalue; its root would be 1e-8 of the largest.
        is_real_F = values_F > values_F.abs().max() * len(values_F) * torch.finfo(values_F.dtype).eps
        return vectors_FF[:, is_real_F] * values_F[is_real_F].sqrt()


def moments_of(features_NF: Tensor) -> dict[str, Tensor]:
    """Count, sum [F] and sum of outer products [F, F] of features, float [N, F] with any N >= 0, in float64.

    All three add up over batches and ranks, so a set can be seen in pieces, in any order. Taking the covariance from
    sums loses about (mean / standard deviation)^2 of float64's 1e-16: nothing for pixels or network features.
    """
    wide_NF = features_NF.double()
    return {"count": torch.tensor(len(wide_NF)), "sum_F": wide_NF.sum(0), "outer_FF": wide_NF.T @ wide_NF}


def gaussian_of(moments: Mapping[str, Tensor]) -> Gaussian:
    """Mean and unbiased covariance (divided by count - 1); UserError for fewer than two images."""
    count = int(moments["count"])
    if count < 2:
        raise UserError(f"Frechet distance: expected at least 2 images in each set, got {count}; score more")
    mean_F = moments["sum_F"] / count
    centred_FF = moments["outer_FF"] - count * torch.outer(mean_F, mean_F)
    return Gaussian(mean_F, centred_FF / (count - 1))


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """The squared 2-Wasserstein distance of two Gaussians, in squared units of the features; at least 0."""
    overlap = torch.linalg.svdvals(first.factor.T @ second.factor).sum()
    spread = first.covariance_FF.trace() + second.covariance_FF.trace() - 2 * overlap
    return max(float((first.mean_F - second.mean_F).square().sum() + spread), 0.0)  # in this order NaN stays NaN

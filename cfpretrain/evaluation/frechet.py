"""The Frechet distance between two sets of images, each taken as one Gaussian in feature space.

For means m1, m2 and covariances C1, C2 it is |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^(1/2) C2 C1^(1/2))^(1/2))
(Dowson and Landau 1982; Heusel et al. 2017). The matrix in the last trace is symmetric with eigenvalues >= 0, so two
symmetric eigendecompositions give it: no general matrix root, no complex numbers, nothing that diverges.

What the degenerate cases give:
    fewer images than features  the covariance is singular; the distance is finite and exact for that covariance
    constant features           they add only the difference of their means
    identical sets              0 up to rounding; never negative
    fewer than two images       no covariance: UserError
The estimate is biased upward, the more the fewer images: compare distances only between equal numbers of images.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cfpretrain.console import UserError


def pixel_features(images: Tensor, name: str) -> Tensor:
    """The pixels of each image as its features.

    Args:
        images: [N, ...], any real dtype; the scale of the pixels is the scale of the features.
        name: what the images are, for the message.

    Returns:
        float64 [N, F] on the CPU.

    Raises:
        UserError: a value is NaN or infinite.
    """
    features_NF = images.detach().to("cpu", torch.float64).flatten(1)
    num_broken = int((~features_NF.isfinite().all(dim=1)).sum())
    if num_broken:
        raise UserError(
            f"{name}: expected finite numbers, got NaN or infinity in {num_broken} of {len(features_NF)} images; "
            "the model that made them has diverged, or they were read wrongly"
        )
    return features_NF


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of outer products of features, in float64.

    All three add up over batches and ranks, so a set can be seen in pieces, in any order. Taking the covariance from
    sums loses about (mean / standard deviation)^2 of float64's 1e-16: nothing for pixels or network features.
    """

    count: int
    sum_F: Tensor
    outer_FF: Tensor

    @classmethod
    def of(cls, features_NF: Tensor) -> "Moments":
        """The moments of one batch: float [N, F], any N >= 0."""
        wide_NF = features_NF.double()
        return cls(len(wide_NF), wide_NF.sum(0), wide_NF.T @ wide_NF)

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together."""
        return Moments(self.count + other.count, self.sum_F + other.sum_F, self.outer_FF + other.outer_FF)

    @cached_property
    def mean(self) -> Tensor:
        """The mean; UserError for fewer than two images."""
        self._refuse_too_few()
        return self.sum_F / self.count

    @cached_property
    def covariance(self) -> Tensor:
        """The unbiased covariance (divided by count - 1); UserError for fewer than two images."""
        self._refuse_too_few()
        centred_FF = self.outer_FF - self.count * torch.outer(self.mean, self.mean)
        return centred_FF / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """The symmetric root of the covariance; kept, since a reference meets many other sets."""
        values_F, vectors_FF = torch.linalg.eigh(self.covariance)
        root_FF: Tensor = (vectors_FF * _without_rounding(values_F).sqrt()) @ vectors_FF.T
        return root_FF

    def _refuse_too_few(self) -> None:
        if self.count < 2:
            raise UserError(f"Frechet distance: expected at least 2 images in each set, got {self.count}; score more")


def frechet_distance(first: Moments, second: Moments) -> float:
    """The squared 2-Wasserstein distance of the two Gaussians, in squared units of the features; at least 0.

    Args:
        first: moments of one set; when many are compared with one, give that one here (its root is kept).
        second: moments of the other, with the same number of features.

    Raises:
        UserError: a set has fewer than two images.
    """
    product_FF = first.root @ second.covariance @ first.root
    # Rounding left it asymmetric in the last bits; eigvalsh would read one triangle only.
    values_F = torch.linalg.eigvalsh((product_FF + product_FF.T) / 2)
    overlap = _without_rounding(values_F).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * overlap
    return max(0.0, float((first.mean - second.mean).square().sum() + spread))


def frechet_between(first: Tensor, second: Tensor) -> float:
    """`frechet_distance` between two sets of images, by their pixels; arguments as for `pixel_features`."""
    return frechet_distance(
        Moments.of(pixel_features(first, "first set of images")),
        Moments.of(pixel_features(second, "second set of images")),
    )


def _without_rounding(values_F: Tensor) -> Tensor:
    """Eigenvalues of a positive semi-definite matrix with those that rounding alone can have made set to 0."""
    # A root turns an error of 1e-16 into one of 1e-8, for each missing dimension: cut it before the root.
    limit = values_F.abs().max() * len(values_F) * torch.finfo(values_F.dtype).eps
    return torch.where(values_F > limit, values_F, 0.0)

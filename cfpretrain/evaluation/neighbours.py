"""Precision and recall of generated images by nearest neighbours (Kynkaanniemi et al. 2019, arXiv 1904.06991).

A set's manifold is the union of balls, one around each of its images, that reach to the image's k-th nearest
neighbour in the same set. Precision is the share of generated images inside the real manifold: do they look real?
Recall is the share of real images inside the generated manifold: is every kind of real image produced?
Both depend on how many images there are: compare only values taken with equal numbers.
"""

import torch
from torch import Tensor

from cfpretrain.console import UserError

# Rows of a distance matrix held at once: 1024 x 50 000 float64 are 400 MB.
_BLOCK = 1024


def precision_recall(real_RF: Tensor, generated_GF: Tensor, k: int = 3, block: int = _BLOCK) -> tuple[float, float]:
    """Improved precision and recall.

    An image is not its own neighbour, but an equal image elsewhere in its set is one, at distance 0; a distance equal
    to the radius lies inside. Distances are sums of squared differences, not |a|^2 + |b|^2 - 2ab, so equal images are
    at exactly 0 and the result does not depend on `block`.

    Args:
        real_RF: features of the real images, float [R, F].
        generated_GF: features of the generated images, float [G, F].
        k: which neighbour sets the radius; the paper's choice is 3.
        block: rows of a distance matrix held at once; memory is block * max(R, G) * 8 bytes.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        UserError: a set has no k-th neighbour, since it holds k images or fewer.
    """
    real_RF, generated_GF = real_RF.double(), generated_GF.double()
    for name, count in (("real", len(real_RF)), ("generated", len(generated_GF))):
        if count <= k:
            raise UserError(
                f"precision and recall: expected more than k = {k} {name} images, got {count}; score more images"
            )
    precision = _share_inside(generated_GF, real_RF, _radii(real_RF, k, block), block)
    recall = _share_inside(real_RF, generated_GF, _radii(generated_GF, k, block), block)
    return precision, recall


def _distances(rows_AF: Tensor, columns_BF: Tensor) -> Tensor:
    return torch.cdist(rows_AF, columns_BF, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points_NF: Tensor, k: int, block: int) -> Tensor:
    """The distance of each point to its k-th nearest other point."""
    radii = []
    for begin in range(0, len(points_NF), block):
        rows_BF = points_NF[begin : begin + block]
        distances_BN = _distances(rows_BF, points_NF)
        # By index, not by distance 0: a duplicate elsewhere in the set is a neighbour.
        distances_BN.diagonal(begin).fill_(torch.inf)
        radii.append(distances_BN.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _share_inside(points_NF: Tensor, centres_MF: Tensor, radii_M: Tensor, block: int) -> float:
    """The share of points that lie in at least one ball."""
    num_inside = 0
    for begin in range(0, len(points_NF), block):
        distances_BM = _distances(points_NF[begin : begin + block], centres_MF)
        num_inside += int((distances_BM <= radii_M).any(dim=1).sum())
    return num_inside / len(points_NF)

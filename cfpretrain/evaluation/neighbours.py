"""Precision and recall of generated images by nearest neighbours (Kynkaanniemi et al. 2019, arXiv 1904.06991).

A set's manifold is the union of balls, one around each of its images, that reach to the image's k-th nearest
neighbour in the same set. Precision is the share of generated images inside the real manifold: do they look real?
Recall is the share of real images inside the generated manifold: is every kind of real image produced?
Both depend on how many images there are: compare only values taken with equal numbers.

How the result is exact, and yet made of matrix products. A distance is the root of the sum of squared differences,
which is 0 for equal images and the same for (a, b) and (b, a); to take it for every pair would last hours. Tiles of
|a|^2 + |b|^2 - 2 a b miss its square by a bound that is known, and decide nearly all images. An image that is nearer to
the edge of a ball than that bound (a tie, as copies make them) is decided by the distances themselves.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError

# Sides of a tile: its float64 distances and the rows and columns behind it are 34 MB each with 2048 features.
_BLOCK = 2048


def precision_recall(
    real_RF: Tensor, generated_GF: Tensor, k: int = 3, block: int = _BLOCK, together: bool = False
) -> tuple[float, float]:
    """Improved precision and recall, each in [0, 1].

    An image is not its own neighbour, but an equal image elsewhere in its set is one, at distance 0; a distance equal
    to the radius lies inside. The result depends neither on `block` nor on ranks.

    Args:
        real_RF: features of the real images, finite.
        generated_GF: features of the generated images, finite.
        k: which neighbour sets the radius; the paper's choice is 3.
        block: sides of the tiles in which distances are held; memory is a few block * max(block, F) * 8 bytes.
        together: whether all ranks have called this, with the same features, to share the work.
    """
    for name, count in (("real", len(real_RF)), ("generated", len(generated_GF))):
        if count <= k:
            raise UserError(
                f"precision and recall: expected more than k = {k} {name} images, got {count}; score more images"
            )
    # Norms, and with them the bound, are smallest around it. (`mean` would make a float64 copy of all rows.)
    centre_F = torch.stack([part.double().sum(0) for part in real_RF.split(block)]).sum(0) / len(real_RF)
    real, generated = (_Manifold(points, centre_F, k, block, together) for points in (real_RF, generated_GF))
    # Rounding moves a square by less than 2 F eps |a|^2, a radius by as much, and the exact distances are rounded too.
    longest = max(float(one.norms_N.max()) for one in (real, generated))
    margin = 8 * (real_RF.shape[1] + 16) * torch.finfo(torch.float64).eps * longest
    real_gap_R, generated_gap_G = _gaps(real, generated)
    return _share_inside(generated, real, generated_gap_G, margin), _share_inside(real, generated, real_gap_R, margin)


class _Manifold:
    """Points with the balls around them; squared distances are off by rounding until they are asked for exactly."""

    def __init__(self, points_NF: Tensor, centre_F: Tensor, k: int, block: int, together: bool) -> None:
        self.points_NF, self.centre_F, self.k, self.block, self.together = points_NF, centre_F, k, block, together
        self.norms_N = torch.cat([rows_BF.square().sum(1) for _, rows_BF in self.blocks()])
        self.radii_N = self._radii()
        self._exact_radii: dict[int, float] = {}

    def blocks(self, mine: bool = False, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Places, and centred float64 points; of all blocks from a place on, or of this rank's."""
        rank, step = (runtime.rank(), runtime.world_size()) if mine and self.together else (0, 1)
        for begin in range(first + rank * self.block, len(self.points_NF), step * self.block):
            places = slice(begin, begin + self.block)
            yield places, self.points_NF[places].double() - self.centre_F

    def _radii(self) -> Tensor:
        """The squared distance of each point to its k-th nearest other point."""
        nearest_KN = torch.full((self.k, len(self.points_NF)), torch.inf, dtype=torch.float64)
        for rows, rows_BF in self.blocks(mine=True):
            for columns, columns_BF in self.blocks(first=rows.start):  # a tile serves its mirror image too
                squares_BB = _squares(rows_BF, self.norms_N[rows], columns_BF, self.norms_N[columns])
                if rows == columns:  # by place, not by distance 0: a duplicate elsewhere in the set is a neighbour
                    squares_BB.fill_diagonal_(torch.inf)
                else:
                    nearest_KN[:, columns] = _nearest([nearest_KN[:, columns], squares_BB], self.k)
                nearest_KN[:, rows] = _nearest([nearest_KN[:, rows], squares_BB.T], self.k)
        found = runtime.gather(nearest_KN) if self.together else [nearest_KN]
        return _nearest(found, self.k)[-1]

    def exact_radius(self, place: int) -> float:
        """The distance of a point to its k-th nearest other point."""
        if place not in self._exact_radii:
            distances_N = self.exact_distances(self.points_NF[place], torch.arange(len(self.points_NF)))
            distances_N[place] = torch.inf
            self._exact_radii[place] = float(distances_N.kthvalue(self.k).values)
        return self._exact_radii[place]

    def exact_distances(self, point_F: Tensor, places: Tensor) -> Tensor:
        """Of a point to some of these."""
        parts = [self.points_NF[part].double() for part in places.split(self.block)]
        row_1F = point_F.double()[None]
        return torch.cat([torch.cdist(row_1F, part, compute_mode="donot_use_mm_for_euclid_dist")[0] for part in parts])


def _nearest(squares: Sequence[Tensor], k: int) -> Tensor:
    """The k least of each column."""
    return torch.cat(list(squares)).topk(k, dim=0, largest=False).values


def _squares(rows_AF: Tensor, norms_A: Tensor, columns_BF: Tensor, norms_B: Tensor) -> Tensor:
    return torch.addmm(norms_B, rows_AF, columns_BF.T, alpha=-2).add_(norms_A[:, None])


def _gaps(real: _Manifold, generated: _Manifold) -> tuple[Tensor, Tensor]:
    """How far outside of the other set's manifold each real and each generated point is, in squared distance."""
    real_R, generated_G = (torch.full_like(one.norms_N, torch.inf) for one in (real, generated))
    for rows, rows_BF in generated.blocks(mine=True):
        for columns, columns_BF in real.blocks():
            squares_BB = _squares(rows_BF, generated.norms_N[rows], columns_BF, real.norms_N[columns])
            outside_generated_B = (squares_BB - generated.radii_N[rows, None]).amin(0)
            real_R[columns] = torch.minimum(real_R[columns], outside_generated_B)
            outside_real_B = squares_BB.sub_(real.radii_N[columns]).amin(1)
            generated_G[rows] = torch.minimum(generated_G[rows], outside_real_B)
    if real.together:
        real_R, generated_G = (torch.stack(runtime.gather(gaps)).amin(0) for gaps in (real_R, generated_G))
    return real_R, generated_G


def _share_inside(points: _Manifold, manifold: _Manifold, gaps_N: Tensor, margin: float) -> float:
    """The share of points that lie in at least one ball of the manifold."""
    is_inside_N = gaps_N <= -margin
    for place in (~is_inside_N & (gaps_N <= margin)).nonzero().flatten().tolist():
        is_inside_N[place] = _is_inside(points.points_NF[place], manifold, margin)
    return int(is_inside_N.sum()) / len(gaps_N)


def _is_inside(point_F: Tensor, manifold: _Manifold, margin: float) -> bool:
    row_1F = point_F.double()[None] - manifold.centre_F
    squares_N = torch.cat(
        [
            _squares(row_1F, row_1F.square().sum(1), columns_BF, manifold.norms_N[columns])[0]
            for columns, columns_BF in manifold.blocks()
        ]
    )
    near = (squares_N - manifold.radii_N <= margin).nonzero().flatten()
    distances = manifold.exact_distances(point_F, near).tolist()
    pairs = zip(distances, near.tolist(), strict=True)
    return any(distance <= manifold.exact_radius(place) for distance, place in pairs)

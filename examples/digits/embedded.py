"""Distances of small sets of images in the features of a network, beside their floor."""

from collections.abc import Mapping

from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.core import seeds
from cfpretrain.evaluation.feature_sums import add, over_ranks
from cfpretrain.evaluation.features import FeatureExtractor
from cfpretrain.evaluation.frechet import frechet_distance, gaussian_of, moments_of

_BATCH = 32


def distances_beside_floor(
    real: Tensor, candidates: Mapping[str, Tensor], extractor: FeatureExtractor
) -> dict[str, float]:
    """Frechet distances of small sets to one random half of the real images, beside that of the other half.

    All sets are cut to one size, that of the smallest, since fewer images lie farther away. All ranks call it.

    Args:
        real: uint8 [N, 3, Y, X].
        candidates: by name, uint8 [M, 3, Y, X] each, the same on all ranks.
        extractor: of the features.

    Returns:
        By the names of the candidates, and "real_against_real": the floor.
    """
    order_N = seeds.permutation(seeds.key(0, "reference halves"), len(real))
    reference, other = real[order_N[: len(real) // 2]], real[order_N[len(real) // 2 :]]
    sets = {"": reference, **candidates, "real_against_real": other}
    size = min(map(len, sets.values()))
    batches = [(name, first) for name in sets for first in range(0, size, _BATCH)]
    zero = moments_of(extractor.none().pooled_BF.cpu())
    moments = dict.fromkeys(sets, zero)
    for name, first in batches[runtime.rank() :: runtime.world_size()]:
        images = sets[name][first : min(first + _BATCH, size)]
        moments[name] = add(moments[name], moments_of(extractor(images).pooled_BF.cpu()))
    gaussians = {name: gaussian_of(over_ranks(part)) for name, part in moments.items()}
    target = gaussians.pop("")
    return {name: frechet_distance(target, gaussian) for name, gaussian in gaussians.items()}

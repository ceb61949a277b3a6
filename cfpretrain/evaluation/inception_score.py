"""The Inception Score (Salimans et al. 2016): exp of the mean KL divergence of p(y | image) from p(y), over splits.

The images are cut into splits of equal size (by at most one); the score is the mean over the splits, and its spread
their population standard deviation. An image's split is its place in numpy's legacy permutation of seed 2020, as
torch-fidelity shuffles: images may come sorted by class, and a split must hold all classes. ADM's evaluator takes
consecutive images as they come; where they come in no order, that is the same up to the spread.

A score of n images in a split is at most n and at most the number of classes: few images bias it downward.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cfpretrain.base.console import UserError

NUM_SPLITS = 10
_SHUFFLE_SEED = 2020


def splits_of(num_images: int, num_splits: int = NUM_SPLITS) -> Tensor:
    """The split of each image, int64 [num_images]."""
    # numpy promises that this generator never changes, so that the score is torch-fidelity's to the last digits.
    order = torch.from_numpy(np.random.RandomState(_SHUFFLE_SEED).permutation(num_images))
    ends = torch.tensor([i * num_images // num_splits for i in range(1, num_splits + 1)])
    splits_N = torch.empty(num_images, dtype=torch.int64)
    splits_N[order] = torch.searchsorted(ends, torch.arange(num_images), right=True)
    return splits_N


def class_sums(logits_NK: Tensor, splits_N: Tensor, num_splits: int = NUM_SPLITS) -> dict[str, Tensor]:
    """Sums over the images in each of S splits, float64, which add up over batches and ranks.

    count_S: images; probability_SK: of each of K classes; negentropy_S: over classes, of p log p.
    """
    log_p_NK = logits_NK.double().log_softmax(1)
    p_NK = log_p_NK.exp()
    to_split_SN = torch.nn.functional.one_hot(splits_N, num_splits).T.double().to(p_NK.device)
    return {
        "count_S": to_split_SN.sum(1),
        "probability_SK": to_split_SN @ p_NK,
        "negentropy_S": to_split_SN @ (p_NK * log_p_NK).sum(1),
    }


def inception_score(sums: Mapping[str, Tensor]) -> tuple[float, float]:
    """Mean and standard deviation over the splits, of `class_sums`; UserError where a split has no image."""
    count_S, probability_SK, negentropy_S = (sums[name] for name in ("count_S", "probability_SK", "negentropy_S"))
    if not count_S.all():
        raise UserError(
            f"Inception Score: expected at least an image in each of {len(count_S)} splits, got "
            f"{int(count_S.sum())} images in all; score more"
        )
    marginal_SK = probability_SK / count_S[:, None]
    divergence_S = negentropy_S / count_S - torch.xlogy(marginal_SK, marginal_SK).sum(1)
    score_S = divergence_S.exp()
    return float(score_S.mean()), float(score_S.std(correction=0))

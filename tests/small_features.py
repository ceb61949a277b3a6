"""Features that cost nothing, for tests of everything around them; `--features tests.small_features:make`."""

from pathlib import Path

import torch
from torch import Tensor

from cfpretrain.evaluation.features import FeatureExtractor

NUM_POOLED, NUM_SPATIAL, NUM_CLASSES = 24, 12, 10


def project(images_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fixed random projections of the pixels."""
    pixels_BP = images_BCYX.float().flatten(1) / 255
    generator = torch.Generator().manual_seed(pixels_BP.shape[1])
    num_all = NUM_POOLED + NUM_SPATIAL + NUM_CLASSES
    made_BF = pixels_BP @ torch.randn(pixels_BP.shape[1], num_all, generator=generator).to(pixels_BP)
    pooled_BF, spatial_BF, logits_BK = made_BF.split([NUM_POOLED, NUM_SPATIAL, NUM_CLASSES], 1)
    return pooled_BF, spatial_BF, logits_BK


def make(device: torch.device, weights: Path | None) -> FeatureExtractor:
    """The extractor; the name of the weights' file changes its fingerprint alone."""
    return FeatureExtractor("fd_small", f"small {weights}", project, device, "random")


def make_nan(device: torch.device, weights: Path | None) -> FeatureExtractor:
    """One with damaged weights."""
    return FeatureExtractor("fd_nan", "nan", lambda images: (images.flatten(1) * torch.nan,), device, "damaged")


def make_fid(device: torch.device, weights: Path | None) -> FeatureExtractor:
    """One that calls itself what it is not."""
    return FeatureExtractor("fid", "small", project, device, "random")

"""The Inception v3 of the FID, as torch-fidelity builds it. The door to torch-fidelity.

It is the classifier of 2015-12-05 that TensorFlow published, which torchvision's is not: it has 1008 classes, average
pools that leave the border out of the mean, a max pool in its last block, and TensorFlow 1's bilinear resize before it.

Szegedy et al. 2015, arXiv 1512.00567. Axes: B images, C channels, Y rows, X columns, F features, K classes.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

_NUM_SPATIAL_CHANNELS = 7


class Inception(fidelity.FeatureExtractorInceptionV3):
    """The network, for features alone: frozen, in evaluation mode, without weights until they are loaded."""

    def __init__(self) -> None:
        # torch-fidelity would download its weights, or unpickle a file: ours come through our own safe reader.
        with patch.object(fidelity, "load_state_dict_from_url", return_value={}):
            super().__init__("inception", ["2048", "logits_unbiased"])
        self.to(memory_format=torch.channels_last)  # a third faster on CPUs
        self._spatial_BCYX: Tensor
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = False, assign: bool = False) -> Any:
        """Loads weights; older files lack the counters of batch norm, which training alone uses."""
        return super().load_state_dict(state_dict, strict, assign)

    def _keep_spatial(self, module: nn.Module, inputs: Any, output_BCYX: Tensor) -> None:
        self._spatial_BCYX = output_BCYX[:, :_NUM_SPATIAL_CHANNELS]

    def forward(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images, uint8 [B, 3, Y, X] of any size.

        Returns:
            pooled [B, 2048]; spatial [B, 2023], the first 7 channels of what TensorFlow calls mixed_6/conv, row by row
            as ADM orders them; logits [B, 1008] without their bias, which the Inception Score leaves out.
        """
        pooled_BF, logits_BK = super().forward(images_BCYX)
        return pooled_BF, self._spatial_BCYX.permute(0, 2, 3, 1).flatten(1), logits_BK

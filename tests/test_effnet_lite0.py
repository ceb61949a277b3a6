"""Whether the network is the one whose weights it gets: it knows what real photographs show."""

import pytest
import torch
from skimage import data

from cfpretrain.evaluation.effnet_lite0 import EfficientNetLite0
from cfpretrain.evaluation.features import make_extractor

# Numbers of ImageNet's classes: tabby, tiger cat, Egyptian cat, lynx; espresso, cup; rocket-like: missile, projectile.
CLASSES = {"chelsea": {281, 282, 285, 287}, "coffee": {967, 968, 504, 925}, "rocket": {657, 744}}


@pytest.mark.parametrize("name", CLASSES)
def test_photographs_are_recognised(name: str) -> None:
    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)
    short = min(image.shape[1:])
    rows, columns = ((length - short) // 2 for length in image.shape[1:])
    square = image[:, rows : rows + short, columns : columns + short]
    network = make_extractor("effnet_lite0", torch.device("cpu")).network
    assert isinstance(network, EfficientNetLite0)
    assert network(square[None])[0].shape == (1, 320)
    logits = network.classify(square[None])
    assert set(logits[0].topk(2).indices.tolist()) & CLASSES[name]
    assert float(logits[0].softmax(0)[list(CLASSES[name])].sum()) > 0.3

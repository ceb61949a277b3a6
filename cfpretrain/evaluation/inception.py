"""The Inception v3 of the FID: the classifier of 2015-12-05 that TensorFlow published, which torchvision's is not.

It differs in 1008 classes, in average pools that leave the border out of the mean, in a max pool in its last block, and
in the resize before it: bilinear as TensorFlow 1 did it, without half-pixel centres. Names are those under which its
converted weights are shared (pt_inception-2015-12-05-6726825d.pth).

Szegedy et al. 2015, arXiv 1512.00567. Axes: B images, C channels, Y rows, X columns, F features, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 299
NUM_CLASSES = 1008
_NUM_SPATIAL_CHANNELS = 7


class Unit(nn.Module):
    """A convolution, its batch norm, and ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel_size: int | tuple[int, int] = 1, stride: int = 1, pad: bool = False
    ) -> None:
        super().__init__()
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (size[0] // 2, size[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, inputs, Y, X] -> [B, outputs, ...]."""
        normed_BCYX: Tensor = self.bn(self.conv(x_BCYX))
        return normed_BCYX.relu_()


def _mean_pool(x_BCYX: Tensor) -> Tensor:
    return F.avg_pool2d(x_BCYX, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x_BCYX: Tensor) -> Tensor:
    return F.max_pool2d(x_BCYX, 3, stride=1, padding=1)


def _reduce(x_BCYX: Tensor) -> Tensor:
    return F.max_pool2d(x_BCYX, 3, stride=2)


class Block(nn.Module):
    """Branches side by side, each a chain of units; their outputs follow each other along the channels.

    Args:
        branches: names of the units of each branch; a tuple of two names at the end of a chain stands for two units
            that see the same. A chain may begin with a pool.
        units: the units by name.
    """

    def __init__(self, branches: Sequence[Sequence[object]], units: dict[str, Unit]) -> None:
        super().__init__()
        self._branches = branches
        for name, unit in units.items():
            self.add_module(name, unit)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, sum of the branches' channels, ...]."""
        return torch.cat([self._run(branch, x_BCYX) for branch in self._branches], 1)

    def _run(self, branch: Sequence[object], x_BCYX: Tensor) -> Tensor:
        for link in branch:
            if isinstance(link, tuple):
                x_BCYX = torch.cat([self.get_submodule(name)(x_BCYX) for name in link], 1)
            elif callable(link):
                x_BCYX = link(x_BCYX)
            else:
                assert isinstance(link, str)
                x_BCYX = self.get_submodule(link)(x_BCYX)
        return x_BCYX


def _block_35(inputs: int, pooled: int) -> Block:
    """35 x 35 in and out."""
    return Block(
        [
            ["branch1x1"],
            ["branch5x5_1", "branch5x5_2"],
            ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"],
            [_mean_pool, "branch_pool"],
        ],
        {
            "branch1x1": Unit(inputs, 64),
            "branch5x5_1": Unit(inputs, 48),
            "branch5x5_2": Unit(48, 64, 5, pad=True),
            "branch3x3dbl_1": Unit(inputs, 64),
            "branch3x3dbl_2": Unit(64, 96, 3, pad=True),
            "branch3x3dbl_3": Unit(96, 96, 3, pad=True),
            "branch_pool": Unit(inputs, pooled),
        },
    )


def _to_17(inputs: int) -> Block:
    """35 x 35 to 17 x 17."""
    return Block(
        [["branch3x3"], ["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"], [_reduce]],
        {
            "branch3x3": Unit(inputs, 384, 3, stride=2),
            "branch3x3dbl_1": Unit(inputs, 64),
            "branch3x3dbl_2": Unit(64, 96, 3, pad=True),
            "branch3x3dbl_3": Unit(96, 96, 3, stride=2),
        },
    )


def _block_17(width: int) -> Block:
    """17 x 17 in and out, 768 channels."""
    row, column = (1, 7), (7, 1)
    chain = [f"branch7x7dbl_{i}" for i in range(1, 6)]
    chained = [
        Unit(768, width),
        Unit(width, width, column, pad=True),
        Unit(width, width, row, pad=True),
        Unit(width, width, column, pad=True),
        Unit(width, 192, row, pad=True),
    ]
    return Block(
        [["branch1x1"], ["branch7x7_1", "branch7x7_2", "branch7x7_3"], chain, [_mean_pool, "branch_pool"]],
        {
            "branch1x1": Unit(768, 192),
            "branch7x7_1": Unit(768, width),
            "branch7x7_2": Unit(width, width, row, pad=True),
            "branch7x7_3": Unit(width, 192, column, pad=True),
            **dict(zip(chain, chained, strict=True)),
            "branch_pool": Unit(768, 192),
        },
    )


def _to_8() -> Block:
    """17 x 17 to 8 x 8."""
    return Block(
        [["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{i}" for i in range(1, 5)], [_reduce]],
        {
            "branch3x3_1": Unit(768, 192),
            "branch3x3_2": Unit(192, 320, 3, stride=2),
            "branch7x7x3_1": Unit(768, 192),
            "branch7x7x3_2": Unit(192, 192, (1, 7), pad=True),
            "branch7x7x3_3": Unit(192, 192, (7, 1), pad=True),
            "branch7x7x3_4": Unit(192, 192, 3, stride=2),
        },
    )


def _block_8(inputs: int, pool: object) -> Block:
    """8 x 8 in and out."""
    row, column = (1, 3), (3, 1)
    return Block(
        [
            ["branch1x1"],
            ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")],
            ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")],
            [pool, "branch_pool"],
        ],
        {
            "branch1x1": Unit(inputs, 320),
            "branch3x3_1": Unit(inputs, 384),
            "branch3x3_2a": Unit(384, 384, row, pad=True),
            "branch3x3_2b": Unit(384, 384, column, pad=True),
            "branch3x3dbl_1": Unit(inputs, 448),
            "branch3x3dbl_2": Unit(448, 384, 3, pad=True),
            "branch3x3dbl_3a": Unit(384, 384, row, pad=True),
            "branch3x3dbl_3b": Unit(384, 384, column, pad=True),
            "branch_pool": Unit(inputs, 192),
        },
    )


class Inception(nn.Module):
    """The network, for features alone: frozen, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, pad=True)
        self.Conv2d_3b_1x1 = Unit(64, 80)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = _to_17(288)
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = _to_8()
        self.Mixed_7b = _block_8(1280, _mean_pool)
        self.Mixed_7c = _block_8(2048, _max_pool)
        self.fc = nn.Linear(2048, NUM_CLASSES)
        self.eval().requires_grad_(False)

    def forward(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of images.

        Args:
            images_BCYX: uint8 [B, 3, Y, X], any size.

        Returns:
            pooled [B, 2048]; spatial [B, 2023], the first 7 channels of what TensorFlow calls mixed_6/conv, row by row
            as ADM orders them; logits [B, 1008] without their bias, which the Inception Score leaves out.
        """
        x_BCYX = (resize_like_tensorflow_1(images_BCYX.float(), IMAGE_SIZE) - 128) / 128
        x_BCYX = _reduce(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_BCYX))))
        x_BCYX = _reduce(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x_BCYX)))
        x_BCYX = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x_BCYX)))
        x_BCYX = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x_BCYX)))
        spatial_BCYX = self.Mixed_6d.get_submodule("branch1x1")(x_BCYX)[:, :_NUM_SPATIAL_CHANNELS]
        x_BCYX = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x_BCYX)))
        pooled_BF = self.Mixed_7c(self.Mixed_7b(x_BCYX)).mean((2, 3))
        return pooled_BF, spatial_BCYX.permute(0, 2, 3, 1).flatten(1), pooled_BF @ self.fc.weight.T


def resize_like_tensorflow_1(images_BCYX: Tensor, size: int) -> Tensor:
    """Bilinear to size x size as `tf.image.resize_bilinear` did: output i is read at i * old / new."""
    images_BCXY = _resize_last(images_BCYX, size).transpose(2, 3)
    return _resize_last(images_BCXY, size).transpose(2, 3).contiguous()


def _resize_last(x: Tensor, size: int) -> Tensor:
    old = x.shape[-1]
    places = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(old / size, dtype=torch.float32)
    low = places.long()
    low_x, high_x = x[..., low], x[..., (low + 1).clamp_max(old - 1)]
    return low_x + (high_x - low_x) * (places - low)

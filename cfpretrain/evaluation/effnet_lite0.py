"""EfficientNet-Lite0, an ImageNet classifier whose weights come inside a package of 17 MB.

Tan and Le 2019 (arXiv 1905.11946), without squeeze-and-excitation and with ReLU6. As in TensorFlow, whose weights these
are: a convolution of stride 2 pads one side more where the sum is odd, and inputs are (pixel - 127) / 128.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 224
_NUM_CLASSES = 1000
# Of each stage: blocks, kernel, stride, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, _HEAD = 32, 1280


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[B, inputs, Y, X] -> [B, outputs, ceil(Y / stride), ceil(X / stride)]."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride == 1:
            return F.conv2d(input, self.weight, padding=kernel // 2, groups=self.groups)
        pads: list[int] = []
        for length in (input.shape[3], input.shape[2]):
            missing = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(input, pads))


class _Block(nn.Module):
    """Expand, filter each channel, project; with a way around where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expands, self._adds = expansion > 1, stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv, self._bn0 = _Conv(inputs, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = _Conv(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = _Conv(width, outputs, 1), _norm(outputs)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        """[B, inputs, Y, X] -> [B, outputs, Y / stride, X / stride]."""
        wide_BCYX = _relu6(self._bn0(self._expand_conv(x_BCYX))) if self._expands else x_BCYX
        wide_BCYX = _relu6(self._bn1(self._depthwise_conv(wide_BCYX)))
        made_BCYX: Tensor = self._bn2(self._project_conv(wide_BCYX))
        return made_BCYX + x_BCYX if self._adds else made_BCYX


def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=0.001)


class EfficientNetLite0(nn.Module):
    """The network, for features alone: frozen, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _Conv(3, _STEM, 3, 2), _norm(_STEM)
        blocks, inputs = [], _STEM
        for count, kernel, stride, expansion, outputs in _STAGES:
            for i in range(count):
                blocks.append(_Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = _Conv(inputs, _HEAD, 1), _norm(_HEAD)
        self._fc = nn.Linear(_HEAD, _NUM_CLASSES)
        # Channels last: filters of single channels are slow otherwise.
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, images_BCYX: Tensor) -> tuple[Tensor]:
        """Features of images, uint8 [B, 3, Y, X] of any size: the last block's mean over space, [B, 320]."""
        return (self._last_block(images_BCYX).mean((2, 3)),)

    def classify(self, images_BCYX: Tensor) -> Tensor:
        """Logits of ImageNet's classes, [B, 1000]; images as for `forward`."""
        head_BCYX = _relu6(self._bn1(self._conv_head(self._last_block(images_BCYX))))
        logits_BK: Tensor = self._fc(head_BCYX.mean((2, 3)))
        return logits_BK

    def _last_block(self, images_BCYX: Tensor) -> Tensor:
        size = (IMAGE_SIZE, IMAGE_SIZE)  # with a wider filter where images shrink to it
        x_BCYX = F.interpolate(images_BCYX.float(), size, mode="bilinear", antialias=True, align_corners=False)
        x_BCYX = x_BCYX.contiguous(memory_format=torch.channels_last)
        last_BCYX: Tensor = self._blocks(_relu6(self._bn0(self._conv_stem((x_BCYX - 127) / 128))))
        return last_BCYX

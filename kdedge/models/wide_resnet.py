"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016), as FixMatch uses them.

B batch, C channels, H and W pixels, F features.
"""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["WideResNet"]

_SLOPE = 0.1  # leaky ReLU, google-research/fixmatch
_EPSILON = 1e-3  # of batch norm there: Keras's, not torch's 1e-5


@final
class _Block(nn.Module):
    """BN, leaky ReLU, conv, twice; the shortcut is a 1x1 conv where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, activate_before_residual: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=_EPSILON)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None
        self.activate_before_residual = activate_before_residual

    def forward(self, x_BCHW: Tensor) -> Tensor:
        activated = functional.leaky_relu(self.bn1(x_BCHW), _SLOPE)
        out = self.conv1(activated)
        out = self.conv2(functional.leaky_relu(self.bn2(out), _SLOPE))
        source = activated if self.activate_before_residual else x_BCHW
        skip: Tensor = source if self.shortcut is None else self.shortcut(source)
        total: Tensor = skip + out
        return total


@final
class WideResNet(nn.Module):
    """WRN-`depth`-`width`: three groups of (depth - 4) / 6 blocks with 16, 32, 64 times `width` channels.

    `forward` takes float [B, C, H, W] and gives pooled features [B, F] with F = 64 * width.
    `strides` are those of the three groups: (1, 2, 2) is the published network for 32 px.
    """

    def __init__(self, depth: int, width: int, channels: int = 3, strides: tuple[int, int, int] = (1, 2, 2)) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6 n + 4 with n of at least 1")
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        inputs = 16
        for group, stride in enumerate(strides):
            outputs = 16 * 2**group * width
            for block in range(blocks):
                first = block == 0
                layers.append(_Block(inputs, outputs, stride if first else 1, first and group == 0))
                inputs = outputs
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(inputs, eps=_EPSILON)
        self.num_features = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # FixMatch, libml/models.py: N(0, sqrt(2 / (k^2 * out)))
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out = self.blocks(self.stem(x_BCHW))
        out = functional.leaky_relu(self.bn(out), _SLOPE)
        return torch.flatten(functional.adaptive_avg_pool2d(out, 1), 1)

"""The residual networks for CIFAR-10 of He et al., 2016, section 4.2: 32x32 images, three stages of basic
blocks.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions, and a shortcut without parameters: (N, in_channels, H, W) -> (N, channels, H, W),
    or half of H and W with stride 2.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Every stride-th pixel, with as many channels of zeros before as behind."""
        x = x[:, :, :: self.stride, :: self.stride]
        return (
            F.pad(x, (0, 0, 0, 0, self.new_channels // 2, self.new_channels // 2)) if self.new_channels else x
        )


class CIFARResNet(nn.Module):
    """Depth 6n + 2: a 3x3 convolution, n blocks each of 16, 32 and 64 channels, the mean, a linear layer."""

    def __init__(self, n: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(n, 16, 16, stride=1)
        self.layer2 = self._stage(n, 16, 32, stride=2)
        self.layer3 = self._stage(n, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(n, in_channels, channels, stride):
        first = Block(in_channels, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), normalised -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))

"""A second opinion on the images of the problems that ship: convolutions of patches in the place of the other
networks' pyramids. Its distances are FD(digits_mixer) and FD(cifar10_mixer).
"""

from torch import Tensor, nn

from evaluation.networks.digits import DigitsFeatures
from guided_diffusion.files.pretrained import PRETRAINED_DIR

DIGITS_MIXER_WEIGHTS = PRETRAINED_DIR / "digits" / "mixer.safetensors"
CIFAR_MIXER_WEIGHTS = PRETRAINED_DIR / "cifar10" / "mixer.safetensors"


class Mixer(nn.Module):
    """ConvMixer (Trockman and Kolter, "Patches Are All You Need?", 2022): after patches of 2x2 pixels all
    blocks keep the resolution; each mixes space, by depthwise convolutions, and then channels.

    (N, 3, S, S) images in [-1, 1] -> (N, num_classes) logits.
    """

    def __init__(self, num_classes: int = 10, *, width: int, depth: int, kernel: int = 5) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, width, 2, stride=2), nn.GELU(), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(_Block(width, kernel) for _ in range(depth))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """(N, width): the average over space of the last map."""
        x = self.patches(x)
        for block in self.blocks:
            x = block(x)
        return x.mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, width, kernel):
        super().__init__()
        depthwise = nn.Conv2d(width, width, kernel, padding="same", groups=width)
        self.space = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(width))
        self.channels = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x):
        return self.channels(x + self.space(x))


def digits_mixer(num_classes: int = 10) -> Mixer:
    """For 16x16 digits."""
    return Mixer(num_classes, width=64, depth=4)


def cifar_mixer(num_classes: int = 10) -> Mixer:
    """For CIFAR-10's 32x32 images."""
    return Mixer(num_classes, width=256, depth=8)


class DigitsMixerFeatures(DigitsFeatures):
    """As `DigitsFeatures`: `pool3` (N, 64) and `logits` (N, 10)."""

    name = protocol = "digits_mixer"
    build = staticmethod(digits_mixer)


class CIFARMixerFeatures(DigitsFeatures):
    """As `DigitsFeatures`, of (N, 32, 32, 3) images: `pool3` (N, 256) and `logits` (N, 10)."""

    name = protocol = "cifar10_mixer"
    size, batch_size = 32, 100
    build = staticmethod(cifar_mixer)

"""From the sampler's [-1, 1] image to what a classifier expects, differentiable throughout."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

INPUTS = ("paper", "imagenet")
_SHARP = ("bicubic", "lanczos", 3, 1)  # by name and by Pillow's number


def resize_mode(interpolation: str | int) -> str:
    """The nearest mode here to an interpolation as torchvision and timm name it, or as Pillow numbers it."""
    return "bicubic" if interpolation in _SHARP else "bilinear"


@dataclass(frozen=True)
class InputTransform:
    """What a classifier's weights were trained on: square images of `size` pixels in [0, 1], minus `mean`,
    over `std`, per channel; resized by `mode`, "bilinear" or "bicubic".
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "bilinear"

    def __str__(self) -> str:
        mean, std = (" ".join(f"{value:.3g}" for value in values) for values in (self.mean, self.std))
        return f"{self.size}x{self.size} {self.mode}, mean {mean}, std {std}"

    def __call__(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, size, size), normalised: the whole image, antialiased where it
        shrinks. Where bicubic overshoots it is not clamped: there would be no gradient.
        """
        x = (x + 1) / 2
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, size=(self.size, self.size), mode=self.mode, antialias=True)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean) / std


def raw_image(x: Tensor) -> Tensor:
    """The image as it is, in [-1, 1] at its own resolution: what the paper's published numbers were made
    with.
    """
    return x

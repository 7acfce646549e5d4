"""A small feature network for the 16x16 digits, so that their evaluation needs no download; its distance is
FD(digits), never FID.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.networks.weights import read_weights
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.files.state_dicts import load_into

SIZE = 16
DIGITS_WEIGHTS = PRETRAINED_DIR / "digits" / "features.safetensors"


class DigitsNetwork(nn.Module):
    """Three stages of 3x3 convolutions, of these widths, over (N, 3, S, S) images in [-1, 1]; `forward`
    returns (N, num_classes) logits. The digits have 16x16 pixels.
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (32, 64, 64)) -> None:
        super().__init__()
        first, second, last = widths
        self.stages = nn.Sequential(_stage(3, first, pooled=True), _stage(first, second, pooled=True))
        self.last = _stage(second, last, pooled=False)  # at a quarter of the image's size
        self.fc = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x))

    def pool(self, x: Tensor) -> Tensor:
        """(N, last width): the average over space of the last map."""
        return self.last(self.stages(x)).mean(dim=(2, 3))


def _stage(before, after, pooled):
    convolutions = []
    for channels in (before, after):
        convolutions += [
            nn.Conv2d(channels, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*convolutions, *([nn.MaxPool2d(2)] if pooled else []))


def normalise(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1]: what the network is trained on and asked
    about.
    """
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class DigitsFeatures:
    """Called on (N, 16, 16, 3) uint8 images, numpy or torch, it returns float32 arrays: `pool3` (N, 64)
    and `logits` (N, 10).

    `weights` is a file or a state dict. Raises ValueError for weights that do not fit and for images of
    another size.
    """

    name, protocol, batch_size = "digits", "digits", 256
    outputs = ("pool3", "logits")
    size = SIZE
    build: Callable[[], Any] = DigitsNetwork

    def __init__(self, weights: str | Path | Mapping[str, Tensor], device: str | torch.device = "cpu"):
        state_dict, self.sha256 = read_weights(weights)
        self.network = type(self).build()
        load_into(self.network, state_dict, weights if isinstance(weights, str | Path) else "the state dict")
        self.network.to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        if tuple(images.shape[1:]) != (self.size, self.size, 3) or images.dtype not in (
            np.uint8,
            torch.uint8,
        ):
            given = f"{images.dtype} {tuple(images.shape)}"
            needed = f"(N, {self.size}, {self.size}, 3)"
            raise ValueError(f"the {self.name} features need uint8 images {needed}, not {given}")
        pool = self.network.pool(normalise(torch.as_tensor(images).to(self.device)))
        return {"pool3": pool.cpu().numpy(), "logits": self.network.fc(pool).cpu().numpy()}

"""Pixels between [-1, 1] floats and uint8, by the published rules."""

import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import require_finite


def to_uint8(x: Tensor, rounding: str = "adm") -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8 by one of the published rules, `ROUNDING`: "adm" or
    "edm".

    Raises NonFiniteError for a NaN or Inf, which would turn into a black or white pixel.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"unknown rounding {rounding!r}; choose {' or '.join(ROUNDING)}")
    require_finite(x, "pixels")
    levels = (x + 1) * 127.5 if rounding == "adm" else x * 127.5 + 128
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


ROUNDING = {
    "adm": "(x + 1) * 127.5, clamped to 0..255, truncated",
    "edm": "x * 127.5 + 128, clamped to 0..255, truncated",
}

"""Pixels between [-1, 1] floats and uint8, by the published rules."""

import torch
from torch import Tensor


class NonFinitePixelsError(ValueError):
    """A sample holds NaN or Inf; `positions` says where in the batch."""

    def __init__(self, positions: list[int]):
        self.positions = positions
        super().__init__(f"non-finite pixels in the samples at batch positions {positions}")


def to_uint8(x: Tensor, rounding: str = "adm") -> Tensor:
    """(N, C, H, W) float in [-1, 1] -> (N, H, W, C) uint8 by one of the published rules, `ROUNDING`: "adm" or
    "edm".

    Raises NonFinitePixelsError for a NaN or Inf, which would turn into a black or white pixel.
    """
    if rounding not in ROUNDING:
        raise ValueError(f"unknown rounding {rounding!r}; choose {' or '.join(ROUNDING)}")
    bad = ~x.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise NonFinitePixelsError(bad.nonzero()[:, 0].tolist())
    levels = (x + 1) * 127.5 if rounding == "adm" else x * 127.5 + 128
    return levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


ROUNDING = {
    "adm": "(x + 1) * 127.5, clamped to 0..255, truncated",
    "edm": "x * 127.5 + 128, clamped to 0..255, truncated",
}

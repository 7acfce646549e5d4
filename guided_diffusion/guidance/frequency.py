"""The cosine transform of images, strengths that differ between frequencies, and the spectrum of data."""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=16)
def dct_matrix(n: int, dtype: torch.dtype = torch.float64, device: torch.device | None = None) -> Tensor:
    """(n, n), the orthonormal DCT-II: row k is sqrt(2 / n) cos(pi k (j + 1/2) / n), sqrt(1 / n) for k = 0."""
    k, j = (torch.arange(n, dtype=torch.float64) for _ in range(2))
    matrix = math.sqrt(2 / n) * torch.cos(math.pi / n * k[:, None] * (j + 0.5))
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def dct(x: Tensor, inverse: bool = False) -> Tensor:
    """The orthonormal cosine transform of (N, C, H, W) over height, width and channels.

    Over three channels it is an opponent space: grey, red against blue, green against both.
    """
    for dim in (1, 2, 3):
        matrix = dct_matrix(x.shape[dim], x.dtype, x.device)
        x = torch.tensordot(x, matrix if inverse else matrix.T, dims=([dim], [0])).movedim(-1, dim)
    return x


class PerFrequency:
    """A strength that differs between frequencies: times a gradient, (N, C, H, W), it is C^T diag(v) C
    gradient, with v = strengths(C, H, W) the strength of each; times a number it is that much stronger.
    """

    def __init__(self, strengths: Callable[[int, int, int], Tensor], factor: float = 1.0):
        self.strengths, self.factor = strengths, factor

    def __mul__(self, other: float | Tensor):
        if not isinstance(other, Tensor) or other.ndim == 0:
            return PerFrequency(self.strengths, self.factor * float(other))
        strengths = self.factor * self.strengths(*other.shape[1:])
        if other.shape[1:] != strengths.shape:
            raise ValueError(
                f"the spectrum is of images {tuple(strengths.shape)}, and these are "
                f"{tuple(other.shape[1:])}: measure one with scripts/data_spectrum.py"
            )
        return dct(dct(other) * strengths.to(other), inverse=True)

    __rmul__ = __mul__


def natural_spectrum(channels: int, height: int, width: int, sigma_data: float = 0.5) -> Tensor:
    """(C, H, W), the variances of the cosine transform of natural images, until they have been measured.

    The power falls as 1 / f^2 with the spatial frequency f (Field, 1987, "Relations between the statistics of
    natural images and the response properties of cortical cells"); the mean of each channel counts as f = 1
    half period. The mean variance is sigma_data^2, the same for all channels.
    """
    f_y, f_x = (torch.arange(n, dtype=torch.float64) * (max(height, width) / n) for n in (height, width))
    power = 1 / (f_y[:, None] ** 2 + f_x**2).clamp(min=1)
    return (sigma_data**2 * power / power.mean()).expand(channels, height, width)


def read_spectrum(path: str | Path) -> Tensor:
    """(C, H, W) float64, what scripts/data_spectrum.py wrote. Raises FileNotFoundError, and ValueError for
    another file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such spectrum; scripts/data_spectrum.py measures one")
    try:
        with np.load(path, allow_pickle=False) as file:
            spectrum = torch.from_numpy(np.asarray(file["spectrum"], dtype=np.float64))
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} is not a spectrum of scripts/data_spectrum.py ({error})") from error
    if spectrum.ndim != 3 or not bool((spectrum >= 0).all() and spectrum.isfinite().all()):
        raise ValueError(f"{path} must hold variances, (C, H, W), got {tuple(spectrum.shape)}")
    return spectrum

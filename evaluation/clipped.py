"""Clipped density and clipped coverage, which fall linearly with the share of bad samples, outliers or not.

Salvy, Talbot and Thirion, "Enhanced Generative Model Evaluation with Clipped Density and Coverage" (2025,
arXiv 2507.01761). The ball of a real point reaches to its k-th neighbour among the others.

Clipped density: balls larger than the median are cut to it, and a point counts as 1 from k balls on; the mean
over the fake points is divided by that over the real ones, which are not counted in their own balls. Clipped
coverage: a ball counts as 1 from k fake points on; the mean over the balls is turned into the share of good
samples that would give it. A real point that stands there more than k times has a ball of radius 0, which
nothing covers.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaln, gammaln
from torch import Tensor


class ClippedDensity:
    """Counts, from tiles of squared distances, in how many clipped balls each fake point lies.

    nearest, which: squared distances (N, k) of the real points to their k nearest others, and which they are.
    """

    def __init__(self, nearest: Tensor, which: Tensor, num_fake: int):
        self.k = nearest.shape[1]
        radii = nearest[:, -1]
        self.radii = radii.clamp(max=_squared_median(radii))
        # By who the neighbours are: distances computed twice may differ in the last digit.
        inside = which[nearest <= self.radii[:, None]]
        self.of_real = torch.bincount(inside, minlength=len(radii))
        self.of_fake = torch.zeros(num_fake, dtype=torch.int64, device=radii.device)

    def add(self, reals: slice, fakes: slice, tile: Tensor) -> None:
        inside = tile <= self.radii[reals, None]
        self.of_fake[fakes] += inside.sum(dim=0, dtype=torch.int32)  # twice as fast as in int64

    def result(self) -> float:
        """In [0, 1]."""
        fake, real = (counts.clamp(max=self.k).double().mean() for counts in (self.of_fake, self.of_real))
        return min(1.0, (fake / real).item())


def _squared_median(squares):
    """The square of the median distance, which of an even number is the mean of the two in the middle."""
    ordered = squares.sort().values
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return (low + high + 2 * (low * high).sqrt()) / 4  # exact where they are one


def clipped_coverage(inside: Tensor, num_fake: int, k: int) -> float:
    """In [0, 1]; inside: the number of fake points in the ball of each real one (N,)."""
    covered = inside.clamp(max=k).double().mean().item() / k
    expected = expected_coverage(len(inside), num_fake, k)
    return float(np.interp(covered, expected, np.linspace(0, 1, num_fake + 1)))


def expected_coverage(num_real: int, num_fake: int, k: int) -> NDArray[np.float64]:
    """What 0, 1, .. num_fake samples of the real distribution cover on average, before calibration:
    (num_fake + 1,), rising from 0.

    The mass of a ball is distributed as Beta(k, num_real - k), whatever the distribution, and so the number
    of m samples in it as a beta-binomial; the mean of min(number, k) / k needs its first k terms.
    """
    m = np.arange(num_fake + 1.0)
    coverage = np.ones(num_fake + 1)
    for j in range(min(k, num_fake + 1)):
        n = m[j:]
        log_choose = gammaln(n + 1) - gammaln(j + 1) - gammaln(n - j + 1)
        log_mass = betaln(k + j, num_real - k + n - j) - betaln(k, num_real - k)
        coverage[j:] -= (k - j) / k * np.exp(log_choose + log_mass)
    return np.maximum.accumulate(coverage)

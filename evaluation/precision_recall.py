"""Precision, recall, density and coverage from k-nearest-neighbour manifolds.

Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (2019). Density and coverage: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative
Models" (2020). Both compare distances between two sets with radii: the distance of a point to its k-th
neighbour in its own set, not counting itself. Clipped density and coverage do too (see clipped). For the
dtypes see distances: float16 raises precision and recall by a few thousandths and lowers density.
"""

from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from evaluation.clipped import ClippedDensity, clipped_coverage
from evaluation.distances import TiledDistances


def precision_recall(
    *, real: ArrayLike | Tensor, fake: ArrayLike | Tensor, k: int = 3, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """Share of fake inside the manifold of real, and share of real inside the manifold of fake; features (N,
    D) and (M, D).

    Inside: no farther from some point of the other set than that point's radius. Errors: see
    `manifold_scores`.
    """
    distances = TiledDistances(real, fake, dtype, k)
    counter = _PrecisionRecall(distances.radii(distances.real, k), distances.radii(distances.fake, k))
    distances.compare(counter)
    return counter.result()


def density_coverage(
    *, real: ArrayLike | Tensor, fake: ArrayLike | Tensor, k: int = 5, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """How many radii of real a fake point lies within, over k, on average; and the share of real with a fake
    point within its radius.

    Features (N, D) and (M, D). Within: strictly nearer than the radius, so that the density of identical sets
    is 1. Errors: see `manifold_scores`.
    """
    distances = TiledDistances(real, fake, dtype, k)
    counter = _DensityCoverage(distances.radii(distances.real, k), len(distances.fake), k)
    distances.compare(counter)
    return counter.result()


def clipped_density_coverage(
    *, real: ArrayLike | Tensor, fake: ArrayLike | Tensor, k: int = 5, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """The shares of good samples that clipped density and clipped coverage amount to, in [0, 1]; features (N,
    D) and (M, D).

    Errors: see `manifold_scores`.
    """
    distances = TiledDistances(real, fake, dtype, k)
    nearest, which = distances.nearest(distances.real, k)
    density = ClippedDensity(nearest, which, len(distances.fake))
    within_radius = _DensityCoverage(nearest[:, -1], len(distances.fake), k)
    distances.compare(density, within_radius)
    return density.result(), within_radius.clipped_coverage()


@dataclass(frozen=True)
class ManifoldScores:
    """All but density lie in [0, 1]; density is 1 for identical sets and may exceed it."""

    precision: float
    recall: float
    density: float
    coverage: float
    clipped_density: float
    clipped_coverage: float


def manifold_scores(
    *,
    real: ArrayLike | Tensor,
    fake: ArrayLike | Tensor,
    k: int = 3,
    density_k: int = 5,
    dtype: torch.dtype | None = None,
) -> ManifoldScores:
    """`precision_recall` with k, `density_coverage` and `clipped_density_coverage` with density_k, in one
    pass over the distances, where the real features lie.

    Raises ValueError for arrays that are not (N, D) and (M, D), N or M not above k, k below 1, NaN or
    infinity, and other dtypes.
    """
    distances = TiledDistances(real, fake, dtype, k, density_k)
    nearest, which = distances.nearest(distances.real, max(k, density_k))
    in_manifold = _PrecisionRecall(nearest[:, k - 1], distances.radii(distances.fake, k))
    within_radius = _DensityCoverage(nearest[:, density_k - 1], len(distances.fake), density_k)
    clipped = ClippedDensity(nearest[:, :density_k], which[:, :density_k], len(distances.fake))
    distances.compare(in_manifold, within_radius, clipped)
    return ManifoldScores(
        *in_manifold.result(), *within_radius.result(), clipped.result(), within_radius.clipped_coverage()
    )


class _PrecisionRecall:
    def __init__(self, real_radii: Tensor, fake_radii: Tensor):
        self.real_radii, self.fake_radii = real_radii, fake_radii
        self.real_inside = torch.zeros_like(real_radii, dtype=torch.bool)
        self.fake_inside = torch.zeros_like(fake_radii, dtype=torch.bool)

    def add(self, reals: slice, fakes: slice, tile: Tensor) -> None:
        self.fake_inside[fakes] |= (tile <= self.real_radii[reals, None]).any(dim=0)
        self.real_inside[reals] |= (tile <= self.fake_radii[None, fakes]).any(dim=1)

    def result(self) -> tuple[float, float]:
        return _share(self.fake_inside), _share(self.real_inside)


class _DensityCoverage:
    def __init__(self, real_radii: Tensor, num_fake: int, k: int):
        self.real_radii, self.num_fake, self.k = real_radii, num_fake, k
        self.pairs_within = torch.zeros_like(real_radii, dtype=torch.int64)

    def add(self, reals: slice, fakes: slice, tile: Tensor) -> None:
        self.pairs_within[reals] += (tile < self.real_radii[reals, None]).sum(dim=1)

    def result(self) -> tuple[float, float]:
        return self.pairs_within.sum().item() / (self.k * self.num_fake), _share(self.pairs_within > 0)

    def clipped_coverage(self) -> float:
        return clipped_coverage(self.pairs_within, self.num_fake, self.k)


def _share(inside):
    return inside.sum().item() / len(inside)

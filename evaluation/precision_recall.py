"""Precision, recall, density and coverage from k-nearest-neighbour manifolds.

Precision and recall: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative
Models" (2019). Density and coverage: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative
Models" (2020). Both compare distances between two sets with radii: the distance of a point to its k-th
neighbour in its own set, not counting itself. Distances are squared, |u|^2 - 2 u.v + |v|^2 clamped at 0, and
computed tile by tile, so that memory does not grow with their number.

The dtypes. float64 and float32: the mean of the real features is subtracted first, which changes no distance
but keeps its digits.
float16: as in guided-diffusion's evaluator, features, products and distances are rounded to float16 (sums
stay float32), and a tile that overflows is computed in float32; distances tie then, which raises precision
and recall by a few thousandths and lowers density. None, the default: float64 where a set is float64, else
float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

TILE = 4096
DTYPES = (torch.float16, torch.float32, torch.float64)


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


@dataclass(frozen=True)
class ManifoldScores:
    """precision, recall and coverage lie in [0, 1]; density is 1 for identical sets and may exceed it."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(
    *,
    real: ArrayLike | Tensor,
    fake: ArrayLike | Tensor,
    k: int = 3,
    density_k: int = 5,
    dtype: torch.dtype | None = None,
) -> ManifoldScores:
    """`precision_recall` with k and `density_coverage` with density_k in one pass over the distances, where
    the real features lie.

    Raises ValueError for arrays that are not (N, D) and (M, D), N or M not above k, k below 1, NaN or
    infinity, and other dtypes.
    """
    distances = TiledDistances(real, fake, dtype, k, density_k)
    nearest = distances.nearest(distances.real, max(k, density_k))
    in_manifold = _PrecisionRecall(nearest[:, k - 1], distances.radii(distances.fake, k))
    within_radius = _DensityCoverage(nearest[:, density_k - 1], len(distances.fake), density_k)
    distances.compare(in_manifold, within_radius)
    return ManifoldScores(*in_manifold.result(), *within_radius.result())


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


class TiledDistances:
    """Two sets of features on one device, checked to have enough neighbours, and their squared distances, one
    tile at a time.
    """

    def __init__(
        self, real: ArrayLike | Tensor, fake: ArrayLike | Tensor, dtype: torch.dtype | None, *neighbours: int
    ):
        self.real = _as_tensor(real)
        self.fake = _as_tensor(fake).to(self.real.device)
        _check_pair(self.real, self.fake, neighbours)
        double = torch.float64 in (self.real.dtype, self.fake.dtype)
        self.dtype = dtype or (torch.float64 if double else torch.float32)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"distances in {self.dtype}; choose torch.float16, torch.float32 or torch.float64"
            )
        self._centre = 0 if self.dtype == torch.float16 else self.real.mean(dim=0, dtype=torch.float64)

    def radii(self, points: Tensor, k: int) -> Tensor:
        """(N,) squared distances to the k-th neighbour."""
        return self.nearest(points, k)[:, k - 1]

    def nearest(self, points: Tensor, k: int) -> Tensor:
        """(N, k) squared distances to the k nearest other points, ascending."""
        nearest = torch.full((len(points), k), torch.inf, dtype=self._tile_dtype(), device=points.device)
        for rows in _tiles(0, len(points)):
            u = self._load(points, rows)
            for columns in _tiles(rows.start, len(points)):
                tile = self._distances(u, self._load(points, columns))
                if columns == rows:
                    tile.fill_diagonal_(torch.inf)
                else:  # the tile on the other side of the diagonal
                    _keep_nearest(nearest[columns], tile.T)
                _keep_nearest(nearest[rows], tile)
        return nearest

    def compare(self, *counters: _PrecisionRecall | _DensityCoverage) -> None:
        """Show every tile of distances between real (rows) and fake (columns) to the counters."""
        for rows in _tiles(0, len(self.real)):
            u = self._load(self.real, rows)
            for columns in _tiles(0, len(self.fake)):
                tile = self._distances(u, self._load(self.fake, columns))
                for counter in counters:
                    counter.add(rows, columns, tile)

    def _tile_dtype(self):
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def _load(self, points, rows):
        return (points[rows].double() - self._centre).to(self._tile_dtype())

    def _distances(self, u, v):
        if self.dtype == torch.float16:
            tile = _float16_distances(u, v)
            if tile.isfinite().all():
                return tile.float()
        return _squared_distances(u, v)


def _squared_distances(u, v):
    tile = torch.addmm(v.square().sum(dim=1)[None], u, v.T, alpha=-2)
    tile += u.square().sum(dim=1)[:, None]
    return tile.clamp_(min=0)


def _float16_distances(u, v):
    """The same with what float16 arithmetic with float32 accumulators gives, on any device."""
    u, v = u.half().float(), v.half().float()
    norms_u, norms_v = u.square().sum(dim=1).half(), v.square().sum(dim=1).half()
    return (norms_u[:, None] - 2 * (u @ v.T).half()).add_(norms_v[None]).clamp_(min=0)


def _keep_nearest(nearest, tile):
    """Update nearest (n, k), a view, with the distances of n points to more points."""
    k = nearest.shape[1]
    candidates = tile.topk(min(k, tile.shape[1]), dim=1, largest=False).values
    nearest.copy_(torch.cat([nearest, candidates], dim=1).topk(k, dim=1, largest=False).values)


def _tiles(start: int, stop: int) -> Iterator[slice]:
    return (slice(first, min(first + TILE, stop)) for first in range(start, stop, TILE))


def _share(inside):
    return inside.sum().item() / len(inside)


def _as_tensor(features):
    if isinstance(features, Tensor):
        return features.detach()
    features = np.asarray(features)
    return torch.from_numpy(
        features if features.flags.writeable else features.copy()
    )  # torch warns of read-only memory


def _check_pair(real, fake, neighbours):
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(fake.shape)}; needed are (N, D) and (M, D)"
        )
    if min(neighbours) < 1:
        raise ValueError(f"k is {min(neighbours)}; neighbours are counted from 1")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) <= max(neighbours):
            raise ValueError(
                f"{len(features)} {name} images; {max(neighbours)} neighbours of each need at least "
                f"{max(neighbours) + 1}"
            )
        if not torch.stack(features.aminmax()).isfinite().all():  # no mask as large as the features
            raise ValueError(f"{name} features hold NaN or infinity")

"""Squared distances between two sets of features, tile by tile: memory does not grow with their number.

They are |u|^2 - 2 u.v + |v|^2, clamped at 0. The dtypes. float64 and float32: the mean of the real features
is subtracted first, which changes no distance but keeps its digits. float16: as in guided-diffusion's
evaluator, features, products and distances are rounded to float16 (sums stay float32), and a tile that
overflows is computed in float32; distances tie then. None, the default: float64 where a set is float64, else
float32.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

TILE = 4096
DTYPES = (torch.float16, torch.float32, torch.float64)


class Counter(Protocol):
    """What `TiledDistances.compare` shows every tile to: squared distances (reals, fakes) of these real to
    these fake points.
    """

    def add(self, reals: slice, fakes: slice, tile: Tensor) -> None: ...


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
        return self.nearest(points, k)[0][:, k - 1]

    def nearest(self, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Squared distances to the k nearest other points of the same set, ascending, and which they are:
        both (N, k).
        """
        nearest = torch.full((len(points), k), torch.inf, dtype=self._tile_dtype(), device=points.device)
        which = torch.full_like(nearest, -1, dtype=torch.int64)
        for rows in _tiles(0, len(points)):
            u = self._load(points, rows)
            for columns in _tiles(rows.start, len(points)):
                tile = self._distances(u, self._load(points, columns))
                if columns == rows:
                    tile.fill_diagonal_(torch.inf)
                else:  # the tile on the other side of the diagonal
                    _keep_nearest(nearest[columns], which[columns], tile.T, rows.start)
                _keep_nearest(nearest[rows], which[rows], tile, columns.start)
        return nearest, which

    def compare(self, *counters: Counter) -> None:
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


def _keep_nearest(nearest, which, tile, first):
    """Update nearest and which, (n, k) views, with the distances of n points to more points, numbered from
    `first` on.
    """
    k = nearest.shape[1]
    found = tile.topk(min(k, tile.shape[1]), dim=1, largest=False)
    candidates = torch.cat([which, found.indices + first], dim=1)
    best = torch.cat([nearest, found.values], dim=1).topk(k, dim=1, largest=False)
    nearest.copy_(best.values)
    which.copy_(candidates.gather(1, best.indices))


def _tiles(start: int, stop: int) -> Iterator[slice]:
    return (slice(first, min(first + TILE, stop)) for first in range(start, stop, TILE))


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

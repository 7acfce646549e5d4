"""MIND, the Monge Inception Distance: a sliced Wasserstein distance, which estimates no covariance.

Berthet et al., "MIND: Monge Inception Distance for Generative Models Evaluation" (2026, arXiv 2605.06797).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.moments import to_numpy
from evaluation.scores import check_pair

DIRECTIONS = 1000
TILE = 200  # directions at a time
ROWS = 4096  # images at a time


def monge_distance(*, real: ArrayLike, fake: ArrayLike, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """3 D times the mean, over random directions, of the squared Wasserstein distance of the two sets
    projected on it; features (N, D), (M, D).

    The distance on a line is exact, for N != M too. A shift by v counts as 3 |v|^2 on average over the
    directions, which `seed` fixes. In the features' dtype, sums in float64. Raises ValueError for fewer than
    2 images, two different D, NaN or infinity, and no directions.
    """
    real, fake = to_numpy(real), to_numpy(fake)
    check_pair(real, fake, "MIND")
    if directions < 1:
        raise ValueError(f"{directions} directions; MIND needs at least 1")
    dimension, (rows, columns, weights) = real.shape[1], _coupling(len(real), len(fake))
    normal = np.random.RandomState(seed).standard_normal((directions, dimension))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    centre = real.mean(axis=0, dtype=np.float64)
    total = 0.0
    for start in range(0, directions, TILE):
        x, y = (_sorted_projections(points, normal[start : start + TILE], centre) for points in (real, fake))
        difference = np.subtract(x[:, rows], y[:, columns], dtype=np.float64)
        total += float(np.square(difference, out=difference).sum(axis=0) @ weights)
    return 3 * dimension * total / directions


def _sorted_projections(points, normal, centre):
    """(directions, N): each row ascends. The centre, of no effect on the distance, keeps its digits."""
    dtype = np.promote_types(points.dtype, np.float32)
    normal, centre = normal.astype(dtype), centre.astype(dtype)
    projected = np.empty((len(normal), len(points)), dtype)
    for start in range(0, len(points), ROWS):
        rows = points[start : start + ROWS].astype(dtype, copy=False) - centre
        projected[:, start : start + ROWS] = normal @ rows.T
    projected.sort(axis=1)
    return projected


def _coupling(n: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Which of n and which of m sorted points are matched, and what mass each match carries."""
    # In units of 1 / (n m), the points of one set end at multiples of m, those of the other of n.
    ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    return (ends - 1) // m, (ends - 1) // n, np.diff(ends, prepend=0) / (n * m)

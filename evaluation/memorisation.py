"""Whether samples lie nearer to the training images than other real images do.

Meehan, Chaudhuri and Dasgupta, "A Non-Parametric Test to Detect Data-Copying in Generative Models" (2020):
the distance, in feature space, to the nearest training image is compared between samples and held-out images.
An honest generator's samples are as far away as these; a memorising one's are nearer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from evaluation.distances import TiledDistances
from evaluation.moments import to_float64, to_numpy

CLOSEST_HELD_OUT = 0.01  # the share of held-out images that sets what counts as a copy
EQUAL = 1e-3  # of the spread of the training features: the same image in another batch, or kept in float16
ROWS = 4096


@dataclass(frozen=True)
class Nearest:
    """distances (N,) float64, from each of N points to its nearest training image; which (N,), its index."""

    distances: NDArray[np.float64]
    which: NDArray[np.int64]

    def closest(self, count: int) -> list[tuple[int, int, float]]:
        """(point, training image, distance) of the `count` smallest distances, ascending."""
        first = np.argsort(self.distances, kind="stable")[:count]
        return [(int(i), int(self.which[i]), float(self.distances[i])) for i in first]


def nearest_training(*, train: ArrayLike, points: ArrayLike) -> Nearest:
    """Features (M, D) of the training images and (N, D) of others. Raises ValueError for fewer than 2 of one,
    two different D, NaN or infinity.
    """
    train, points = to_numpy(train), to_numpy(points)
    tiled = TiledDistances(train, points, None, 1)
    found = _NearestReal(len(points))
    tiled.compare(found)
    which = found.which.numpy()
    distances = np.empty(len(points))
    for start in range(0, len(points), ROWS):  # again, without the rounding of differences of squares
        rows = slice(start, start + ROWS)
        apart = to_float64(points[rows]) - train[which[rows]]
        distances[rows] = np.linalg.norm(apart, axis=1)
    return Nearest(distances, which)


class _NearestReal:
    def __init__(self, num_fake: int):
        self.squares = torch.full((num_fake,), torch.inf, dtype=torch.float64)
        self.which = torch.full((num_fake,), -1)

    def add(self, reals: slice, fakes: slice, tile: Tensor) -> None:
        squares, which = tile.min(dim=0)
        nearer = squares < self.squares[fakes]
        self.squares[fakes] = torch.where(nearer, squares, self.squares[fakes])
        self.which[fakes] = torch.where(nearer, which + reals.start, self.which[fakes])


def nearer_share(samples: NDArray[np.float64], held_out: NDArray[np.float64]) -> float:
    """The probability that a sample's distance (N,) is smaller than a held-out image's (M,), equal ones
    counted half: 0.5 for an honest generator, 1 where every sample is nearer than every held-out image.
    """
    ordered = np.sort(held_out)
    farther = len(ordered) - np.searchsorted(ordered, samples, "right")
    not_nearer = len(ordered) - np.searchsorted(ordered, samples, "left")
    return float((farther + not_nearer).mean() / (2 * len(ordered)))


def copies_share(samples: NDArray[np.float64], held_out: NDArray[np.float64]) -> float:
    """The share of samples that are nearer to a training image than all but the closest 1% of the held-out
    images: 0.01 by chance.
    """
    return float((samples < np.quantile(held_out, CLOSEST_HELD_OUT)).mean())


def are_training_images(distances: NDArray[np.float64], train: NDArray) -> NDArray[np.bool_]:
    """(N,): which of these distances are those of a training image to itself; train (M, D)."""
    spread = np.sqrt(np.var(train, axis=0, dtype=np.float64).sum())
    return distances <= EQUAL * spread

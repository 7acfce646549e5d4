"""Mean and covariance, also of features that arrive in batches.

A covariance here is `numpy.cov`'s, divided by N - 1, in float64 whatever the dtype of the features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Published statistics went through float32 or a symmetrised square root now and then; a wrong matrix is off
# by far more.
SYMMETRY_TOLERANCE = 1e-4
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Gaussian:
    """mu (D,) and sigma (D, D), float64. `Gaussian.checked` makes one from numbers that nobody has looked at
    yet.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]

    @classmethod
    def checked(cls, mu: ArrayLike, sigma: ArrayLike, source: object = "statistics") -> "Gaussian":
        """mu (D,) and sigma (D, D) of any real dtype -> float64, sigma made exactly symmetric.

        Raises ValueError, with `source` in front, for sizes that do not fit, NaN or infinity, a sigma that is
        not symmetric (to 1e-4 of its largest entry) and a negative variance.
        """
        mu, sigma = (
            np.atleast_1d(to_float64(mu, f"{source}: mu")),
            np.atleast_2d(to_float64(sigma, f"{source}: sigma")),
        )
        if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
            raise ValueError(
                f"{source}: mu has shape {mu.shape} and sigma {sigma.shape}; needed are (D,) and (D, D)"
            )
        for name, array in (("mu", mu), ("sigma", sigma)):
            if not np.isfinite(array).all():
                bad = np.count_nonzero(~np.isfinite(array))
                raise ValueError(f"{source}: {name} holds {bad} NaN or infinite entries; compute it anew")
        asymmetry = float(np.abs(sigma - sigma.T).max())
        if asymmetry > SYMMETRY_TOLERANCE * np.abs(sigma).max():
            raise ValueError(
                f"{source}: sigma is not symmetric (entries differ by up to {asymmetry:.3g}), "
                "so it is no covariance"
            )
        if sigma.diagonal().min() < 0:
            raise ValueError(
                f"{source}: sigma has the variance {sigma.diagonal().min():.3g} on its diagonal, "
                "so it is no covariance"
            )
        return cls(mu, (sigma + sigma.T) / 2)


class Moments:
    """Mean and covariance of features that arrive in batches; takes D * D float64, twice that during
    `update`.

    The batches are combined by the formula of Chan, Golub and LeVeque (1979), which subtracts no large
    numbers from each other.
    """

    def __init__(self, dimension: int):
        self.count = 0
        self.mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))  # sum of (x - mean)(x - mean)^T

    def update(self, features: ArrayLike) -> None:
        """Add features (n, D), numpy or torch, of any real dtype. Raises ValueError for another D, NaN or
        infinity.
        """
        features = to_numpy(features)
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise ValueError(
                f"features of shape {features.shape} cannot join moments of {self.mean.size} dimensions"
            )
        for start in range(0, len(features), CHUNK_ROWS):
            self._add(to_float64(features[start : start + CHUNK_ROWS], "the array of features"), start)

    def _add(self, chunk, start):
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"features hold NaN or infinity, first in row {start + int(np.argmin(finite))} of the batch"
            )
        mean = chunk.mean(axis=0)
        chunk -= mean
        self._scatter += chunk.T @ chunk
        self._shift(len(chunk), mean)

    def _shift(self, count, mean):
        """Move the mean for `count` more points around `mean`, and add what the distance of the two means is
        worth.
        """
        if count == 0:
            return
        total, delta = self.count + count, mean - self.mean
        if self.count:
            self._scatter += np.outer(delta, delta * (self.count * count / total))
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def state(self) -> dict[str, Any]:
        """Arrays by name, from which `of_state` makes the same moments, bit for bit."""
        return {"count": np.array(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def of_state(cls, count: ArrayLike, mean: NDArray, scatter: NDArray) -> "Moments":
        """The inverse of `state`."""
        moments = cls(len(mean))
        moments.count, moments.mean, moments._scatter = int(np.asarray(count)), mean, scatter
        return moments

    def covariance(self) -> NDArray[np.float64]:
        """(D, D), divided by N - 1 as `numpy.cov` does. Raises ValueError for fewer than two points."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 points, not {self.count}")
        return self._scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """The mean and covariance so far."""
        return Gaussian(self.mean, self.covariance())


def moments_of(features: ArrayLike) -> Moments:
    """The moments of one array (N, D)."""
    features = to_numpy(features)
    if features.ndim != 2:
        raise ValueError(f"features have shape {features.shape}; needed is (images, dimensions)")
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def to_numpy(array: ArrayLike) -> NDArray:
    """A numpy array, from a torch tensor on any device too; no copy where none is needed."""
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)


def to_float64(array: ArrayLike, name: str = "array") -> NDArray[np.float64]:
    """A copy of it in float64. Raises ValueError, with `name` in front, for anything that is not made of real
    numbers.
    """
    array = to_numpy(array)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} is made of {array.dtype}; needed are real numbers")
    return array.astype(np.float64)

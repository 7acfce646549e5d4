"""Mean and covariance: of features that arrive in batches, and of published statistics files.

A covariance here is `numpy.cov`'s, divided by N - 1, in float64 whatever the dtype of the features.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

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
                raise ValueError(
                    f"{source}: {name} holds {np.count_nonzero(~np.isfinite(array))} NaN or infinite entries; compute it anew"
                )
        asymmetry = float(np.abs(sigma - sigma.T).max())
        if asymmetry > SYMMETRY_TOLERANCE * np.abs(sigma).max():
            raise ValueError(
                f"{source}: sigma is not symmetric (entries differ by up to {asymmetry:.3g}), so it is no covariance"
            )
        if sigma.diagonal().min() < 0:
            raise ValueError(
                f"{source}: sigma has the variance {sigma.diagonal().min():.3g} on its diagonal, so it is no covariance"
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


def load_statistics(path: str | Path) -> tuple[Gaussian, Gaussian | None]:
    """Read the Gaussian of the pooled features (`mu`, `sigma`) and of the spatial ones (`mu_s`, `sigma_s`),
    None where there are none.

    The file is an npz in the layout of guided-diffusion's references or pytorch-fid's statistics; other
    arrays in it stay unread. Raises FileNotFoundError, and ValueError for a file that is no npz, lacks an
    array, or holds one that `Gaussian.checked` refuses.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no npz file, or a damaged one") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is a single array; statistics are an npz with mu and sigma")
    with archive:
        if "mu_s" not in archive and "sigma_s" not in archive:
            return _read_gaussian(path, archive, "mu", "sigma"), None
        return _read_gaussian(path, archive, "mu", "sigma"), _read_gaussian(path, archive, "mu_s", "sigma_s")


def _read_gaussian(path, archive, mu, sigma):
    for name in (mu, sigma):
        if name not in archive:
            raise ValueError(
                f"{path} has no {name}; statistics are an npz with mu and sigma, this one holds {', '.join(archive.files)}"
            )
    try:
        arrays = archive[mu], archive[sigma]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: {mu} or {sigma} is damaged, or holds Python objects, which are refused"
        ) from error
    return Gaussian.checked(*arrays, f"{path} ({mu}, {sigma})")


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

"""The Frechet distance between two Gaussians (FID, sFID), its error bar, and its extrapolation to infinitely
many images.

FID: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium"
(2017). FID-infinity: Chong and Forsyth, "Effectively Unbiased FID and Inception Score and where to find them"
(2020).

With roots S = R R^T of the two covariances, the trace of (S1 S2)^(1/2) is the sum of the singular values of
R1^T R2: real and finite where the matrix root of the singular product is neither.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.moments import Gaussian, moments_of, to_float64, to_numpy

NEGATIVE_TOLERANCE = 1e-5  # of the largest eigenvalue: statistics may have gone through float32
# Of the two traces, from which the distance is what is left. A singular value is off by at most some 1e-9 of
# the largest (see `sum_of_singular_values`), their sum by 1e-11 of the traces, as measured on equal
# covariances of 8 to 2,048 dimensions, singular ones too.
ROUNDING = 1e-10
EQUAL_MEANS = 1e-14  # of the size of the features: sums in two orders are off by as much
NORMAL_95 = 1.959964  # half the width of the normal distribution's central 95%, in standard deviations


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), in float64; means (D,), covariances (D,
    D), singular ones too.

    Raises ValueError for what `Gaussian.checked` refuses and for two different D.
    """
    second = Gaussian.checked(mu2, sigma2, "second Gaussian")
    return FrechetReference(Gaussian.checked(mu1, sigma1, "first Gaussian")).distance(second)


class FrechetReference:
    """One Gaussian to which many distances are taken: its covariance is factored once."""

    def __init__(self, gaussian: Gaussian):
        self.mu = gaussian.mu
        self._trace = float(np.trace(gaussian.sigma))
        self._root = covariance_root(gaussian.sigma)

    def distance(self, gaussian: Gaussian) -> float:
        """The Frechet distance to a Gaussian. Raises ValueError where it has another D."""
        self._require_dimension(gaussian.mu.size)
        return self._distance(gaussian.mu, float(np.trace(gaussian.sigma)), covariance_root(gaussian.sigma))

    def distance_to_features(self, features: ArrayLike) -> float:
        """The Frechet distance to the mean and covariance of features (N, D). Raises ValueError for N < 2,
        another D, NaN or infinity.
        """
        x = _images_by_dimensions(features, "features")
        self._require_dimension(x.shape[1])
        if len(x) > self.mu.size:
            return self.distance(moments_of(x).gaussian())
        # Few images: centred and scaled they are a root of their covariance, and a smaller one than D x D.
        if len(x) < 2:
            raise ValueError(f"a Frechet distance needs at least 2 images, not {len(x)}")
        if not np.isfinite(x).all():
            raise ValueError("features hold NaN or infinity")
        x = to_float64(x)
        mu = x.mean(axis=0)
        root = (x - mu).T / np.sqrt(len(x) - 1)
        return self._distance(mu, float(np.square(root).sum()), root)

    def _distance(self, mu, trace, root):
        shared = sum_of_singular_values(self._root.T @ root)
        shift = float(np.square(mu - self.mu).sum())
        distance = float(shift + self._trace + trace - 2 * shared)
        # Two covariances are never at a negative distance (von Neumann's trace inequality): what is below the
        # rounding of the terms, or negative, is 0, so that equal sets are at 0 and not at -6e-27.
        traces = self._trace + trace
        if distance - shift > ROUNDING * traces:
            return distance
        return shift if shift > EQUAL_MEANS**2 * (traces + float(np.square(mu).sum())) else 0.0

    def _require_dimension(self, dimension):
        if dimension != self.mu.size:
            raise ValueError(
                f"{dimension} dimensions against a reference of {self.mu.size}: these are different features"
            )


def covariance_root(sigma: NDArray) -> NDArray:
    """R (D, rank) with R R^T = sigma: the Cholesky factor, or where sigma is singular the scaled eigenvectors
    above rounding noise.

    Raises ValueError for a sigma with a negative eigenvalue beyond rounding noise.
    """
    try:
        return np.linalg.cholesky(sigma)
    except np.linalg.LinAlgError:
        eigenvalues, eigenvectors = np.linalg.eigh(sigma)
        if eigenvalues[0] < -NEGATIVE_TOLERANCE * eigenvalues[-1]:
            extremes = f"{eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}"
            raise ValueError(
                f"sigma is no covariance: its eigenvalues go from {extremes}, and none may be negative; "
                "compute the statistics anew"
            ) from None
        kept = eigenvalues > len(sigma) * np.finfo(np.float64).eps * eigenvalues[-1]
        return eigenvectors[:, kept] * np.sqrt(eigenvalues[kept])


def sum_of_singular_values(a: NDArray) -> float:
    """Of a matrix (m, n): roots of the eigenvalues of a^T a, which is fast, unless that would cost digits;
    then the singular values.
    """
    if 0 in a.shape:
        return 0.0
    eigenvalues = np.linalg.eigvalsh(a @ a.T if len(a) < len(a.T) else a.T @ a)
    # The eigenvalues are off by some 1e-16 of the largest: at 1e-14 of it, the smallest that is let through,
    # a root by 1e-9 of the largest.
    if eigenvalues[0] > 1e-14 * eigenvalues[-1]:
        return float(np.sqrt(eigenvalues).sum())
    return float(np.linalg.svd(a, compute_uv=False).sum())


@dataclass(frozen=True)
class Extrapolation:
    """Intercept and slope of distance = value + slope / N, and the standard error of the intercept in that
    fit.
    """

    value: float
    standard_error: float
    slope: float


def frechet_infinity(
    reference: FrechetReference, features: ArrayLike, *, num_points: int = 15, seed: int = 0
) -> Extrapolation:
    """FID-infinity: the distance at 1/N = 0 of a line through `num_points` random subsets of features (N, D),
    largest all of them.

    Sizes run evenly from N / 10, as published, but not from less than 2 D or, where that is more, N / 2: with
    few images the bias is not linear in 1/N. The standard error is that of the line; it leaves out what
    another N images would change (see `bootstrap_frechet`). Raises ValueError for fewer than 3 points and
    fewer than 20 images.
    """
    x = _images_by_dimensions(features, "features")
    count, dimension = x.shape
    if num_points < 3 or count < 20:
        raise ValueError(
            f"an extrapolation needs at least 3 points and 20 images, not {num_points} and {count}"
        )
    random_state = np.random.RandomState(seed)
    sizes = np.linspace(max(count // 10, min(2 * dimension, count // 2)), count, num_points).astype(int)
    distances = [
        reference.distance_to_features(x[random_state.choice(count, n, replace=False)]) for n in sizes
    ]
    line = np.stack([np.ones(num_points), 1 / sizes], axis=1)
    (value, slope), *_ = np.linalg.lstsq(line, np.array(distances), rcond=None)
    residual_variance = np.square(distances - line @ (value, slope)).sum() / (num_points - 2)
    standard_error = np.sqrt(residual_variance * np.linalg.inv(line.T @ line)[0, 0])
    return Extrapolation(float(value), float(standard_error), float(slope))


def bootstrap_frechet(
    reference: FrechetReference, features: ArrayLike, repeats: int, seed: int = 0
) -> NDArray[np.float64]:
    """(repeats,) distances of N images drawn with replacement out of features (N, D).

    A resample repeats images, so that its distance is too large, by about as much as N images are worse than
    infinitely many. Only the spread is used (`error_bar`): around the measured distance it says what another
    N images of this generator would give.
    """
    x = _images_by_dimensions(features, "features")
    return np.array(
        [reference.distance_to_features(x[indices]) for indices in _resamples(len(x), repeats, seed)]
    )


def bootstrap_difference(
    reference: FrechetReference, features_a: ArrayLike, features_b: ArrayLike, repeats: int, seed: int = 0
) -> NDArray[np.float64]:
    """(repeats,) distances of resampled a minus those of resampled b, both (N, D).

    The two share their indices, so that images made from the same noise and label stay pairs, and what they
    have in common cancels. So does the bias of a resample, much the same in both. Raises ValueError for sets
    of two sizes: the distance falls with the number of images, and that difference would be taken for one of
    the generators.
    """
    a, b = _images_by_dimensions(features_a, "set a"), _images_by_dimensions(features_b, "set b")
    if len(a) != len(b):
        raise ValueError(
            f"{len(a)} against {len(b)} images: take as many of each, since the distance depends on their "
            "number"
        )
    return bootstrap_frechet(reference, a, repeats, seed) - bootstrap_frechet(reference, b, repeats, seed)


@dataclass(frozen=True)
class ErrorBar:
    """A measured number, the standard deviation and the mean of its resamples, and the 95% interval low ..
    high around the number.
    """

    value: float
    std: float
    resampled_mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return not self.low <= 0 <= self.high


def error_bar(value: float, resampled: NDArray[np.float64]) -> ErrorBar:
    """The 95% interval value +- 1.96 standard deviations of `resampled`, which may be centred elsewhere.

    Of one distance it covers what N such images give on average, not the distance at infinitely many; where
    that is close to 0 it is too wide rather than too narrow. Of a difference it covers the true one. Raises
    ValueError for fewer than two resamples.
    """
    if len(resampled) < 2:
        raise ValueError(f"an error bar needs at least 2 resamples, not {len(resampled)}")
    std = float(np.std(resampled, ddof=1))
    return ErrorBar(value, std, float(np.mean(resampled)), value - NORMAL_95 * std, value + NORMAL_95 * std)


def _resamples(count, repeats, seed):
    """Index arrays (count,), with replacement; the same for the same count, whatever the features."""
    if repeats < 1:
        raise ValueError(f"a bootstrap needs at least 1 repeat, not {repeats}")
    random_state = np.random.RandomState(seed)
    return (random_state.randint(count, size=count) for _ in range(repeats))


def _images_by_dimensions(features, name):
    features = to_numpy(features)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} of shape {features.shape}; needed is (images, dimensions)")
    return features

"""How far a classifier's probabilities can be believed: its calibration, and two scores that need no bins.

probs are (N, K), K >= 2: a row for each image, not negative, of sum 1 within 0.001; NumPy or torch, float32
or float64, since rows of half precision are not so exact. y are the (N,) right classes, whole numbers from 0
to K - 1. Every function raises ValueError for anything else.

softmax(tau1 f) of logits f is a probability, and 1 / tau1 the temperature of Guo et al.; guidance's
exp(tau1 f_y) / sum_i exp(tau2 f_i) is none where tau1 != tau2: its rows do not sum to 1, and it has no
calibration.

Expected calibration error: Guo et al., "On Calibration of Modern Neural Networks" (2017), eq. 3. Brier score:
Brier (1950), the sum over the classes, from 0 to 2.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evaluation.moments import to_float64, to_numpy

BINS = 15
SUM_TOLERANCE = 1e-3  # float32 rows of a thousand classes sum to 1 within 1e-4
LEAST = np.finfo(np.float64).tiny  # what counts as the probability 0 in a logarithm


def expected_calibration_error(probs: ArrayLike, y: ArrayLike, bins: int = BINS) -> float:
    """Mean distance of accuracy and confidence over bins of the confidence, weighed by their images.

    The confidence is that of the most probable class; the bins are equally wide and closed on the right. Few
    images bias it upwards, by up to `noise_floor`; wide bins downwards, as errors of both signs cancel within
    one (Kumar et al., "Verified Uncertainty Calibration", 2019).
    """
    confidence, right, places = _binned(probs, y, bins)
    return _error(right - confidence, places, bins)


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: confidence and accuracy are means over the images of each bin, (bins,) float64,
    NaN where it has none; counts (bins,) int64.
    """

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    counts: NDArray[np.int64]


def reliability(probs: ArrayLike, y: ArrayLike, bins: int = BINS) -> Reliability:
    """The reliability diagram over the bins of `expected_calibration_error`."""
    confidence, right, places = _binned(probs, y, bins)
    counts = np.bincount(places, minlength=bins)
    with np.errstate(invalid="ignore"):
        return Reliability(
            confidence=np.bincount(places, confidence, bins) / counts,
            accuracy=np.bincount(places, right, bins) / counts,
            counts=counts,
        )


def noise_floor(probs: ArrayLike, bins: int = BINS, draws: int = 100, seed: int = 0) -> float:
    """The error that these probabilities would have if they were right: the mean of
    `expected_calibration_error` over labels drawn from them.
    """
    confidence, _, places = _binned(probs, np.zeros(len(to_numpy(probs)), dtype=np.int64), bins)
    if draws < 1:
        raise ValueError(f"a noise floor from {draws} draws; it takes at least 1")
    random = np.random.default_rng(seed)
    # Whether the most probable class is the drawn one is all that the error sees of a label.
    drawn = ((random.random(len(confidence)) < confidence) - confidence for _ in range(draws))
    return float(np.mean([_error(gaps, places, bins) for gaps in drawn]))


def resampled_errors(
    probs: ArrayLike, y: ArrayLike, weights: NDArray[np.int64], bins: int = BINS
) -> NDArray[np.float64]:
    """(R,) calibration errors of R resamples of the images; weights (R, N): how often each has an image, N in
    all. Two classifiers under the same weights are compared pairwise.
    """
    confidence, right, places = _binned(probs, y, bins)
    return np.array([_error(row * (right - confidence), places, bins) for row in weights])


def accuracy(probs: ArrayLike, y: ArrayLike) -> float:
    """The share of the images whose most probable class is the right one, the first one of equals."""
    probs, y = _checked(probs, y)
    return float(np.mean(probs.argmax(axis=1) == y))


def negative_log_likelihood(probs: ArrayLike, y: ArrayLike) -> float:
    """Mean of -log p of the right class, in nats; a probability of 0 counts as the least normal float64."""
    probs, y = _checked(probs, y)
    likelihood = to_float64(probs[np.arange(len(y)), y])
    return float(-np.log(np.maximum(likelihood, LEAST)).mean())


def brier_score(probs: ArrayLike, y: ArrayLike) -> float:
    """Mean squared distance of a row from that of a classifier that is right and sure: 0 to 2."""
    probs, y = _checked(probs, y)
    distances = to_float64(probs)
    distances[np.arange(len(y)), y] -= 1
    return float(np.square(distances).sum(axis=1).mean())


def _binned(probs, y, bins):
    """(confidence, whether it is right as 0 or 1, its bin), each (N,), after the checks."""
    probs, y = _checked(probs, y)
    if bins < 1:
        raise ValueError(f"{bins} bins; it takes at least 1")
    confidence = probs.max(axis=1)
    # Edges of the same dtype: a float32 of 0.8 lies on the edge 0.8, not behind it.
    edges = np.linspace(0, 1, bins + 1).astype(confidence.dtype)
    places = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    return confidence.astype(np.float64), (probs.argmax(axis=1) == y).astype(np.float64), places


def _error(gaps, places, bins):
    """l1 over the bins; gaps (N,): accuracy minus confidence of each image."""
    return float(np.abs(np.bincount(places, gaps, bins)).sum() / len(gaps))


def _checked(probs: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
    probs, y = _checked_probs(probs), to_numpy(y)
    if y.shape != (len(probs),) or y.dtype.kind not in "iu":
        raise ValueError(f"y is {y.dtype} {y.shape}; needed are {len(probs)} whole numbers, one for each row")
    outside = np.flatnonzero((y < 0) | (y >= probs.shape[1]))
    if len(outside):
        raise ValueError(
            f"y holds class {y[outside[0]]} for image {outside[0]}, but probs has the classes 0 to "
            f"{probs.shape[1] - 1}"
        )
    return probs, y


def _checked_probs(probs: ArrayLike) -> NDArray:
    probs = to_numpy(probs)
    if probs.dtype.kind != "f":
        probs = to_float64(probs, "probs")
    if probs.ndim != 2 or len(probs) == 0 or probs.shape[1] < 2:
        raise ValueError(
            f"probs has shape {probs.shape}; needed is (images, classes), with 2 classes or more"
        )
    sums = probs.sum(axis=1, dtype=np.float64)
    wrong = np.flatnonzero(~((probs.min(axis=1) >= 0) & (np.abs(sums - 1) <= SUM_TOLERANCE)))  # NaN too
    if len(wrong):
        raise ValueError(
            f"row {wrong[0]} of probs is negative somewhere, or sums to {sums[wrong[0]]:.4g} and not to 1: "
            "of logits, take the softmax first"
        )
    return probs

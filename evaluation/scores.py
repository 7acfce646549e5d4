"""Inception Score and the distances by a kernel, KID and CMMD.

Inception Score: Salimans et al., "Improved Techniques for Training GANs" (2016). Kernel distance: Binkowski
et al., "Demystifying MMD GANs" (2018). CMMD: Jayasumana et al., "Rethinking FID: Towards a Better Evaluation
Metric for Image Generation" (2024, arXiv 2401.09603).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax, xlogy

from evaluation.moments import to_float64, to_numpy

TILE = 2048
CMMD_SIGMA, CMMD_SCALE = 10, 1000


def inception_score(
    *, logits: ArrayLike | None = None, probs: ArrayLike | None = None, split_size: int = 5000
) -> float:
    """exp of the mean KL divergence from p(y | x) to p(y), averaged over consecutive splits of `split_size`
    images.

    Exactly one of logits (N, classes), probs (N, classes) in [0, 1] with rows that sum to 1. As in
    guided-diffusion's evaluator the splits follow the order of the images, and a ragged last one counts like
    the others. In float64. Raises ValueError for both or neither, NaN or infinity, rows that are no
    probabilities, no images, and a split size below 1.
    """
    if logits is not None and probs is None:
        values, to_probs = to_numpy(logits), _probs_of_logits
    elif probs is not None and logits is None:
        values, to_probs = to_numpy(probs), _checked_probs
    else:
        raise ValueError(
            f"an Inception Score takes either logits or probs, not {'neither' if logits is None else 'both'}"
        )
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"an Inception Score takes an array (images, classes), not one of shape {values.shape}"
        )
    if split_size < 1:
        raise ValueError(f"a split of {split_size} images; it takes at least 1")
    splits = (to_float64(values[start : start + split_size]) for start in range(0, len(values), split_size))
    return float(np.mean([_split_score(to_probs(split)) for split in splits]))


def _probs_of_logits(logits):
    if not np.isfinite(logits).all():
        raise ValueError("logits hold NaN or infinity")
    return softmax(logits, axis=1)


def _checked_probs(probs):
    # Written so that NaN fails too. float32 rows of a thousand classes sum to 1 within 1e-4.
    if not (probs.min() >= 0 and np.abs(probs.sum(axis=1) - 1).max() <= 1e-3):
        raise ValueError(
            "probs hold rows that are negative or do not sum to 1; pass raw network outputs as logits="
        )
    return probs


def _split_score(probs):
    """Mean KL as a difference of entropies: H(mean p) - mean H(p)."""
    mean = probs.mean(axis=0)
    return np.exp(xlogy(probs, probs).sum(axis=1).mean() - xlogy(mean, mean).sum())


def kernel_distance(
    *, real: ArrayLike, fake: ArrayLike, subsets: int | None = None, subset_size: int = 1000, seed: int = 2020
) -> float | tuple[float, float]:
    """Unbiased squared MMD of features (N, D), (M, D) under the kernel (x.y / D + 1)^3, in float64; it may be
    below 0.

    Over all images; or, given a number of `subsets`, mean and standard deviation (dividing by `subsets`) over
    that many pairs of random subsets of `subset_size` images each, drawn as torch-fidelity draws them, real
    first. Raises ValueError for fewer than 2 images, fewer than `subset_size`, two different D, NaN or
    infinity.
    """
    real, fake = to_numpy(real), to_numpy(fake)
    check_pair(real, fake, "a kernel distance")
    if subsets is None:
        return _mmd2(real, fake)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"{subsets} subsets of {subset_size} images; it takes at least 1 of at least 2")
    if subset_size > min(len(real), len(fake)):
        raise ValueError(
            f"subsets of {subset_size} out of {len(real)} real and {len(fake)} fake images; "
            "pass a smaller subset_size"
        )
    random_state = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        some_real = real[random_state.choice(len(real), subset_size, replace=False)]
        some_fake = fake[random_state.choice(len(fake), subset_size, replace=False)]
        distances.append(_mmd2(some_real, some_fake))
    return float(np.mean(distances)), float(np.std(distances))


def clip_mmd(*, real: ArrayLike, fake: ArrayLike) -> float:
    """CMMD of CLIP embeddings (N, D), (M, D), which the network has normalised: 1000 times the biased squared
    MMD under exp(-|x - y|^2 / (2 10^2)), at least 0, in float64.

    Raises ValueError as `kernel_distance` does.
    """
    real, fake = to_numpy(real), to_numpy(fake)
    check_pair(real, fake, "CMMD")
    within = sum(_sum_within(x, _gaussian_less_1) / len(x) ** 2 for x in (real, fake))
    return CMMD_SCALE * float(within - 2 * _mean_across(real, fake, _gaussian_less_1))


def check_pair(real: NDArray, fake: NDArray, metric: str) -> None:
    """Raise ValueError for features that are not (N, D) and (M, D), fewer than 2 images, NaN or infinity."""
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features of shapes {real.shape} and {fake.shape}; needed are (N, D) and (M, D)")
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < 2:
            raise ValueError(f"{len(features)} {name} images; {metric} needs at least 2")
        if not all(np.isfinite(tile).all() for tile in _tiles(features)):
            raise ValueError(f"{name} features hold NaN or infinity")


def _mmd2(real, fake):
    within = [_sum_within(x, _cubic) / (len(x) * (len(x) - 1)) for x in (real, fake)]
    return float(within[0] + within[1] - 2 * _mean_across(real, fake, _cubic))


def _sum_within(x, kernel):
    """Of all pairs of two different points. The kernel is symmetric: tiles above the diagonal count twice."""
    total = 0.0
    for i, rows in enumerate(_tiles(x)):
        for j, columns in enumerate(_tiles(x[i * TILE :])):
            values = kernel(rows, columns)
            total += 2 * values.sum() if j else values.sum() - np.trace(values)
    return total


def _mean_across(x, y, kernel):
    return sum(kernel(rows, columns).sum() for rows in _tiles(x) for columns in _tiles(y)) / (len(x) * len(y))


def _cubic(x, y):
    kernel = x @ y.T
    kernel /= x.shape[1]
    kernel += 1
    return kernel * kernel * kernel  # many times faster than kernel**3


def _gaussian_less_1(x, y):
    """The kernel of two equal points is 0, and digits are kept: all others are close to 1, and the constant
    leaves the biased MMD.
    """
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
    return np.expm1(squares.clip(min=0) / (-2 * CMMD_SIGMA**2))


def _tiles(features: NDArray) -> Iterator[NDArray[np.float64]]:
    return (to_float64(features[start : start + TILE]) for start in range(0, len(features), TILE))

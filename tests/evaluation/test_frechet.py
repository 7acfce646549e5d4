"""The Frechet distance against closed forms, its error bars against many independent sets, and its
extrapolation.
"""

import numpy as np
import pytest
import torch

from evaluation.frechet import (
    FrechetReference,
    bootstrap_difference,
    bootstrap_frechet,
    error_bar,
    frechet_distance,
    frechet_infinity,
    sum_of_singular_values,
)
from evaluation.moments import Gaussian, moments_of

DIMENSION = 8
SCALES = 0.5 + np.arange(DIMENSION) / (DIMENSION - 1)
REFERENCE = FrechetReference(Gaussian(np.zeros(DIMENSION), np.diag(SCALES**2)))


def generated(count, seed, mean=0.3, scale=0.9):
    """Draws of a Gaussian whose distance to REFERENCE is `true_distance(mean, scale)`."""
    return np.random.RandomState(seed).standard_normal((count, DIMENSION)) * scale * SCALES + mean


def true_distance(mean=0.3, scale=0.9):
    return DIMENSION * mean**2 + np.square((1 - scale) * SCALES).sum()


def random_covariance(dimension, seed, rank=None):
    factor = np.random.RandomState(seed).standard_normal((dimension, rank or 2 * dimension))
    return factor @ factor.T / factor.shape[1]


def test_equal_covariances_give_the_squared_distance_of_the_means():
    sigma, mu1, mu2 = random_covariance(6, 0), np.arange(6.0), np.ones(6)
    assert frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(np.square(mu1 - mu2).sum(), rel=1e-12)


def test_covariances_that_commute():
    basis, _ = np.linalg.qr(np.random.RandomState(0).standard_normal((6, 6)))
    first, second = np.arange(1.0, 7), np.array([4.0, 0.5, 9, 1, 0.01, 2])
    distance = frechet_distance(np.zeros(6), basis * first @ basis.T, np.zeros(6), basis * second @ basis.T)
    assert distance == pytest.approx(np.square(np.sqrt(first) - np.sqrt(second)).sum(), rel=1e-12)


def test_variances_over_many_orders_of_magnitude():
    """The eigenvalues of the product reach down to 1e-16 of the largest; their roots still count with all
    their digits.
    """
    basis, _ = np.linalg.qr(np.random.RandomState(0).standard_normal((40, 40)))
    left, right = np.geomspace(1, 1e-9, 40), np.geomspace(1, 1e-7, 40)
    shared = np.sqrt(left * right).sum()
    assert sum_of_singular_values(basis * np.sqrt(left * right) @ basis) == pytest.approx(shared, rel=1e-13)
    distance = frechet_distance(np.zeros(40), basis * left @ basis.T, np.zeros(40), basis * right @ basis.T)
    assert distance == pytest.approx(left.sum() + right.sum() - 2 * shared, rel=1e-9)


def test_it_is_a_float_symmetric_and_takes_tensors():
    one, two = random_covariance(5, 1), random_covariance(5, 2)
    distance = frechet_distance(np.zeros(5), one, np.ones(5), two)
    assert type(distance) is float
    assert frechet_distance(np.ones(5), two, np.zeros(5), one) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(*map(torch.from_numpy, (np.zeros(5), one, np.ones(5), two))) == distance


@pytest.mark.parametrize("ranks", [(3, 3), (3, 40), (40, 3)])
def test_rank_deficient_covariances(ranks):
    """Orthogonal supports share nothing; the same support is measured as if the rest of the space were not
    there.
    """
    basis, _ = np.linalg.qr(np.random.RandomState(3).standard_normal((20, 20)))
    one, two = (random_covariance(3, seed, rank) for seed, rank in enumerate(ranks))
    embedded_one, embedded_two = (basis[:, :3] @ sigma @ basis[:, :3].T for sigma in (one, two))
    elsewhere = basis[:, 3:6] @ two @ basis[:, 3:6].T
    zeros = np.zeros(20)
    assert frechet_distance(zeros, embedded_one, zeros, embedded_two) == pytest.approx(
        frechet_distance(zeros[:3], one, zeros[:3], two)
    )
    assert frechet_distance(zeros, embedded_one, zeros, elsewhere) == pytest.approx(
        np.trace(one) + np.trace(two)
    )


@pytest.mark.parametrize("scale", [1e-13, 1, 1e6])
@pytest.mark.parametrize("count", [3, DIMENSION, 4 * DIMENSION])
def test_equal_sets_are_at_distance_zero_and_none_is_below(count, scale):
    x = scale * generated(count, 0, mean=5)
    gaussian = moments_of(x).gaussian()
    reference = FrechetReference(gaussian)
    assert reference.distance(gaussian) == reference.distance_to_features(x) == 0
    assert frechet_distance(gaussian.mu, gaussian.sigma, gaussian.mu, gaussian.sigma) == 0
    flat = np.broadcast_to(x[:1], x.shape)  # no spread at all
    assert FrechetReference(moments_of(flat).gaussian()).distance_to_features(flat) == 0
    # Statistics that went through float32 have eigenvalues a little below 0.
    rounded = gaussian.sigma.astype(np.float32).astype(np.float64)
    assert 0 <= frechet_distance(gaussian.mu, gaussian.sigma, gaussian.mu, rounded) < 1e-5 * scale**2


def test_small_distances_that_are_none_of_rounding_stay():
    sigma, mu = random_covariance(6, 0), np.ones(6)
    assert frechet_distance(mu, sigma, mu + 1e-9, sigma) == pytest.approx(6e-18, rel=1e-5)
    assert frechet_distance(mu, sigma, mu, sigma * 1.001**2) == pytest.approx(
        1e-6 * np.trace(sigma), rel=1e-6
    )


def test_no_spread_at_all_leaves_the_means_and_the_other_trace():
    sigma = random_covariance(4, 0)
    assert frechet_distance(np.zeros(4), np.zeros((4, 4)), np.ones(4), sigma) == pytest.approx(
        4 + np.trace(sigma), rel=1e-12
    )


@pytest.mark.parametrize("count", [30, DIMENSION + 1, DIMENSION, 3])
def test_few_images_take_the_smaller_form_and_get_the_same_number(count):
    x = generated(count, seed=4)
    assert REFERENCE.distance_to_features(x) == pytest.approx(
        REFERENCE.distance(moments_of(x).gaussian()), rel=1e-9
    )


def test_what_has_no_distance():
    sigma = random_covariance(3, 0)
    with pytest.raises(
        ValueError, match="2 dimensions against a reference of 3: these are different features"
    ):
        frechet_distance(np.zeros(3), sigma, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match=r"second Gaussian: mu has shape \(2,\) and sigma \(3, 3\)"):
        frechet_distance(np.zeros(3), sigma, np.zeros(2), sigma)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        REFERENCE.distance_to_features(generated(1, 0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        REFERENCE.distance_to_features(np.full((3, DIMENSION), np.nan))
    with pytest.raises(ValueError, match="5 dimensions against a reference of 8"):
        REFERENCE.distance_to_features(np.zeros((30, 5)))
    with pytest.raises(ValueError, match=r"set b of shape \(0, 8\)"):
        bootstrap_difference(REFERENCE, generated(5, 0), np.zeros((0, DIMENSION)), 2)
    with pytest.raises(ValueError, match="at least 1 repeat, not 0"):
        bootstrap_frechet(REFERENCE, generated(5, 0), 0)
    with pytest.raises(ValueError, match="at least 2 resamples, not 1"):
        error_bar(1.0, np.ones(1))
    with pytest.raises(ValueError, match="at least 3 points and 20 images, not 2 and 30"):
        frechet_infinity(REFERENCE, generated(30, 0), num_points=2)


def test_extrapolation_takes_the_bias_away():
    sets = [generated(400, seed, mean=0.05) for seed in range(100)]
    plain = np.array([REFERENCE.distance_to_features(x) for x in sets])
    extrapolated = np.array([frechet_infinity(REFERENCE, x).value for x in sets])
    bias, standard_error = plain.mean() - true_distance(mean=0.05), extrapolated.std() / np.sqrt(len(sets))
    assert bias > 8 * standard_error  # so that the next line says something
    assert abs(extrapolated.mean() - true_distance(mean=0.05)) < 3 * standard_error


def test_extrapolation_is_a_line_through_seeded_subsets():
    x = generated(200, seed=0)
    fit = frechet_infinity(REFERENCE, x, seed=5)
    assert fit == frechet_infinity(REFERENCE, x, seed=5)
    assert fit.value != frechet_infinity(REFERENCE, x, seed=6).value
    assert fit.value + fit.slope / 200 == pytest.approx(
        REFERENCE.distance_to_features(x), abs=4 * fit.standard_error
    )


def test_the_error_bar_of_a_distance_covers_what_such_sets_give_on_average():
    sets = [generated(300, seed) for seed in range(60)]
    distances = [REFERENCE.distance_to_features(x) for x in sets]
    bars = [error_bar(d, bootstrap_frechet(REFERENCE, x, 40)) for d, x in zip(distances, sets, strict=True)]
    covered = sum(bar.low <= np.mean(distances) <= bar.high for bar in bars)
    assert covered >= 52  # 95% of 60 is 57; fewer than 52 has a chance of 1 in 50
    assert 0.8 < np.mean([bar.std for bar in bars]) / np.std(distances) < 1.4
    assert np.mean([bar.resampled_mean for bar in bars]) > np.mean(
        distances
    )  # the bias that the bar leaves out


def test_the_error_bar_of_a_difference_covers_the_truth_and_pairs_make_it_shorter():
    covered, paired_widths, single_widths = 0, [], []
    for seed in range(60):
        a = generated(300, seed)
        b = 0.98 * (a - 0.3) + 0.31  # the same noise, through a generator that is a little different
        difference = REFERENCE.distance_to_features(a) - REFERENCE.distance_to_features(b)
        bar = error_bar(difference, bootstrap_difference(REFERENCE, a, b, 40))
        covered += bar.low <= true_distance() - true_distance(0.31, 0.98 * 0.9) <= bar.high
        paired_widths.append(bar.std)
        single_widths.append(bootstrap_frechet(REFERENCE, a, 40).std())
    assert covered >= 52
    assert np.mean(paired_widths) < 0.5 * np.mean(single_widths)


def test_differences_pair_sets_of_one_size_and_no_others():
    a = generated(50, 0)
    assert np.array_equal(bootstrap_difference(REFERENCE, a, a, 5), np.zeros(5))
    with pytest.raises(ValueError, match="50 against 49 images: take as many of each"):
        bootstrap_difference(REFERENCE, a, a[:-1], 5)
    assert bootstrap_frechet(REFERENCE, a, 5, seed=1).shape == (5,)
    assert not np.array_equal(
        bootstrap_frechet(REFERENCE, a, 5, seed=1), bootstrap_frechet(REFERENCE, a, 5, seed=2)
    )


def test_a_matrix_with_negative_eigenvalues_is_no_covariance():
    indefinite = np.array([[1.0, 3.0], [3.0, 1.0]])  # -2 and 4
    with pytest.raises(
        ValueError, match=r"sigma is no covariance: its eigenvalues go from -2 to 4, and none may be negative"
    ):
        frechet_distance(np.zeros(2), indefinite, np.zeros(2), np.eye(2))


def test_an_error_bar_knows_whether_zero_lies_outside():
    resampled = np.array([4.0, 6.0])  # standard deviation 1.414, around 5
    assert error_bar(3.0, resampled).excludes_zero
    assert not error_bar(2.0, resampled).excludes_zero
    bar = error_bar(-3.0, resampled)
    assert bar.excludes_zero
    assert (bar.std, bar.resampled_mean) == (pytest.approx(2**0.5), 5.0)
    assert (bar.low, bar.high) == (pytest.approx(-5.772, abs=1e-3), pytest.approx(-0.228, abs=1e-3))

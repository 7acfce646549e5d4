"""Calibration against examples by hand, other implementations, and classifiers that are right by
construction.
"""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, mean_squared_error

from evaluation import expected_calibration_error
from evaluation.calibration import (
    accuracy,
    brier_score,
    negative_log_likelihood,
    noise_floor,
    reliability,
    resampled_errors,
)

RANDOM = np.random.RandomState(0)
PROBS = softmax(2 * RANDOM.standard_normal((400, 7)), axis=1)
Y = RANDOM.randint(0, 7, 400)
BY_HAND = np.array([[0.8, 0.2, 0.0], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.0, 0.0, 1.0]])


def two_classes(*confidences):
    return np.array([[p, 1 - p] for p in confidences])


def drawn(probs, random):
    """Labels by which these probabilities are right."""
    return (probs.cumsum(axis=1) < random.random_sample((len(probs), 1))).sum(axis=1)


def by_loops(probs, y, bins):
    """Guo et al.'s own way: bin after bin, each open on the left and closed on the right."""
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == y
    total, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


def test_an_example_by_hand():
    y = [0, 2, 2, 2]  # bins: 0.8 twice, one right; 0.6, right; 1, right
    assert expected_calibration_error(BY_HAND, y) == pytest.approx((2 * 0.3 + 0.4 + 0) / 4)
    assert accuracy(BY_HAND, y) == 0.75
    assert negative_log_likelihood(BY_HAND, y) == pytest.approx(-np.log(0.8 * 0.1 * 0.6 * 1) / 4)
    squares = (0.2**2 + 0.2**2) + (0.1**2 + 0.8**2 + 0.9**2) + (0.2**2 + 0.2**2 + 0.4**2) + 0
    assert brier_score(BY_HAND, y) == pytest.approx(squares / 4)


@pytest.mark.parametrize("bins", [1, 10, 15, 100])
def test_the_error_is_that_of_a_loop_over_bins(bins):
    assert expected_calibration_error(PROBS, Y, bins) == pytest.approx(by_loops(PROBS, Y, bins), rel=1e-12)


def test_a_reliability_diagram_and_its_error_are_scikit_learns():
    diagram = reliability(PROBS, Y)
    right, confidence = PROBS.argmax(axis=1) == Y, PROBS.max(axis=1)
    expected = calibration_curve(right, confidence, n_bins=15)
    filled = diagram.counts > 0
    assert diagram.counts.sum() == 400 and not filled.all()
    np.testing.assert_allclose(diagram.accuracy[filled], expected[0], rtol=1e-12)
    np.testing.assert_allclose(diagram.confidence[filled], expected[1], rtol=1e-12)
    assert np.isnan(diagram.accuracy[~filled]).all() and np.isnan(diagram.confidence[~filled]).all()
    shares = np.histogram(confidence, bins=15, range=(0, 1))[0][filled] / 400
    error = expected_calibration_error(PROBS, Y)
    assert error == pytest.approx(shares @ np.abs(expected[0] - expected[1]), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("edge", [8, 9, 10, 11, 12, 13, 14])
def test_a_value_on_an_edge_belongs_to_the_bin_below(edge, dtype):
    p = edge / 15
    counts = reliability(two_classes(p - 1e-3, p, p + 1e-3).astype(dtype), [0, 0, 0]).counts
    assert counts[edge - 1 : edge + 1].tolist() == [2, 1]


def test_the_ends_have_bins():
    assert reliability(two_classes(1.0), [0]).counts.tolist() == [0] * 14 + [1]
    assert reliability(np.full((3, 100), 0.01), [0, 1, 2], bins=15).counts[0] == 3


@pytest.mark.parametrize(("n", "low", "high"), [(500, 0.045, 0.065), (5000, 0.014, 0.021)])
def test_what_is_right_by_construction_measures_its_noise_floor(n, low, high):
    random = np.random.RandomState(1)
    probs = softmax(1.5 * random.standard_normal((n, 10)), axis=1)
    errors = [expected_calibration_error(probs, drawn(probs, random)) for _ in range(60)]
    floor = noise_floor(probs, draws=1000)
    assert low < floor < high
    assert np.mean(errors) == pytest.approx(floor, abs=4 * np.std(errors) / 60**0.5)
    sharpened = probs**2 / (probs**2).sum(axis=1, keepdims=True)
    assert expected_calibration_error(sharpened, drawn(probs, random)) > 3 * floor


def test_a_noise_floor_is_reproducible_and_zero_where_all_is_sure():
    assert noise_floor(PROBS, seed=3) == noise_floor(PROBS, seed=3) != noise_floor(PROBS, seed=4)
    assert noise_floor(np.eye(5)) == 0


def test_scores_are_scikit_learns():
    assert negative_log_likelihood(PROBS, Y) == pytest.approx(log_loss(Y, PROBS), rel=1e-12)
    assert brier_score(PROBS, Y) == pytest.approx(7 * mean_squared_error(np.eye(7)[Y], PROBS), rel=1e-12)


def test_one_who_knows_nothing_and_one_who_is_wrong():
    even = np.full((6, 4), 0.25)
    y = np.array([0, 0, 0, 1, 2, 3])
    numbers = [f(even, y) for f in (expected_calibration_error, negative_log_likelihood, brier_score)]
    assert numbers == pytest.approx([0.25, np.log(4), 0.75])
    sure = np.eye(4)[[1, 1]]
    assert expected_calibration_error(sure, [0, 0]) == 1 and brier_score(sure, [0, 0]) == 2
    assert negative_log_likelihood(sure, [0, 0]) == pytest.approx(708.4, abs=0.1)  # finite, for tables


def test_tensors_and_float32_give_the_same_python_floats():
    probs, y = torch.from_numpy(PROBS).float(), torch.from_numpy(Y)
    for function in (expected_calibration_error, accuracy, negative_log_likelihood, brier_score):
        number = function(probs, y)
        assert type(number) is float and number == pytest.approx(function(PROBS, Y), rel=1e-5)
    assert type(noise_floor(probs)) is float


def test_a_resample_is_the_images_as_often_as_drawn():
    places = np.random.RandomState(2).randint(0, 400, (5, 400))
    weights = np.stack([np.bincount(row, minlength=400) for row in places])
    expected = [expected_calibration_error(PROBS[row], Y[row]) for row in places]
    np.testing.assert_allclose(resampled_errors(PROBS, Y, weights), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("probs", "y", "message"),
    [
        (PROBS[:2], [0, 7], "y holds class 7 for image 1, but probs has the classes 0 to 6"),
        (PROBS[:2], [-1, 0], "y holds class -1 for image 0"),
        (PROBS[:2], [0], r"y is int64 \(1,\); needed are 2 whole numbers"),
        (PROBS[:2], [0.0, 1.0], r"y is float64 \(2,\); needed are 2 whole numbers"),
        (np.log(PROBS[:2]), [0, 1], "row 0 of probs is negative somewhere.*take the softmax first"),
        (np.array([[0.5, 0.5], [0.9, 0.6]]), [0, 1], "row 1 of probs .* sums to 1.5 and not to 1"),
        (np.full((1, 2), np.nan), [0], "row 0 of probs .* sums to nan"),
        (np.ones((3, 1)), [0, 0, 0], r"shape \(3, 1\); needed is \(images, classes\), with 2 classes"),
        (np.ones(3), [0], r"shape \(3,\)"),
        (np.ones((0, 3)), [], r"shape \(0, 3\)"),
    ],
)
@pytest.mark.parametrize("function", [expected_calibration_error, negative_log_likelihood, brier_score])
def test_what_has_no_calibration(function, probs, y, message):
    with pytest.raises(ValueError, match=message):
        function(probs, y)


def test_no_bins_and_no_draws_are_refused():
    with pytest.raises(ValueError, match="0 bins"):
        expected_calibration_error(PROBS, Y, 0)
    with pytest.raises(ValueError, match="0 draws"):
        noise_floor(PROBS, draws=0)

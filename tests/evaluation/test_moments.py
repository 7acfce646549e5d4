"""Streaming moments against numpy, and what they refuse."""

import numpy as np
import pytest
import torch

from evaluation import moments as moments_module
from evaluation.moments import Gaussian, Moments, moments_of

ZEROS = np.zeros(3)


def draws(count, dimension=5, seed=0):
    random_state = np.random.RandomState(seed)
    return random_state.standard_normal((count, dimension)) @ random_state.standard_normal(
        (dimension, dimension)
    )


def streamed(x, sizes):
    moments = Moments(x.shape[1])
    for batch in np.split(x, np.cumsum(sizes)):
        moments.update(batch)
    return moments


def test_batches_of_any_size_give_numpys_mean_and_covariance(monkeypatch):
    monkeypatch.setattr(moments_module, "CHUNK_ROWS", 7)
    x = draws(100)
    moments = streamed(x, [1, 30, 0, 2])
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance(), np.cov(x, rowvar=False), rtol=1e-12)


def test_a_large_offset_costs_no_digits():
    x = draws(200) + 1e8  # the sum of squares minus the square of the sum would keep no digit at all
    np.testing.assert_allclose(streamed(x, [50] * 3).covariance(), np.cov(x - 1e8, rowvar=False), rtol=1e-6)


def test_float32_tensors_are_accumulated_in_float64_and_not_written_to():
    x = torch.from_numpy(draws(50)).float()
    before = x.clone()
    np.testing.assert_allclose(
        moments_of(x).covariance(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-12
    )
    assert torch.equal(x, before)


def test_moments_refuse_what_they_cannot_take():
    moments = Moments(3)
    with pytest.raises(ValueError, match=r"features of shape \(2, 4\) cannot join moments of 3 dimensions"):
        moments.update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="NaN or infinity, first in row 1"):
        moments.update([[0, 0, 0], [0, np.nan, 0], [np.inf, 0, 0]])
    moments.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 points, not 1"):
        moments.covariance()
    with pytest.raises(ValueError, match=r"features have shape \(3,\)"):
        moments_of(ZEROS)


def test_a_state_gives_the_same_moments_bit_for_bit():
    moments = moments_of(draws(50))
    again = Moments.of_state(**moments.state())
    again.update(draws(5, seed=1))
    moments.update(draws(5, seed=1))
    assert again.count == moments.count and np.array_equal(again.covariance(), moments.covariance())


def test_float32_asymmetry_is_evened_out():
    sigma = moments_of(draws(50)).covariance()
    sigma[0, 1] *= 1 + 1e-6
    read = Gaussian.checked(np.zeros(5), sigma)
    np.testing.assert_array_equal(read.sigma, read.sigma.T)

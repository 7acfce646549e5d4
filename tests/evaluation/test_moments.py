"""Streaming moments, and statistics files that hold what they should or something else."""

import numpy as np
import pytest
import torch

from evaluation import moments as moments_module
from evaluation.moments import Gaussian, Moments, load_statistics, moments_of

EYE, ZEROS = np.eye(3), np.zeros(3)


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


def write_statistics(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_statistics_of_pooled_and_spatial_features(tmp_path):
    pool, spatial = moments_of(draws(50)).gaussian(), moments_of(draws(50, 4)).gaussian()
    path = write_statistics(
        tmp_path / "s.npz",
        mu=pool.mu,
        sigma=pool.sigma,
        mu_s=spatial.mu,
        sigma_s=spatial.sigma,
        arr_0=np.zeros(1),
    )
    for read, written in zip(load_statistics(path), (pool, spatial), strict=True):
        np.testing.assert_array_equal(read.mu, written.mu)
        np.testing.assert_array_equal(read.sigma, written.sigma)
    path = write_statistics(
        tmp_path / "p.npz", mu=pool.mu.astype(np.float32), sigma=pool.sigma.astype(np.float32)
    )
    read, nothing = load_statistics(path)
    assert nothing is None
    assert read.sigma.dtype == np.float64


def test_float32_asymmetry_is_evened_out():
    sigma = moments_of(draws(50)).covariance()
    sigma[0, 1] *= 1 + 1e-6
    read = Gaussian.checked(np.zeros(5), sigma)
    np.testing.assert_array_equal(read.sigma, read.sigma.T)


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (ZEROS, np.eye(4), r"mu has shape \(3,\) and sigma \(4, 4\)"),
        (EYE, EYE, r"mu has shape \(3, 3\) and sigma \(3, 3\)"),
        (ZEROS, np.full((3, 3), np.nan), "sigma holds 9 NaN or infinite entries"),
        (np.array([0, np.inf, 0]), EYE, "mu holds 1 NaN or infinite"),
        (ZEROS, EYE + np.eye(3, k=1), r"sigma is not symmetric \(entries differ by up to 1\)"),
        (ZEROS, -EYE, "sigma has the variance -1 on its diagonal"),
        (np.array(["a", "b", "c"]), EYE, "mu is made of <U1; needed are real numbers"),
    ],
)
def test_statistics_that_are_none(tmp_path, mu, sigma, message):
    path = write_statistics(tmp_path / "bad.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=rf"bad\.npz \(mu, sigma\): {message}") as caught:
        load_statistics(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_statistics(tmp_path):
    objects = np.array([{}], dtype=object)
    (tmp_path / "text.npz").write_text("nothing of the kind")
    np.save(tmp_path / "single.npy", EYE)
    damaged = write_statistics(tmp_path / "damaged.npz", mu=ZEROS, sigma=EYE)
    damaged.write_bytes(damaged.read_bytes().replace(np.float64(1).tobytes(), b"\0" * 8))
    for path, message in [
        (
            write_statistics(tmp_path / "images.npz", arr_0=EYE),
            "has no mu; statistics are an npz with mu and sigma, this one holds arr_0",
        ),
        (write_statistics(tmp_path / "half.npz", mu=ZEROS, sigma=EYE, mu_s=ZEROS), "has no sigma_s"),
        (
            write_statistics(tmp_path / "objects.npz", mu=objects, sigma=EYE),
            "damaged, or holds Python objects, which are refused",
        ),
        (damaged, "damaged, or holds Python objects"),
        (tmp_path / "text.npz", "is no npz file, or a damaged one"),
        (tmp_path / "single.npy", "is a single array"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            load_statistics(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load_statistics(tmp_path / "absent.npz")

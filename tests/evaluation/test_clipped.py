"""Clipped density and coverage: definitions, closed forms, conventions, and tiles."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from evaluation import clipped_density_coverage, density_coverage, distances
from evaluation.clipped import expected_coverage
from evaluation.precision_recall import manifold_scores

DTYPES = [torch.float16, torch.float32, torch.float64]
REAL, FRESH = np.random.RandomState(0).standard_normal((2, 1000, 6))
FAR = 40 + FRESH


def simulated_coverage(num_real, num_fake, k, repeats=400):
    """Of points uniform on a circle: the mean share of k fake ones that a ball of k neighbours holds."""
    random_state, shares = np.random.RandomState(0), []
    for _ in range(repeats):
        real, fake = random_state.rand(num_real), random_state.rand(num_fake)

        def apart(x, y):
            return np.abs((x[:, None] - y + 0.5) % 1 - 0.5)

        radii = np.sort(apart(real, real), axis=1)[:, k]
        shares.append((apart(real, fake) < radii[:, None]).sum(axis=1).clip(max=k).mean() / k)
    return np.mean(shares)


def direct_scores(real, fake, k):
    """The definitions, on whole matrices of distances."""
    within, across = cdist(real, real), cdist(real, fake)
    radii = np.sort(within, axis=1)[:, k]  # entry 0 is the point itself
    clipped = np.minimum(radii, np.median(radii))[:, None]
    itself = np.eye(len(real), dtype=bool)
    of_real = ((within <= clipped + 1e-12) & ~itself).sum(axis=0).clip(max=k).mean()
    of_fake = (across <= clipped).sum(axis=0).clip(max=k).mean()
    covered = (across < radii[:, None]).sum(axis=1).clip(max=k).mean() / k
    expected = expected_coverage(len(real), len(fake), k)
    share = np.searchsorted(expected, covered)  # the first number of good samples that covers as much
    return min(1, of_fake / of_real), min(1, share / len(fake))


@pytest.mark.parametrize("tile", [7, 64, 4096])
@pytest.mark.parametrize("count", [150, 151])  # with and without a median of its own
def test_every_tile_size_agrees_with_the_definitions(monkeypatch, tile, count):
    monkeypatch.setattr(distances, "TILE", tile)
    real, fake = REAL[:count], 1.3 * FRESH[:90] + 0.5
    density, coverage = clipped_density_coverage(real=real, fake=fake, k=4)
    expected = direct_scores(real, fake, 4)
    assert density == pytest.approx(expected[0], abs=1e-12)
    assert coverage == pytest.approx(expected[1], abs=1 / 90)
    assert 0.1 < density < 0.95 and 0.1 < coverage < 0.95  # neither is trivial here
    scores = manifold_scores(real=real, fake=fake, k=5, density_k=4)
    assert (scores.clipped_density, scores.clipped_coverage) == (density, coverage)


@pytest.mark.parametrize(("num_real", "num_fake", "k"), [(30, 30, 5), (20, 50, 3), (40, 2, 5)])
def test_the_coverage_of_good_samples_is_that_of_a_simulation(num_real, num_fake, k):
    expected = expected_coverage(num_real, num_fake, k)
    assert expected.shape == (num_fake + 1,) and expected[0] == 0 and (np.diff(expected) > 0).all()
    assert expected[-1] == pytest.approx(simulated_coverage(num_real, num_fake, k), abs=0.01)
    # Of a single neighbour it is the share of the balls of mass Beta(1, N - 1) that are not missed.
    missed = (num_real - 1) / (num_real - 1 + np.arange(num_fake + 1))
    assert expected_coverage(num_real, num_fake, 1) == pytest.approx(1 - missed, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("good", [0, 250, 500, 750, 1000])
def test_they_are_the_share_of_good_samples(dtype, good):
    fake = np.concatenate([FRESH[:good], FAR[good:]])
    scores = clipped_density_coverage(real=REAL, fake=fake, dtype=dtype)
    assert scores == pytest.approx((good / 1000, good / 1000), abs=0.08 if good else 0)


def test_they_fall_with_the_shift_of_a_gaussian_from_1_to_0():
    shifts = (0, 0.5, 1, 2, 4, 20)
    scores = [clipped_density_coverage(real=REAL[:400], fake=FRESH[:400] + shift) for shift in shifts]
    for numbers in zip(*scores, strict=True):
        assert numbers[0] == pytest.approx(1, abs=0.08) and numbers[-1] == 0
        assert (np.diff(numbers) < 0).sum() >= 4 and (np.diff(numbers) <= 0).all()


def test_a_collapsed_a_memorising_generator_and_outliers():
    density, coverage = clipped_density_coverage(real=REAL, fake=0.05 * FRESH)
    assert density == 1 and coverage < 0.3
    assert clipped_density_coverage(real=REAL, fake=REAL.copy()) == (1, 1)
    # The balls of a few real outliers hold everything: that raises density, not clipped density.
    outliers = np.concatenate([REAL[:980], 60 * REAL[980:]])
    bad = np.concatenate([FRESH[:500], 8 + FRESH[500:]])
    assert density_coverage(real=outliers, fake=bad)[0] > 1
    assert clipped_density_coverage(real=outliers, fake=bad)[0] == pytest.approx(0.5, abs=0.08)

"""Precision, recall, density and coverage: their conventions, their tiles against a direct computation, and
what they refuse.
"""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from evaluation import density_coverage, distances, precision_recall
from evaluation.precision_recall import ManifoldScores, manifold_scores

DTYPES = [torch.float16, torch.float32, torch.float64]


def points(count, seed, scale=1.0, offset=0.0, dimension=6):
    return np.random.RandomState(seed).standard_normal((count, dimension)) * scale + offset


def direct_scores(real, fake, k=3, density_k=5):
    """The definitions, on whole matrices of distances."""

    def radii(x, k):
        return np.sort(cdist(x, x), axis=1)[:, k]  # entry 0 is the point itself

    across = cdist(real, fake)
    inside_real, inside_fake = across <= radii(real, k)[:, None], across <= radii(fake, k)[None]
    within = across < radii(real, density_k)[:, None]
    precision, recall = inside_real.any(axis=0).mean(), inside_fake.any(axis=1).mean()
    return precision, recall, within.sum() / (density_k * len(fake)), within.any(axis=1).mean()


def as_tuple(scores: ManifoldScores):
    return scores.precision, scores.recall, scores.density, scores.coverage


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_collapsed_generator_has_high_precision_and_low_recall(dtype):
    wide, tight = points(300, 0), points(300, 1, scale=0.05)
    precision, recall = precision_recall(real=wide, fake=tight, dtype=dtype)
    assert precision > 0.95
    assert recall < 0.05
    precision, recall = precision_recall(real=tight, fake=wide, dtype=dtype)
    assert precision < 0.05
    assert recall > 0.95


def test_coverage_falls_with_collapse_and_density_with_leaving_the_manifold():
    wide, tight = points(300, 0), points(300, 1, scale=0.05)
    density, coverage = density_coverage(real=wide, fake=tight)
    assert density > 1
    assert coverage < 0.5
    density, coverage = density_coverage(real=tight, fake=wide)
    assert density < 0.05
    assert coverage < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_sets_give_one(dtype):
    x = points(200, 0)
    assert as_tuple(manifold_scores(real=x, fake=x.copy(), dtype=dtype)) == (1, 1, 1, 1)


def test_sets_far_apart_give_zero():
    assert as_tuple(manifold_scores(real=points(50, 0), fake=points(60, 1, offset=100))) == (0, 0, 0, 0)


@pytest.mark.parametrize("tile", [7, 64, 4096])
def test_every_tile_size_agrees_with_the_definitions(monkeypatch, tile):
    monkeypatch.setattr(distances, "TILE", tile)
    real, fake = points(150, 0), points(90, 1, scale=0.8, offset=0.3)
    scores = manifold_scores(real=real, fake=fake, k=2, density_k=9)
    assert as_tuple(scores) == pytest.approx(direct_scores(real, fake, k=2, density_k=9), abs=1e-12)
    assert 0.1 < scores.recall < 0.9  # neither is trivial here
    assert precision_recall(real=real, fake=fake, k=2) == (scores.precision, scores.recall)
    assert density_coverage(real=real, fake=fake, k=9) == (scores.density, scores.coverage)


def test_more_neighbours_than_a_tile_holds(monkeypatch):
    monkeypatch.setattr(distances, "TILE", 3)
    real, fake = points(20, 0), points(20, 1)
    assert density_coverage(real=real, fake=fake, k=11) == pytest.approx(
        direct_scores(real, fake, 1, 11)[2:], abs=1e-12
    )


def test_a_large_offset_costs_float32_no_digits():
    real, fake = points(150, 0), points(150, 1, scale=0.8)
    moved = [(x + 1e3).astype(np.float32) for x in (real, fake)]
    scores = manifold_scores(real=moved[0], fake=moved[1])
    assert as_tuple(scores) == pytest.approx(
        direct_scores(*(x.astype(np.float64) for x in moved)), abs=3 / 150
    )


def test_float16_rounds_and_falls_back_where_it_overflows():
    """Two reals 1 apart, a fake 1.0001 from its nearest real: float16 cannot tell, float32 can; at 300 times
    the size it has to.
    """
    real, fake = np.array([[0.0], [1.0]], np.float32), np.array([[2.0001], [3.1]], np.float32)
    assert precision_recall(real=real, fake=fake, k=1, dtype=torch.float16)[0] == 0.5
    assert precision_recall(real=real, fake=fake, k=1, dtype=torch.float32)[0] == 0
    assert precision_recall(real=real * 300, fake=fake * 300, k=1, dtype=torch.float16)[0] == 0


def test_the_dtype_follows_the_features_and_tensors_do_as_well_as_arrays():
    real, fake = points(80, 0), points(70, 1)
    frozen = real.copy()
    frozen.flags.writeable = False
    expected = direct_scores(real, fake)
    assert as_tuple(manifold_scores(real=frozen, fake=torch.from_numpy(fake))) == pytest.approx(
        expected, abs=1e-12
    )
    # Distances of 1e-9 are below float32's digits next to 1, and are told apart in float64 alone.
    real, fake = np.array([[0.0], [1.0], [1 + 1e-9], [1 + 2e-9]]), np.array([[1 + 4e-9], [5.0]])
    assert precision_recall(real=real, fake=fake, k=1)[0] == 0
    assert precision_recall(real=real, fake=fake, k=1, dtype=torch.float32)[0] == 0.5


@pytest.mark.parametrize("function", [precision_recall, density_coverage, manifold_scores])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"real": points(3, 0), "fake": points(20, 1), "k": 3},
            r"3 real images; [35] neighbours of each need at least [46]",
        ),
        ({"real": points(20, 0), "fake": points(3, 1), "k": 3}, r"3 fake images; [35] neighbours"),
        ({"real": points(20, 0), "fake": points(20, 1), "k": 0}, "k is 0"),
        ({"real": points(20, 0), "fake": points(20, 1, dimension=5)}, r"shapes \(20, 6\) and \(20, 5\)"),
        ({"real": points(20, 0) * np.nan, "fake": points(20, 1)}, "real features hold NaN or infinity"),
        ({"real": points(20, 0), "fake": points(20, 1) * np.inf}, "fake features hold NaN or infinity"),
        (
            {"real": points(20, 0), "fake": points(20, 1), "dtype": torch.int32},
            "distances in torch.int32; choose",
        ),
    ],
)
def test_what_has_no_manifold(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)

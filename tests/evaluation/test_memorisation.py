"""The nearest training image, and the two shares made of its distance."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu

from evaluation import distances
from evaluation.memorisation import are_training_images, copies_share, nearer_share, nearest_training

TRAIN, POINTS = np.random.RandomState(0).standard_normal((2, 120, 5))


@pytest.mark.parametrize("tile", [7, 4096])
def test_the_nearest_training_image_is_that_of_all_pairs(monkeypatch, tile):
    monkeypatch.setattr(distances, "TILE", tile)
    found, apart = nearest_training(train=TRAIN[:90], points=POINTS), cdist(POINTS, TRAIN[:90])
    assert np.array_equal(found.which, apart.argmin(axis=1))
    assert found.distances == pytest.approx(apart.min(axis=1), rel=1e-12)
    first = found.closest(3)
    assert [row[0] for row in first] == list(np.argsort(apart.min(axis=1))[:3])
    assert all(distance == apart[i, j] for i, j, distance in [(i, j, pytest.approx(d)) for i, j, d in first])


def test_near_copies_keep_their_digits_in_float32():
    train = (TRAIN + 100).astype(np.float32)
    near = train + np.float32(2**-12)
    found = nearest_training(train=train, points=near)
    assert found.distances == pytest.approx(5**0.5 * 2**-12, rel=1e-2)


def test_training_images_are_recognised_also_where_float16_kept_their_features():
    kept = TRAIN.astype(np.float16).astype(np.float64)  # as make_reference.py --features_only does
    for points, equal in ((TRAIN, True), (kept, True), (POINTS, False), (TRAIN + 0.01, False)):
        distances = nearest_training(train=TRAIN, points=points).distances
        assert are_training_images(distances, TRAIN).tolist() == [equal] * 120


def test_the_share_that_is_nearer_is_mann_and_whitneys():
    samples, held_out = np.random.RandomState(1).randint(0, 9, (2, 50)).astype(float)  # with ties
    u = mannwhitneyu(held_out, samples[:40]).statistic
    assert nearer_share(samples[:40], held_out) == pytest.approx(u / (50 * 40), rel=1e-12)
    assert nearer_share(held_out, held_out) == 0.5


def test_a_memorising_a_collapsed_and_an_honest_generator_and_an_outlier():
    held_out, honest = np.random.RandomState(2).rand(2, 2000) + 1
    assert nearer_share(honest, held_out) == pytest.approx(0.5, abs=0.03)
    assert copies_share(honest, held_out) == pytest.approx(0.01, abs=0.008)
    assert (nearer_share(honest * 0, held_out), copies_share(honest * 0, held_out)) == (1, 1)
    # One in ten is a copy: the average hardly shows it.
    tenth = np.concatenate([honest[:1800], np.zeros(200)])
    assert copies_share(tenth, held_out) == pytest.approx(0.11, abs=0.01)
    assert nearer_share(tenth, held_out) == pytest.approx(0.55, abs=0.03)
    assert (nearer_share(honest + 9, held_out), copies_share(honest + 9, held_out)) == (0, 0)
    outlier = np.append(held_out[1:], 1e9)
    assert abs(nearer_share(honest, outlier) - nearer_share(honest, held_out)) < 1e-3


@pytest.mark.parametrize(
    ("train", "message"),
    [(TRAIN[:1], "1 real images"), (TRAIN * np.nan, "hold NaN"), (TRAIN[:, :2], "shapes")],
)
def test_what_has_no_nearest_image(train, message):
    with pytest.raises(ValueError, match=message):
        nearest_training(train=train, points=POINTS)

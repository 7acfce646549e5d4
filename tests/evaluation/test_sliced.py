"""MIND against direct optimal transport and closed forms, its conventions, and what it refuses."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from evaluation import monge_distance, sliced

REAL = np.random.RandomState(0).standard_normal((24, 5))
FAKE = np.random.RandomState(1).standard_normal((16, 5)) * 0.7 + 0.4


def direct_distance(real, fake, directions):
    """By matching, on every direction, copies of the points: as many as make the sets equally large."""
    copies = np.lcm(len(real), len(fake))
    x, y = (points.repeat(copies // len(points), axis=0) for points in (real, fake))
    normal = np.random.RandomState(0).standard_normal((directions, real.shape[1]))
    costs = []
    for direction in normal / np.linalg.norm(normal, axis=1, keepdims=True):
        squares = np.square((x @ direction)[:, None] - y @ direction)
        costs.append(squares[linear_sum_assignment(squares)].mean())
    return 3 * real.shape[1] * np.mean(costs)


@pytest.mark.parametrize("tile", [3, 100])
@pytest.mark.parametrize("count", [16, 24])
def test_it_is_the_mean_over_directions_of_exact_distances(monkeypatch, tile, count):
    monkeypatch.setattr(sliced, "TILE", tile)
    monkeypatch.setattr(sliced, "ROWS", 2 * tile)
    fake = np.resize(FAKE, (count, 5))
    distance = monge_distance(real=torch.from_numpy(REAL), fake=fake, directions=7)
    assert type(distance) is float
    assert distance == pytest.approx(direct_distance(REAL, fake, 7), rel=1e-9)
    assert distance == monge_distance(real=REAL, fake=fake, directions=7)
    assert distance != monge_distance(real=REAL, fake=fake, directions=7, seed=1)


def test_closed_forms():
    shift = np.array([3.0, 0, 0, 4, 0])
    assert monge_distance(real=REAL, fake=REAL[::-1]) == pytest.approx(0, abs=1e-20)
    # The distance on a direction u is (v.u)^2, |v|^2 / D on average: known to some 3 % from 1,000 of them.
    assert monge_distance(real=REAL, fake=REAL + shift) == pytest.approx(3 * 25, rel=0.1)
    # N(0, 1) against N(0, 4): on every direction (2 - 1)^2.
    x = np.random.RandomState(2).standard_normal((2000, 4))
    assert monge_distance(real=x, fake=2 * x) == pytest.approx(3 * 4, rel=0.05)
    twice = REAL.repeat(2, axis=0)
    assert monge_distance(real=twice, fake=FAKE) == pytest.approx(
        monge_distance(real=REAL, fake=FAKE), rel=1e-9
    )


def test_a_large_offset_costs_float32_no_digits():
    moved = [(x + 1e3).astype(np.float32) for x in (REAL, FAKE)]
    expected = monge_distance(real=moved[0].astype(np.float64), fake=moved[1].astype(np.float64))
    assert monge_distance(real=moved[0], fake=moved[1]) == pytest.approx(expected, rel=1e-5)


def test_a_collapsed_a_memorising_and_an_almost_right_generator():
    real, fresh = np.random.RandomState(3).standard_normal((2, 300, 4))
    honest, collapsed = (monge_distance(real=real, fake=fake) for fake in (fresh, 0.05 * fresh))
    outlier = monge_distance(real=real, fake=[*fresh[1:], np.full(4, 15.0)])
    # The variance that the collapsed one lacks, and the mass of one image, moved by 30.
    assert collapsed == pytest.approx(3 * 4 * 0.95**2, rel=0.15)
    assert 0 < honest < 0.5 < outlier < collapsed
    assert outlier == pytest.approx(3 * 30**2 / 300, rel=0.35)
    # A memorising one looks perfect: see --against for what tells it apart.
    assert monge_distance(real=real, fake=real) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"real": REAL[:1], "fake": FAKE}, "1 real images; MIND needs at least 2"),
        ({"real": REAL, "fake": FAKE[:, :3]}, r"shapes \(24, 5\) and \(16, 3\)"),
        ({"real": REAL, "fake": FAKE * np.nan}, "fake features hold NaN or infinity"),
        ({"real": REAL, "fake": FAKE, "directions": 0}, "0 directions; MIND needs at least 1"),
    ],
)
def test_what_has_no_mind(arguments, message):
    with pytest.raises(ValueError, match=message):
        monge_distance(**arguments)

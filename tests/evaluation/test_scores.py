"""Inception Score, kernel distance and CMMD against direct formulas, and what they refuse."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from evaluation import clip_mmd, inception_score, kernel_distance, scores

LOGITS = np.random.RandomState(0).standard_normal((23, 7)) * 2
REAL = np.random.RandomState(1).standard_normal((31, 4))
FAKE = np.random.RandomState(2).standard_normal((17, 4)) * 0.9 + 0.5


def test_inception_score_between_its_bounds():
    assert inception_score(probs=np.full((10, 8), 1 / 8)) == pytest.approx(1)  # undecided
    assert inception_score(probs=np.eye(8)) == pytest.approx(8)  # sure, and all classes
    assert inception_score(probs=np.eye(8)[[3] * 10]) == pytest.approx(1)  # sure, and one class


def test_inception_score_of_logits_probs_and_tensors_is_the_mean_divergence():
    probs = softmax(LOGITS, axis=1)
    expected = np.exp(rel_entr(probs, probs.mean(axis=0)).sum(axis=1).mean())
    assert inception_score(logits=LOGITS) == pytest.approx(expected, rel=1e-12)
    assert inception_score(probs=probs) == pytest.approx(expected, rel=1e-12)
    assert type(inception_score(logits=torch.from_numpy(LOGITS))) is float
    assert inception_score(logits=torch.from_numpy(LOGITS)) == pytest.approx(expected, rel=1e-12)
    assert inception_score(logits=LOGITS + 1e4) == pytest.approx(expected, rel=1e-9)  # no overflow


def test_a_ragged_last_split_counts_like_the_others():
    parts = [inception_score(logits=LOGITS[start : start + 10]) for start in (0, 10, 20)]
    assert inception_score(logits=LOGITS, split_size=10) == pytest.approx(np.mean(parts), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either logits or probs, not neither"),
        ({"logits": LOGITS, "probs": LOGITS}, "either logits or probs, not both"),
        ({"probs": LOGITS}, "negative or do not sum to 1; pass raw network outputs as logits="),
        ({"probs": np.full((2, 2), 0.6)}, "do not sum to 1"),
        ({"probs": np.full((2, 2), np.nan)}, "do not sum to 1"),
        ({"logits": np.full((2, 2), np.inf)}, "logits hold NaN or infinity"),
        ({"logits": np.zeros((0, 5))}, r"not one of shape \(0, 5\)"),
        ({"logits": np.zeros(5)}, r"not one of shape \(5,\)"),
        ({"logits": LOGITS, "split_size": 0}, "a split of 0 images"),
    ],
)
def test_what_has_no_inception_score(arguments, message):
    with pytest.raises(ValueError, match=message):
        inception_score(**arguments)


def direct_mmd2(x, y):
    def kernel(a, b):
        return (np.einsum("id,jd->ij", a, b) / a.shape[1] + 1) ** 3

    def off_diagonal(k):
        return k[~np.eye(len(k), dtype=bool)].mean()

    return off_diagonal(kernel(x, x)) + off_diagonal(kernel(y, y)) - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("tile", [5, 17, 2048])
def test_kernel_distance_is_the_same_in_tiles_of_any_size(monkeypatch, tile):
    monkeypatch.setattr(scores, "TILE", tile)
    distance = kernel_distance(real=torch.from_numpy(REAL), fake=FAKE)
    assert type(distance) is float
    assert distance == pytest.approx(direct_mmd2(REAL, FAKE), rel=1e-12)


def test_kernel_distance_is_unbiased():
    sets = [np.random.RandomState(seed).standard_normal((2, 20, 3)) for seed in range(300)]
    distances = [kernel_distance(real=real, fake=fake) for real, fake in sets]
    assert abs(np.mean(distances)) < 3 * np.std(distances) / np.sqrt(300)
    assert min(distances) < 0


def test_kernel_distance_over_subsets():
    mean, std = kernel_distance(real=REAL, fake=FAKE, subsets=3, subset_size=10)
    random_state = np.random.RandomState(2020)
    drawn = [
        (REAL[random_state.choice(31, 10, replace=False)], FAKE[random_state.choice(17, 10, replace=False)])
        for _ in range(3)
    ]
    expected = [direct_mmd2(*pair) for pair in drawn]
    assert (mean, std) == (
        pytest.approx(np.mean(expected), rel=1e-12),
        pytest.approx(np.std(expected), rel=1e-12),
    )
    assert kernel_distance(real=REAL, fake=FAKE, subsets=3, subset_size=10, seed=1) != (mean, std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"real": REAL[:1], "fake": FAKE}, "1 real images; a kernel distance needs at least 2"),
        (
            {"real": REAL, "fake": FAKE, "subsets": 2},
            "subsets of 1000 out of 31 real and 17 fake images; pass a smaller subset_size",
        ),
        (
            {"real": REAL, "fake": FAKE, "subsets": 2, "subset_size": 20},
            "subsets of 20 out of 31 real and 17 fake",
        ),
        ({"real": REAL, "fake": FAKE, "subsets": 0, "subset_size": 5}, "0 subsets of 5 images"),
        ({"real": REAL, "fake": FAKE, "subsets": 1, "subset_size": 1}, "1 subsets of 1 images"),
        ({"real": REAL, "fake": FAKE[:, :3]}, r"shapes \(31, 4\) and \(17, 3\)"),
        ({"real": REAL * np.nan, "fake": FAKE}, "real features hold NaN or infinity"),
        ({"real": REAL, "fake": FAKE * np.inf}, "fake features hold NaN or infinity"),
    ],
)
def test_what_has_no_kernel_distance(arguments, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(**arguments)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("tile", [5, 2048])
def test_cmmd_is_the_biased_mmd_of_normalised_features(monkeypatch, tile):
    monkeypatch.setattr(scores, "TILE", tile)
    real, fake = unit(REAL), unit(FAKE)

    def mean_kernel(a, b):
        return np.exp(-np.square(a[:, None] - b).sum(axis=2) / 200).mean()

    expected = 1000 * (mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake))
    assert clip_mmd(real=torch.from_numpy(real), fake=fake) == pytest.approx(expected, rel=1e-9)
    # Two points at a right angle against one of them twice: 1000 (1 - k) / 2, k the kernel of the two.
    square, corner = np.eye(2), np.eye(2)[[0, 0]]
    assert clip_mmd(real=square, fake=corner) == pytest.approx(500 * -np.expm1(-0.01), rel=1e-12)


def test_cmmd_of_shifted_gaussians_is_their_closed_form():
    shift, (x, y) = 4, np.random.RandomState(4).standard_normal((2, 600, 3))
    within = (100 / (100 + 2)) ** 1.5  # mean kernel of two points with deviation 1 in each of 3 dimensions
    across = within * np.exp(-(shift**2) / (2 * (100 + 2)))
    bias = 2 * (1 - within) / 600  # each point beside itself has the kernel 1
    distance = clip_mmd(real=x, fake=y + np.array([shift, 0, 0]))
    assert distance == pytest.approx(1000 * (2 * within - 2 * across + bias), rel=0.05)
    assert clip_mmd(real=x, fake=y) == pytest.approx(1000 * bias, abs=0.05)


def test_cmmd_of_a_collapsed_a_memorising_and_an_almost_right_generator():
    real = unit(np.random.RandomState(3).standard_normal((120, 5)))
    memorised, outlier = clip_mmd(real=real, fake=real[::-1]), clip_mmd(real=real, fake=[*real[1:], -real[0]])
    assert memorised == pytest.approx(0, abs=1e-9)
    assert 0 < outlier < 0.01 < clip_mmd(real=real, fake=real[:1].repeat(120, axis=0))


def test_what_has_no_cmmd():
    with pytest.raises(ValueError, match="1 fake images; CMMD needs at least 2"):
        clip_mmd(real=REAL, fake=FAKE[:1])

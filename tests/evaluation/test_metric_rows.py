"""The rows of the table of metrics: their names, and those that not all sets have: CMMD, which CLIP alone
has, and what needs training images.
"""

import dataclasses

import numpy as np
import pytest
from pictures_util import TestNetwork

from evaluation.evaluator import evaluate
from evaluation.features import Features
from evaluation.metrics import BY_KEY, METRICS, metric_key, metric_label, rounded
from evaluation.moments import moments_of
from evaluation.reference import Reference
from evaluation.scores import clip_mmd
from evaluation.sets import MeasuredSet, measure, open_set
from evaluation.tables import table

WIDE, FRESH = np.random.RandomState(9).randint(0, 256, (2, 300, 16, 16, 3), dtype=np.uint8)
KEYS = [metric.key for metric in METRICS]


@pytest.fixture
def make(tmp_path):
    """Write an npz and measure it."""
    network = TestNetwork()

    def measured(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return measure(open_set(tmp_path / f"{name}.npz", network), network, progress=False)

    return measured


@pytest.fixture
def wide(make):
    return make("wide", arr_0=WIDE[:150])


def test_cmmd_is_that_of_clips_features_alone(make, wide):
    dark = make("dark", arr_0=WIDE[:140] // 2)
    network = {"features": "clip"}
    real, fake = (
        dataclasses.replace(measured, provenance=measured.provenance | network) for measured in (wide, dark)
    )
    result = evaluate(Reference(real), fake)
    assert result.metrics["cmmd"] == clip_mmd(real=wide.features.pool3, fake=dark.features.pool3)
    assert "CMMD" in table([result]) and "CMMD" not in table([evaluate(Reference(wide), dark)])
    assert (result.name, result.count, result.fid_error, result.fid_infinity) == ("dark.npz", 140, None, None)


def test_training_images_tell_a_memorising_generator_from_an_honest_one(make, wide):
    train, honest = make("train", arr_0=FRESH[:150]), make("honest", arr_0=FRESH[150:])
    copied = make("copied", arr_0=np.concatenate([FRESH[:30], FRESH[200:270]]))
    reference = Reference(wide, against=train)
    result = evaluate(reference, copied)
    assert result.metrics["copies"] == pytest.approx(0.3, abs=0.05)
    assert result.metrics["nearer"] == pytest.approx(0.3 + 0.7 * 0.5, abs=0.1)
    assert [(sample, image) for sample, image, _ in result.nearest_pairs] == [(i, i) for i in range(16)]
    assert max(distance for *_, distance in result.nearest_pairs) < 1e-4
    assert result.reference["against"].items() >= {"images": "train.npz", "count": 150}.items()
    assert "nearer to train  copies" in table([result]) and "copies" not in table(
        [evaluate(Reference(wide), wide)]
    )
    numbers = evaluate(reference, honest).metrics
    assert numbers["copies"] < 0.06 and numbers["nearer"] == pytest.approx(0.5, abs=0.1)
    stats = make("stats", protocol="test", mu=wide.pool().mu, sigma=wide.pool().sigma)
    assert evaluate(reference, stats).metrics["copies"] is None
    with pytest.raises(
        ValueError, match=r"150 of 150 images of the reference train.npz are training images th"
    ):
        Reference(train, against=train)
    for sides in ((stats, train), (wide, stats)):
        with pytest.raises(ValueError, match=r"--against compares images, and stats.npz holds statistics"):
            Reference(sides[0], against=sides[1])
    some = Reference(make("some", arr_0=np.concatenate([FRESH[:3], FRESH[160:]])), against=train)
    assert any("3 of 143 images are training images: mem" in note for note in some.notes)
    assert evaluate(some, copied).metrics["copies"] == pytest.approx(0.3, abs=0.05)


# Against an honest generator a memorising one, one collapsed onto a training image, and one whose first
# sample is far outside have: the same number, or a higher or a lower one.
CONVENTIONS = {
    "fid": "=>>",
    "sfid": "=>>",
    "inception_score": "=<=",
    "precision": "===",
    "recall": "=<=",
    "density": "=>=",
    "coverage": "=<=",
    "kid": "=>?",  # without the outlier's pair with itself, its terms have mean 0
    "mind": "=>>",
    "cmmd": "=>=",
    "clipped_density": "===",
    "clipped_coverage": "=<=",
    "nearer": ">>=",
    "copies": ">>=",
}


@pytest.fixture(scope="module")
def generators():
    """[the honest, the memorising, the collapsed, the one with an outlier]: their numbers by key."""
    real, train, honest = np.random.RandomState(0).standard_normal((3, 300, 6)).astype(np.float32)
    centre = train[np.square(train).sum(axis=1).argmin()]
    outlier = np.concatenate([np.full((1, 6), 25, np.float32), honest[1:]])

    def measured(points):
        about = dict.fromkeys(("images", "count", "fingerprint", "protocol", "weights_sha256"))
        features = Features(points, 3 * points, moments_of(points), (1, 1), {})
        return MeasuredSet("points", features, None, [], {"features": "clip", **about})

    reference = Reference(measured(real), against=measured(train))
    sets = (honest, train, centre + 0.01 * honest, outlier)
    return [evaluate(reference, measured(points)).metrics for points in sets]


@pytest.mark.parametrize("metric", METRICS, ids=KEYS)
def test_every_metric_has_its_conventions(generators, metric):
    honest, *others = (numbers[metric.key] for numbers in generators)
    close = 0.15 if metric.share else 0.15 * abs(others[1] - honest)
    for value, convention in zip(others, CONVENTIONS[metric.key], strict=True):
        found = "=" if abs(value - honest) <= close else ">" if value > honest else "<"
        assert convention in (found, "?"), (honest, others)


def test_only_inception_gives_a_fid_and_each_metric_has_its_decimals():
    inception = "inception-2015-12-05"
    assert [metric_key(key, inception) for key in KEYS] == KEYS
    assert metric_label("fid", inception) == "FID"
    named = {"fid": "FD(x)", "sfid": "sFD(x)", "inception_score": "IS(x)", "kid": "KD(x)", "mind": "MIND(x)"}
    same = {key: BY_KEY[key].label for key in KEYS if key not in named}
    assert {key: metric_label(key, "x") for key in KEYS} == named | same
    keys = ["fd_x", "sfd_x", "is_x", "kd_x", "mind_x"]
    assert [metric_key(key, "x") for key in named] == keys and [metric_key(key, "x") for key in same] == [
        *same
    ]
    assert [rounded(key, -1e-9) for key in ("fid", "recall", "kid")] == ["0.000", "0.0000", "0.00000"]

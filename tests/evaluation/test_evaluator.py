"""The numbers of one set against a reference: what they come from, what is n/a and why, the five lines."""

import dataclasses
import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from pictures_util import TestNetwork

from evaluation import metrics, reference
from evaluation.evaluator import evaluate, five_lines
from evaluation.frechet import frechet_distance, frechet_infinity
from evaluation.metrics import METRICS, Metric, metric_label
from evaluation.precision_recall import clipped_density_coverage, density_coverage, precision_recall
from evaluation.reference import Reference
from evaluation.resampling import Options, compare
from evaluation.scores import inception_score, kernel_distance
from evaluation.sets import measure, open_set, require_comparable
from evaluation.sliced import monge_distance
from evaluation.tables import table

ROOT = Path(__file__).resolve().parents[2]
RANDOM = np.random.RandomState(5)
WIDE = RANDOM.randint(0, 256, (150, 16, 16, 3), dtype=np.uint8)
# of few of the wide ones
SHADES = RANDOM.randint(0, 40, 140), RANDOM.randint(0, 20, (140, 16, 16, 1))
DARK = (0.9 * WIDE[SHADES[0]] + SHADES[1]).astype(np.uint8)
KEYS = [metric.key for metric in METRICS]
ON_REQUEST = ["cmmd", "nearer", "copies"]  # of CLIP alone, and of training images
WITHOUT_IMAGES = [key for key in KEYS if key not in ("fid", "sfid", *ON_REQUEST)]


@pytest.fixture(scope="module")
def network():
    return TestNetwork()


@pytest.fixture
def make(tmp_path, network):
    """Write an npz and measure it."""

    def measured(name, by=network, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return measure(open_set(tmp_path / f"{name}.npz", by), by, progress=False)

    return measured


@pytest.fixture
def wide(make):
    return make("wide", arr_0=WIDE)


@pytest.fixture
def dark(make):
    return make("dark", arr_0=DARK)


def statistics(measured, spatial=True, **more):
    pool, other = measured.pool(), measured.spatial()
    spatial_ones = {"mu_s": other.mu, "sigma_s": other.sigma} if spatial else {}
    return {"mu": pool.mu, "sigma": pool.sigma, **spatial_ones, **more}


def missing(result):
    return [key for key in KEYS if key not in ON_REQUEST and result.metrics[key] is None]


def says(notes, *fragments):
    return any(all(fragment in note for fragment in fragments) for note in notes)


def test_every_number_is_that_of_the_library(network, wide, dark):
    result = evaluate(Reference(wide), dark)
    real, fake = network(WIDE), network(DARK)

    def distance(key):
        return frechet_distance(*(m for f in (real, fake) for m in (f[key].mean(0), np.cov(f[key].T))))

    expected = {
        "fid": distance("pool3"),
        "sfid": distance("spatial"),
        "inception_score": inception_score(logits=fake["logits"]),
    }
    pair = {"real": real["pool3"], "fake": fake["pool3"]}
    expected |= {"kid": kernel_distance(**pair), "mind": monge_distance(**pair)}
    expected["precision"], expected["recall"] = precision_recall(**pair)
    expected["density"], expected["coverage"] = density_coverage(**pair)
    expected["clipped_density"], expected["clipped_coverage"] = clipped_density_coverage(**pair)
    assert all(expected.values()) and list(result.metrics) == KEYS
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert missing(result) == []


def test_provenance_names_all_that_the_numbers_depend_on(network, wide, dark):
    result = evaluate(Reference(wide), dark, Options(precision_recall_dtype="float16"))
    assert result.precision_recall_dtype == "float16" and "float16" in result.protocol
    for about, count in ((result.samples, 140), (result.reference, 150)):
        wanted = {"protocol": "test", "features": "test", "weights_sha256": network.sha256, "count": count}
        assert about.items() >= {**wanted, "resolution": [16, 16], "dtype": "float32"}.items()
        assert len(about["file_sha256"]) == 64 and {"torch", "numpy"} <= about["versions"].keys()
    json.dumps([result.samples, result.reference], allow_nan=False)


@pytest.mark.parametrize("outputs", [("pool3",), ("pool3", "logits"), ("pool3", "spatial")])
def test_what_the_network_does_not_give_is_no_column_and_no_complaint(make, outputs):
    fewer = TestNetwork(outputs=outputs)
    real, fake = make("real", fewer, arr_0=WIDE), make("fake", fewer, arr_0=DARK)
    result = evaluate(Reference(real), fake)
    lacked = [
        key for key, need in (("sfid", "spatial"), ("inception_score", "logits")) if need not in outputs
    ]
    assert missing(result) == lacked
    head = table([result]).splitlines()[3].split()
    titles = [metric_label(key, "test") for key in KEYS if key not in (*lacked, *ON_REQUEST)]
    assert head == " ".join(["set", "images", *titles]).split()
    assert not says(result.notes, "sFID") and "nan" in five_lines(result)
    of_statistics = make("stats", fewer, protocol="test", **statistics(real, spatial=False))
    assert not says(evaluate(Reference(real), of_statistics).notes, "no sFID") or "spatial" in outputs


def test_a_metric_is_one_row(monkeypatch, wide, dark):
    row = Metric("mean", "mean", 1, "features", lambda pair: float(pair.images.pool3.mean()))
    for table_of in ("METRICS", "BY_KEY"):
        more = (*METRICS, row) if table_of == "METRICS" else {**metrics.BY_KEY, "mean": row}
        monkeypatch.setattr(metrics, table_of, more)
    monkeypatch.setattr("evaluation.tables.METRICS", metrics.METRICS)
    result = evaluate(Reference(wide), dark)
    number = f"{dark.features.pool3.mean():.1f}"
    assert table([result]).splitlines()[3].split()[-1] == "mean"
    assert table([result]).splitlines()[4].split()[-1] == number


def test_a_reference_in_the_published_layout_gives_fid_by_its_statistics_and_precision_by_its_images(
    make, dark
):
    published = make("reference", arr_0=WIDE[:100], protocol="test", **statistics(dark))
    result = evaluate(Reference(published), dark)
    images_only = evaluate(Reference(make("images", arr_0=WIDE[:100])), dark)
    assert result.metrics["fid"] == result.metrics["sfid"] == 0 < images_only.metrics["fid"]
    for key in set(KEYS) - {"fid", "sfid"}:
        assert result.metrics[key] == images_only.metrics[key]


def test_statistics_alone_as_reference_and_as_samples(make, wide, dark):
    full = evaluate(Reference(wide), dark)
    plain = make("plain", **statistics(wide, spatial=False))
    assert says(plain.notes, "does not say of which protocol", "taken as test")
    assert says(plain.notes, "plain.npz has no spatial statistics (mu_s, sigma_s): sFID is n/a")
    result = evaluate(Reference(plain), dark)
    assert result.metrics["fid"] == pytest.approx(full.metrics["fid"], rel=1e-9)
    assert missing(result) == ["sfid", *WITHOUT_IMAGES[1:]]
    assert "no sFID: one side has no spatial statistics" in result.notes
    lost = "no precision, recall, density, coverage, KID, MIND, clipped density and clipped coverage: the ref"
    assert says(result.notes, lost)

    samples = make("samples", protocol="test", count=140, **statistics(dark))
    result = evaluate(Reference(wide), samples)
    for key in ("fid", "sfid"):
        assert result.metrics[key] == pytest.approx(full.metrics[key], rel=1e-9)
    assert missing(result) == WITHOUT_IMAGES
    assert result.count == 140 and says(result.notes, "statistics without images")


@pytest.mark.parametrize(
    ("label", "fragment"),
    [
        ({"protocol": "pytorch-fid"}, "pytorch-fid, not test"),
        ({}, "adm, not test"),
        ({"protocol": "test", "weights_sha256": "0" * 64}, "other weights"),
    ],
)
def test_statistics_of_another_protocol_or_network_are_not_used(
    make, tmp_path, network, wide, dark, label, fragment
):
    other = make("other", arr_0=WIDE, **statistics(dark), **label)
    assert other.statistics is None and says(other.notes, fragment)
    assert evaluate(Reference(other), dark).metrics == evaluate(Reference(wide), dark).metrics
    np.savez(tmp_path / "bare.npz", **statistics(dark), **label)
    with pytest.raises(ValueError, match=f"{fragment}.*no images"):
        open_set(tmp_path / "bare.npz", network)


def test_at_most_ten_thousand_reference_images_drawn_with_the_seed(monkeypatch, wide, dark):
    monkeypatch.setattr(reference, "MAX_REFERENCE_IMAGES", 60)
    monkeypatch.setattr(reference, "ENOUGH_IMAGES", 60)
    first, again, other = Reference(wide, 1), Reference(wide, 1), Reference(wide, 2)
    assert len(first.features) == 60 and says(first.notes, "60 of 150 images")
    assert np.array_equal(first.features, again.features)
    assert not np.array_equal(first.features, other.features)
    assert evaluate(first, dark).metrics["fid"] == evaluate(other, dark).metrics["fid"]
    precision, _ = precision_recall(real=first.features, fake=dark.features.pool3)
    assert evaluate(first, dark).metrics["precision"] == precision


def test_few_images_are_warned_of_refused_or_just_enough(make, tmp_path, network, wide):
    few = make("few", arr_0=DARK[:39])
    notes = evaluate(Reference(wide), few).notes
    assert says(notes, "39 images", "64 pooled features: singular covariance")
    assert not says(notes, "spatial features")
    assert says(notes, "fewer than 10,000 images") and not says(Reference(wide).notes, "singular")
    stats = make("stats", protocol="test", count=60, **statistics(few))
    assert says(Reference(stats).notes, "60 images", "singular")
    for count, held in ((1, "holds 1 image;"), (5, "holds 5 images;")):
        np.savez(tmp_path / "tiny.npz", arr_0=WIDE[:count])
        with pytest.raises(ValueError, match=held):
            open_set(tmp_path / "tiny.npz", network)
    assert missing(evaluate(Reference(wide), make("six", arr_0=DARK[:6]))) == []


def test_an_error_bar_and_an_extrapolation_on_request(wide, dark, make):
    result = evaluate(Reference(wide), dark, Options(bootstrap=8, fid_infinity=True, seed=3))
    assert result.fid_error.low < result.metrics["fid"] < result.fid_error.high and result.fid_error.std > 0
    assert result.fid_infinity == frechet_infinity(Reference(wide).pool, dark.features.pool3, seed=3)
    assert evaluate(Reference(wide), dark, Options(bootstrap=8, seed=3)).fid_error == result.fid_error
    few = evaluate(Reference(wide), make("few", arr_0=DARK[:19]), Options(fid_infinity=True))
    assert few.fid_infinity is None and says(few.notes, "no extrapolation: 19 images")
    stats = make("stats", protocol="test", **statistics(dark))
    bare = evaluate(Reference(wide), stats, Options(bootstrap=8))
    assert bare.fid_error is None and says(bare.notes, "cannot be resampled")


def test_compare_tells_a_difference_from_noise(make, wide):
    light, same = make("light", arr_0=255 - WIDE[:100] // 4), make("same", arr_0=WIDE[:100])
    difference = compare(Reference(wide), light, same, 12)
    assert difference.excludes_zero and difference.value > 0
    left, right = make("left", arr_0=WIDE[:75]), make("right", arr_0=WIDE[75:])
    assert not compare(Reference(wide), left, right, 12).excludes_zero
    with pytest.raises(ValueError, match=r"resamples images; stats.npz holds statistics"):
        compare(Reference(wide), light, make("stats", protocol="test", **statistics(wide)), 12)


def test_sets_that_do_not_fit_are_refused(tmp_path, network, wide, dark):
    changed = dataclasses.replace(dark, provenance={**dark.provenance, "protocol": "adm"})
    with pytest.raises(ValueError, match="measured with protocol adm, the reference with test"):
        evaluate(Reference(wide), changed)
    np.savez(tmp_path / "small.npz", mu=np.zeros(10), sigma=np.eye(10))
    small, images = (open_set(tmp_path / f"{name}.npz", network) for name in ("small", "wide"))
    with pytest.raises(ValueError, match=r"small.npz has features of 10 dimensions and .*wide.npz of 64"):
        require_comparable(small, images, network)


def test_another_resolution_is_refused_unless_allowed(wide, dark):
    larger = dataclasses.replace(dark, features=dataclasses.replace(dark.features, resolution=(32, 32)))
    with pytest.raises(ValueError, match=r"is 16x16 and .* is 32x32"):
        evaluate(Reference(wide), larger)
    result = evaluate(Reference(wide), larger, Options(allow_resolution=True))
    assert result.metrics == evaluate(Reference(wide), dark).metrics and says(result.notes, "resolution")


def test_the_five_lines(tmp_path, monkeypatch, capsys, network, wide, dark):
    asked = {}
    monkeypatch.setattr("evaluation.networks.feature_network", lambda **flags: asked.update(flags) or network)
    paths = [str(tmp_path / name) for name in ("wide.npz", "dark.npz")]
    monkeypatch.setattr(sys, "argv", ["x", paths[0], "--weights=w.pth", "--device", "cpu", paths[1]])
    runpy.run_path(str(ROOT / "evaluation/evaluator.py"), run_name="__main__")
    assert asked == {"weights": "w.pth", "device": "cpu"}
    out, err = capsys.readouterr()
    pairs = [line.split(": ") for line in out.splitlines()]
    assert [label for label, _ in pairs] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    result = evaluate(Reference(wide), dark)
    keys = ("inception_score", "fid", "sfid", "precision", "recall")
    assert [float(value) for _, value in pairs] == [result.metrics[key] for key in keys]
    assert "note: " in err
    without = dataclasses.replace(result, metrics={**result.metrics, "sfid": None})
    assert five_lines(without).splitlines()[2] == "sFID: nan"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a.npz", "b.npz", "--weights", "none.pth"], 1, "error: no Inception weights at none.pth; "),
        (["a.npz", "b.npz", "--device", "nothing"], 1, "error: --device nothing cannot be used here"),
        (["a.npz"], 2, "evaluator.py: error: it is called as python evaluation/evaluator.py REFERENCE SAM"),
        (["a.npz", "b.npz", "--features", "digits"], 2, "evaluator.py: error: it is called as"),
        (["a.npz", "--weights", "w.pth", "b.npz", "--device"], 2, "evaluator.py: error: it is called as"),
    ],
)
def test_a_wrong_call_of_the_five_lines_ends_in_one_line(tmp_path, monkeypatch, words, code, message):
    monkeypatch.chdir(tmp_path)
    script = str(ROOT / "evaluation/evaluator.py")
    done = call(partial(runpy.run_path, script, run_name="__main__"), words)
    if "none.pth" in words:  # what a shell sees, once
        process = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
        assert (process.returncode, process.stdout, process.stderr) == (code, "", done.err)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(message) and done.err.count("\n") == 1

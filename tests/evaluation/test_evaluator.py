"""The numbers of one set against a reference: where statistics and features come from, what is n/a and why,
and the five lines.
"""

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import evaluator as module
from evaluation.evaluator import (
    METRICS,
    Options,
    Reference,
    compare,
    evaluate,
    five_lines,
    metric_key,
    metric_label,
)
from evaluation.frechet import frechet_distance, frechet_infinity
from evaluation.networks import feature_network
from evaluation.networks.digits import DigitsFeatures, DigitsNetwork
from evaluation.precision_recall import density_coverage, precision_recall
from evaluation.scores import inception_score, kernel_distance
from evaluation.sets import measure, open_set, require_comparable

ROOT = Path(__file__).resolve().parents[2]
RANDOM = np.random.RandomState(5)
WIDE = RANDOM.randint(0, 256, (150, 16, 16, 3), dtype=np.uint8)
DARK = (0.9 * WIDE[RANDOM.randint(0, 40, 140)] + RANDOM.randint(0, 20, (140, 16, 16, 1))).astype(
    np.uint8
)  # of few of the wide ones
WITHOUT_IMAGES = ("inception_score", "precision", "recall", "density", "coverage", "kid")


@pytest.fixture(scope="module")
def network():
    generator = torch.Generator().manual_seed(0)
    weights = DigitsNetwork().state_dict()
    for name, tensor in weights.items():
        if tensor.ndim > 1:  # features of the size of 1
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    weights["fc.bias"] = torch.zeros(10)
    return DigitsFeatures(weights)


@pytest.fixture
def make(tmp_path, network):
    """Write an npz and measure it."""

    def measured(name, **arrays):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        return measure(open_set(tmp_path / f"{name}.npz", network), network, progress=False)

    return measured


@pytest.fixture
def wide(make):
    return make("wide", arr_0=WIDE)


@pytest.fixture
def dark(make):
    return make("dark", arr_0=DARK)


def statistics(measured, spatial=True, **more):
    pool, other = measured.pool(), measured.spatial()
    return {
        "mu": pool.mu,
        "sigma": pool.sigma,
        **({"mu_s": other.mu, "sigma_s": other.sigma} if spatial else {}),
        **more,
    }


def test_every_number_is_that_of_the_library(network, wide, dark):
    result = evaluate(Reference(wide), dark)
    real, fake = network(WIDE), network(DARK)
    gaussians = {
        key: [(f[key].mean(axis=0), np.cov(f[key].astype(float), rowvar=False)) for f in (real, fake)]
        for key in ("pool3", "spatial")
    }
    expected = {
        "fid": frechet_distance(*gaussians["pool3"][0], *gaussians["pool3"][1]),
        "sfid": frechet_distance(*gaussians["spatial"][0], *gaussians["spatial"][1]),
        "inception_score": inception_score(logits=fake["logits"]),
        "kid": kernel_distance(real=real["pool3"], fake=fake["pool3"]),
    }
    expected["precision"], expected["recall"] = precision_recall(real=real["pool3"], fake=fake["pool3"])
    expected["density"], expected["coverage"] = density_coverage(real=real["pool3"], fake=fake["pool3"])
    assert all(expected.values())
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert set(result.metrics) == set(METRICS)
    assert (result.name, result.count, result.fid_error, result.fid_infinity) == ("dark.npz", 140, None, None)


def test_provenance_names_all_that_the_numbers_depend_on(network, wide, dark):
    result = evaluate(Reference(wide), dark, Options(precision_recall_dtype="float16"))
    assert result.precision_recall_dtype == "float16" and "float16" in result.protocol
    for provenance, count in ((result.samples, 140), (result.reference, 150)):
        assert (provenance["protocol"], provenance["features"], provenance["weights_sha256"]) == (
            "digits",
            "digits",
            network.sha256,
        )
        assert (provenance["count"], provenance["resolution"], provenance["dtype"]) == (
            count,
            [16, 16],
            "float32",
        )
        assert len(provenance["file_sha256"]) == 64 and {"torch", "numpy"} <= provenance["versions"].keys()
    json.dumps([result.samples, result.reference], allow_nan=False)


def test_a_reference_in_the_published_layout_gives_fid_by_its_statistics_and_precision_by_its_images(
    make, wide, dark
):
    reference = make("reference", arr_0=WIDE[:100], protocol="digits", **statistics(dark))
    result = evaluate(Reference(reference), dark)
    images_only = evaluate(Reference(make("images", arr_0=WIDE[:100])), dark)
    assert (
        abs(result.metrics["fid"]) < 1e-6 and abs(result.metrics["sfid"]) < 1e-6 < images_only.metrics["fid"]
    )
    others = set(METRICS) - {"fid", "sfid"}
    assert {key: result.metrics[key] for key in others} == {key: images_only.metrics[key] for key in others}


def test_statistics_alone_as_reference_and_as_samples(make, wide, dark):
    full = evaluate(Reference(wide), dark)
    plain = make("plain", **statistics(wide, spatial=False))
    assert any("does not say of which protocol" in note and "taken as digits" in note for note in plain.notes)
    result = evaluate(Reference(plain), dark)
    assert result.metrics["fid"] == pytest.approx(full.metrics["fid"], rel=1e-9)
    assert [metric for metric in METRICS if result.metrics[metric] is None] == ["sfid", *METRICS[3:]]
    assert any("no sFID" in note for note in result.notes) and any(
        "the reference has no images" in note for note in result.notes
    )

    samples = make("samples", protocol="digits", count=140, **statistics(dark))
    result = evaluate(Reference(wide), samples)
    assert result.metrics["fid"] == pytest.approx(full.metrics["fid"], rel=1e-9)
    assert result.metrics["sfid"] == pytest.approx(full.metrics["sfid"], rel=1e-9)
    assert [metric for metric in METRICS if result.metrics[metric] is None] == list(WITHOUT_IMAGES)
    assert result.count == 140 and any("statistics without images" in note for note in result.notes)


@pytest.mark.parametrize(
    ("label", "fragment"),
    [
        ({"protocol": "pytorch-fid"}, "pytorch-fid, not digits"),
        ({}, "adm, not digits"),
        ({"protocol": "digits", "weights_sha256": "0" * 64}, "other weights"),
    ],
)
def test_statistics_of_another_protocol_or_network_are_not_used(
    make, tmp_path, network, wide, dark, label, fragment
):
    reference = make("other", arr_0=WIDE, **statistics(dark), **label)
    assert reference.statistics is None and any(fragment in note for note in reference.notes)
    assert evaluate(Reference(reference), dark).metrics == evaluate(Reference(wide), dark).metrics
    np.savez(tmp_path / "bare.npz", **statistics(dark), **label)
    with pytest.raises(ValueError, match=f"{fragment}.*no images"):
        open_set(tmp_path / "bare.npz", network)


def test_at_most_ten_thousand_reference_images_drawn_with_the_seed(monkeypatch, wide, dark):
    monkeypatch.setattr(module, "MAX_REFERENCE_IMAGES", 60)
    monkeypatch.setattr(module, "ENOUGH_IMAGES", 60)
    first, again, other = Reference(wide, 1), Reference(wide, 1), Reference(wide, 2)
    assert len(first.features) == 60 and any("60 of 150 images" in note for note in first.notes)
    assert np.array_equal(first.features, again.features) and not np.array_equal(
        first.features, other.features
    )
    assert evaluate(first, dark).metrics["fid"] == evaluate(other, dark).metrics["fid"]
    assert (
        evaluate(first, dark).metrics["precision"]
        == precision_recall(real=first.features, fake=dark.features.pool3)[0]
    )


def test_few_images_are_warned_of(make, wide):
    few = make("few", arr_0=DARK[:64])
    notes = evaluate(Reference(wide), few).notes
    assert any("64 images" in note and "64 pooled features: singular covariance" in note for note in notes)
    assert any("112 spatial features" in note for note in notes)
    assert any("fewer than 10,000 images" in note for note in notes)
    assert not any("singular" in note for note in Reference(wide).notes)
    stats = make("stats", protocol="digits", count=60, **statistics(few))
    assert any(note.startswith("60 images") and "singular" in note for note in Reference(stats).notes)


@pytest.mark.parametrize(("count", "fragment"), [(1, "holds 1 image;"), (5, "holds 5 images;")])
def test_fewer_images_than_neighbours_are_refused(tmp_path, network, count, fragment):
    np.savez(tmp_path / "few.npz", arr_0=WIDE[:count])
    with pytest.raises(ValueError, match=fragment):
        open_set(tmp_path / "few.npz", network)


def test_as_many_images_as_neighbours_need_are_enough(make, wide):
    result = evaluate(Reference(wide), make("six", arr_0=DARK[:6]))
    assert None not in result.metrics.values()


def test_an_error_bar_and_an_extrapolation_on_request(wide, dark, make):
    result = evaluate(Reference(wide), dark, Options(bootstrap=8, fid_infinity=True, seed=3))
    assert result.fid_error.low < result.metrics["fid"] < result.fid_error.high and result.fid_error.std > 0
    assert result.fid_infinity == frechet_infinity(Reference(wide).pool, dark.features.pool3, seed=3)
    assert evaluate(Reference(wide), dark, Options(bootstrap=8, seed=3)).fid_error == result.fid_error
    few = evaluate(Reference(wide), make("few", arr_0=DARK[:19]), Options(fid_infinity=True))
    assert few.fid_infinity is None and any("no extrapolation: 19 images" in note for note in few.notes)
    stats = evaluate(
        Reference(wide), make("stats", protocol="digits", **statistics(dark)), Options(bootstrap=8)
    )
    assert stats.fid_error is None and any("cannot be resampled" in note for note in stats.notes)


def test_compare_tells_a_difference_from_noise(make, wide):
    reference = Reference(wide)
    light, same = make("light", arr_0=255 - WIDE[:100] // 4), make("same", arr_0=WIDE[:100])
    difference = compare(reference, light, same, 12)
    assert difference.excludes_zero and difference.value > 0
    assert not compare(
        reference, make("left", arr_0=WIDE[:75]), make("right", arr_0=WIDE[75:]), 12
    ).excludes_zero
    with pytest.raises(ValueError, match=r"resamples images; stats.npz holds statistics"):
        compare(reference, light, make("stats", protocol="digits", **statistics(wide)), 12)


def test_sets_that_do_not_fit_are_refused(tmp_path, make, network, wide, dark):
    changed = {**dark.provenance, "protocol": "adm"}
    with pytest.raises(ValueError, match="measured with protocol adm, the reference with digits"):
        evaluate(Reference(wide), dataclasses.replace(dark, provenance=changed))
    small = {"mu": np.zeros(10), "sigma": np.eye(10)}
    np.savez(tmp_path / "small.npz", **small)
    with pytest.raises(ValueError, match=r"small.npz has features of 10 dimensions and .*wide.npz of 64"):
        require_comparable(
            open_set(tmp_path / "small.npz", network), open_set(tmp_path / "wide.npz", network), network
        )


def test_another_resolution_is_refused_unless_allowed(wide, dark):
    larger = dataclasses.replace(dark, features=dataclasses.replace(dark.features, resolution=(32, 32)))
    with pytest.raises(ValueError, match=r"is 16x16 and .* is 32x32"):
        evaluate(Reference(wide), larger)
    result = evaluate(Reference(wide), larger, Options(allow_resolution=True))
    assert result.metrics == evaluate(Reference(wide), dark).metrics
    assert any("resolution" in note for note in result.notes)


def test_only_inception_gives_a_fid():
    assert [metric_key(metric, "inception-2015-12-05") for metric in METRICS] == list(METRICS)
    assert metric_label("fid", "inception-2015-12-05") == "FID"
    keys = [metric_key(metric, "digits") for metric in METRICS]
    assert keys == [
        "fd_digits",
        "sfd_digits",
        "is_digits",
        "precision",
        "recall",
        "density",
        "coverage",
        "kd_digits",
    ]
    labels = [metric_label(metric, "digits") for metric in METRICS]
    assert labels == [
        "FD(digits)",
        "sFD(digits)",
        "IS(digits)",
        "precision",
        "recall",
        "density",
        "coverage",
        "KD(digits)",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"features": "digit"}, "unknown --features digit"),
        ({"features": "digits", "protocol": "adm"}, "--protocol and --weights are Inception's"),
        ({"features": "x.safetensors", "weights": "w.pth"}, "--protocol and --weights are Inception's"),
    ],
)
def test_flags_that_name_no_network(flags, message):
    with pytest.raises(ValueError, match=message):
        feature_network(**flags)


def run_as_script(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["evaluator.py", *map(str, words)])
    runpy.run_path(str(ROOT / "evaluation/evaluator.py"), run_name="__main__")


def test_the_five_lines(tmp_path, monkeypatch, capsys, network, wide, dark):
    monkeypatch.setattr("evaluation.networks.feature_network", lambda **_: network)
    run_as_script(monkeypatch, tmp_path / "wide.npz", tmp_path / "dark.npz")
    out, err = capsys.readouterr()
    pairs = [line.split(": ") for line in out.splitlines()]
    assert [label for label, _ in pairs] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    result = evaluate(Reference(wide), dark)
    assert [float(value) for _, value in pairs] == [
        result.metrics[key] for key in ("inception_score", "fid", "sfid", "precision", "recall")
    ]
    assert "note: " in err
    assert (
        five_lines(dataclasses.replace(result, metrics={**result.metrics, "sfid": None})).splitlines()[2]
        == "sFID: nan"
    )


def test_the_five_lines_fail_in_one_line_without_weights(tmp_path):
    script = [sys.executable, ROOT / "evaluation/evaluator.py", "a.npz", "b.npz", "--weights", "none.pth"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("error: no Inception weights at none.pth; ") and done.stderr.count("\n") == 1
    )

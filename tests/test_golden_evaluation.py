"""Frechet distance, precision and recall, density and coverage, kernel distance and Inception Score (golden
set H).
"""

import hashlib
from functools import cache

import numpy as np
import pytest
import torch
from goldens_util import load_golden

from evaluation import density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall
from evaluation.frechet import FrechetReference
from evaluation.moments import moments_of
from evaluation.precision_recall import TiledDistances, manifold_scores

CASES, ARRAYS = load_golden("H_eval_math")
FEATURE_CASES = [name for name in CASES if name.startswith("h")]
SCORE_CASES = {
    "is1_N1000_C50": (1651, 1000, 50, 5000),
    "is2_N230_C20_split60": (1652, 230, 20, 60),
    "is3_N120_C1008_split5000": (1653, 120, 1008, 5000),
}


def sha256_16(x):
    return hashlib.sha256(x.tobytes()).hexdigest()[:16]


@cache
def load_features(name):
    """(reference, samples), float32, drawn by the rule of set H."""
    spec = CASES[name]["spec"]
    z1 = np.random.RandomState(spec["seed"]).standard_normal((spec["N1"], spec["D"]))
    z2 = np.random.RandomState(spec["seed"] + 1).standard_normal((spec["N2"], spec["D"]))
    j = np.arange(spec["D"])
    s = 0.5 + j / (spec["D"] - 1)
    shifted = z2 * (0.9 * s) + 0.2 * np.cos(j)
    pairs = {
        "gauss": (z1 * s, shifted),
        "pool": (np.maximum(z1 * s + 0.3, 0) * 1.2, np.maximum(z2 * s * 0.9 + 0.35, 0) * 1.2),
        "big": (z1 * s * 60, shifted * 60),
        "same": (z1 * s, (z1 * s)[: spec["N2"]]),
    }
    return tuple(x.astype(np.float32) for x in pairs[spec["kind"]])


@cache
def load_logits(name):
    seed, count, classes, _ = SCORE_CASES[name]
    return (np.random.RandomState(seed).standard_normal((count, classes)) * 2).astype(np.float32)


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_features_are_those_of_the_golden_set(name):
    ref, smp = load_features(name)
    assert (sha256_16(ref), sha256_16(smp)) == (CASES[name]["ref_sha256_16"], CASES[name]["smp_sha256_16"])


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_frechet_distance(name):
    ref, smp = (moments_of(x).gaussian() for x in load_features(name))
    golden = CASES[name]["fid"]
    for distance in (
        frechet_distance(ref.mu, ref.sigma, smp.mu, smp.sigma),
        frechet_distance(smp.mu, smp.sigma, ref.mu, ref.sigma),
        FrechetReference(ref).distance_to_features(load_features(name)[1]),
    ):
        # set H: rtol 1e-6; below 1e-6 for identical sets
        for method in ("exact_eigh", "exact_nuclear_norm", "pytorch_fid_scipy_1_17_1"):
            assert distance == pytest.approx(
                golden[method], rel=1e-6, abs=1e-6 if "identical" in name else 0
            ), method


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_radii(name):
    distances = TiledDistances(*(x.astype(np.float64) for x in load_features(name)), None, 3)
    for points, key in ((distances.real, "radii_sq_ref_f64"), (distances.fake, "radii_sq_smp_f64")):
        np.testing.assert_allclose(distances.radii(points, 3), ARRAYS[f"{name}/{key}"], rtol=1e-9)


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_precision_and_recall(name):
    ref, smp = load_features(name)
    golden = CASES[name]["precision_recall"]
    assert precision_recall(real=ref, fake=smp, dtype=torch.float64) == tuple(golden["exact_float64"])
    assert precision_recall(real=ref.astype(np.float64), fake=smp) == tuple(golden["exact_float64"])
    # set H: 3 / N against the numbers in float32 and float16
    allowed = 3 / min(len(ref), len(smp)) + 1e-9
    for dtype, methods in (
        (torch.float32, ("float32", "torch_fidelity", "adm_evaluator_TF_cpu")),
        (torch.float16, ("fp16_numpy_emulation", "adm_evaluator_TF_cpu")),
    ):
        actual = precision_recall(real=ref, fake=smp, dtype=dtype)
        for method in methods:
            assert actual == pytest.approx(golden[method], abs=allowed), (dtype, method)


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_density_and_coverage(name):
    ref, smp = load_features(name)
    golden = CASES[name]["prdc_pip_k5"]
    # set H: exact; as floats these are the same counts, divided in another order
    expected = pytest.approx((golden["density"], golden["coverage"]), rel=1e-12)
    assert density_coverage(real=ref.astype(np.float64), fake=smp) == expected
    scores = manifold_scores(real=ref, fake=smp, dtype=torch.float64)
    assert (scores.density, scores.coverage) == expected


@pytest.mark.parametrize("name", FEATURE_CASES)
def test_kernel_distance(name):
    ref, smp = load_features(name)
    golden = CASES[name]["kid_torch_fidelity"]
    mean, std = kernel_distance(
        real=ref, fake=smp, subsets=golden["subsets"], subset_size=golden["subset_size"]
    )
    # set H: rtol 1e-9. Where each subset is a permutation of the whole set, its std is rounding noise.
    assert mean == pytest.approx(golden["mean_float64_features"], rel=1e-9)
    assert std == pytest.approx(golden["std_float64_features"], rel=1e-9, abs=1e-14)
    over_all = CASES[name]["mmd2_poly3_unbiased_all_samples_f64"]
    if over_all is not None:
        assert kernel_distance(real=ref, fake=smp) == pytest.approx(over_all, rel=1e-9)


@pytest.mark.parametrize("name", SCORE_CASES)
def test_inception_score(name):
    logits, split = load_logits(name), SCORE_CASES[name][3]
    assert sha256_16(logits) == CASES[name]["logits_sha256_16"]
    # set H: rtol 1e-6
    golden = CASES[name]
    assert inception_score(logits=logits, split_size=split) == pytest.approx(
        golden["adm_formula_float64"], rel=1e-6
    )
    assert inception_score(logits=logits, split_size=split) == pytest.approx(
        golden["adm_evaluator_inception_score"], rel=1e-6
    )
    one_split = inception_score(logits=logits, split_size=len(logits))
    assert one_split == pytest.approx(golden["torch_fidelity_1split"]["inception_score_mean"], rel=1e-6)

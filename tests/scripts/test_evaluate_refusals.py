"""scripts/evaluate.py: one line for each bad input, and --selfcheck."""

import json
from pathlib import Path

import numpy as np
import published_pair
import pytest
from helpers import ROOT, call, load_script
from pictures_util import digits_weights, write_pictures
from safetensors.torch import save_file

from evaluation.networks.digits import DigitsFeatures

evaluate = load_script("evaluate")
REAL, FAKE = np.random.RandomState(6).randint(0, 256, (2, 100, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the script in a folder that has real.npz and fake.npz, with the digits network."""
    monkeypatch.chdir(tmp_path)
    save_file(digits_weights(), "weights.safetensors")
    np.savez("real.npz", arr_0=REAL)
    np.savez("fake.npz", arr_0=FAKE)
    return lambda *words: call(evaluate.main, [*words, "--features", "weights.safetensors"])


def stats(mu=None, sigma=None, **more):
    return {"mu": np.zeros(64) if mu is None else mu, "sigma": np.eye(64) if sigma is None else sigma, **more}


def object_array():
    array = np.empty(8, object)
    array[:] = "x"
    return array


NO_IMAGES = "bad.npz holds statistics of the protocol adm, not digits, and no images (arr_0)"
NEIGHBOURS = "the metrics look at 5 neighbours of each: give 6 or more"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": FAKE[:0]}, "bad.npz holds 0 images"),
        ({"arr_0": FAKE[:1]}, f"bad.npz holds 1 image; {NEIGHBOURS}"),
        ({"arr_0": FAKE[:5]}, f"bad.npz holds 5 images; {NEIGHBOURS}"),
        ({"arr_0": object_array()}, "bad.npz: arr_0 holds Python objects, which are refused"),
        ({"images": FAKE}, "bad.npz has no arr_0, which holds the images in an npz; it holds images"),
        (
            {"mean": np.zeros(64), "cov": np.eye(64)},
            "it holds mean, cov; statistics are an npz with mu and sigma",
        ),
        (stats(mu=object_array()), "mu or sigma is damaged, or holds Python objects"),
        (stats(protocol=object_array()), "in Python objects, which are refused"),
        (stats(mu=np.full(64, np.nan)), "mu holds 64 NaN or infinite entries"),
        (stats(sigma=np.eye(63)), "mu has shape (64,) and sigma (63, 63)"),
        (stats(mu=np.zeros(10), sigma=np.eye(10)), "these are of different networks"),
        (stats(mu_s=np.zeros(112), protocol="digits"), "bad.npz has no sigma_s"),
        (stats(protocol="adm"), NO_IMAGES),
        (stats(mu_s=np.zeros(112), sigma_s=np.eye(112)), NO_IMAGES),
        ({"mu": np.zeros(64)}, "bad.npz has no sigma"),
    ],
)
def test_a_bad_npz_ends_in_one_line_on_either_side(run, arrays, message):
    np.savez("bad.npz", **arrays)
    for pair in (("real.npz", "bad.npz"), ("bad.npz", "fake.npz")):
        result = run(*pair)
        assert (result.code, result.out) == (1, ""), result
        assert result.err.startswith("error: ") and message in result.err and result.err.count("\n") == 1


def test_statistics_cannot_be_compared_and_that_is_said_first(run, monkeypatch):
    np.savez("stats.npz", **stats())
    monkeypatch.setattr(evaluate, "measure", None)  # an extraction would fail
    result = run("real.npz", "--compare", "fake.npz", "stats.npz")
    said = "a comparison resamples images; stats.npz holds statistics, give its images instead"
    assert (result.code, result.err) == (1, f"error: {said}\n")


def test_files_and_folders_that_are_no_set_of_images(tmp_path, run):
    (tmp_path / "cut.npz").write_bytes((tmp_path / "fake.npz").read_bytes()[:5000])
    (tmp_path / "set.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (write_pictures(tmp_path / "nowhere", FAKE[:20]) / "n01440764").symlink_to("gone")
    for name, message in (
        ("cut.npz", "truncated or not an npz"),
        ("set.txt", "cannot read images from set.txt"),
        ("empty", "empty holds 0 images"),
        ("gone", "there is nothing at gone"),
        ("nowhere", "nowhere/n01440764 is a link that leads nowhere"),
    ):
        result = run("real.npz", name)
        assert result.code == 1 and message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["fake.npz", "--bootstrap", "1"], 1, "--bootstrap 1: an error bar needs at least 2 resamples"),
        (["fake.npz", "--seed", "-1"], 1, "--seed -1 must be between"),
        (["fake.npz", "--batch_size", "0"], 1, "the batch size is 0"),
        (["fake.npz", "--json", "gone/out.json"], 1, "--json gone/out.json: there is no such folder"),
        (["fake.npz", "--json", "."], 1, "--json . is a folder"),
        (["fake.npz", "--report", "fake.npz"], 1, "--report fake.npz is a file"),
        (["fake.npz", "--device", "nothing"], 1, "--device nothing cannot be used here"),
        (["fake.npz", "--protocol", "adm"], 1, "--protocol and --weights are Inception's"),
        (["fake.npz", "fake.npz"], 1, "given twice"),
        (["--compare", "fake.npz", "./fake.npz"], 1, "--compare fake.npz with itself"),
        (["fake.npz", "--protocol", "tensorflow"], 2, "invalid choice: 'tensorflow'"),
        (["fake.npz", "--boot", "3"], 2, "--boot"),
        (["fake.npz", "--selfcheck"], 2, "it does not go with features, reference, samples"),
        ([], 2, "give a REFERENCE and at least one set of SAMPLES"),
    ],
)
def test_wrong_flags(run, flags, code, message):
    result = run("real.npz", *flags)
    assert (result.code, result.out) == (code, "") and message in result.err, result.err
    assert len(result.err.splitlines()) == 1


def test_a_report_without_matplotlib_fails_before_anything_is_extracted(tmp_path, run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("real.npz", "fake.npz", "--report", "report")
    said = '--report draws with matplotlib, which is not installed: pip install -e ".[plot]"'
    assert (result.code, result.err) == (1, f"error: {said}\n") and not (tmp_path / "report").exists()


def test_inception_weights_that_are_not_there(run):
    result = call(evaluate.main, ["real.npz", "fake.npz", "--weights", "none.pth"])
    said = "error: no Inception weights at none.pth; the published file pt_inception-2015"
    assert result.code == 1 and result.err.startswith(said)


# --selfcheck

KEYS = ("inception_score", "fid", "sfid", "precision", "recall")
TENSORFLOW = dict(zip(KEYS, (141.4767, 2.973289, 5.094564, 0.78138, 0.5929), strict=True))
PYTORCH_PORT = dict(zip(KEYS, (141.4781, 2.973283, 5.093504, 0.78042, 0.5906), strict=True))


def test_both_published_implementations_pass_the_selfcheck():
    for metrics in (TENSORFLOW, PYTORCH_PORT):
        lines = published_pair.compare_with_published(metrics)
        assert len(lines) == 5 and all(line.endswith("agrees") and "tolerance" in line for line in lines)


@pytest.mark.parametrize("metric", TENSORFLOW)
@pytest.mark.parametrize("wrong", [1.01, 0.99, np.nan, None])
def test_a_figure_one_percent_off_fails_the_selfcheck(metric, wrong):
    metrics = {**PYTORCH_PORT, metric: wrong and TENSORFLOW[metric] * wrong}
    (line,) = [line for line in published_pair.compare_with_published(metrics) if line.endswith("DIFFERS")]
    assert line.startswith(f"{metric}: ")


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    """An empty folder in the place of pretrained_models, and the names that were asked of
    scripts/download.py, which finds no network.
    """
    asked = []
    monkeypatch.setattr(published_pair, "PRETRAINED_DIR", tmp_path)
    monkeypatch.setattr(published_pair.download, "main", asked.extend)
    return asked


REFERENCE, SAMPLES = "VIRTUAL_imagenet128_labeled.npz", "admnet_guided_imagenet128.npz"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
FILES = f"{REFERENCE} {SAMPLES} {INCEPTION}"


def test_the_selfcheck_fetches_what_is_missing_and_says_what_it_could_not_have(tmp_path, no_downloads):
    result = call(evaluate.main, ["--selfcheck"])
    assert no_downloads == FILES.split()
    line = f"--selfcheck needs files that are not in {tmp_path}: `python scripts/download.py {FILES}`"
    assert (result.code, result.out, result.err) == (1, "", f"error: {line}\n")
    known = json.loads((ROOT / "pretrained_models/files.json").read_text())["files"]
    assert set(FILES.split()) <= set(known)


def test_the_selfcheck_fetches_nothing_that_is_there(tmp_path, no_downloads):
    (tmp_path / REFERENCE).touch()
    missing = call(evaluate.main, ["--selfcheck", "--weights", tmp_path / "given.pth"])
    # before gigabytes are fetched
    assert no_downloads == [] and missing.code == 1 and "given.pth" in missing.err
    (tmp_path / "given.pth").touch()
    result = call(evaluate.main, ["--selfcheck", "--weights", tmp_path / "given.pth"])
    assert no_downloads == [SAMPLES]
    assert result.code == 1 and REFERENCE not in result.err and INCEPTION not in result.err


def test_the_selfcheck_evaluates_the_pair_and_its_exit_code_says_whether_it_agrees(run, monkeypatch):
    (measured,) = json.loads(run("real.npz", "fake.npz", "--json", "-").out)["results"]
    names = {"inception_score": "is_digits", "fid": "fd_digits", "precision": "precision", "recall": "recall"}
    figures = {metric: (measured[name], 1e-6) for metric, name in names.items()}
    files = [Path("real.npz"), Path("fake.npz"), "weights.safetensors"]
    monkeypatch.setattr(published_pair, "find_published", lambda given: files)
    # in Inception's place
    monkeypatch.setattr(
        published_pair, "feature_network", lambda weights, device: DigitsFeatures(weights, device)
    )
    monkeypatch.setattr(published_pair, "PUBLISHED_FIGURES", figures)
    result = call(evaluate.main, ["--selfcheck"])
    assert result.code == 0 and result.out.count("agrees") == 4, result.err
    monkeypatch.setitem(figures, "fid", (measured["fd_digits"] + 1e-5, 1e-6))
    result = call(evaluate.main, ["--selfcheck"])
    assert result.code == 1 and result.out.count("DIFFERS") == 1
    assert result.err.endswith("error: the self-check failed: see the figures that differ\n")

"""scripts/evaluate.py: one command from files to numbers, the same for every kind of file; results that
nothing behind stdout can lose.
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, call, load_script
from pictures_util import TestNetwork, digits_weights, write_pictures, write_zip
from PIL import Image
from safetensors.torch import save_file

from evaluation.networks.digits import DigitsFeatures

evaluate = load_script("evaluate")
RANDOM = np.random.RandomState(6)
REAL = RANDOM.randint(0, 256, (130, 16, 16, 3), dtype=np.uint8)
SHADES = RANDOM.randint(0, 40, 120), RANDOM.randint(0, 20, (120, 16, 16, 1))
FAKE = (0.9 * REAL[SHADES[0]] + SHADES[1]).astype(np.uint8)  # of few of the real ones
NUMBERS = ["fd_digits", "is_digits", "precision", "recall", "density", "coverage", "kd_digits"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(digits_weights(), path)
    return path


@pytest.fixture
def run(tmp_path, weights, monkeypatch):
    """Call the script in a folder that has real.npz and fake.npz, with the digits network."""
    monkeypatch.chdir(tmp_path)
    np.savez("real.npz", arr_0=REAL)
    np.savez("fake.npz", arr_0=FAKE)
    return lambda *words: call(evaluate.main, [*words, "--features", weights])


def row(result):
    assert result.code == 0, result.err
    (only,) = json.loads(result.out)["results"]
    return only


def numbers(result):
    return {key: row(result)[key] for key in NUMBERS}


# What it answers


def test_a_table_to_stdout_and_the_rest_to_stderr(tmp_path, run):
    np.savez("other.npz", arr_0=FAKE[:110])
    result = run("real.npz", "--json", "out.json", "fake.npz", "other.npz")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith("protocol digits")
    assert "real.npz: 130 images, statistics of the images (130), sha256 " in lines[1]
    starts = [line.split()[:2] for line in lines[3:6]]
    assert starts == [["set", "images"], ["fake.npz", "120"], ["other.npz", "110"]]
    assert "FID" not in result.out.split("note:")[0] and "sFD" not in result.out
    assert "image/s" in result.err and "image/s" not in result.out
    names = [measured["name"] for measured in json.loads((tmp_path / "out.json").read_text())["results"]]
    assert names == ["fake.npz", "other.npz"]
    to_stdout = run("real.npz", "fake.npz", "--json", "-")
    assert row(to_stdout)["num_images"] == 120 and "protocol digits" in to_stdout.err


def forms(folder, name, images):
    """The same images as an npz, a folder, a zip, and the shards of an unfinished run."""
    pictures = write_pictures(folder / f"{name}-folder", images)
    write_zip(folder / f"{name}.zip", pictures)
    shards = folder / f"{name}-run" / "shards"
    shards.mkdir(parents=True)
    (shards.parent / "run.json").write_text(json.dumps({"settings": {"num_samples": 500}}))
    for start in range(0, len(images), 50):
        part = images[start : start + 50]
        np.savez(shards / f"{start:06d}-{start + len(part):06d}.npz", arr_0=part)
    return [f"{name}.npz", f"{name}-folder", f"{name}.zip", f"{name}-run"]


def test_npz_folder_zip_and_shards_give_the_same_numbers(tmp_path, run):
    expected = None
    for real, fake in zip(forms(tmp_path, "real", REAL), forms(tmp_path, "fake", FAKE), strict=True):
        actual = numbers(run(real, fake, "--json", "-", "--batch_size", 33))
        expected = expected or actual
        assert actual == pytest.approx(expected, abs=1e-6, rel=0)
        assert all(actual.values())


def test_what_the_numbers_mean(run):
    def measure(real, fake):
        return numbers(run(real, fake, "--json", "-"))

    one, other = measure("real.npz", "fake.npz"), measure("fake.npz", "real.npz")
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["precision"] > one["recall"] > 0
    assert one["fd_digits"] == pytest.approx(other["fd_digits"], rel=1e-9)
    itself = measure("real.npz", "real.npz")
    assert [itself[key] for key in NUMBERS if key not in ("is_digits", "kd_digits")] == [0, 1, 1, 1, 1]
    # A collapsed generator is precise, a scattered one has recall.
    np.savez("narrow.npz", arr_0=(128 + RANDOM.randint(-2, 3, (100, 16, 16, 3))).astype(np.uint8))
    shades = np.linspace(0, 255, 100)[:, None, None, None] * np.ones((1, 16, 16, 3))
    np.savez("wide.npz", arr_0=shades.astype(np.uint8))
    collapsed, scattered = measure("wide.npz", "narrow.npz"), measure("narrow.npz", "wide.npz")
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1
    assert scattered["precision"] < 0.1 and scattered["recall"] > 0.9


def test_a_second_run_from_the_cache_extracts_nothing(run, monkeypatch):
    words = ("real.npz", "fake.npz", "--json", "-", "--cache", "kept")
    first = run(*words)
    monkeypatch.setattr(DigitsFeatures, "__call__", None)
    second = run(*words, "--precision_recall_dtype", "float16")
    assert numbers(second)["fd_digits"] == numbers(first)["fd_digits"]
    dtypes = [row(result)["provenance"]["precision_recall_dtype"] for result in (first, second)]
    assert dtypes == ["float32", "float16"]


def test_bootstrap_and_infinity(run):
    words = ("real.npz", "fake.npz", "--json", "-", "--bootstrap", 5, "--seed")
    measured, again = row(run(*words, 2, "--fid_infinity")), row(run(*words, 3))
    assert measured["fd_digits_bootstrap"]["value"] == measured["fd_digits"] == again["fd_digits"]
    assert measured["fd_digits_bootstrap"]["std"] != again["fd_digits_bootstrap"]["std"] > 0
    assert "fd_digits_infinity" in measured and "fd_digits_infinity" not in again


def test_compare_says_in_words_whether_two_sets_differ(run):
    np.savez("left.npz", arr_0=REAL[:65])
    np.savez("right.npz", arr_0=REAL[65:])
    result = run("real.npz", "--compare", "left.npz", "fake.npz", "--json", "out.json", "--bootstrap", 20)
    assert result.code == 0, result.err
    nearer = "left.npz is nearer to the reference than fake.npz beyond the noise: FD(digits) of "
    verdict = result.out.splitlines()[-1]
    assert verdict.startswith(f"{nearer}left.npz minus that of fake.npz is -")
    assert "95% interval" in verdict and "20 resamples, 65 images of each" in verdict
    with open("out.json") as file:
        content = json.load(file)
    rows = content["results"]
    assert [measured["name"] for measured in rows] == ["left.npz", "fake.npz"]
    # Measured on as many images of each, so not quite the difference of the two rows.
    difference = rows[0]["fd_digits"] - rows[1]["fd_digits"]
    assert content["comparison"]["difference"]["value"] == pytest.approx(difference, rel=0.1)
    assert "the sets differ in their number of images" in result.out
    swapped = run("real.npz", "left.npz", "fake.npz", "--compare", "fake.npz", "left.npz", "--bootstrap", 20)
    assert f"{nearer}fake.npz minus that of left.npz" in swapped.out
    alike = run("real.npz", "--compare", "left.npz", "right.npz").out
    assert "left.npz and right.npz do not differ beyond the noise" in alike and "200 resamples" in alike


def test_sets_of_one_name_are_told_apart(tmp_path, run):
    for seed in ("seed0", "seed1"):
        (tmp_path / seed).mkdir()
        np.savez(tmp_path / seed / "samples.npz", arr_0=FAKE[:90])
    result = run("real.npz", "seed0/samples.npz", "seed1/samples.npz", "fake.npz")
    names = [line.split()[0] for line in result.out.splitlines()[4:7]]
    assert names == ["seed0/samples.npz", "seed1/samples.npz", "fake.npz"]


# Results that stay

OUTPUTS = ["bars.png", "grid1-fake-_-.npz.png", "precision_recall.png", "report.json", "report.md"]
LOCALES = {
    "ascii": (["+-"], {"PYTHONIOENCODING": "ascii"}),
    "utf-8": (["±"], {"PYTHONIOENCODING": "utf-8"}),
}


@pytest.mark.parametrize("behind", [*LOCALES, "full disk", "gone reader"])
def test_whatever_is_behind_stdout_the_files_are_complete(tmp_path, run, weights, behind):
    os.rename("fake.npz", "fake$_{.npz")
    words = ["real.npz", "fake$_{.npz", "--bootstrap", 3, "--json", "out.json", "--report", "new/report"]
    command = [sys.executable, ROOT / "scripts/evaluate.py", *words, "--features", weights, "--device", "cpu"]
    expected, more = LOCALES.get(behind, ([], {}))
    if behind == "utf-8":  # and a matplotlibrc that asks for programs that may not be there
        (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: gtk4agg\n")
    out, into = os.pipe()
    if behind == "gone reader":
        os.close(out)
    stdout = os.open("/dev/full", os.O_WRONLY) if behind == "full disk" else into
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(list(map(str, command)), stdout=stdout, stderr=subprocess.PIPE, env=environment)
    err = done.stderr.decode()
    os.close(into)
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["fd_digits"] > 0
    assert sorted(path.name for path in (tmp_path / "new/report").iterdir()) == OUTPUTS
    assert "Traceback" not in err and "Exception ignored" not in err
    if behind == "full disk":
        assert done.returncode == 1
        assert err.splitlines()[-1].startswith("error: standard output took no more text (No space left")
        return
    assert done.returncode == 0, err
    if behind != "gone reader":
        shown = os.read(out, 1 << 16).decode(behind if behind in LOCALES else "utf-8")
        assert all(text in shown for text in expected) and "fake$_{.npz" in shown


# Bad input


def test_notes_about_what_was_read(tmp_path, run):
    folder = write_pictures(tmp_path / "mixed", FAKE)
    Image.fromarray(FAKE[0]).convert("L").save(folder / "0000.png")
    Image.fromarray(FAKE[1]).convert("P").save(folder / "0001.png")
    Image.fromarray(FAKE[2]).save(folder / "0002.jpg")
    Image.fromarray(FAKE[2]).save(folder / "0002.gif")
    result = run("real.npz", "mixed")
    assert result.code == 0, result.err
    for note in ("grey, converted", "palette, converted", "JPEG, whose compression"):
        assert f"note: mixed: 1 of 121 images: {note}" in result.out
    assert "note: mixed: 1 file left out, not read as pictures: 1 .gif" in result.out


def test_images_not_more_than_features_are_warned_of(run):
    np.savez("few.npz", arr_0=FAKE[:64])
    result = run("real.npz", "few.npz")
    assert (result.code, result.out.count("singular covariance")) == (0, 1)
    note = "note: few.npz: 64 images are not more than the 64 pooled features: singular covariance"
    assert note in result.out


def test_an_unreadable_picture_is_named_or_counted(tmp_path, run):
    file = write_pictures(tmp_path / "torn", FAKE) / "0003.png"
    file.write_bytes(file.read_bytes()[:100])
    result = run("real.npz", "torn")
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: torn/0003.png is damaged")
    result = run("real.npz", "torn", "--skip_unreadable", "--json", "-")
    assert row(result)["num_images"] == 119 and "1 of 120 images: unreadable, skipped" in row(result)["notes"]


def test_a_reference_without_spatial_statistics_leaves_sfid_out(run, monkeypatch):
    monkeypatch.setattr(evaluate, "networks_of", lambda args: [TestNetwork()])
    np.savez("ref.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=REAL, protocol="test")
    result = run("ref.npz", "fake.npz")
    head, row = (re.split(" {2,}", line) for line in result.out.splitlines()[3:5])
    cells = dict(zip(head, row, strict=True))
    assert cells["sFD(test)"] == "n/a" != cells["FD(test)"]
    assert "note: reference: ref.npz has no spatial statistics" in result.out


def test_another_resolution_is_refused_unless_allowed(run, monkeypatch):
    np.savez("large.npz", arr_0=FAKE.repeat(2, axis=1))
    result = run("real.npz", "large.npz")
    said = (
        "the reference real.npz is 16x16 and large.npz is 32x16 (HxW): resize one, or pass --allow_resolution"
    )
    assert (result.code, result.err) == (1, f"error: {said}\n")
    full = DigitsFeatures.__call__
    monkeypatch.setattr(DigitsFeatures, "__call__", lambda self, x: full(self, x[:, :: len(x[0]) // 16]))
    allowed = run("real.npz", "large.npz", "--allow_resolution", "--json", "-")
    assert numbers(allowed) == pytest.approx(numbers(run("real.npz", "fake.npz", "--json", "-")))
    assert "resolution (32, 16) against (16, 16) of the reference" in row(allowed)["notes"]

"""scripts/evaluate.py: one command from files to numbers, the same for every kind of file, and one line for
each bad input.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call, load_script
from PIL import Image
from safetensors.torch import save_file

from evaluation.networks.digits import DigitsFeatures, DigitsNetwork

evaluate = load_script("evaluate")
RANDOM = np.random.RandomState(6)
REAL = RANDOM.randint(0, 256, (130, 16, 16, 3), dtype=np.uint8)
FAKE = (0.9 * REAL[RANDOM.randint(0, 40, 120)] + RANDOM.randint(0, 20, (120, 16, 16, 1))).astype(
    np.uint8
)  # of few of the real ones
NUMBERS = ["fd_digits", "sfd_digits", "is_digits", "precision", "recall", "density", "coverage", "kd_digits"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    state_dict = DigitsNetwork().state_dict()
    for name, tensor in state_dict.items():
        if tensor.ndim > 1:  # features of the size of 1
            state_dict[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(state_dict, path)
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


def save_folder(path, images, **more):
    path.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:04d}.png")
    return path


# What it answers


def test_a_table_to_stdout_and_the_rest_to_stderr(tmp_path, run):
    np.savez("other.npz", arr_0=FAKE[:110])
    result = run("real.npz", "--json", "out.json", "fake.npz", "other.npz")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert (
        lines[0].startswith("protocol digits")
        and "real.npz: 130 images, statistics of the images (130), sha256 " in lines[1]
    )
    assert [line.split()[:2] for line in lines[3:6]] == [
        ["set", "images"],
        ["fake.npz", "120"],
        ["other.npz", "110"],
    ]
    assert "FID" not in lines[3] and "image/s" in result.err and "image/s" not in result.out
    assert [measured["name"] for measured in json.loads((tmp_path / "out.json").read_text())["results"]] == [
        "fake.npz",
        "other.npz",
    ]


def test_json_to_stdout_sends_the_table_to_stderr(run):
    result = run("real.npz", "fake.npz", "--json", "-")
    assert row(result)["num_images"] == 120
    assert "protocol digits" in result.err


@pytest.fixture
def forms(tmp_path):
    """The same images as an npz, a folder, a zip, and the shards of an unfinished run."""

    def write(name, images):
        folder = save_folder(tmp_path / f"{name}-folder", images)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in folder.iterdir():
                archive.write(path, path.name)
        (tmp_path / f"{name}-run" / "shards").mkdir(parents=True)
        (tmp_path / f"{name}-run" / "run.json").write_text(json.dumps({"settings": {"num_samples": 500}}))
        for start in range(0, len(images), 50):
            part = images[start : start + 50]
            np.savez(
                tmp_path / f"{name}-run" / "shards" / f"{start:06d}-{start + len(part):06d}.npz", arr_0=part
            )
        return [f"{name}.npz", f"{name}-folder", f"{name}.zip", f"{name}-run"]

    return write


def test_npz_folder_zip_and_shards_give_the_same_numbers(run, forms):
    expected = None
    for real, fake in zip(forms("real", REAL), forms("fake", FAKE), strict=True):
        actual = numbers(run(real, fake, "--json", "-", "--batch_size", 33))
        expected = expected or actual
        assert actual == pytest.approx(expected, abs=1e-6, rel=0)
        assert all(actual.values())


def test_swapping_reference_and_samples_swaps_precision_and_recall(run):
    one, other = (
        numbers(run(*pair, "--json", "-")) for pair in (("real.npz", "fake.npz"), ("fake.npz", "real.npz"))
    )
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["precision"] > one["recall"] > 0
    assert one["fd_digits"] == pytest.approx(other["fd_digits"], rel=1e-9)


def test_a_collapsed_generator_is_precise_and_a_scattered_one_has_recall(run):
    narrow = (128 + RANDOM.randint(-2, 3, (100, 16, 16, 3))).astype(np.uint8)
    shades = np.linspace(0, 255, 100)[:, None, None, None] * np.ones((1, 16, 16, 3))
    np.savez("narrow.npz", arr_0=narrow)
    np.savez("wide.npz", arr_0=shades.astype(np.uint8))
    collapsed, scattered = (
        numbers(run(*pair, "--json", "-"))
        for pair in (("wide.npz", "narrow.npz"), ("narrow.npz", "wide.npz"))
    )
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1
    assert scattered["precision"] < 0.1 and scattered["recall"] > 0.9


def test_a_set_against_itself(run):
    itself = numbers(run("real.npz", "real.npz", "--json", "-"))
    assert abs(itself["fd_digits"]) < 1e-6 and abs(itself["sfd_digits"]) < 1e-6
    assert [itself[key] for key in ("precision", "recall", "density", "coverage")] == [1, 1, 1, 1]


def test_a_second_run_from_the_cache_extracts_nothing(run, monkeypatch):
    first = run("real.npz", "fake.npz", "--json", "-", "--cache", "kept")

    def refuse(*_):
        raise AssertionError("an image was extracted")

    monkeypatch.setattr(DigitsFeatures, "__call__", refuse)
    second = run(
        "real.npz", "fake.npz", "--json", "-", "--cache", "kept", "--precision_recall_dtype", "float16"
    )
    assert numbers(second)["fd_digits"] == numbers(first)["fd_digits"]
    assert (
        row(second)["provenance"]["precision_recall_dtype"]
        == "float16"
        != row(first)["provenance"]["precision_recall_dtype"]
    )


def test_bootstrap_and_infinity(run):
    measured = row(
        run("real.npz", "fake.npz", "--json", "-", "--bootstrap", 5, "--fid_infinity", "--seed", 2)
    )
    again = row(run("real.npz", "fake.npz", "--json", "-", "--bootstrap", 5, "--seed", 3))
    assert measured["fd_digits_bootstrap"]["value"] == measured["fd_digits"] == again["fd_digits"]
    assert measured["fd_digits_bootstrap"]["std"] != again["fd_digits_bootstrap"]["std"] > 0
    assert "fd_digits_infinity" in measured and "fd_digits_infinity" not in again


def test_compare_says_in_words_whether_two_sets_differ(run):
    np.savez("left.npz", arr_0=REAL[:65])
    np.savez("right.npz", arr_0=REAL[65:])
    result = run("real.npz", "--compare", "left.npz", "fake.npz", "--json", "out.json", "--bootstrap", 20)
    assert result.code == 0, result.err
    verdict = result.out.splitlines()[-1]
    assert verdict.startswith(
        "left.npz is nearer to the reference than fake.npz beyond the noise: FD(digits) of left.npz minus that of fake.npz is -"
    )
    assert "95% interval" in verdict and "20 resamples" in verdict
    with open("out.json") as file:
        content = json.load(file)
    rows = content["results"]
    assert [measured["name"] for measured in rows] == ["left.npz", "fake.npz"]
    # Measured on as many images of each, so not quite the difference of the two rows.
    assert content["comparison"]["difference"]["value"] == pytest.approx(
        rows[0]["fd_digits"] - rows[1]["fd_digits"], rel=0.1
    )
    assert "resamples, 65 images of each" in verdict or "resamples, 60 images of each" in verdict
    assert "the sets differ in their number of images" in result.out
    swapped = run("real.npz", "left.npz", "fake.npz", "--compare", "fake.npz", "left.npz", "--bootstrap", 20)
    assert (
        "left.npz is nearer to the reference than fake.npz beyond the noise" in swapped.out
        and "fake.npz minus that of left.npz" in swapped.out
    )
    alike = run("real.npz", "--compare", "left.npz", "right.npz")
    assert (
        "left.npz and right.npz do not differ beyond the noise" in alike.out and "200 resamples" in alike.out
    )


def test_a_report_has_a_grid_of_every_set(tmp_path, run):
    np.savez("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    result = run("real.npz", "fake.npz", "stats.npz", "--report", "new/report")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "new/report").iterdir()) == [
        *("bars.png", "grid1-fake.npz.png", "precision_recall.png", "report.json", "report.md")
    ]


def test_sets_of_one_name_are_told_apart(tmp_path, run):
    for seed in ("seed0", "seed1"):
        (tmp_path / seed).mkdir()
        np.savez(tmp_path / seed / "samples.npz", arr_0=FAKE[:90])
    result = run("real.npz", "seed0/samples.npz", "seed1/samples.npz", "fake.npz")
    assert [line.split()[0] for line in result.out.splitlines()[4:7]] == [
        "seed0/samples.npz",
        "seed1/samples.npz",
        "fake.npz",
    ]


# Bad input


def test_notes_about_what_was_read(tmp_path, run):
    folder = save_folder(tmp_path / "mixed", FAKE)
    Image.fromarray(FAKE[0]).convert("L").save(folder / "0000.png")
    Image.fromarray(FAKE[1]).convert("P").save(folder / "0001.png")
    Image.fromarray(FAKE[2]).save(folder / "0002.jpg")
    result = run("real.npz", "mixed")
    assert result.code == 0, result.err
    for note in (
        "1 of 121 images: grey, converted",
        "1 of 121 images: palette, converted",
        "1 of 121 images: JPEG, whose compression",
    ):
        assert f"note: mixed: {note}" in result.out


def test_images_not_more_than_features_are_warned_of(run):
    np.savez("few.npz", arr_0=FAKE[:64])
    result = run("real.npz", "few.npz")
    assert (result.code, result.out.count("singular covariance")) == (0, 2)
    assert (
        "note: few.npz: 64 images are not more than the 64 pooled features: singular covariance" in result.out
    )


def test_an_unreadable_picture_is_named_or_counted(tmp_path, run):
    folder = save_folder(tmp_path / "torn", FAKE)
    (folder / "0003.png").write_bytes((folder / "0003.png").read_bytes()[:100])
    result = run("real.npz", "torn")
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: torn/0003.png is damaged")
    result = run("real.npz", "torn", "--skip_unreadable", "--json", "-")
    assert row(result)["num_images"] == 119 and "1 of 120 images: unreadable, skipped" in row(result)["notes"]


def test_a_reference_without_spatial_statistics_leaves_sfid_out(run):
    np.savez("ref.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=REAL, protocol="digits")
    result = run("ref.npz", "fake.npz")
    cells = dict(zip(*(line.split() for line in result.out.splitlines()[3:5]), strict=True))
    assert cells["sFD(digits)"] == "n/a" != cells["FD(digits)"]
    assert "note: reference: ref.npz has no spatial statistics" in result.out


def test_another_resolution_is_refused_unless_allowed(run, monkeypatch):
    np.savez("large.npz", arr_0=FAKE.repeat(2, axis=1))
    result = run("real.npz", "large.npz")
    assert (result.code, result.err) == (
        1,
        "error: the reference real.npz is 16x16 and large.npz is 32x16 (HxW): resize one, or pass --allow_resolution\n",
    )
    call_network = DigitsFeatures.__call__
    monkeypatch.setattr(
        DigitsFeatures,
        "__call__",
        lambda self, images: call_network(self, images[:, :: len(images[0]) // 16]),
    )
    allowed = run("real.npz", "large.npz", "--allow_resolution", "--json", "-")
    assert numbers(allowed) == pytest.approx(numbers(run("real.npz", "fake.npz", "--json", "-")))
    assert any(
        "resolution (32, 16) against (16, 16) of the reference" in note for note in row(allowed)["notes"]
    )


def stats(mu=None, sigma=None, **more):
    return {"mu": np.zeros(64) if mu is None else mu, "sigma": np.eye(64) if sigma is None else sigma, **more}


def object_array():
    array = np.empty(8, object)
    array[:] = "x"
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": FAKE[:0]}, "bad.npz holds 0 images"),
        (
            {"arr_0": FAKE[:1]},
            "bad.npz holds 1 image; the metrics look at 5 neighbours of each: give 6 or more",
        ),
        (
            {"arr_0": FAKE[:5]},
            "bad.npz holds 5 images; the metrics look at 5 neighbours of each: give 6 or more",
        ),
        ({"arr_0": object_array()}, "bad.npz: arr_0 holds Python objects, which are refused"),
        ({"arr_0": FAKE.astype(np.float32)}, "bad.npz: arr_0 is float32 (120, 16, 16, 3)"),
        ({"images": FAKE}, "bad.npz has no arr_0, which holds the images in an npz; it holds images"),
        (stats(mu=object_array()), "mu or sigma is damaged, or holds Python objects"),
        (stats(protocol=object_array()), "in Python objects, which are refused"),
        (stats(mu=np.full(64, np.nan)), "mu holds 64 NaN or infinite entries"),
        (stats(sigma=np.eye(64) + np.eye(64, k=1)), "sigma is not symmetric"),
        (stats(sigma=np.eye(63)), "mu has shape (64,) and sigma (63, 63)"),
        (stats(mu=np.zeros(10), sigma=np.eye(10)), "these are of different networks"),
        (stats(mu_s=np.zeros(112), protocol="digits"), "bad.npz has no sigma_s"),
        (
            stats(protocol="adm"),
            "bad.npz holds statistics of the protocol adm, not digits, and no images (arr_0)",
        ),
        (
            stats(mu_s=np.zeros(112), sigma_s=np.eye(112)),
            "bad.npz holds statistics of the protocol adm, not digits, and no images (arr_0)",
        ),
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
    assert result.code == 1
    assert (
        result.err
        == "error: a comparison resamples images; stats.npz holds statistics, give its images instead\n"
    )


def test_a_truncated_npz_and_a_file_that_is_none(run):
    with open("fake.npz", "rb") as file:
        content = file.read()
    for name, data, message in (
        ("cut.npz", content[:5000], "truncated or not an npz"),
        ("set.txt", b"text", "cannot read images from set.txt"),
    ):
        with open(name, "wb") as file:
            file.write(data)
        result = run("real.npz", name)
        assert result.code == 1 and message in result.err and result.err.count("\n") == 1


def picture(mode):
    return {
        "alpha": Image.fromarray(FAKE[0]).convert("RGBA"),
        "16 bits": Image.fromarray(np.zeros((16, 16), np.uint16)),
    }[mode]


@pytest.mark.parametrize("mode", ["alpha", "16 bits"])
def test_alpha_and_16_bits_are_refused_by_name(tmp_path, run, mode):
    folder = save_folder(tmp_path / "pictures", FAKE[:20])
    picture(mode).save(folder / "0007.png")
    result = run("real.npz", "pictures")
    assert result.code == 1 and "pictures/0007.png has " in result.err and mode in result.err.splitlines()[-1]


def test_pictures_of_two_sizes_are_refused_by_their_names(tmp_path, run):
    folder = save_folder(tmp_path / "pictures", FAKE[:20])
    Image.fromarray(FAKE[0][:8]).save(folder / "0007.png")
    result = run("real.npz", "pictures")
    assert result.code == 1
    assert result.err.splitlines()[-1].endswith(
        "images of different sizes: 0000.png is 16x16, 0007.png is 8x16 (HxW)"
    )


def test_an_empty_folder_and_nothing_at_all(tmp_path, run):
    (tmp_path / "empty").mkdir()
    for name, message in (("empty", "empty holds 0 images"), ("gone", "there is nothing at gone")):
        result = run("real.npz", name)
        assert result.code == 1 and message in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["fake.npz", "--bootstrap", "1"], 1, "--bootstrap 1: an error bar needs at least 2 resamples"),
        (["fake.npz", "--seed", "-1"], 1, "--seed -1 must be between"),
        (["fake.npz", "--batch_size", "0"], 1, "the batch size is 0"),
        (["fake.npz", "--json", "gone/out.json"], 1, "--json gone/out.json: there is no such folder"),
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
    assert (result.code, result.err) == (
        1,
        'error: --report draws with matplotlib, which is not installed: pip install -e ".[plot]"\n',
    )
    assert not (tmp_path / "report").exists()


def test_inception_weights_that_are_not_there(run, tmp_path):
    result = call(evaluate.main, ["real.npz", "fake.npz", "--weights", "none.pth"])
    assert result.code == 1 and result.err.startswith(
        "error: no Inception weights at none.pth; the published file pt_inception-2015"
    )


# --selfcheck

TENSORFLOW = {
    "inception_score": 141.4767,
    "fid": 2.973289,
    "sfid": 5.094564,
    "precision": 0.78138,
    "recall": 0.5929,
}
PYTORCH_PORT = {
    "inception_score": 141.4781,
    "fid": 2.973283,
    "sfid": 5.093504,
    "precision": 0.78042,
    "recall": 0.5906,
}


def test_both_published_implementations_pass_the_selfcheck():
    for metrics in (TENSORFLOW, PYTORCH_PORT):
        lines = evaluate.compare_with_published(metrics)
        assert len(lines) == 5 and all(line.endswith("agrees") and "tolerance" in line for line in lines)


@pytest.mark.parametrize("metric", TENSORFLOW)
@pytest.mark.parametrize("wrong", [1.01, 0.99, np.nan, None])
def test_a_figure_one_percent_off_fails_the_selfcheck(metric, wrong):
    metrics = {**PYTORCH_PORT, metric: wrong and TENSORFLOW[metric] * wrong}
    (line,) = [line for line in evaluate.compare_with_published(metrics) if line.endswith("DIFFERS")]
    assert line.startswith(f"{metric}: ")


@pytest.fixture
def no_downloads(tmp_path, monkeypatch):
    """An empty folder in the place of pretrained_models, and the names that were asked of
    scripts/download.py, which finds no network.
    """
    asked = []
    monkeypatch.setattr(evaluate, "PRETRAINED_DIR", tmp_path)
    monkeypatch.setattr(evaluate.subprocess, "call", lambda command: asked.extend(command[2:]))
    return asked


REFERENCE, SAMPLES = "VIRTUAL_imagenet128_labeled.npz", "admnet_guided_imagenet128.npz"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"


def test_the_selfcheck_fetches_what_is_missing_and_says_in_one_line_what_it_could_not_have(
    tmp_path, no_downloads
):
    result = call(evaluate.main, ["--selfcheck"])
    assert no_downloads == [REFERENCE, SAMPLES, INCEPTION]
    line = f"--selfcheck needs files that are not in {tmp_path}: `python scripts/download.py {REFERENCE} {SAMPLES} {INCEPTION}`"
    assert (result.code, result.out, result.err) == (1, "", f"error: {line}\n")


def test_the_selfcheck_fetches_nothing_that_is_there(tmp_path, no_downloads):
    (tmp_path / REFERENCE).touch()
    missing = call(evaluate.main, ["--selfcheck", "--weights", tmp_path / "given.pth"])
    assert (
        no_downloads == [] and missing.code == 1 and "given.pth" in missing.err
    )  # before gigabytes are fetched
    (tmp_path / "given.pth").touch()
    result = call(evaluate.main, ["--selfcheck", "--weights", tmp_path / "given.pth"])
    assert no_downloads == [SAMPLES]
    assert result.code == 1 and REFERENCE not in result.err and INCEPTION not in result.err


def test_the_selfchecks_files_are_known_to_the_download_script():
    known = json.loads((ROOT / "pretrained_models/files.json").read_text())["files"]
    assert {REFERENCE, SAMPLES, INCEPTION} <= set(known)


def test_the_selfcheck_evaluates_the_pair_and_its_exit_code_says_whether_it_agrees(run, weights, monkeypatch):
    measured = numbers(run("real.npz", "fake.npz", "--json", "-"))
    names = {
        "inception_score": "is_digits",
        "fid": "fd_digits",
        "sfid": "sfd_digits",
        "precision": "precision",
        "recall": "recall",
    }
    figures = {metric: (measured[name], 1e-6) for metric, name in names.items()}
    monkeypatch.setattr(
        evaluate, "find_published", lambda given: [Path("real.npz"), Path("fake.npz"), weights]
    )
    monkeypatch.setattr(
        evaluate, "feature_network", lambda weights, device: DigitsFeatures(weights, device)
    )  # in Inception's place
    monkeypatch.setattr(evaluate, "PUBLISHED_FIGURES", figures)
    result = call(evaluate.main, ["--selfcheck"])
    assert result.code == 0 and result.out.count("agrees") == 5, result.err
    monkeypatch.setitem(figures, "fid", (measured["fd_digits"] + 1e-5, 1e-6))
    result = call(evaluate.main, ["--selfcheck"])
    assert result.code == 1 and result.out.count("DIFFERS") == 1
    assert result.err.endswith("error: the self-check failed: see the figures that differ\n")

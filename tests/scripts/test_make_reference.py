"""scripts/make_reference.py: the published layout, a seeded subset, no file that is half written or silently
replaced.
"""

import json

import numpy as np
import pytest
from helpers import call, load_script
from pictures_util import TestNetwork, digits_weights, write_pictures, write_zip
from safetensors.torch import save_file

from evaluation.metrics import metric_key
from evaluation.networks.digits import DigitsFeatures

make_reference = load_script("make_reference")
evaluate = load_script("evaluate")
IMAGES = np.random.RandomState(4).randint(0, 256, (300, 16, 16, 3), dtype=np.uint8)
ABOUT = {"arr_0", "protocol", "features", "weights_sha256", "count"}


@pytest.fixture
def weights(tmp_path):
    save_file(digits_weights(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    return tmp_path / "weights.safetensors"


def make(folder, weights, *flags, images="images.npz"):
    return call(make_reference.main, [folder / images, folder / "ref.npz", "--features", weights, *flags])


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("spatial", [False, True])
def test_the_statistics_are_those_of_all_images_and_the_subset_is_in_order(
    tmp_path, weights, monkeypatch, spatial
):
    network = TestNetwork() if spatial else DigitsFeatures(weights)
    monkeypatch.setattr(make_reference, "network_of", lambda args: network)
    result = make(tmp_path, weights, "--num_images", 100, "--batch_size", 7)
    said = f"{tmp_path / 'ref.npz'}: statistics of 300 images, 100 of them inside\n"
    assert (result.code, result.out) == (0, said)
    features, written = network(IMAGES), arrays_of(tmp_path / "ref.npz")
    kinds = {"": "pool3", "_s": "spatial"} if spatial else {"": "pool3"}
    assert set(written) == ABOUT | {name + end for end in kinds for name in ("mu", "sigma")}
    for end, key in kinds.items():
        x = features[key].astype(np.float64)
        assert written[f"mu{end}"].dtype == written[f"sigma{end}"].dtype == np.float64
        np.testing.assert_allclose(written[f"mu{end}"], x.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(written[f"sigma{end}"], np.cov(x, rowvar=False), rtol=1e-4, atol=1e-5)
    about = [str(written[key]) for key in ("protocol", "features", "weights_sha256", "count")]
    assert about == [network.protocol, network.name, network.sha256, "300"]
    subset = written["arr_0"]
    assert subset.shape == (100, 16, 16, 3) and subset.dtype == np.uint8
    places = [int(np.flatnonzero((image == IMAGES).all(axis=(1, 2, 3)))[0]) for image in subset]
    assert places == sorted(set(places)) and places != list(range(100))


def test_the_seed_chooses_the_subset_and_a_small_set_is_kept_whole(tmp_path, weights):
    subsets = []
    for seed in (0, 0, 1):
        assert make(tmp_path, weights, "--num_images", 20, "--seed", seed, "--overwrite").code == 0
        subsets.append(arrays_of(tmp_path / "ref.npz")["arr_0"])
    assert np.array_equal(subsets[0], subsets[1]) and not np.array_equal(subsets[0], subsets[2])
    assert make(tmp_path, weights, "--overwrite").code == 0
    assert np.array_equal(arrays_of(tmp_path / "ref.npz")["arr_0"], IMAGES)


def test_a_folder_and_a_zip_give_the_same_reference(tmp_path, weights):
    write_zip(tmp_path / "pictures.zip", write_pictures(tmp_path / "pictures", IMAGES))
    expected = None
    for images in ("images.npz", "pictures", "pictures.zip"):
        assert make(tmp_path, weights, "--num_images", 20, "--overwrite", images=images).code == 0
        actual = arrays_of(tmp_path / "ref.npz")
        expected = expected or actual
        assert actual.keys() == expected.keys()
        assert all(np.array_equal(actual[key], expected[key]) for key in expected)


def test_damaged_pictures_stop_it_or_are_skipped_and_told(tmp_path, weights):
    (write_pictures(tmp_path / "folder", IMAGES[:20]) / "0007.png").write_bytes(b"not a picture")
    refused = make(tmp_path, weights, images="folder")
    assert refused.code == 1 and "0007.png" in refused.err and not (tmp_path / "ref.npz").exists()
    skipped = make(tmp_path, weights, "--skip_unreadable", images="folder")
    said = f"{tmp_path / 'ref.npz'}: statistics of 19 images, 19 of them inside\n"
    assert (skipped.code, skipped.out) == (0, said) and "1 of 20 images" in skipped.err


@pytest.mark.parametrize("count", [300, 40])  # with more and with fewer images than features
def test_a_set_against_the_reference_made_from_it_is_perfect(tmp_path, weights, count):
    np.savez(tmp_path / "images.npz", arr_0=IMAGES[:count])
    assert make(tmp_path, weights).code == 0
    words = [tmp_path / "ref.npz", tmp_path / "images.npz", "--features", weights, "--json", "-"]
    result = call(evaluate.main, words)
    assert result.code == 0, result.err
    row = json.loads(result.out)["results"][0]
    assert row["provenance"]["reference"]["statistics"] == "in the file"
    assert [row[key] for key in ("fd_digits", "precision", "recall", "density", "coverage")] == [
        0,
        1,
        1,
        1,
        1,
    ]


def test_an_existing_file_is_kept_unless_told(tmp_path, weights):
    (tmp_path / "ref.npz").write_bytes(b"precious")
    result = make(tmp_path, weights)
    said = f"error: {tmp_path / 'ref.npz'} exists: choose another name, or pass --overwrite\n"
    assert (result.code, result.err) == (1, said)
    assert (tmp_path / "ref.npz").read_bytes() == b"precious"


def test_a_failure_leaves_no_file(tmp_path, weights, monkeypatch):
    def fail(*_):
        raise ValueError("the disk is on fire")

    monkeypatch.setattr(make_reference, "pick_images", fail)
    result = make(tmp_path, weights)
    assert result.code == 1 and result.err.endswith("error: the disk is on fire\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npz", "weights.safetensors"]


def test_bad_input_ends_in_one_line(tmp_path, weights):
    np.savez(tmp_path / "five.npz", arr_0=IMAGES[:5])
    cases = [
        ({"images": "five.npz"}, [], "five.npz holds 5 images"),
        ({"images": "gone"}, [], "there is nothing at"),
        ({}, ["--num_images", "5"], "--num_images 5: the metrics need at least 6"),
        ({}, ["--seed", "-1"], "--seed -1 must be between 0"),
        ({}, ["--protocol", "adm"], "--protocol and --weights are Inception's"),
        ({}, ["--batch_size", "0"], "the batch size is 0"),
    ]
    for place, flags, message in cases:
        result = make(tmp_path, weights, *flags, **place)
        assert (result.code, result.out) == (1, "") and message in result.err, result.err
        assert result.err.startswith("error: ") and result.err.count("\n") == 1
    for out, message in (("ref.npy", "must end in .npz"), ("no/ref.npz", "there is no such folder")):
        result = call(make_reference.main, [tmp_path / "images.npz", tmp_path / out, "--features", weights])
        assert result.code == 1 and message in result.err
    assert call(make_reference.main, [tmp_path / "images.npz"]).code == 2


def test_features_beyond_float16_are_not_kept(tmp_path, weights):
    own = "from torch import nn\nclass Large(nn.Flatten):\n    def forward(self, x):\n"
    (tmp_path / "own.py").write_text(own + "        return 1e6 * super().forward(x)[:, :9]\n")
    result = make(tmp_path, f"{tmp_path}/own.py:Large", "--features_only")
    assert result.code == 1 and "keeps float16, and a feature is 1e+06: keep the images" in result.err
    assert not (tmp_path / "ref.npz").exists()


def test_features_in_place_of_images_give_the_same_metrics(tmp_path, weights):
    """To within float16; the distance, of the statistics, to the bit."""
    np.savez(tmp_path / "samples.npz", arr_0=255 - IMAGES[:80] // 2)
    results = {}
    for kind, flags in {"images": (), "features": ("--features_only",)}.items():
        assert make(tmp_path, weights, "--num_images", 300, "--overwrite", *flags).code == 0
        reference, report = tmp_path / "ref.npz", tmp_path / f"{kind}.json"
        words = [reference, tmp_path / "samples.npz", "--features", weights, "--json", report]
        assert call(evaluate.main, words).code == 0
        results[kind] = json.loads(report.read_text())["results"][0]
    assert ABOUT - {"arr_0"} < set(arrays_of(tmp_path / "ref.npz"))
    assert "arr_0" not in arrays_of(tmp_path / "ref.npz")
    distance = metric_key("fid", "digits")
    assert results["features"][distance] == results["images"][distance]
    for metric in ("precision", "recall", "density", "coverage"):
        assert results["features"][metric] == pytest.approx(results["images"][metric], abs=0.02), metric


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((20, 5), np.float16), "pool3 has 5 features, its statistics 64"),
        (np.ones(64, np.float16), r"pool3 (64,)"),
        (np.full((20, 64), np.nan, np.float16), "pool3 holds NaN or infinity"),
        (np.ones((3, 64), np.float16), "3 images"),
        (np.array([None]), "pool3 or resolution is absent"),
    ],
)
def test_features_that_cannot_be_are_refused(tmp_path, weights, array, said):
    make(tmp_path, weights, "--features_only")
    np.savez(tmp_path / "bad.npz", **{**arrays_of(tmp_path / "ref.npz"), "pool3": array})
    words = [tmp_path / "bad.npz", tmp_path / "images.npz", "--features", weights]
    result = call(evaluate.main, words)
    assert result.code == 1 and said in result.err

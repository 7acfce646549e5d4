"""scripts/evaluate.py: several feature networks, training images to compare with, and a judge."""

import json

import numpy as np
import pytest
from helpers import ROOT, call, load_script
from judging import labels_of
from pictures_util import digits_weights, write_pictures
from safetensors.torch import save_file

evaluate = load_script("evaluate")
RANDOM = np.random.RandomState(6)
REAL, TRAIN, FRESH = RANDOM.randint(0, 256, (3, 90, 16, 16, 3), dtype=np.uint8)
FAKE = np.concatenate([TRAIN[:30][::-1], FRESH[:50]])  # a third are copies
OWN = """
from torch import nn

def pixels():
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the script in a folder of npz files, weights.safetensors of the digits and own.py."""
    monkeypatch.chdir(tmp_path)
    save_file(digits_weights(), "weights.safetensors")
    (tmp_path / "own.py").write_text(OWN)
    for name, images in {"real": REAL, "fake": FAKE, "train": TRAIN}.items():
        np.savez(f"{name}.npz", arr_0=images, arr_1=np.arange(len(images)) % 10)
    return lambda *words: call(evaluate.main, [*words, "--device", "cpu"])


def rows(result):
    assert result.code == 0, result.err
    return json.loads(result.out)["results"]


def test_two_networks_give_what_each_gives(tmp_path, run):
    words, each = (
        ("real.npz", "fake.npz", "train.npz", "--features"),
        ("weights.safetensors", "own.py:pixels"),
    )
    result = run(*words, ",".join(each), "--json", "out.json", "--report", "page")
    assert result.code == 0, result.err
    both = json.loads((tmp_path / "out.json").read_text())["results"]
    assert both == [row for network in each for row in rows(run(*words, network, "--json", "-"))]
    assert all(row["fd_digits"] > 0 for row in both[:2]) and all(row["fd_own.pixels"] > 0 for row in both[2:])
    text = (tmp_path / "page/report.md").read_text()
    assert "| fake.npz | FD(digits) / FD(own.pixels) |" in text and "bars-own.pixels.png" in text
    assert "WARNING" not in text + result.out and result.out.count("protocol ") == 2
    assert "FD(digits)" in result.out and "FD(own.pixels)" in result.out


def test_copies_of_training_images_are_counted_and_shown(tmp_path, run):
    words = (
        "real.npz",
        "fake.npz",
        "--against",
        "train.npz",
        "--features",
        "weights.safetensors",
        "--json",
        "-",
    )
    (row,) = rows(run(*words, "--report", "page"))
    assert row["copies"] == pytest.approx(30 / 80, abs=0.05) and row["nearer"] > 0.6
    assert {(i, j) for i, j, _ in row["nearest_pairs"]} <= {(i, 29 - i) for i in range(30)}
    assert (tmp_path / "page/nearest1-fake.npz-digits-.png").is_file()
    assert "## Nearest training images" in (tmp_path / "page/report.md").read_text()
    refused = run("train.npz", "fake.npz", "--against", "train.npz", "--features", "weights.safetensors")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.splitlines()[-1].startswith(
        "error: --against train.npz: 90 of 90 images of the reference"
    )


def test_pairs_are_picked_in_their_order():
    class Numbered:
        def pick(self, indices):
            assert (np.diff(indices) > 0).all()
            return 10 * indices

    assert list(evaluate.pick_each(Numbered(), (5, 2, 5, 0))) == [50, 20, 50, 0]


def test_a_judge_says_how_often_the_class_is_found(tmp_path, run):
    digits(tmp_path)
    words = ("real.npz", "digits.npz", "fake.npz", "--features", "weights.safetensors")
    judge = ("--judge", "digits_judge", "--num_classes", 10)
    judged = run(*words, *judge, "--json", "out.json", "--report", "page")
    assert judged.code == 0, judged.err
    real, fake = (row["judgement"] for row in json.loads((tmp_path / "out.json").read_text())["results"])
    assert real["judge"] == "digits_judge" and real["accuracy"] > 0.9 > 0.5 > fake["accuracy"]
    hits = sum(accuracy * count for accuracy, count in real["by_class"].values())
    assert hits == pytest.approx(60 * real["accuracy"])
    assert "digits_judge on digits.npz: accuracy" in judged.out
    assert "## Accuracy by class" in (tmp_path / "page/report.md").read_text()


def digits(folder):
    """Write 60 of the shipped held-out digits, once as an npz, once as pictures with a dataset.json."""
    with np.load(ROOT / "pretrained_models/digits/held_out.npz") as file:
        images, labels = file["arr_0"][:60], file["arr_1"][:60]
    np.savez(folder / "digits.npz", arr_0=images, arr_1=labels)
    pictures = write_pictures(folder / "pictures", images)
    listed = [[f"{i:04d}.png", int(label)] for i, label in enumerate(labels)]
    (pictures / "dataset.json").write_text(json.dumps({"labels": listed[::-1]}))
    return labels


def test_labels_come_from_an_npz_or_a_dataset_json(tmp_path):
    labels = digits(tmp_path)
    for name in ("digits.npz", "pictures"):
        assert np.array_equal(labels_of(tmp_path / name), labels)


FLAGS = ["--judge", "digits_judge", "--features", "weights.safetensors"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "digits,digits"], "--features 'digits,digits' must name networks, each once"),
        (["--features", "digits,"], "--features 'digits,' must name networks, each once"),
        (
            ["--features", "digits,own.py:pixels", "--weights", "w.pth"],
            "Inception's, which --features does not",
        ),
        (
            ["--features", "digits,own.py:pixels", "--compare", "real.npz", "train.npz"],
            "--compare takes one netw",
        ),
        (["--features", "digits", "--judge_weights", "w.pth"], "are of the judge: name it by --judge"),
        (["--features", "digits", "--num_classes", "10"], "are of the judge: name it by --judge"),
        (
            ["--features", "digits", "--against", "stats.npz"],
            "--against compares images, and stats.npz holds",
        ),
        (["--features", "digits", "--judge", "nobody"], "unknown classifier 'nobody'"),
        (FLAGS, "--judge digits_judge with --num_classes 1000: "),
        ([*FLAGS, "--num_classes", "5"], "classifier.weight is [10, 112] in the file but [5, 112]"),
        (["short.npz", *FLAGS, "--num_classes", "10"], "short.npz has 2 labels for 90 images"),
        (
            ["bare.npz", *FLAGS, "--num_classes", "10"],
            "--judge needs the labels of bare.npz: give an npz with",
        ),
        (
            ["wrong.npz", *FLAGS, "--num_classes", "10"],
            "wrong.npz has label 11, and --num_classes 10 allows 0 to 9",
        ),
    ],
)
def test_wrong_flags(run, flags, message):
    np.savez("bare.npz", arr_0=FRESH)
    np.savez("wrong.npz", arr_0=FRESH, arr_1=np.full(90, 11))
    np.savez("short.npz", arr_0=FRESH, arr_1=[1, 2])
    np.savez("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    result = run("real.npz", "fake.npz", *flags)
    assert (result.code, result.out) == (1, "") and message in result.err, result.err
    assert len(result.err.splitlines()) == 1


def test_clip_has_a_cmmd(tmp_path, run):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=4)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "saved")
    words = ("real.npz", "fake.npz", "--features", "clip:saved")
    (row,) = rows(run(*words, "--json", "-"))
    assert row["cmmd"] > 0 and row["fd_clip"] > 0 and row["protocol"].startswith("clip-16, clip ")
    assert "CMMD" in run(*words).out

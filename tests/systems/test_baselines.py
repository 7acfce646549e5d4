"""The presets of the paper's baselines, CIFAR-10's networks that ship, and the script that compares them."""

import json

import numpy as np
import problems
import pytest
from helpers import call, load_samples, load_script
from samplers import manifest

from classifiers import load_classifier
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.flags.trained import NETWORKS

SAMPLE, COMPARE = load_script("classifier_sample"), load_script("compare_cifar10")
CIFAR10 = PRETRAINED_DIR / "cifar10"
# Of one step: evaluations of networks, and passes of a classifier.
COSTS = {
    "unguided": (1, 0),
    "noisy": (1, 1),
    "noisy-ddim": (1, 1),
    "cfg": (2, 0),
    "autoguidance": (2, 0),
}


def sample(folder, preset, *flags):
    """The images of a run of two."""
    words = ("--preset", preset, "--steps", 1, "--num_samples", 2, "--out", folder, *flags)
    result = call(SAMPLE.main, words)
    assert result.code == 0, result.err
    assert "WARNING" not in (folder / "log.txt").read_text()  # of a flag unlike the network's training
    return load_samples(folder)[0]


@pytest.mark.parametrize("problem", ["digits", "cifar10"])
def test_each_baseline_costs_what_it_is_and_changes_the_images(problem, tmp_path):
    images = {name: sample(tmp_path / name, f"{problem}-{name}") for name in COSTS}
    for name, (evaluations, passes) in COSTS.items():
        totals = manifest(tmp_path / name)["totals"]
        assert totals["network_evaluations"] == 2 * evaluations, name
        assert totals.get("classifier_passes", 0) == 2 * passes, name
    others = [name for name in COSTS if name != "unguided"]
    assert all((images[name] != images["unguided"]).any() for name in others)


def test_the_worse_network_of_autoguidance_has_its_own_architecture(tmp_path):
    """At scale 0 it alone samples."""
    own = {key: value for key, value in NETWORKS["cifar10/small.safetensors"].items() if "channels" in key}
    alone = [word for key, value in own.items() for word in (f"--{key}", value)]
    alone += ["--model_path", CIFAR10 / "small.safetensors", "--cfg_scale", 1]
    mixed = sample(tmp_path / "mixed", "cifar10-autoguidance", "--guide_scale", 0)
    assert (mixed == sample(tmp_path / "alone", "cifar10-cfg", *alone)).all()


@pytest.mark.parametrize("folder", ["digits", "digits_dit", "cifar10"])
def test_what_ships_is_what_its_hashes_say(folder):
    recorded = json.loads((PRETRAINED_DIR / folder / "hashes.json").read_text())
    assert recorded
    for name, row in recorded.items():
        path = PRETRAINED_DIR / folder / name
        assert (sha256(path), path.stat().st_size) == (row["sha256"], row["bytes"]), name


def test_of_cifar10s_images_only_statistics_and_features_ship():
    with np.load(CIFAR10 / "reference.npz", allow_pickle=False) as file:
        assert set(file.files) == {
            "mu", "sigma", "pool3", "resolution", "protocol", "features", "weights_sha256", "count"
        }  # fmt: skip
    recorded = json.loads((CIFAR10 / "training.json").read_text())
    networks = {path.stem for path in CIFAR10.glob("*.safetensors")}
    assert recorded.keys() == networks and all("--data_dir" in row["command"] for row in recorded.values())


def test_weights_that_ship_go_by_a_name_of_their_own(tmp_path):
    for name, depth in (("CIFAR10_20K", 20), ("CIFAR10_20K", 56), ("DIGITS", 20)):
        load_classifier(f"cifar_resnet{depth}", name, num_classes=10, softplus_beta=10, image_size=32)
    with pytest.raises(FileNotFoundError, match="CIFAR10_21K"):
        load_classifier("cifar_resnet20", "CIFAR10_21K", num_classes=10)


def test_the_rows_of_cifar10_are_its_presets_from_the_same_noise(tmp_path, monkeypatch):
    for row in COMPARE.ROWS.values():
        monkeypatch.setitem(row, "steps", 1)
    monkeypatch.setattr(problems, "RESAMPLES", 2)
    result = call(COMPARE.main, ("--num_samples", 6, "--seeds", 3, "--out", tmp_path))
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "comparison.json").read_text())
    costs = {row["name"]: (row["evaluations"]["mean"], row["classifier_passes"]["mean"]) for row in rows}
    assert list(costs.values()) == [(1, 0), (1, 1), (2, 0), (1, 1)]
    assert all(row["fd_cifar10"]["mean"] > 0 for row in rows) and "FD(cifar10)" in result.out
    assert (tmp_path / "comparison.png").exists()
    assert {row["preset"] for row in COMPARE.ROWS.values()} <= PRESETS.keys()

"""The digits features, the network that a name stands for, and what a user may say about it."""

import dataclasses

import numpy as np
import pytest
import torch
from pictures_util import digits_weights
from safetensors.torch import save_file

from evaluation.networks import SHIPPED, NetworkOptions, feature_network
from evaluation.networks.cifar import CIFARFeatures, cifar_network
from evaluation.networks.digits import DigitsFeatures, DigitsNetwork
from guided_diffusion.files.pretrained import PRETRAINED_DIR

IMAGES = np.random.RandomState(3).randint(0, 256, (37, 16, 16, 3), dtype=np.uint8)


def test_digits_features_are_those_of_the_network_from_a_dict_or_a_file(tmp_path):
    weights = digits_weights()
    network = DigitsFeatures(weights)
    result = network(torch.from_numpy(IMAGES))
    assert tuple(result) == DigitsFeatures.outputs == ("pool3", "logits")
    assert {key: (value.shape, value.dtype) for key, value in result.items()} == {
        "pool3": ((37, 64), np.float32),
        "logits": ((37, 10), np.float32),
    }
    trained = DigitsNetwork().eval()
    trained.load_state_dict(weights)
    with torch.no_grad():
        logits = trained(torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.abs(result["logits"] - logits.numpy()).max() <= 1e-6
    assert np.abs(result["pool3"] @ weights["fc.weight"].numpy().T - result["logits"]).max() <= 1e-5

    save_file(weights, tmp_path / "features.safetensors")
    named = feature_network(str(tmp_path / "features.safetensors"))
    assert np.array_equal(named(IMAGES)["pool3"], result["pool3"])
    with pytest.raises(ValueError, match="does not fit the architecture flags"):
        CIFARFeatures(weights)
    for wrong in (IMAGES[:, :8], IMAGES.astype(np.float32)):
        with pytest.raises(ValueError, match=r"need uint8 images \(N, 16, 16, 3\), not"):
            network(wrong)


def test_cifars_features_are_found_by_the_width_of_their_file(tmp_path):
    judge = cifar_network().eval()
    save_file(judge.state_dict(), tmp_path / "judge.safetensors")
    network = feature_network(str(tmp_path / "judge.safetensors"))
    images = np.repeat(np.repeat(IMAGES, 2, axis=1), 2, axis=2)
    result = network(images)
    assert (network.name, result["pool3"].shape, result["logits"].shape) == ("cifar10", (37, 256), (37, 10))
    with torch.no_grad():
        logits = judge(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
    assert np.abs(result["logits"] - logits.numpy()).max() <= 1e-6


@pytest.mark.parametrize("name", SHIPPED)
def test_features_that_ship(name):
    network = feature_network(name)
    result = network(np.zeros((2, network.size, network.size, 3), np.uint8))
    assert result["pool3"].shape == (2, 64 if "digits" in name else 256)
    assert network.name == name and result["logits"].shape == (2, 10)


def test_the_digits_second_network_knows_digits():
    with np.load(PRETRAINED_DIR / "digits/held_out.npz", allow_pickle=False) as held_out:
        images, labels = held_out["arr_0"], held_out["arr_1"]
    one, other = (feature_network(name)(images) for name in ("digits", "digits_mixer"))
    assert (other["logits"].argmax(1) == labels).mean() > 0.98
    assert np.abs(np.corrcoef(one["pool3"].T, other["pool3"].T)[:64, 64:]).max() < 0.99  # not the same


OWN = """
import torch

class Means(torch.nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.keep = keep

    def forward(self, x):
        return (x.mean(dim=(2, 3)) * self.scale)[:, : self.keep]

def colours():
    return Means(3)

def maps():
    network = Means(3)
    network.forward = lambda x: x
    return network

def nothing():
    return "colours"
"""


def test_a_network_of_ones_own(tmp_path):
    file = tmp_path / "mean.py"
    file.write_text(OWN)
    network = feature_network(f"{file}:colours")
    result = network(IMAGES)
    assert (network.name, tuple(result), result["pool3"].dtype) == ("mean.colours", ("pool3",), np.float32)
    assert np.abs(result["pool3"] - (IMAGES.mean(axis=(1, 2)) / 127.5 - 1)).max() < 1e-6
    file.write_text(OWN.replace("[:, : self.keep]", ""))
    assert feature_network(f"{file}:colours").sha256 != network.sha256
    with pytest.raises(ValueError, match=r"mean.py:maps answers \(37, 3, 16, 16\) to 37 images; needed is"):
        feature_network(f"{file}:maps")(IMAGES)
    for function, message in (
        ("nothing", "built str, not a torch.nn.Module"),
        ("none", "no function 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_network(f"{file}:{function}")
    with pytest.raises(FileNotFoundError, match=r"no file none.py, named by --features none.py:colours"):
        feature_network("none.py:colours")


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


def test_every_option_has_a_default_and_a_help():
    for option in dataclasses.fields(NetworkOptions):
        assert option.metadata["help"] and option.default is not dataclasses.MISSING
    with pytest.raises(dataclasses.FrozenInstanceError):
        NetworkOptions().features = "digits"

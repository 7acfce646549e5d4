"""The Inception extractor around its network: inputs, weights, and where they are looked for. Its numbers:
test_golden_inception.
"""

import socket

import numpy as np
import pytest
import torch

from evaluation.networks.inception import (
    WEIGHTS,
    InceptionFeatures,
    adm_input,
    find_inception_weights,
    inception_network,
    pytorch_fid_input,
)
from guided_diffusion.files import pretrained

URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}"


@pytest.fixture(scope="module")
def weights():
    """Zero convolutions with a known last layer: fast to make, and enough for everything but the numbers."""
    with torch.device("meta"):
        network = inception_network()
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 7, 320), (1, 3, 299, 299)])
def test_adm_resize_is_that_of_tensorflow_1(shape):
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 256, shape)).float()
    expected = x.double()
    for dim in (2, 3):
        size = x.shape[dim]
        position = torch.arange(299, dtype=torch.float64) * size / 299
        lower = position.floor().long()
        weight = (position - lower).view((-1, 1) if dim == 2 else (-1,))
        upper = (lower + 1).clamp(max=size - 1)
        expected = (
            expected.index_select(dim, lower) * (1 - weight) + expected.index_select(dim, upper) * weight
        )
    # A source coordinate in float32 is good to 2^-22 of the side, twice (height and width), times a step of
    # at most 255 / 128.
    assert (adm_input(x) - (expected - 128) / 128).abs().max() <= 2 * 2 * max(shape) * 2**-22


def test_inputs_span_minus_one_to_one():
    white, black = torch.full((1, 3, 8, 8), 255.0), torch.zeros(1, 3, 8, 8)
    assert torch.allclose(pytorch_fid_input(white), torch.ones(1), atol=1e-6)
    assert torch.equal(pytorch_fid_input(black), -torch.ones(1, 3, 299, 299))
    assert torch.allclose(adm_input(white), torch.full((1, 3, 299, 299), 127 / 128), atol=1e-6)
    assert torch.equal(adm_input(black), -torch.ones(1, 3, 299, 299))


def test_weights_from_a_file_without_counters_and_no_bias_in_the_logits(weights, tmp_path, monkeypatch):
    def no_network(*args):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    kept["fc.bias"] = torch.ones(1008)
    kept["Mixed_7c.branch1x1.bn.bias"] = torch.ones(320)
    kept["fc.weight"] = torch.zeros(1008, 2048)
    kept["fc.weight"][5, :320] = 0.5
    path = tmp_path / "weights.pth"
    torch.save(kept, path)
    network = InceptionFeatures(path)
    assert network.sha256 == pretrained.sha256(path)
    features = network(torch.zeros(1, 4, 4, 3, dtype=torch.uint8))
    assert {key: value.shape for key, value in features.items()} == {
        "pool3": (1, 2048),
        "spatial": (1, 2023),
        "logits": (1, 1008),
    }
    assert (features["pool3"][0, :320] == 1).all()
    assert not features["pool3"][0, 320:].any()
    assert np.array_equal(features["logits"][0], 160.0 * np.eye(1008, dtype=np.float32)[5])


def test_refused(weights):
    with pytest.raises(ValueError, match=r"the file lacks fc\.bias"):
        InceptionFeatures({name: tensor for name, tensor in weights.items() if name != "fc.bias"})
    with pytest.raises(ValueError, match="unknown protocol 'tf'; choose adm or pytorch-fid"):
        InceptionFeatures(weights, protocol="tf")
    network = InceptionFeatures(weights)
    for images in (
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"need uint8 images \(N, H, W, 3\)"):
            network(images)


def test_finding_weights(tmp_path, monkeypatch):
    (tmp_path / "files.json").write_text('{"files": {}}')
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path)
    for path in (None, tmp_path / "none.pth"):
        with pytest.raises(FileNotFoundError) as error:
            find_inception_weights(path)
        assert URL in str(error.value)
        assert str(path or tmp_path / WEIGHTS) in str(error.value)
        assert "\n" not in str(error.value)

    mine = tmp_path / "mine.pth"
    mine.write_bytes(b"anything")
    assert find_inception_weights(mine) == mine
    (tmp_path / WEIGHTS).write_bytes(b"anything")
    for path in (None, tmp_path / WEIGHTS):
        with pytest.raises(
            ValueError, match=r"not the published file \(sha256 .*\.\.\., not 6726825d\.\.\.\)"
        ):
            find_inception_weights(path)
    monkeypatch.setattr("evaluation.networks.inception.sha256", lambda path: "6726825d" + 56 * "0")
    assert find_inception_weights() == tmp_path / WEIGHTS

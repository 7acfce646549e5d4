"""Reading weights: strict, safe, and clear where a file is not what it should be."""

import hashlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from guided_diffusion import dist_util
from guided_diffusion.files.checkpoints import find_pretrained, load_into, load_state_dict, sha256


def state_dict():
    return {
        "a.weight": torch.arange(6.0).view(2, 3),
        "a.bias": torch.tensor([1, 2]),
        "h": torch.ones(4000).half(),
    }


def write(path, content=None):
    content = state_dict() if content is None else content
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization="legacy" not in path.stem)
    return path


NAMES = ["weights.pt", "weights.pth", "weights.safetensors", "legacy.pt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_text", [False, True])
def test_reads_names_and_tensors(tmp_path, name, as_text):
    path = write(tmp_path / name)
    got = load_state_dict(str(path) if as_text else path)
    assert type(got) is dict
    assert set(got) == set(state_dict())
    for key, tensor in state_dict().items():
        assert got[key].dtype == tensor.dtype
        assert got[key].device.type == "cpu"
        assert torch.equal(got[key], tensor)


def test_reads_what_a_module_saves(tmp_path):
    module, other = (
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
    )
    torch.save(module.state_dict(), tmp_path / "m.pt")
    load_into(other, load_state_dict(tmp_path / "m.pt"), "m.pt")
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_dist_util_reads_the_same(tmp_path):
    path = write(tmp_path / "weights.pt")
    got = dist_util.load_state_dict(str(path), map_location="cpu")
    assert all(torch.equal(got[key], tensor) for key, tensor in state_dict().items())
    assert got["h"].dtype == torch.float16


# Files that are not what they should be


@pytest.mark.parametrize("name", NAMES)
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path / name}.*scripts/download\.py"):
        load_state_dict(tmp_path / name)


def test_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"folder\.pt"):
        load_state_dict(tmp_path / "folder.pt")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("name", NAMES)
def test_truncated_file(tmp_path, name, share):
    content = write(tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=name) as caught:
        load_state_dict(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("truncated", "damaged"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"hello", b"<html>not found</html>" * 100, bytes(range(256)) * 20])
def test_file_of_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.bin", "weights", "weights.pt.part", "weights.npz"])
def test_wrong_ending(tmp_path, name):
    (tmp_path / name).write_bytes(write(tmp_path / "weights.pt").read_bytes())
    with pytest.raises(ValueError, match=rf"{name}.*\.pt, \.pth or \.safetensors"):
        load_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["weights.pt", "legacy.pt"])
@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2),
        [torch.ones(2)],
        {"epoch": 3, "w": torch.ones(2)},
        {"state_dict": {"w": torch.ones(2)}},
        3,
    ],
    ids=["tensor", "list", "number inside", "nested", "number"],
)
def test_content_that_is_no_state_dict(tmp_path, name, content):
    torch.save(content, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*state dict"):
        load_state_dict(tmp_path / name)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("inside", [True, False])
def test_code_is_refused_and_not_run(tmp_path, form, inside):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    content = {"w": torch.ones(2), "x": Payload(canary)} if inside else Payload(canary)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        load_state_dict(path)
    assert not canary.exists()
    # The canary does what it should: the same file, read as a plain pickle, runs the command.
    if form == "bare pickle":
        pickle.loads(path.read_bytes())
        assert canary.exists()


def test_whole_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"module\.pt"):
        load_state_dict(tmp_path / "module.pt")


# Into a network


def misfit(**changes):
    """The message of loading a Linear(3, 2)'s state dict, changed, into another."""
    content = {
        name: tensor
        for name, tensor in {**nn.Linear(3, 2).state_dict(), **changes}.items()
        if tensor is not None
    }
    module = nn.Linear(3, 2)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"^file\.pt ") as caught:
        load_into(module, content, "file.pt")
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
    return str(caught.value)


def test_other_shapes_are_named_with_both():
    message = misfit(weight=torch.zeros(2, 5))
    assert "weight" in message and "[2, 5]" in message and "[2, 3]" in message


def test_every_misshapen_tensor_is_counted():
    message = misfit(weight=torch.zeros(2, 5), bias=torch.zeros(7))
    assert "1 more" in message


def test_missing_names():
    assert "lacks bias" in misfit(bias=None)


def test_unexpected_names():
    assert "scale" in misfit(scale=torch.zeros(1))


def test_several_faults_are_all_named():
    message = misfit(weight=torch.zeros(4, 4), bias=None, scale=torch.zeros(1))
    assert all(word in message for word in ("weight", "[4, 4]", "bias", "scale"))


def test_values_are_copied_and_cast():
    module, weights = nn.Linear(3, 2), {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).double()}
    load_into(module, weights, "x")
    assert module.weight.dtype == module.bias.dtype == torch.float32
    weights["bias"] += 1
    assert (module.weight == 1).all() and (module.bias == 0).all()


# Finding and hashing


def test_file_that_is_there_under_another_name(tmp_path):
    (tmp_path / "resnet50_weight_V2.pth").touch()
    assert find_pretrained("resnet50-11ad3fa6.pth", folder=tmp_path) == tmp_path / "resnet50_weight_V2.pth"
    (tmp_path / "resnet50-11ad3fa6.pth").touch()
    assert find_pretrained("resnet50-11ad3fa6.pth", folder=tmp_path) == tmp_path / "resnet50-11ad3fa6.pth"


def test_file_that_is_not_there_and_can_be_fetched(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path}/128x128_diffusion\.pt.*scripts/download\.py"
    ) as caught:
        find_pretrained("128x128_diffusion.pt", folder=tmp_path)
    assert "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/128x128_diffusion.pt" in str(
        caught.value
    )


def test_file_that_is_not_there_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/mine\.pt"):
        find_pretrained("mine.pt", folder=tmp_path)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 7])
def test_sha256(tmp_path, size):
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()

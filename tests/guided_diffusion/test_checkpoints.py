"""Reading weights: any file by its content, nothing run, and clear words where it is something else."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from guided_diffusion import dist_util
from guided_diffusion.checkpoints import load_state_dict

STATE = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "a.bias": torch.tensor([1, 2]),
    "h": torch.ones(4000).half(),
}
FORMS = ["zip", "legacy", "safetensors"]


def write(path, form="zip", content=STATE):
    if form == "safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def refusal(path, **options):
    with pytest.raises(ValueError) as caught:
        load_state_dict(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


ENDINGS = [
    "pt",
    "pth",
    "safetensors",
    "ckpt",
    "bin",
    "pth.tar",
    "th",
    "PT",
    "npz",
    "NPZ",
    "ZIP",
    "pkl",
    "part",
    "",
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("form", FORMS)
def test_names_and_tensors_whatever_the_ending(tmp_path, form, ending):
    path = write(tmp_path / f"weights.{ending}".rstrip("."), form)
    for got in (load_state_dict(str(path)), load_state_dict(path), dist_util.load_state_dict(path)):
        assert isinstance(got, dict) and got.keys() == STATE.keys()
        for key, tensor in STATE.items():
            assert got[key].dtype == tensor.dtype and got[key].device.type == "cpu"
            assert torch.equal(got[key], tensor)


# Files that are not there


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.pt", "no checkpoint at nowhere.pt; see `python scripts/download.py --list`"),
        ("x/128x128_diffusion.pt", "fetch it with `python scripts/download.py 128x128_diffusion.pt`"),
        ("x/resnet50_weight_V2.pth", "fetch it with `python scripts/download.py resnet50_weight_V2.pth`"),
        (Path(__file__).parent, "guided_diffusion: it is a folder; give the path of a file in it"),
        (
            "https://example.org/a/b.pt?x=1",
            "/pretrained_models/b.pt 'https://example.org/a/b.pt?x=1'`, then give",
        ),
        (Path("https://example.org/a/b.pt"), "https://example.org/a/b.pt is an address, not a file"),
        (
            "https://example.org/edm-cifar10-32x32-cond-vp.pkl",
            "scripts/download.py edm-cifar10-32x32-cond-vp.pkl`",
        ),
        ("hf://owner/model/b.bin", "fetch it, put it at "),
    ],
)
def test_file_that_is_not_there(path, words):
    with pytest.raises(FileNotFoundError) as caught:
        load_state_dict(path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Files that are something else


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pt"), io.BytesIO())
    return file.getvalue()


def saved(function, *args, **kwargs):
    file = io.BytesIO()
    function(*[file if arg is ... else arg for arg in args], **kwargs)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
OTHERS = {
    "a git-lfs pointer": POINTER,
    "a web page": b"\n<!DOCTYPE html><html>Sign in</html>",
    "a web page or": b"\xef\xbb\xbf<html>",
    "server's answer in XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "a text file that begins with 'Not Found'": b"Not Found",
    "a text file that begins with '{": b'{\n "weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "packed with gzip": gzip.compress(saved(torch.save, STATE, ...)),
    "packed with bzip2": b"BZh91AY&SY",
    "packed with xz": b"\xfd7zXZ\x00\x00\x04",
    "packed with zstd": b"\x28\xb5\x2f\xfd\x04",
    "a tar archive": tarred(),
    "a zip archive of weights.pt": zipped(**{"weights.pt": b"x"}),
    "a zip archive of a, b, c and 1 more": zipped(a=b"", b=b"", c=b"", d=b""),
    "a NumPy archive (.npz) of arr_0.npy": saved(np.savez, ..., np.ones(2)),
    "a NumPy array": saved(np.save, ..., np.ones(2)),
    "a TorchScript program": zipped(**{"net/data.pkl": b"", "net/constants.pkl": b""}),
    "truncated": b"",
    "truncated or not": bytes(range(256)) * 20,
}


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "weights"])
@pytest.mark.parametrize("what", OTHERS)
def test_file_of_something_else_is_called_that(tmp_path, what, name):
    (tmp_path / name).write_bytes(OTHERS[what])
    assert what in refusal(tmp_path / name)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("form", FORMS)
def test_truncated_file(tmp_path, form, share):
    path = write(tmp_path / "weights", form)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert any(word in refusal(path) for word in ("truncated", "damaged"))


# More than data


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("inside", [True, False])
def test_code_is_refused_by_name_and_not_run(tmp_path, form, inside):
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    content = {"w": torch.ones(2), "x": Payload(canary)} if inside else Payload(canary)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        write(path, form, content)
    assert "asks for posix.system" in refusal(path)
    assert not canary.exists()
    # The canary does what it should: the same content, read as a plain pickle, runs the command.
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"model": STATE, "args": SimpleNamespace(lr=1)}, "types.SimpleNamespace"),
        ({"model": STATE, "best": np.float64(1)}, ".multiarray.scalar"),
        ({"model": STATE, "folder": Path("x")}, "pathlib."),
    ],
)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_what_is_no_data_is_named_with_the_way_out(tmp_path, form, content, name):
    message = refusal(write(tmp_path / "w.pt", form, content))
    assert f"{name}" in message and "asks for" in message and "torch.save its state dict alone" in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_later_pickle_protocols_are_named(tmp_path, form):
    torch.save(STATE, tmp_path / "w.pt", pickle_protocol=4, _use_new_zipfile_serialization=form == "zip")
    assert "pickle protocol 4 or later" in refusal(tmp_path / "w.pt")

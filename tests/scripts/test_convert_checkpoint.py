"""From EDM's pickle to safetensors: the same network, in little memory, complete or not at all."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from edm_pickles import Call, dumps, module_state, network, persistent, tiny_snapshots
from helpers import ROOT, call, environment, load_script
from safetensors import safe_open
from safetensors.torch import save_file

from guided_diffusion.edm import load_edm_network
from guided_diffusion.files import edm_pickle
from guided_diffusion.files.checkpoints import load_edm_checkpoint, load_state_dict

script = load_script("convert_checkpoint")
MiB = 1 << 20


@pytest.fixture(params=["at once", "streamed"])
def convert(request, tmp_path, monkeypatch):
    """convert(content, *flags): in.pkl to out.safetensors, with memory for all tensors or without."""
    if request.param == "streamed":
        monkeypatch.setattr(script.machine, "available_memory", lambda device: None)

    def convert(content, *flags):
        (tmp_path / "in.pkl").write_bytes(content)
        return call(script.main, [tmp_path / "in.pkl", tmp_path / "out.safetensors", *flags])

    return convert


@pytest.mark.parametrize("kind", [0, 1], ids=["EDMPrecond", "iDDPMPrecond"])
def test_the_same_network(convert, tmp_path, kind):
    net, arguments, content = list(tiny_snapshots())[kind]
    result = convert(content)
    assert result.code == 0, result.err
    assert f"{type(net).__name__}, {len(net.state_dict())} tensors" in result.out
    x = torch.randn(2, 3, 8, 8)
    for path in (tmp_path / "in.pkl", tmp_path / "out.safetensors"):
        checkpoint = load_edm_checkpoint(path)
        assert (checkpoint.class_name, checkpoint.arguments) == (type(net).__name__, arguments)
        assert checkpoint.state_dict.keys() == load_state_dict(path).keys() == net.state_dict().keys()
        torch.testing.assert_close(load_edm_network(path)(x, 1.0), net(x, 1.0), rtol=0, atol=1e-5)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.pop("arguments") == json.dumps(arguments)
    digest = hashlib.sha256(content).hexdigest()
    assert metadata == {"format": "pt", "class_name": type(net).__name__, "source_sha256": digest}


def test_every_type_and_size(convert, tmp_path):
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    dtypes += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {f"w{i}": torch.tensor([[1, 0, 1]]).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {
        "none": torch.ones(0, 2),
        "scalar": torch.tensor(2.5),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    assert convert(dumps(network(tensors))).code == 0
    read = load_state_dict(tmp_path / "out.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())


def test_a_file_that_exists_is_kept_until_its_replacement_is_whole(convert, tmp_path, monkeypatch):
    _, _, content = next(tiny_snapshots())
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    result = convert(content)
    assert result.code == 1 and "out.safetensors exists" in result.err and "--overwrite" in result.err
    with monkeypatch.context() as patch:
        original, left = edm_pickle.StoredTensor.read, iter(range(5))
        patch.setattr(edm_pickle.StoredTensor, "read", lambda tensor: (next(left), original(tensor))[1])
        with pytest.raises(StopIteration):
            convert(content, "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pkl", "out.safetensors"]
    assert out.read_text() == "precious"
    assert convert(content, "--overwrite").code == 0 and load_state_dict(out)


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("no.pkl", "out.safetensors", "no checkpoint at"),
        ("torch.pkl", "out.safetensors", "torch.pkl is no EDM snapshot"),
        ("in.pkl", "out.pt", "must end in .safetensors"),
        ("in.pkl", "no/out.safetensors", "no such folder"),
        ("hostile.pkl", "out.safetensors", "hostile.pkl: it asks for posix.system"),
    ],
)
def test_what_cannot_be_converted(tmp_path, source, out, words):
    (tmp_path / "in.pkl").write_bytes(b"\x80\x04N.")
    (tmp_path / "hostile.pkl").write_bytes(dumps({"ema": Call(os.system, f"touch {tmp_path / 'canary'}")}))
    torch.save({"w": torch.ones(1)}, tmp_path / "torch.pkl")
    result = call(script.main, [tmp_path / source, tmp_path / out])
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile.pkl", "in.pkl", "torch.pkl"]


def test_weights_of_something_else_are_no_edm_network(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors does not say which EDM network.*convert_checkpoint"
    ):
        load_edm_checkpoint(tmp_path / "w.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is no EDM network.*\.pkl"):
        load_edm_checkpoint(tmp_path / "w.pt")


def peak(tmp_path, megabytes):
    """Bytes that a process needs to stream that much, in tensors of 4 MiB."""
    tensors = {f"w{i}": torch.rand(MiB) for i in range(megabytes // 4)}
    (tmp_path / "in.pkl").write_bytes(dumps({"ema": persistent("EDMPrecond", module_state(tensors))}))
    program = (
        "import runpy, sys\n"
        "sys.path.insert(0, 'scripts')\n"
        "from guided_diffusion.runs import machine\n"
        "machine.available_memory = lambda device: 0\n"
        "runpy.run_path('scripts/convert_checkpoint.py', run_name='__main__')\n"
    )
    files = [tmp_path / "in.pkl", tmp_path / "out.safetensors", "--overwrite"]
    command = [sys.executable, "-c", program, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").stat().st_size > megabytes * MiB
    return int(re.search(r"peak memory ([\d,]+) bytes", done.stdout)[1].replace(",", ""))


def test_memory_does_not_grow_with_the_file_where_there_is_none(tmp_path):
    # Of the 160 MiB more, as much as a few tensors; all of them in memory would be 160.
    assert peak(tmp_path, 200) - peak(tmp_path, 40) < 32 * MiB

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

from guided_diffusion.edm import load_edm_network
from guided_diffusion.files import edm_pickle
from guided_diffusion.files.checkpoints import load_edm_checkpoint, load_into, load_state_dict

main = load_script("convert_checkpoint").main
MiB = 1 << 20


def convert(tmp_path, content, *flags):
    (tmp_path / "in.pkl").write_bytes(content)
    return call(main, [tmp_path / "in.pkl", tmp_path / "out.safetensors", *flags])


@pytest.mark.parametrize("kind", [0, 1], ids=["EDMPrecond", "iDDPMPrecond"])
def test_the_same_network(tmp_path, kind):
    net, arguments, content = list(tiny_snapshots())[kind]
    result = convert(tmp_path, content)
    assert result.code == 0, result.err
    assert f"{type(net).__name__}, {len(net.state_dict())} tensors" in result.out
    pickled, converted = (load_edm_checkpoint(tmp_path / name) for name in ("in.pkl", "out.safetensors"))
    assert (
        (pickled.class_name, pickled.arguments)
        == (converted.class_name, converted.arguments)
        == (type(net).__name__, arguments)
    )
    assert (
        load_state_dict(tmp_path / "out.safetensors").keys()
        == pickled.state_dict.keys()
        == net.state_dict().keys()
    )
    for name, tensor in pickled.state_dict.items():
        assert tensor.dtype == converted.state_dict[name].dtype and torch.equal(
            tensor, converted.state_dict[name]
        )
    x = torch.randn(2, 3, 8, 8)
    for name in ("in.pkl", "out.safetensors"):
        load_into(type(net)(**arguments), load_state_dict(tmp_path / name), name)  # strictly
        torch.testing.assert_close(load_edm_network(tmp_path / name)(x, 1.0), net(x, 1.0), rtol=0, atol=1e-5)


def test_metadata(tmp_path):
    _, arguments, content = next(tiny_snapshots())
    convert(tmp_path, content)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "class_name", "arguments", "source_sha256"}
    assert metadata["class_name"] == "EDMPrecond"
    assert json.loads(metadata["arguments"]) == arguments
    assert metadata["source_sha256"] == hashlib.sha256(content).hexdigest()


def test_every_type_and_size(tmp_path):
    dtypes = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    dtypes += (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {f"w{i}": torch.tensor([[1, 0, 1]]).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {
        "none": torch.ones(0, 2),
        "scalar": torch.tensor(2.5),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    assert convert(tmp_path, dumps(network(tensors))).code == 0
    read = load_state_dict(tmp_path / "out.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())


def test_a_file_that_exists_is_kept(tmp_path):
    _, _, content = next(tiny_snapshots())
    (tmp_path / "out.safetensors").write_text("precious")
    result = convert(tmp_path, content)
    assert result.code == 1 and "out.safetensors exists" in result.err and "--overwrite" in result.err
    assert (tmp_path / "out.safetensors").read_text() == "precious"
    assert convert(tmp_path, content, "--overwrite").code == 0
    assert load_state_dict(tmp_path / "out.safetensors")


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_nothing_is_left_of_a_conversion_that_failed(tmp_path, monkeypatch, flags):
    _, _, content = next(tiny_snapshots())
    if flags:
        (tmp_path / "out.safetensors").write_text("precious")

    original, left = edm_pickle.StoredTensor.read, iter(range(5))
    monkeypatch.setattr(edm_pickle.StoredTensor, "read", lambda tensor: (next(left), original(tensor))[1])
    with pytest.raises(StopIteration):
        convert(tmp_path, content, *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pkl"] + ["out.safetensors"] * len(flags)
    assert not flags or (tmp_path / "out.safetensors").read_text() == "precious"


def test_hostile_pickle(tmp_path):
    result = convert(tmp_path, dumps({"ema": Call(os.system, f"touch {tmp_path / 'canary'}")}))
    assert result.code == 1
    assert re.search(r"^error: refused to read .*in\.pkl: it asks for posix\.system", result.err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pkl"]


@pytest.mark.parametrize(
    ("source", "out", "words"),
    [
        ("no.pkl", "out.safetensors", "no file at"),
        ("in.pt", "out.safetensors", "must end in .pkl"),
        ("in.pkl", "out.pt", "must end in .safetensors"),
        ("in.pkl", "no/out.safetensors", "no such folder"),
    ],
)
def test_flags_that_cannot_be(tmp_path, source, out, words):
    for name in ("in.pkl", "in.pt"):
        (tmp_path / name).write_bytes(b"N.")
    result = call(main, [tmp_path / source, tmp_path / out])
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1


def test_safetensors_of_something_else(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match=r"w\.safetensors does not say which EDM network.*convert_checkpoint"
    ):
        load_edm_checkpoint(tmp_path / "w.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is no EDM network.*\.pkl"):
        load_edm_checkpoint(tmp_path / "w.pt")


def peak(tmp_path, megabytes):
    """Bytes that a process needs to convert that much, in tensors of 4 MiB."""
    tensors = {f"w{i}": torch.rand(MiB) for i in range(megabytes // 4)}
    (tmp_path / "in.pkl").write_bytes(dumps({"ema": persistent("EDMPrecond", module_state(tensors))}))
    command = [
        sys.executable,
        "scripts/convert_checkpoint.py",
        tmp_path / "in.pkl",
        tmp_path / "out.safetensors",
        "--overwrite",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.safetensors").stat().st_size > megabytes * MiB
    return int(re.search(r"peak memory ([\d,]+) bytes", done.stdout)[1].replace(",", ""))


def test_memory_does_not_grow_with_the_file(tmp_path):
    # Of the 160 MiB more, as much as a few tensors; all of them in memory would be 160.
    assert peak(tmp_path, 200) - peak(tmp_path, 40) < 32 * MiB

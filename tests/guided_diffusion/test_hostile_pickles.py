"""Pickles that ask for more than data: each is refused with the name of what it asked for, and nothing is
done.
"""

import builtins
import copyreg
import io
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from edm_pickles import Call, dumps, module_state, network, persistent, refusal, tiny_snapshots, touch, write

from guided_diffusion.edm import load_edm_network
from guided_diffusion.files.checkpoints import load_state_dict

# What it asks for


def hostile_calls(canary):
    """name that must appear -> what would touch the canary, were it unpickled."""
    source, command = touch(canary)
    return {
        "posix.system": Call(os.system, command),
        "builtins.eval": Call(eval, source),
        "builtins.exec": Call(exec, source),
        "os.popen": Call(os.popen, command),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "io.open": Call(open, str(canary), "w"),
        "torch.serialization.load": Call(torch.load, str(canary)),
    }


NAMES = list(hostile_calls("unused"))


@pytest.mark.parametrize("place", ["alone", "ema", "beside", "state", "parameter", "argument", "key", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_are_refused_by_name_and_not_made(tmp_path, name, place):
    call = hostile_calls(tmp_path / "canary")[name]
    contents = {
        "alone": call,
        "ema": {"ema": call},
        "beside": {**network(), "loss_fn": call},
        "state": network(hook=[call]),
        "parameter": network({"w": call}),
        "argument": network(_init_kwargs={"x": call}),
        "key": network(hook=Call(dict, [(call, 1)])),
        "meta": {"ema": persistent("EDMPrecond", {}, version=call)},
    }
    expected = "builtins.dict" if place == "key" else name
    assert f"asks for {expected}," in refusal(write(tmp_path, contents[place]))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_in_every_protocol(tmp_path, protocol):
    content = dumps(hostile_calls(tmp_path / "canary")["posix.system"], protocol)
    assert "posix.system" in refusal(write(tmp_path, content))
    assert not (tmp_path / "canary").exists()
    pickle.loads(content)  # the canary does what it should
    assert (tmp_path / "canary").exists()


def test_stored_source_is_not_run(tmp_path):
    source, _ = touch(tmp_path / "canary")
    _, _, content = next(tiny_snapshots(source))
    assert source.encode() in content
    load_edm_network(write(tmp_path, content))
    assert not (tmp_path / "canary").exists()
    exec(source)
    assert (tmp_path / "canary").exists()


def torch_file(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch, older", "torch, zip"])
@pytest.mark.parametrize("name", NAMES)
def test_calls_in_nested_files(tmp_path, name, form):
    call = hostile_calls(tmp_path / "canary")[name]
    zipped = {"_use_new_zipfile_serialization": form == "torch, zip"}
    nested = pickle.dumps(call) if form == "pickle" else torch_file(call, **zipped)
    storage = Call(torch.storage._load_from_bytes, nested)
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, OrderedDict())
    message = refusal(write(tmp_path, network({"w": tensor})))
    # In protocol 2, which torch writes, it is the older name of the module.
    assert f"asks for {name}," in message.replace("__builtin__", "builtins")
    assert not (tmp_path / "canary").exists()


def test_nested_zip_is_refused_even_if_harmless(tmp_path):
    storage = Call(torch.storage._load_from_bytes, torch_file([1, 2]))
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, OrderedDict())
    assert "asks for a storage in a zip archive" in refusal(write(tmp_path, network({"w": tensor})))


def test_extension_codes(tmp_path):
    command = touch(tmp_path / "canary")[1]
    copyreg.add_extension("posix", "system", 240)
    try:
        content = dumps(Call(os.system, command), protocol=2)
        assert "copyreg's extension registry (EXT1)" in refusal(write(tmp_path, content))
    finally:
        copyreg.remove_extension("posix", "system", 240)
    assert b"\x82\xf0" in content
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"(S'touch canary'\nios\nsystem\n.", "os.system"),
        (b"cos\nsystem\n(S'touch canary'\ntR.", "os.system"),
        (b"(cos\nsystem\nS'touch canary'\no.", "os.system"),
        (b"Pan id\n.", "a persistent id"),
        (b"U\x05an idQ.", "a persistent id"),
        (
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch canary'\ntR.",
            "builtins.getattr",
        ),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"N2.", "DUP"),
        (b"ctorch.nn.modules.linear\nLinear\n)}\x92.", "NEWOBJ_EX"),
        (b"\x80\x04\x8c\x17torch.nn.modules.linear\x8c\x0eLinear.__new__\x93.", "Linear.__new__"),
        (b"\x80\x04\x8c\x08torch.nn\x8c\x0amodules.os\x93.", "torch.nn.modules.os"),
        (b"ctorch.nn.modules.linear\nLinear\n}\x8c\x03bad\x8c\x04evils\x62.", "a Name where a Record"),
        (b"}}\x8c\x0c__setstate__\x8c\x01xs\x62.", "a dict where a Record"),
        (b"ctorch_utils.persistence\n_reconstruct_persistent_obj_\n.", "_reconstruct_persistent_obj_"),
        (b"\x80\xff.", "protocol 255"),
    ],
)
def test_instructions_that_no_snapshot_has(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(write(tmp_path, content))
    assert not (tmp_path / "canary").exists()


def test_states_stay_data(tmp_path):
    state = {"__class__": "x", "__setstate__": "y", "__dict__": {}, "__reduce__": "z", "load_state_dict": "w"}
    linear = torch.nn.Linear(1, 1)
    linear.__dict__.update(state)
    loaded = load_state_dict(
        write(tmp_path, {"ema": persistent("EDMPrecond", {**module_state(modules={"a": linear}), **state})})
    )
    assert list(loaded) == ["a.weight", "a.bias"]


def test_the_reader_never_unpickles(tmp_path, monkeypatch):
    _, _, content = next(tiny_snapshots())
    path = write(tmp_path, content)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, None)
    assert load_state_dict(path)

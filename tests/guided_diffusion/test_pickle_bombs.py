"""Pickles that ask for much, or for what is not there: each is refused soon and in little memory."""

import contextlib
import pickle
import pickletools
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from edm_pickles import Call, module_state, network, persistent, refusal, tiny_snapshots, write
from fuzz_checkpoints import fuzz

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.edm_pickle import read_snapshot

MiB = 1 << 20


@contextlib.contextmanager
def little():
    """What happens here takes little time, and little of Python's memory."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 5
    assert peak < 100 * MiB


def text(content):
    """The instruction for a text, and one that keeps it as number 0."""
    return b"X" + struct.pack("<I", len(content)) + content + b"q\x00"


def linked(depth, width):
    """A value that a reader who follows references would take width ** depth steps for."""
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    "instruction", [b"\x8e", b"\x8d", b"\x96"], ids=["BINBYTES8", "BINUNICODE8", "BYTEARRAY8"]
)
@pytest.mark.parametrize("length", [100, 1 << 33, (1 << 63) - 1, (1 << 64) - 1])
def test_lengths_beyond_the_file(tmp_path, instruction, length):
    path = write(tmp_path, b"\x80\x05" + instruction + struct.pack("<Q", length) + b"abc.")
    with little():
        assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"B\xff\xff\xff\xffabc.", "4,294,967,295 bytes announced where 4 are left"),
        (b"X\xff\xff\xff\x7fabc.", "2,147,483,647 bytes announced where 4 are left"),
        (b"\x8b\xff\xff\xff\x7fabc.", "2,147,483,647 bytes announced where 4 are left"),
        (b"\x8b\xff\xff\xff\xffabc.", "damaged"),
        (b"\x8b" + struct.pack("<I", MiB) + b"\x7f" * MiB + b".", "an integer of 8,388,607 bits"),
        (b"L" + b"9" * MiB + b"L\n.", "damaged"),
        (b"I" + b"9" * MiB, "damaged"),
        (b"c" + b"a" * MiB + b"\nb\n.", "damaged"),
        (b"N" * 1_100_000 + b".", "more than 1,000,000 instructions"),
        (b")" + b"\x85" * 100_000 + b".", "a tuple where a dict belongs"),
        (b"]" * 100_000 + b"a" * 99_999 + b".", "a list where a dict belongs"),
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "a tuple where a str belongs"),
        (b"(" * 100_000 + b".", "damaged"),
        (b"Nr\xff\xff\xff\xff.", "a NoneType where a dict belongs"),
        (b"}" + text(b"a" * MiB) + b"h\x00\x93" * 1000 + b".", "asks for " + "a" * 120 + ","),
        (
            b"(" + text(b"torch.nn.modules.a") + text(b"A" * MiB) + b"\x93h\x00h\x00\x93.",
            "torch.nn.modules.a.AAA",
        ),
        (b"ccollections\nOrderedDict\n(" + b"](" + b"N" * 1000 + b"etR.", "OrderedDict with arguments"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_sizes_and_depths(tmp_path, content, words):
    path = write(tmp_path, content)
    with contextlib.nullcontext() if content.startswith(b"NNN") else little():
        assert words in refusal(path)


def test_references_that_multiply(tmp_path):
    bomb = linked(60, 10)
    with little():
        assert list(load_state_dict(write(tmp_path, network(hook=bomb)))) == ["w"]
        assert "the argument 'x'" in refusal(write(tmp_path, network(_init_kwargs={"x": bomb})))
        parameter = Call(torch._utils._rebuild_parameter, bomb)
        assert "belongs" in refusal(write(tmp_path, network({"w": parameter})))


@pytest.mark.parametrize(
    ("depth", "width", "words"),
    [(40, 1, "modules 16 deep"), (14, 10, "more than 100,000 parameters and modules")],
)
def test_modules_that_multiply(tmp_path, depth, width, words):
    module = torch.nn.Linear(1, 1)
    for _ in range(depth):
        module = torch.nn.ModuleDict({f"m{i}": module for i in range(width)})
    path = write(tmp_path, {"ema": persistent("EDMPrecond", module_state(modules={"m": module}))})
    with little():
        message = refusal(path)
    assert words in message or "larger than the file" in message


def test_things_inside_themselves(tmp_path):
    module, values, items = torch.nn.Sequential(), [], {}
    module.register_module("0", module)
    values.append(values)
    items["x"] = items
    assert "is one inside itself?" in refusal(write(tmp_path, {"ema": module}))
    assert list(load_state_dict(write(tmp_path, network(hook=(values, items))))) == ["w"]
    assert "a dict where a Record belongs" in refusal(write(tmp_path, items | {"ema": items}))


# Tensors that are not there


def storage_file(values=None):
    """What torch pickles for the storage of a tensor."""
    values = torch.ones(6) if values is None else values
    return next(arg for _, arg, _ in pickletools.genops(pickle.dumps(values)) if isinstance(arg, bytes))


def tensor(nested=None, offset=0, shape=(6,), stride=(1,), metadata=()):
    storage = Call(torch.storage._load_from_bytes, storage_file() if nested is None else nested)
    return Call(
        torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, OrderedDict(), *metadata
    )


# fmt: off
OUTSIDE = [
    (0, (7,), (1,)), (1, (6,), (1,)), (6, (1,), (1,)), (6, (), ()), (1 << 62, (1,), (1,)),
    (0, (2, 3), (3, 2)), (0, (2,), (6,)), (0, (2,), (1 << 64,)), (0, (7,), (0,)), (-1, (1,), (1,)),
    (0, (1 << 40, 1 << 40), (0, 0)), (5, (2,), (-1,)), (0, (-1,), (1,)), (0, (2, 2), (1,)),
    (0, (2.0,), (1,)), (0, (True,), (1,)), (0, [2], (1,)), (0, (1,) * 9, (1,) * 9), (None, (1,), (1,)),
]
# fmt: on


@pytest.mark.parametrize(("offset", "shape", "stride"), OUTSIDE)
def test_tensors_beyond_their_storage(tmp_path, offset, shape, stride):
    path = write(tmp_path, network({"w": tensor(None, offset, shape, stride)}))
    with little():
        message = refusal(path)
    words = "beyond its storage of 6 numbers", "impossible shape", "a list where a tuple belongs"
    assert any(text in message for text in words)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x06Nt", b"K\x07Nt"),
        (b"K\x06Nt", b"J\xff\xff\xff\x7fNt"),
        (b"K\x06Nt", b"J\xff\xff\xff\xffNt"),
        (b"K\x06Nt", b"K\x06K\x00K\x00K\x00\x87t"),  # a view
        (b".\x06\x00\x00\x00\x00\x00\x00\x00", b".\x07\x00\x00\x00\x00\x00\x00\x00"),
        (b".\x06\x00\x00\x00\x00\x00\x00\x00", b".\x06\x00\x00\x00\x00\x00\x00\x80"),
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
        (b"storage", b"storagf"),
        (b"\x00\x00\x80?" * 6, b"\x00\x00\x80?" * 5),
        (b"\x00\x00\x80?" * 6, b"\x00\x00\x80?" * 7),
        (b"ctorch\nFloatStorage", b"ctorch\nDoubleStorage"),
        (b"ctorch\nFloatStorage", b"ctorch\nFloatTensor"),
        (b"ctorch\nFloatStorage\n", b"N"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03."),
    ],
)
def test_storages_that_are_not_what_they_say(tmp_path, old, new):
    content = storage_file()
    assert content.count(old) == 1
    path = write(tmp_path, network({"w": tensor(content.replace(old, new))}))
    with little():
        message = refusal(path)
    assert "asks for torch.FloatTensor" in message or "damaged" in message


def test_a_storage_is_not_used_over_and_over(tmp_path):
    storage = Call(torch.storage._load_from_bytes, storage_file(torch.ones(MiB)))
    view = torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, OrderedDict()
    path = write(tmp_path, network({f"w{i}": Call(*view) for i in range(20_000)}))
    with little():
        assert "the tensors together are larger than the file" in refusal(path)


@pytest.mark.parametrize("name", ["a.b", "", "a b", "a\n", "ä", "a" * 101])
def test_names_that_no_parameter_has(tmp_path, name):
    assert "the name" in refusal(write(tmp_path, network({name: torch.ones(1)})))
    twice = network({"w": torch.ones(1)}, _buffers={"w": torch.ones(1)})
    assert "w twice" in refusal(write(tmp_path, twice))


@pytest.mark.parametrize(
    "content",
    [
        {"ema": None},
        {"net": 1},
        [],
        {"ema": {"w": torch.ones(1)}},
        {"ema": torch.ones(1)},
        {"ema": persistent("EDM Precond", module_state())},
        {"ema": persistent("EDMPrecond", module_state(), type="function")},
        {"ema": persistent("EDMPrecond", None)},
        network({"w": 3}),
        network({"w": torch.nn.Linear(1, 1)}),
        network(_modules={"m": torch.ones(1)}),
        network(_non_persistent_buffers_set={"w"}),
        network({"w": tensor(metadata=({"neg": True},))}),
    ],
)
def test_content_that_is_no_snapshot(tmp_path, content):
    assert "is truncated, damaged or not an EDM snapshot" in refusal(write(tmp_path, content))


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_files_that_are_cut_short(tmp_path, share):
    _, _, content = next(tiny_snapshots())
    assert "truncated" in refusal(write(tmp_path, content[: int(share * len(content))]))


def test_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path, network())
    stored = read_snapshot(path).tensors["w"]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"network\.pkl: a tensor of it cannot be read"):
        stored.read()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, at some of the files
def test_mutated_files(tmp_path):
    outcomes, growth = fuzz(tmp_path, files=1500, seed=1)
    assert sum(outcomes.values()) == 1500
    assert min(outcomes[what] for what in ("read", "damaged", "refused by name")) > 20
    assert growth < 64 * MiB


def test_the_command_of_the_readme_runs_as_it_is_written():
    command = [sys.executable, "tests/fuzz_checkpoints.py", "--files", "30"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("30 files: ")

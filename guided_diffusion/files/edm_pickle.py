"""EDM's snapshot pickles, read as data.

A snapshot is a pickle of a dict whose "ema" is a network that saved itself through `torch_utils.persistence`:
the name of its class, the source text of its module, its constructor's arguments, and its attributes.
Unpickling it would execute that text. Why there is a reader of our own: torch's `weights_only` refuses these
files, and allowing it their globals would run them, so no library reads them as data. `read_snapshot` is the
only door to it; what is behind the door (here and in pickle_data.py) follows a pickle's instructions without
importing or calling anything.

The bytes of each tensor are themselves a file of torch's older format: its head is read in the same way, its
values by torch with `weights_only=True`. What the file declares is checked against what it holds before
anything is allocated, so that a small file can never ask for much memory.
"""

import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from guided_diffusion.files.pickle_data import (
    CONTAINERS,
    PERSISTENT_ID,
    Name,
    Record,
    RefusedError,
    Span,
    Window,
    expect,
    printable,
    read_pickle,
)

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_PARAMETER, _TENSOR, _STORAGE = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
)
_NUMBERS = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)  # in the arguments of layers
_NAMES = CONTAINERS | {_PERSISTENT, _PARAMETER, _TENSOR, _STORAGE, *_NUMBERS}
_TORCH_MODULE = re.compile(r"torch\.nn\.modules\.[a-z_]{1,99}\.[A-Z]\w{0,99}", re.ASCII)
_FIRST_ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "use_fp16")  # of every class of networks
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_ENTRY = re.compile(r"\w{1,100}", re.ASCII)  # a parameter, buffer or module in its parent

# Above what a snapshot has (the ADM network: 70,000 instructions, 1,000 entries, 40 instructions in a
# storage's head), below what hurts.
_MOST_INSTRUCTIONS, _MOST_ENTRIES, _MOST_IN_HEAD, _DEEPEST, _MOST_DIMENSIONS = 1_000_000, 100_000, 200, 16, 8

# torch's older file format: a magic number, a version and the machine, each a pickle, before the content.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that still lies in the file at `path`: as a view of the storage whose older-format torch file
    is `span`.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    span: Span

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor itself, contiguous, on the CPU. Raises ValueError where torch cannot read it, or the
        file has changed since.
        """
        with open(self.path, "rb") as file:
            file.seek(self.span.start)
            content = io.BytesIO(file.read(self.span.length))
        try:
            storage = torch.load(content, map_location="cpu", weights_only=True)
            return (
                torch.empty(0, dtype=self.dtype)
                .set_(storage)
                .as_strided(self.shape, self.stride, self.offset)
                .contiguous()
            )
        except Exception as error:  # torch does not say what it raises at a damaged file
            raise ValueError(
                f"{self.path}: a tensor of it cannot be read ({type(error).__name__}); get the file again"
            ) from error


@dataclass(frozen=True)
class Snapshot:
    """A network out of a pickle: its class, its constructor's arguments by name, and its state dict, still in
    the file.
    """

    class_name: str
    arguments: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_snapshot(path: str | Path) -> Snapshot:
    """Read the network "ema" of an EDM pickle; of its tensors, only what they are and where they lie.

    Raises ValueError with the name of what the pickle asks for, where that is more than a snapshot needs, and
    ValueError where the file is cut short, damaged or something else.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            content = read_pickle(Window(file, 0, size), _NAMES, _TORCH_MODULE, most=_MOST_INSTRUCTIONS)
            if "ema" not in expect(content, dict):
                raise ValueError(f'no network "ema" in it, but {", ".join(list(content)[:5]) or "nothing"}')
            class_name, state = _module(content["ema"])
            return Snapshot(class_name, _arguments(state), _tensors(path, file, size, state))
    except RefusedError as error:
        raise ValueError(
            f"refused to read {path}: it asks for {error}, which no EDM snapshot needs"
        ) from error
    except (
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as error:
        reason = (
            printable(str(error))
            if type(error) is ValueError
            else f"{type(error).__name__} {printable(str(error))}"
        )
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated, damaged or not an EDM snapshot ({reason})"
        ) from error


def _module(record):
    """(class name, attributes) of a network or layer: a persistent object, or a plain one of torch's."""
    if expect(record, Record).name != _PERSISTENT:
        if not _TORCH_MODULE.fullmatch(record.name):
            raise ValueError(f"a {record.name} where a module belongs")
        return record.name.rpartition(".")[2], expect(record.state, dict)
    (meta,) = record.args
    if expect(meta, dict)["type"] != "class":
        raise ValueError("a persistent object that is not of a class")
    if not _IDENTIFIER.fullmatch(expect(meta["class_name"], str)):
        raise ValueError(f"the class name {printable(meta['class_name'])!r}")
    return meta["class_name"], expect(meta["state"], dict)


def _arguments(state):
    """The constructor's arguments by name, as JSON could hold them."""
    args, kwargs = expect(state.get("_init_args", ()), tuple), expect(state.get("_init_kwargs", {}), dict)
    if len(args) > len(_FIRST_ARGUMENTS):
        raise ValueError(f"{len(args)} arguments without a name")
    arguments = {**dict(zip(_FIRST_ARGUMENTS, args, strict=False)), **kwargs}
    for name, value in arguments.items():
        values = value if type(value) in (list, tuple) and len(value) <= 100 else [value]
        if not _IDENTIFIER.fullmatch(name) or not all(
            v is None or type(v) in (bool, int, float, str) for v in values
        ):
            raise ValueError(f"the argument {printable(name)!r} is not of numbers and text")
        if any(len(v) > 100 for v in values if type(v) is str):
            raise ValueError(f"the argument {printable(name)!r} is too long")
    return {name: list(value) if type(value) is tuple else value for name, value in arguments.items()}


def _tensors(path: Path, file: BinaryIO, size: int, state: dict) -> dict[str, StoredTensor]:
    """The state dict. Each tensor has bytes of its own, so that all of them together are no larger than the
    file.
    """
    tensors: dict[str, StoredTensor] = {}
    total = 0
    for count, (name, tensor) in enumerate(_entries(state)):
        if count == _MOST_ENTRIES:
            raise ValueError(f"more than {_MOST_ENTRIES:,} parameters and modules; is one inside itself?")
        if tensor is None:
            continue
        if name in tensors:
            raise ValueError(f"{name} twice")
        stored = _stored(path, file, tensor)
        # Views of one storage would be read in full for each, so that each counts with the whole of it.
        total += stored.span.length
        if total > size:
            raise ValueError("the tensors together are larger than the file")
        tensors[name] = stored
    return tensors


def _entries(state: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(name, pickled tensor or None) of the parameters, buffers and modules, in the order of torch's state
    dicts.
    """
    if depth > _DEEPEST:
        raise ValueError(f"modules {_DEEPEST} deep and more; is one inside itself?")
    if state.get("_non_persistent_buffers_set"):
        raise ValueError("buffers that are not part of the state dict")
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in expect(state[kind], dict).items():
            if not _ENTRY.fullmatch(name):
                raise ValueError(f"the name {printable(name)!r}")
            if kind != "_modules":
                yield prefix + name, value
                continue
            yield prefix + name, None  # a module counts as an entry, or empty ones could go on for ever
            if value is not None:
                yield from _entries(_module(value)[1], f"{prefix}{name}.", depth + 1)


def _stored(path, file, record):
    """Where a pickled tensor lies, once its declared sizes are known to fit into its storage."""
    if expect(record, Record).name == _PARAMETER:
        record = expect(record.args[0], Record)
    storage, offset, shape, stride, _, _, *metadata = _call(record, _TENSOR)
    (span,) = _call(storage, _STORAGE)
    dtype, numel = _storage(file, expect(span, Span))
    numbers = (offset, *expect(shape, tuple), *expect(stride, tuple))
    if (
        any(type(n) is not int or n < 0 for n in numbers)
        or len(shape) != len(stride)
        or len(shape) > _MOST_DIMENSIONS
        or any(metadata)
    ):
        raise ValueError("a tensor of impossible shape")
    # The furthest number that the view reaches; strides of 0 repeat numbers, so the count is checked as well.
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) > numel or (0 not in shape and last >= numel):
        raise ValueError(
            f"a tensor of shape {printable(str(shape))} reaches beyond its storage of {numel:,} numbers"
        )
    return StoredTensor(path, dtype, shape, stride, offset, span)


def _storage(file, span):
    """(dtype, count of numbers) of a storage, from the head of its torch file, whose length must be what they
    say.
    """
    window = Window(file, span.start, span.start + span.length)
    if window.read(4) == b"PK\x03\x04":
        _refuse_zip(window)
    file.seek(span.start)
    allowed = {*_DTYPES, PERSISTENT_ID}
    # Five pickles, one after another: magic number, version, machine, the storage's description, its keys.
    head = [read_pickle(window, allowed, most=_MOST_IN_HEAD) for _ in range(5)]
    if head[0] != _MAGIC or head[1] != _VERSION or expect(head[2], dict).get("little_endian") is not True:
        raise ValueError("a storage that is not in torch's format")
    kind, name, key, _, numel, view = _call(head[3], PERSISTENT_ID)
    if kind != "storage" or head[4] != [key] or view is not None or expect(numel, int) < 0:
        raise ValueError("a storage of another kind")
    dtype = _DTYPES[expect(name, Name).name]
    # Then the count again, and the numbers; what follows them would be another storage, which none has.
    if int.from_bytes(window.read(8), "little") != numel or window.left() != numel * dtype.itemsize:
        raise ValueError(f"a storage of {numel:,} numbers in {window.left():,} bytes")
    return dtype, numel


def _refuse_zip(window):
    """End the reading at torch's newer format, if possible with the name of what the pickle in it, its first
    member, asks for.
    """
    name_length, extra_length = struct.unpack("<22xHH", window.read(26))
    window.read(name_length + extra_length)
    read_pickle(window, (), most=_MOST_INSTRUCTIONS)
    raise RefusedError("a storage in a zip archive")


def _call(record, name):
    """The arguments of a call of `name`."""
    if expect(record, Record).name != name:
        raise ValueError(f"a {record.name} where a {name} belongs")
    return record.args

"""The one door to weights. Reading a checkpoint never runs code that it carries.

torch files are read with `weights_only=True`, EDM's pickles as data (edm_pickle.py), and safetensors hold no
code at all. Which of them a file is, its bytes say (formats.py); which state dict in it is meant,
state_dicts.py.
"""

import argparse
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from guided_diffusion.files.edm_pickle import read_snapshot
from guided_diffusion.files.formats import EDM, SAFETENSORS, kind_of
from guided_diffusion.files.pickle_data import printable
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.files.state_dicts import choose_state_dict, first_line


def load_state_dict(
    path: str | Path, checkpoint_key: str | None = None, *, prefer: str = ""
) -> dict[str, Tensor]:
    """Read name -> tensor from a torch file, safetensors, or the network "ema" of an EDM pickle, onto the
    CPU.

    The state dict may stand in a checkpoint, and in wrappers such as DataParallel, whose names it loses here.
    checkpoint_key: which, where a checkpoint holds several, such as "ema". prefer: which, where several are
    there and no key is given.

    Raises FileNotFoundError, and ValueError for a file that is cut short, asks for more than data, or is
    something else, with what it is.
    """
    path = existing_file(path)
    kind = kind_of(path)
    if kind == EDM:
        if checkpoint_key not in (None, "ema"):
            raise ValueError(
                f"{path} is an EDM snapshot, read for its network ema; not for {checkpoint_key!r}"
            )
        return load_edm_checkpoint(path).state_dict
    content = _read_safetensors(path) if kind == SAFETENSORS else load_torch(path)
    return choose_state_dict(content, path, checkpoint_key, prefer)


def _read_safetensors(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def load_torch(path: str | Path) -> Any:
    """What a torch file holds, tensors onto the CPU. Raises ValueError for more than data, and for a damaged
    file.
    """
    try:
        # A training checkpoint of DiT's holds its flags, a class of nothing but attributes.
        flags = torch.serialization.safe_globals([argparse.Namespace])
        with flags, open(path, "rb") as file:  # not the path, whose ending torch would go by
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global) ([\w.]+\.\w+)", str(error))
        if asked is None:
            what = f"it holds more than tensors, or is damaged ({_reason(error)})"
            raise ValueError(f"refused to read {path}: {what}") from error
        way_out = "load it once with torch.load(..., weights_only=False), and torch.save its state dict alone"
        raise ValueError(
            f"refused to read {path}: it asks for {printable(asked[1])}, which is no data. "
            f"Where you trust the file, {way_out}"
        ) from error
    except Exception as error:  # torch does not say what it raises at a damaged file
        raise _damaged(path, error) from error


def _damaged(path, error):
    size = path.stat().st_size
    return ValueError(f"{path} ({size:,} bytes) is truncated or not a checkpoint ({first_line(error)})")


def _reason(error):
    """What torch's reader says, without what it advises."""
    if re.search(r"Unsupported operand (14\d|150)", str(error)):  # the instructions that came with protocol 4
        return "it is written in pickle protocol 4 or later: torch.save it without pickle_protocol"
    found = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return printable(found[1].split(". ")[0]) if found else first_line(error)


@dataclass(frozen=True)
class EDMCheckpoint:
    """Weights of an EDM network with what it takes to build it: its class, and its constructor's arguments by
    name.
    """

    class_name: str
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]


def load_edm_checkpoint(path: str | Path) -> EDMCheckpoint:
    """Read an EDM pickle, or the safetensors that scripts/convert_checkpoint.py made of one. Raises as
    `load_state_dict` does.
    """
    path = existing_file(path)
    kind = kind_of(path)
    if kind == EDM:
        snapshot = read_snapshot(path)
        state_dict = {name: tensor.read() for name, tensor in snapshot.tensors.items()}
        return EDMCheckpoint(snapshot.class_name, snapshot.arguments, state_dict)
    if kind != SAFETENSORS:
        raise ValueError(f"{path} is no EDM network: it must be an EDM .pkl, or the .safetensors made of one")
    state_dict = _read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return EDMCheckpoint(metadata["class_name"], dict(json.loads(metadata["arguments"])), state_dict)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say which EDM network it is of; make it with scripts/convert_checkpoint.py"
        ) from error

"""The one place that reads weights: safe, hashed, strict.

Reading a checkpoint never runs code that it carries: torch files are read with `weights_only=True`, EDM's
pickles as data, safetensors hold no code at all. This module and the two that it imports (edm_pickle,
pickle_data) use no other of the project, so that every room may use them.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from guided_diffusion.files.edm_pickle import read_snapshot

PRETRAINED_DIR = Path(__file__).resolve().parents[2] / "pretrained_models"


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read name -> tensor from a .pt, .pth or .safetensors file, or the network "ema" of an EDM .pkl, onto
    the CPU.

    Raises FileNotFoundError, and ValueError for a file that is truncated, holds something other than tensors
    by name, or has another ending; of a pickle that asks for more than data, it says for what.
    """
    path = existing_file(path)
    if path.suffix == ".pkl":
        return load_edm_checkpoint(path).state_dict
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(
            f"cannot read {path}: the ending must be .pt, .pth or .safetensors, or .pkl for an EDM snapshot"
        )
    try:
        state_dict = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"refused to read {path}: it holds more than tensors, or is damaged ({_first_line(error)})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated or not a checkpoint ({_first_line(error)})"
        ) from error
    if not isinstance(state_dict, Mapping) or not all(isinstance(v, Tensor) for v in state_dict.values()):
        raise ValueError(f"{path} does not hold a state dict, that is tensors by name")
    return dict(state_dict)


@dataclass(frozen=True)
class EDMCheckpoint:
    """Weights of an EDM network with what it takes to build it: its class, and its constructor's arguments by
    name.
    """

    class_name: str
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]


def load_edm_checkpoint(path: str | Path) -> EDMCheckpoint:
    """Read an EDM .pkl, or a .safetensors that scripts/convert_checkpoint.py made of one. Raises as
    `load_state_dict` does.
    """
    path = existing_file(path)
    if path.suffix == ".pkl":
        snapshot = read_snapshot(path)
        return EDMCheckpoint(
            snapshot.class_name,
            snapshot.arguments,
            {name: tensor.read() for name, tensor in snapshot.tensors.items()},
        )
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no EDM network: the ending must be .pkl, or .safetensors for a converted one"
        )
    state_dict = load_state_dict(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return EDMCheckpoint(metadata["class_name"], dict(json.loads(metadata["arguments"])), state_dict)
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not say which EDM network it is of; make it with scripts/convert_checkpoint.py"
        ) from error


def load_into(module: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `state_dict` into `module`, strictly. `source` names it in the error.

    A module that was built on the meta device takes the tensors themselves, as float32: nothing is held
    twice.

    Raises ValueError with the first missing, unexpected or misshapen name, both shapes, and how many there
    are of each.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state_dict]
    unexpected = [k for k in state_dict if k not in own]
    misshapen = [k for k in own if k in state_dict and own[k].shape != state_dict[k].shape]
    problems = []
    if misshapen:
        k = misshapen[0]
        problems.append(
            f"{k} is {list(state_dict[k].shape)} in the file but {list(own[k].shape)} in the network{_more(misshapen)}"
        )
    if missing:
        problems.append(f"the file lacks {missing[0]}{_more(missing)}")
    if unexpected:
        problems.append(f"the network lacks {unexpected[0]}{_more(unexpected)}")
    if problems:
        raise ValueError(f"{source} does not fit the architecture flags: {'; '.join(problems)}")
    if any(tensor.is_meta for tensor in own.values()):
        state_dict = {k: v.float() if v.is_floating_point() else v for k, v in state_dict.items()}
        module.load_state_dict(state_dict, assign=True)
    else:
        module.load_state_dict(state_dict)


def find_pretrained(name: str, *, url: str | None = None, folder: Path | None = None) -> Path:
    """Return where `name`, or another name under which `files.json` knows it, lies in pretrained_models/ (or
    `folder`).

    Raises FileNotFoundError that says which file to put where; `url` is where it comes from if the table does
    not know.
    """
    folder = PRETRAINED_DIR if folder is None else folder
    entry = _published().get(name, {})
    for alias in (name, *entry.get("also_named", [])):
        if (folder / alias).is_file():
            return folder / alias
    hint = f"run `python scripts/download.py {name}`" if entry else "give its path"
    source = f", or put {entry.get('url', url)} there by hand" if entry or url else ""
    raise FileNotFoundError(f"no weights at {folder / name}; {hint}{source}")


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def existing_file(path: str | Path) -> Path:
    """The path itself. Raises FileNotFoundError that says how to fetch the file where it is missing."""
    path = Path(path)
    if not path.is_file():
        hint = "see `python scripts/download.py --list`"
        if path.name in _published():
            hint = f"fetch it with `python scripts/download.py {path.name}`"
        raise FileNotFoundError(f"no checkpoint at {path}; {hint}")
    return path


def known_hashes(path: str | Path) -> list[tuple[str, str]]:
    """[(SHA-256 or its beginning, who says so)] of a file by its name: what is published, and what its
    download recorded beside it.
    """
    path = Path(path)
    entries = (entry for name, entry in _published().items() if path.name in (name, *entry["also_named"]))
    published = [entry["sha256"] or entry.get("sha256_prefix", "") for entry in entries]
    recorded = recorded_hashes(path.parent).get(path.name, {}).get("sha256", "")
    return [
        (text, who)
        for text, who in (*((text, "published") for text in published), (recorded, "recorded"))
        if text
    ]


def recorded_hashes(folder: Path) -> dict[str, dict]:
    """`hashes.json` of a folder: file name -> {"sha256", "bytes"}, seen at the first download. Raises OSError
    if it is broken.
    """
    path = folder / "hashes.json"
    try:
        records = json.loads(path.read_text()) if path.exists() else {}
        return {
            name: {"sha256": row["sha256"].lower(), "bytes": row["bytes"]} for name, row in records.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError):
        raise OSError(f"{path} is not a table of sha256 and bytes: repair or remove it") from None


def _published():
    """The table of files that scripts/download.py knows, by name."""
    return json.loads((PRETRAINED_DIR / "files.json").read_text())["files"]


def _more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _first_line(error):
    """What an error says, up to the end of its first line or sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]

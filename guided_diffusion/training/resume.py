"""What must stay as it was where a training goes on, and the parts of a checkpoint that still fit."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "training.json"


def read_record(folder: Path) -> dict[str, Any]:
    """What training.json in a folder says; nothing where it is not there. Raises ValueError for a damaged
    one.
    """
    try:
        return dict(json.loads((folder / FILE).read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is damaged ({error}): choose another --out") from error


def describe_data(images: Tensor, labels: Tensor) -> str:
    """The number of images, and a checksum of them and their labels."""
    checksum = zlib.crc32(labels.cpu().numpy().data, zlib.crc32(images.cpu().contiguous().numpy().data))
    return f"{len(images)} images, checksum {checksum:08x}"


def require_same(folder: Path, record: Mapping[str, Any], config: Any, data: str, processes: int) -> None:
    """Raise ValueError that names the first difference between the training that training.json records and
    this one, of what decides about the weights. Data count by their content, not by where they lie.
    """
    flags, now = record.get("flags", {}), config.record()
    apart = config.not_compared() | {"data_dir"}
    old = {name: value for name, value in flags.items() if name in now and name not in apart}
    pairs = {f"--{name}": (value, now[name]) for name, value in old.items()}
    pairs["the number of processes"] = (record.get("processes", processes), processes)
    if record.get("data", data) != data:
        was = f"{flags.get('data_dir')} ({record['data']})"
        pairs["--data_dir"] = (was, f"{config.data_dir} ({data})")
    for name, (before, after) in pairs.items():
        if before != after:
            raise ValueError(
                f"{folder} holds a training with another value of {name}: {_shown(before)}, now "
                f"{_shown(after)}; choose another --out, or keep the value to resume"
            )


def _shown(value):
    return "none" if value == "" else value


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> bool:
    """Take the state that an optimizer of the same kind and parameters saved, and keep our own settings, such
    as weight_decay. False where the state is not such a one, and nothing is taken.
    """
    if not _fits(optimizer, state):
        return False
    pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
    groups = [{**theirs, **ours, "params": theirs["params"]} for theirs, ours in pairs]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    return True


def _fits(optimizer, state):
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        return False
    ours, theirs = optimizer.param_groups, state["param_groups"]
    if [len(group["params"]) for group in ours] != [len(group["params"]) for group in theirs]:
        return False
    if any(("betas" in one) != ("betas" in other) for one, other in zip(ours, theirs, strict=True)):
        return False
    parameters = [parameter for group in ours for parameter in group["params"]]
    indices = [index for group in theirs for index in group["params"]]
    return all(
        value.shape in ((), parameter.shape)
        for index, parameter in zip(indices, parameters, strict=True)
        for value in state["state"].get(index, {}).values()
        if isinstance(value, Tensor)
    )

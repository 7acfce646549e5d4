"""The checkpoints of a training, under guided-diffusion's names, S the number of steps taken, six digits:

    modelS.pt         the network's weights
    ema_RATE_S.pt     an average of them
    optS.pt           all else that a training resumes from: written last, so that a step which has one is
                      complete

Each file is complete or absent. Only tensors, numbers and text are in them: reading one runs no code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from guided_diffusion.files.atomic import PART, renamed_when_complete
from guided_diffusion.files.checkpoints import load_state_dict, load_torch
from guided_diffusion.files.state_dicts import load_into

_NAME = re.compile(r"(?:model|opt|ema_[\d.]+_)(\d{6,})\.pt")


class Checkpoints:
    """The checkpoints in a folder. keep: how many of the latest stay; 0 keeps all."""

    def __init__(self, folder: str | Path, keep: int = 0):
        self.folder, self.keep = Path(folder), keep

    def save(
        self, step: int, model: nn.Module, averages: Mapping[str, nn.Module], rest: Mapping[str, Any]
    ) -> None:
        """Write the checkpoint of this step, then remove those that are too old. averages: rate as it was
        written in the flag -> network.
        """
        for rate, network in averages.items():
            self._write(average_file(self.folder, rate, step), network.state_dict())
        self._write(self.folder / f"model{step:06d}.pt", model.state_dict())
        self._write(self.folder / f"opt{step:06d}.pt", dict(rest))
        if self.keep:
            self._remove_all_but(self.steps()[-self.keep :])

    def steps(self) -> list[int]:
        """The steps whose checkpoints are complete, ascending."""
        files = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        found = [match for name in files if (match := _NAME.fullmatch(name))]
        steps = {kind: {int(m[1]) for m in found if m[0].startswith(kind)} for kind in ("model", "opt")}
        return sorted(steps["model"] & steps["opt"])

    def remove_unfinished(self) -> None:
        """Remove the files that a killed process was writing."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if re.fullmatch(PART, path.name):
                path.unlink()

    def _write(self, path, content):
        try:
            with renamed_when_complete(path) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk in its own way
            last = self.steps()
            kept = (
                f"the checkpoint of step {last[-1]} is complete" if last else "no earlier checkpoint is there"
            )
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise OSError(f"{path} could not be written ({reason}); {kept}") from error

    def _remove_all_but(self, steps):
        for path in self.folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) not in steps:
                path.unlink()


def average_file(folder: Path, rate: str, step: int) -> Path:
    """Where the average of this rate is kept."""
    return folder / f"ema_{rate}_{step:06d}.pt"


def step_of(path: str | Path) -> int:
    """The number of steps in a checkpoint's name, model000100.pt; 0 where there is none."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else 0


def load_checkpoint(
    path: str | Path, model: nn.Module, averages: Mapping[str, nn.Module]
) -> dict[str, Any] | None:
    """Read modelS.pt into `model` and the averages beside it into theirs; return what optS.pt holds, None
    where that is not there.

    An average that is not there begins at the model's weights. Raises FileNotFoundError, and ValueError for
    files that are damaged, and for weights of another shape.
    """
    path, step = Path(path), step_of(path)
    load_into(model, load_state_dict(path), path)
    for rate, network in averages.items():
        file = average_file(path.parent, rate, step)
        load_into(network, load_state_dict(file) if file.is_file() else model.state_dict(), file)
    rest = path.with_name(f"opt{step:06d}.pt")
    return load_torch(rest) if rest.is_file() else None


def write_half(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, floating-point numbers in float16, complete or absent."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in state_dict.items()
    }
    with renamed_when_complete(path) as file:
        file.write(save(tensors, {"format": "pt", **metadata}))

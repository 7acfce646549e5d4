"""The weights of a feature network, and the hash by which results say whose they are."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import sha256


def read_weights(weights: str | Path | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A file or a state dict -> (name -> tensor, 64 hexadecimal digits: of the file, or of the names and
    values of the state dict).
    """
    if isinstance(weights, str | Path):
        return load_state_dict(weights), sha256(weights)
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return dict(weights), digest.hexdigest()

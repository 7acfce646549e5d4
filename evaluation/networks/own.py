"""A feature network of one's own, from a Python file."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.networks.digits import normalise
from evaluation.networks.weights import read_weights


class OwnFeatures:
    """Called on (N, H, W, 3) uint8 images, it returns `pool3` (N, D): what the network of FILE.py:builder
    answers.

    builder() returns a torch.nn.Module, filled with its weights, from (N, 3, H, W) images in [-1, 1] to
    features (N, D). Its distance is FD(FILE.builder). Running it runs the file. Raises FileNotFoundError, and
    ValueError for a file without such a builder and for answers of another shape.
    """

    outputs = ("pool3",)

    def __init__(self, source: str, device: str | torch.device = "cpu"):
        file, _, function = source.rpartition(":")
        if not Path(file).is_file():
            raise FileNotFoundError(f"no file {file}, named by --features {source}")
        network = _builder(Path(file), function)()
        if not isinstance(network, nn.Module):
            raise ValueError(f"{source} built {type(network).__name__}, not a torch.nn.Module")
        weights = read_weights(network.state_dict())[1]
        # The same weights in other code are another network.
        self.sha256 = hashlib.sha256(Path(file).read_bytes() + weights.encode()).hexdigest()
        self.name = self.protocol = f"{Path(file).stem}.{function}"
        self.source, self.device = source, torch.device(device)
        self.batch_size = 16 if self.device.type == "cpu" else 128
        self.network = network.float().to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        features = self.network(normalise(torch.as_tensor(images).to(self.device)))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
            answer = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"{self.source} answers {answer} to {len(images)} images; needed is (N, D)")
        return {"pool3": features.float().cpu().numpy()}


def _builder(file, function):
    spec = importlib.util.spec_from_file_location(f"own_features_{file.stem}", file)
    assert spec and spec.loader  # of a .py they are there
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, for one, look their module up there
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{file} has no function {function!r}; write FILE.py:builder")
    return getattr(module, function)

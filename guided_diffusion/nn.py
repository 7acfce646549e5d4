"""Small helpers, under the names and with the arguments of openai/guided-diffusion."""

from collections.abc import Iterable

import torch
from torch import Tensor

from guided_diffusion.layers import timestep_embedding

__all__ = ["mean_flat", "timestep_embedding", "update_ema"]


def mean_flat(tensor: Tensor) -> Tensor:
    """The mean over all dimensions but the first: (N, ...) -> (N,)."""
    return tensor.reshape(len(tensor), -1).mean(dim=1)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Set each target to rate * target + (1 - rate) * source, in place.

    The sources may be of another dtype or on another device. Raises ValueError where the numbers of tensors
    differ.
    """
    for target, source in zip(target_params, source_params, strict=True):
        target.lerp_(source.to(target), 1 - rate)

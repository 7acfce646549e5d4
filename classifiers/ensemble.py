"""Several classifiers as one: against gradients that fool a single one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """forward(x) -> the mean of the members' log-probabilities, (N, classes): the logarithm of their product
    of experts, not normalised, in float32 (float64 if they are).

    Each member sees the image in its own way. notes: those of all of them.
    """

    members: Any

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def notes(self) -> list[str]:
        return [note for member in self.members for note in member.notes]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([log_probabilities(member(x)) for member in self.members]).mean(dim=0)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the classes, in float32 (float64 if the logits are)."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=1)

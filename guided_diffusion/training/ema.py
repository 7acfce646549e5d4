"""Weights that are averaged over training."""

import copy

import torch
from torch import Tensor, nn


class Average:
    """A copy of `model` whose parameters are an exponential moving average of the model's; buffers are the
    model's own.

    rate: in [0, 1); an old value weighs rate ** k after k updates. `module` is the copy, in eval mode.
    """

    def __init__(self, model: nn.Module, rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"the rate of the moving average must be in [0, 1), got {rate}")
        self.model, self.rate = model, rate
        self.module = copy.deepcopy(model).requires_grad_(False).eval()
        self._averaged: list[Tensor] = list(self.module.parameters())
        self._present: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights: call it after each step of the optimizer."""
        torch._foreach_lerp_(self._averaged, self._present, 1 - self.rate)
        for mine, its in zip(self.module.buffers(), self.model.buffers(), strict=True):
            mine.copy_(its)

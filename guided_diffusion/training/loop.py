"""One loop that trains any network."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from guided_diffusion.files.nonfinite import require_finite
from guided_diffusion.training.ema import Average

LAST = 200  # iterations over which the recorded loss is a mean: a single batch's is noise


@dataclass(frozen=True)
class Optimization:
    """AdamW whose rate rises to `learning_rate` in the first part `warmup` of the iterations, then falls to
    almost 0, both along a cosine.
    """

    iterations: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: float = 0.1

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"training needs at least 1 iteration, got {self.iterations}")

    def build(self, model: nn.Module) -> tuple[torch.optim.Optimizer, OneCycleLR]:
        """Return the optimizer of the model's parameters, and its schedule."""
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        # A rise of exactly one iteration is no rise, and PyTorch divides by its length less one.
        warmup = 0.0 if self.warmup * self.iterations == 1 else self.warmup
        schedule = OneCycleLR(optimizer, self.learning_rate, total_steps=self.iterations, pct_start=warmup)
        return optimizer, schedule


def train(
    model: nn.Module,
    losses_of: Callable[..., Mapping[str, Tensor]],
    batches: Iterable[tuple[Any, ...]],
    optimization: Optimization,
    *,
    average: Average | None = None,
    name: str = "training",
) -> dict[str, Any]:
    """Train `model` in place, and return figures to record: iterations, parameters, loss_of_last_200.

    losses_of: called as losses_of(*batch), returns the terms of the loss by name, (N, ...) each, with one row
    per image. The mean of "loss" is minimised; the other terms are recorded. batches: one is taken per
    iteration. average: updated after each iteration. The progress bar, called `name`, shows the loss and the
    remaining time. loss_of_last_200 holds each term's mean over the last 200 iterations.

    Raises NonFiniteError for a loss that is not finite, ValueError where the batches end too early.
    """
    optimizer, schedule = optimization.build(model)
    model.train()
    batches = iter(batches)
    last: deque[dict[str, float]] = deque(maxlen=LAST)
    for iteration in (progress := tqdm(range(optimization.iterations), desc=name)):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the batches end after {iteration} of {optimization.iterations} iterations")
        losses = losses_of(*batch)
        require_finite(losses["loss"].detach().reshape(len(losses["loss"]), -1), "training loss", iteration)
        terms = {term: value.mean() for term, value in losses.items()}
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update()
        last.append({term: value.item() for term, value in terms.items()})
        progress.set_postfix(loss=f"{last[-1]['loss']:.4f}")
    return {
        "iterations": optimization.iterations,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_of_last_200": {
            term: round(float(np.mean([terms[term] for terms in last])), 5) for term in last[0]
        },
    }

"""One loop that trains any network: a step of the optimizer at a time, on one process or several."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.training.ema import Average

LAST = 200  # iterations over which the recorded loss is a mean: a single batch's is noise
QUARTERS = 4
POSITION = "position"
WATCHED = ("training loss", "gradient")

LossesOf = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True)
class Precision:
    """What a network computes in; its parameters, their averages and the optimizer stay in float32.

    dtype: of convolutions and products. With float16 on CUDA the loss is scaled by a power of two that grows
    by `scale_growth` a step, and halves where a gradient overflows; that step is left out (guided-diffusion's
    rule).
    """

    dtype: torch.dtype = torch.float32
    scale_growth: float = 1e-3

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context for the forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """What scales the loss, or does nothing where there is no need."""
        enabled = self.dtype == torch.float16 and device.type == "cuda"
        growth = 2**self.scale_growth
        return torch.amp.GradScaler(
            device.type, init_scale=2.0**20, growth_factor=growth, growth_interval=1, enabled=enabled
        )


class Loop:
    """Trains `model` in place by calls of `advance`; `step` counts them.

    losses_of: called as losses_of(*batch), returns the terms of the loss by name, (N, ...) each, with one row
    per image. The mean of "loss" is minimised; the other terms are recorded. A term "position", (N,) in
    [0, 1), says where on the axis of noise each image stood: the loss is then recorded by quarter of that
    axis too. averages: updated after each step. microbatch: images that go through the network at once, 0 for
    the whole batch; the gradient is that of the whole batch.

    Where torch.distributed has several processes, each is given its part of the batch, and the gradients are
    averaged. Nothing here makes the host wait for an accelerator.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: LossesOf,
        optimizer: torch.optim.Optimizer,
        averages: Iterable[Average] = (),
        *,
        precision: Precision | None = None,
        microbatch: int = 0,
    ):
        self.model, self.losses_of, self.optimizer = model, losses_of, optimizer
        self.averages = list(averages)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.precision, self.microbatch = precision or Precision(), microbatch
        self.scaler = self.precision.scaler(self.device)
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.step = 0
        # The first step at which each of them was not finite.
        self._first_bad = {what: torch.full((), -1, device=self.device) for what in WATCHED}

    def advance(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """Take one step on a batch, a tuple of (N, ...) tensors. Returns (sum, count), (2,) float64 on the
        device, of every term over the images of this process, by name; grad_norm as well.
        """
        self.optimizer.zero_grad(set_to_none=True)
        figures: dict[str, Tensor] = {}
        for part in self._parts(batch):
            with self.precision.autocast(self.device):
                losses = dict(self.losses_of(*part))
            loss = losses["loss"].float().mean()
            self.scaler.scale(loss * (len(part[0]) / len(batch[0]))).backward()
            add_figures(figures, _figures(losses))
            self._note_nonfinite("training loss", loss.detach())
        self._share_gradients()
        self.scaler.unscale_(self.optimizer)
        figures["grad_norm"] = self._gradient_norm()
        if not self.scaler.is_enabled():  # which leaves such a step out
            self._note_nonfinite("gradient", figures["grad_norm"][0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for average in self.averages:
            average.update()
        self.step += 1
        return figures

    def require_finite(self) -> None:
        """Raise NonFiniteError with the step where the loss or its gradient was first not finite, in every
        process where it happened in one. Waits for the device.
        """
        first = torch.stack([self._first_bad[what] for what in WATCHED])
        if self.processes > 1:
            dist.all_reduce(first, dist.ReduceOp.MAX)
        bad = [(step, i) for i, step in enumerate(first.tolist()) if step >= 0]
        if bad:
            step, i = min(bad)
            raise NonFiniteError(WATCHED[i], [], step)

    def _parts(self, batch):
        size = self.microbatch or len(batch[0])
        for start in range(0, len(batch[0]), size):
            yield tuple(each[start : start + size] for each in batch)

    def _note_nonfinite(self, what, value):
        first = self._first_bad[what]
        self._first_bad[what] = torch.where((first < 0) & ~value.isfinite(), self.step, first)

    def _gradients(self):
        return [p.grad for p in self.parameters if p.grad is not None]

    def _share_gradients(self):
        if self.processes == 1:
            return
        gradients = self._gradients()
        flat = _flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.processes
        for own, shared in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
            own.copy_(shared)

    def _gradient_norm(self):
        norm = torch.stack(torch._foreach_norm(self._gradients())).norm()
        return torch.stack([norm, torch.ones_like(norm)]).double()


def add_figures(totals: dict[str, Tensor], figures: Mapping[str, Tensor]) -> None:
    """Add (sum, count) pairs to those of the same names, in place."""
    for name, pair in figures.items():
        totals[name] = totals[name] + pair if name in totals else pair


def _figures(losses):
    """(sum, count) over the images of each term, and of the loss by quarter."""
    position = losses.pop(POSITION, None)
    each = {name: term.detach().reshape(len(term), -1).double().mean(dim=1) for name, term in losses.items()}
    figures = {name: torch.stack([term.sum(), torch.ones_like(term).sum()]) for name, term in each.items()}
    if position is not None:
        quarter = (position * QUARTERS).long().clamp(0, QUARTERS - 1)
        pairs = torch.stack([each["loss"], torch.ones_like(each["loss"])], dim=1)
        table = pairs.new_zeros(QUARTERS, 2).index_add(0, quarter, pairs)
        figures |= {f"loss_q{i}": table[i] for i in range(QUARTERS)}
    return figures


# For small networks, without checkpoints


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
    losses_of: LossesOf,
    batches: Iterable[tuple[Any, ...]],
    optimization: Optimization,
    *,
    average: Average | None = None,
    name: str = "training",
) -> dict[str, Any]:
    """Train `model` in place, and return figures to record: iterations, parameters, loss_of_last_200.

    losses_of: as in `Loop`. batches: one is taken per iteration. average: updated after each iteration. The
    progress bar, called `name`, shows the loss and the remaining time. loss_of_last_200 holds each term's
    mean over the last 200 iterations.

    Raises NonFiniteError for a loss that is not finite, ValueError where the batches end too early.
    """
    optimizer, schedule = optimization.build(model)
    model.train()
    loop = Loop(model, losses_of, optimizer, [] if average is None else [average])
    batches = iter(batches)
    last: deque[dict[str, float]] = deque(maxlen=LAST)
    for iteration in (progress := tqdm(range(optimization.iterations), desc=name)):
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the batches end after {iteration} of {optimization.iterations} iterations")
        figures = loop.advance(batch)
        loop.require_finite()
        schedule.step()
        del figures["grad_norm"]
        last.append({term: float(total / count) for term, (total, count) in figures.items()})
        progress.set_postfix(loss=f"{last[-1]['loss']:.4f}")
    return {
        "iterations": optimization.iterations,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss_of_last_200": {
            term: round(float(np.mean([terms[term] for terms in last])), 5) for term in last[0]
        },
    }

"""What the solvers share: their checks, the question that they ask, and what happens after each step."""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import require_finite

Denoise = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor], None]
RandnLike = Callable[[Tensor], Tensor]
Solver = Callable[..., Tensor]
Parts = Callable[[Tensor, float], tuple[Tensor, Tensor | float]]


def solver(walk: Solver) -> Solver:
    """Decorate walk(denoise, x, sigmas, **options), which walks between any two levels: as a solver it gets
    float64, takes no gradients, and refuses levels that do not fall to 0.
    """

    @wraps(walk)
    @torch.no_grad()
    def solve(denoise: Denoise, x: Tensor, sigmas: Sequence[float], **options: Any) -> Tensor:
        return walk(denoise, x.double(), falling_levels(sigmas), **options)

    return solve


def falling_levels(sigmas: Sequence[float]) -> list[float]:
    """The levels as floats. Raises ValueError for levels that do not fall to 0."""
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or any(not now > then for now, then in pairwise(levels)):
        raise ValueError(f"noise levels must fall, and end with 0, got {levels}")
    return levels


def in_parts(denoise: Denoise, split_guidance: bool) -> Parts:
    """denoise as a function (x, sigma) -> (D, shift), float64: D goes into a solver's history, the shift does
    not.

    Without split_guidance D is the whole answer. With it, `denoise` must answer in parts, as GuidedDenoiser
    does. Raises ValueError where it does not.
    """
    if not split_guidance:
        return lambda x, sigma: (denoise(x, sigma).double(), -0.0)  # adding -0.0 changes no bit
    # Of the class: an instance may pass on the attributes of a denoiser inside it.
    parts = getattr(type(denoise), "parts", None)
    if parts is None:
        raise ValueError(
            f"split_guidance needs a denoiser that is guided, and {type(denoise).__name__} is not one: "
            "pass a GuidedDenoiser"
        )

    def ask(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        denoised, shift = parts(denoise, x, sigma)
        return denoised.double(), shift.double()

    return ask


def arrived(x: Tensor, i: int, sigma: float, on_step: OnStep | None) -> Tensor:
    """x after step i, which began at the level sigma. Raises NonFiniteError."""
    require_finite(x, "network output", i, sigma)
    if on_step is not None:
        on_step(i, x)
    return x

"""Recurrence: every step several times, noise between them (universal guidance: Bansal et al., 2023)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guided_diffusion.solvers.single_step import Slope, by_single_steps
from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, Solver, solver


def recurrent(step: Callable[[Slope, Tensor, float, float], Tensor], rounds: int) -> Solver:
    """A solver of single steps, each done `rounds` times: after all but the last of
    them noise brings the sample back to where the step began, x = x' + sqrt(sigma^2 - sigma'^2) * noise.

    step: of solvers.STEPS. It asks the denoiser `rounds` times as often, and calls `randn_like` rounds - 1
    times per step. Raises ValueError for fewer than 1 round.
    """
    if rounds < 1:
        raise ValueError(f"recurrence takes 1 round or more, got {rounds}")

    @solver
    def solve(
        denoise: Denoise,
        x: Tensor,
        sigmas: list[float],
        *,
        randn_like: RandnLike | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        draw = randn_like or torch.randn_like

        def repeated(slope, x_cur, sigma, sigma_next):
            x_next = step(slope, x_cur, sigma, sigma_next)
            for _ in range(rounds - 1):
                x_cur = x_next + math.sqrt(sigma**2 - sigma_next**2) * draw(x_next)
                x_next = step(slope, x_cur, sigma, sigma_next)
            return x_next

        return by_single_steps(repeated, denoise, x, sigmas, on_step)

    return solve

"""The universal form: the gradient with respect to the noisy sample, through the network (universal guidance:
Bansal et al., 2023; FreeDoM: Yu et al., 2023; TFG: Ye et al., 2024), and its recurrence.

Exact guidance of a denoiser D is D + sigma^2 grad_x log p(y | x). With log p(y | x) ~ log p(y | D(x)) the
gradient is J^T g: g = d log p / dD, J = dD / dx. It costs a backward pass through the network at each
guided step; posterior strengths (strength.py) stand for J = Cov[x0 | x] / sigma^2 without one. For Gaussian
data of standard deviation s, J = s^2 / (sigma^2 + s^2) and both agree.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.guidance.step import Guidance, GuidanceStep, name_of
from guided_diffusion.guidance.wrappers import wrapper
from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, Solver, arrived, solver


@wrapper
def through_network(gradient: Guidance) -> Guidance:
    """J^T g for a gradient g: pulled back through the network to the noisy sample, like x.

    The sampler has to offer `step.pull_back`; GuidedDenoiser does, to rules that say `through_network`.
    Raises ValueError under one that does not.
    """

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if step.pull_back is None:
            raise ValueError(
                f"{name_of(gradient)} is to go through the network, which this sampler does not offer: "
                "GuidedDenoiser does"
            )
        return step.pull_back(gradient(x, y, step)).to(x.dtype)

    guided.through_network = True  # type: ignore[attr-defined]
    return guided


def noise_variance(step: GuidanceStep) -> float:
    """sigma^2, the strength of the universal form."""
    return step.sigma**2


def differentiable(
    net: Callable[..., Tensor], x: Tensor, sigma: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(net(x, sigma, ...), pull_back): the answer, detached, and v -> J^T v, like x; J its derivative by x.

    pull_back may be called any number of times. The graph of the network lives as long as it does.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        answer = net(leaf, sigma, *args, **kwargs)

    def pull_back(v: Tensor) -> Tensor:
        return torch.autograd.grad(answer, leaf, v.to(answer.dtype), retain_graph=True)[0]

    return answer.detach(), pull_back


def recurrent(
    step: Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float], Tensor], rounds: int
) -> Solver:
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
        randn_like: RandnLike = torch.randn_like,
        on_step: OnStep | None = None,
    ) -> Tensor:
        def slope(x: Tensor, sigma: float) -> Tensor:
            return (x - denoise(x, sigma)) / sigma

        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            x_cur = x
            for k in range(rounds):
                x = step(slope, x_cur, sigma, sigma_next)
                if k < rounds - 1:
                    x_cur = x + math.sqrt(sigma**2 - sigma_next**2) * randn_like(x)
            x = arrived(x, i, sigma, on_step)
        return x

    return solve

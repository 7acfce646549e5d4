"""The universal form: the gradient with respect to the noisy sample, through the network (universal guidance:
Bansal et al., 2023; FreeDoM: Yu et al., 2023; TFG: Ye et al., 2024). Its recurrence is
solvers/recurrence.py.

Exact guidance of a denoiser D is D + sigma^2 grad_x log p(y | x). With log p(y | x) ~ log p(y | D(x)) the
gradient is J^T g: g = d log p / dD, J = dD / dx. It costs a backward pass through the network at each
guided step; posterior strengths (strength.py) stand for J = Cov[x0 | x] / sigma^2 without one. For Gaussian
data of standard deviation s, J = s^2 / (sigma^2 + s^2) and both agree.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.guidance.step import Guidance, GuidanceStep, name_of
from guided_diffusion.guidance.wrappers import wrapper


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

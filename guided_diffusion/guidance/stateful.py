"""Wrappers that remember: what they keep lies in `step.memory`, per image, and ends with the trajectory.

They wrap a gradient rather than a shift: the strength of a step falls by orders of magnitude on the way, and
the memory of an early shift would outweigh all later ones. An image whose gradient is zero (dropped by
--on_nonfinite skip) gets none at that step, and its memory stays as it is.
"""

import torch
from torch import Tensor

from guided_diffusion.guidance.step import Guidance, GuidanceStep
from guided_diffusion.guidance.wrappers import is_zero, wrapper


@wrapper
def momentum(gradient: Guidance, beta: float) -> Guidance:
    """m = g + beta * m, which takes the place of g (APG: Sadat et al., 2024, arXiv 2410.02416, where beta is
    negative, -0.75 or -0.5). Raises ValueError where not -1 < beta < 1.
    """
    if not -1 < beta < 1:
        raise ValueError(f"momentum must be above -1 and below 1, got {beta}: the sum would not end")

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        g = gradient(x, y, step)
        before = step.memory.get(guided, torch.zeros_like(g))
        none, after = is_zero(g), g + beta * before
        step.memory[guided] = torch.where(none, before, after)
        return torch.where(none, g, after)

    return guided


@wrapper
def adam(gradient: Guidance, beta_1: float, beta_2: float) -> Guidance:
    """g' = (m / (1 - beta_1^k)) / (sqrt(v / (1 - beta_2^k)) + 1e-8), m = beta_1 m + (1 - beta_1) g, v =
    beta_2 v + (1 - beta_2) g^2, per pixel; k counts the guided steps of the image (arXiv 2603.16797).

    The entries of g' are about 1 whatever those of g are: the scale is to be chosen anew. Raises ValueError
    where not 0 <= beta < 1.
    """
    if not (0 <= beta_1 < 1 and 0 <= beta_2 < 1):
        raise ValueError(f"Adam's betas must be from 0 to below 1, got {beta_1},{beta_2}")

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        g = gradient(x, y, step)
        none, precise = is_zero(g), g.double()
        zeros = torch.zeros_like(precise)
        m, v, k = step.memory.get(guided, (zeros, zeros, zeros[:, :1, :1, :1]))
        new_m = torch.where(none, m, beta_1 * m + (1 - beta_1) * precise)
        new_v = torch.where(none, v, beta_2 * v + (1 - beta_2) * precise**2)
        new_k = torch.where(none, k, k + 1)
        step.memory[guided] = new_m, new_v, new_k
        new_g = (new_m / (1 - beta_1**new_k)) / ((new_v / (1 - beta_2**new_k)).sqrt() + 1e-8)
        return torch.where(none, g, new_g.to(g.dtype))

    return guided


@wrapper
def every(gradient: Guidance, k: int) -> Guidance:
    """The gradient is taken at the first call of a trajectory and at every k-th after it; between them the
    last one is used again, under the strength of the step (cf. Dinh et al., 2024, arXiv 2408.11194).

    The classifier is asked ceil(calls / k) times.
    """

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        calls, kept = step.memory.get(guided, (0, None))
        if calls % k == 0:
            kept = gradient(x, y, step)
        step.memory[guided] = calls + 1, kept
        return kept

    return guided

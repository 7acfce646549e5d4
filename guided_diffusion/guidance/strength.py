"""Strengths: step -> number or tensor, what a unit of gradient is worth at a step."""

import math
from collections.abc import Callable

from torch import Tensor

from guided_diffusion.guidance.step import GuidanceStep

Strength = Callable[[GuidanceStep], float | Tensor]


def sine_schedule(step: GuidanceStep, gamma_factor: float) -> float | Tensor:
    """variance + gamma * variance_max * sin(pi t / T), with the sampler's own variance (Ma et al., 2024)."""
    sine = max(math.sin(math.pi * step.index / step.num_steps), 0.0)
    return step.variance + gamma_factor * step.variance_max * sine


def ddim_strength(sigma: float) -> float:
    """sigma^2 / sqrt(1 + sigma^2), which is (1 - alpha_bar) / sqrt(alpha_bar).

    The rule eps - sqrt(1 - alpha_bar) * gradient (Dhariwal and Nichol, 2021, algorithm 2) written for the
    clean image.
    """
    return sigma**2 / math.sqrt(1 + sigma**2)


def released_edm_schedule(step: GuidanceStep, max_guidance: float, add_factor: float) -> float:
    """The strength of EluCD's EDM code at step i of N: a line down from max_guidance, and add_factor of it as
    a sine on top.
    """
    i, n = step.index, step.num_steps
    line = max(max_guidance * (n + 1 - i) / (n + 1), 1e-5)
    return line + math.sin(math.pi * i / n) * max_guidance * add_factor

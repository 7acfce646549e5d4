"""Solvers without a memory: Euler's and Heun's method."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, arrived, solver

Slope = Callable[[Tensor, float], Tensor]


def euler_step(slope: Slope, x: Tensor, t: float, t_next: float) -> Tensor:
    """One step of Euler's method along dx/dt = slope(x, t)."""
    return x + (t_next - t) * slope(x, t)


def heun_step(slope: Slope, x: Tensor, t: float, t_next: float) -> Tensor:
    """One step of Heun's method; to t = 0, where there is no slope, it is Euler's (Karras et al., 2022,
    algorithm 1).
    """
    d_cur = slope(x, t)
    x_next = x + (t_next - t) * d_cur
    if t_next > 0:
        d_prime = slope(x_next, t_next)
        x_next = x + (t_next - t) * (d_cur + d_prime) / 2
    return x_next


STEPS = {"euler": euler_step, "heun": heun_step}


@solver
def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method: one evaluation per step. On the levels of a discrete process it is DDIM (Song et al.,
    2021).
    """
    return by_single_steps(euler_step, denoise, x, sigmas, on_step)


@solver
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method, of second order: two evaluations per step, one in the last (Karras et al., 2022,
    algorithm 1).
    """
    return by_single_steps(heun_step, denoise, x, sigmas, on_step)


def by_single_steps(step, denoise, x, sigmas, on_step):
    """Walk down the levels by `step`, a function as those of STEPS."""

    def slope(x, sigma):
        return (x - denoise(x, sigma)) / sigma

    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = arrived(step(slope, x, sigma, sigma_next), i, sigma, on_step)
    return x

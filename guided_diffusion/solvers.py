"""Solvers: functions that walk from noise to an image along dx/dsigma = (x - D(x, sigma)) / sigma.

    x = solver(denoise, x, sigmas, *, randn_like=None, on_step=None)

denoise(x, sigma): see denoisers.py. x: (N, C, H, W), a sample at the level sigmas[0]. sigmas: (n + 1,),
falling, the last one 0. randn_like(x): for solvers that add noise, called once per step, in order. on_step(i,
x): called after each step. Returns the image, (N, C, H, W) float64. Raises ValueError for levels that do not
fall to 0, NonFiniteError where the trajectory leaves the finite numbers. A new solver is one function and one
entry of SOLVERS.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import require_finite

Denoise = Callable[[Tensor, float], Tensor]
Slope = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor], None]


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


@torch.no_grad()
def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method: one evaluation per step. On the levels of a discrete process it is DDIM (Song et al.,
    2021).
    """
    return _by_single_steps(euler_step, denoise, x, sigmas, on_step)


@torch.no_grad()
def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    randn_like: Callable[[Tensor], Tensor] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Heun's method, of second order: two evaluations per step, one in the last (Karras et al., 2022,
    algorithm 1).
    """
    return _by_single_steps(heun_step, denoise, x, sigmas, on_step)


SOLVERS = {"euler": euler, "heun": heun}


def _by_single_steps(step, denoise, x, sigmas, on_step):
    def slope(x, sigma):
        return (x - denoise(x, sigma)) / sigma

    x = x.double()
    for i, (sigma, sigma_next) in enumerate(falling_pairs(sigmas)):
        x = step(slope, x, sigma, sigma_next)
        require_finite(x, "network output", i, sigma)
        if on_step is not None:
            on_step(i, x)
    return x


def falling_pairs(sigmas: Sequence[float]) -> Iterator[tuple[float, float]]:
    """(sigma, the next one) of each step. Raises ValueError for levels that do not fall to 0."""
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] != 0 or any(not now > then for now, then in pairwise(levels)):
        raise ValueError(f"noise levels must fall, and end with 0, got {levels}")
    return pairwise(levels)

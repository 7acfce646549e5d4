"""Solvers that remember earlier answers, one evaluation per step: DPM-Solver++(2M), its SDE form, iPNDM."""

import math
from collections import deque
from itertools import pairwise

import torch
from torch import Tensor

from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, arrived, in_parts, solver

# Adams-Bashforth, the newest slope first: row k for k + 1 slopes.
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@solver
def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
    split_guidance: bool = False,
) -> Tensor:
    """DPM-Solver++(2M), of second order (Lu et al., 2022, algorithm 2)."""
    return _dpmpp_2m(denoise, x, sigmas, 0, torch.randn_like, on_step, split_guidance)


@solver
def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
    split_guidance: bool = False,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al., 2022): at each step the noise is drawn anew, as much as in ancestral
    sampling. randn_like: called once per step, the last included.
    """
    return _dpmpp_2m(denoise, x, sigmas, 1, randn_like or torch.randn_like, on_step, split_guidance)


def _dpmpp_2m(denoise, x, sigmas, eta, randn_like, on_step, split_guidance):
    """Exact integration of a D that is linear in lambda = -log sigma. eta: 0 is the ODE, 1 the SDE.

    With h = log(sigma / sigma') the paper's e^-h is sigma' / sigma.
    """
    ask, D_prev, h_prev = in_parts(denoise, split_guidance), None, math.nan
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        D, shift = ask(x, sigma)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        E = D if D_prev is None or sigma_next == 0 else D + (D - D_prev) * (h / (2 * h_prev))
        kept = (sigma_next / sigma) ** (1 + eta)
        noise = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** (2 * eta)) * randn_like(x) if eta else -0.0
        x = arrived(kept * x + (1 - kept) * (E + shift) + noise, i, sigma, on_step)
        D_prev, h_prev = D, h
    return x


@solver
def ipndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
    order: int = 4,
    split_guidance: bool = False,
) -> Tensor:
    """iPNDM: Adams-Bashforth slopes of `order` 1 to 4, with lower orders at the start (Zhang and Chen, 2023).

    Its weights are those of equal steps. On other levels, and since it starts with Euler's step, the order in
    which the error falls is at most 2; the constant is much smaller. Raises ValueError for another order.
    """
    if not 1 <= order <= len(ADAMS_BASHFORTH):
        raise ValueError(f"ipndm has the orders 1 to {len(ADAMS_BASHFORTH)}, got {order}")
    ask, slopes = in_parts(denoise, split_guidance), deque[Tensor](maxlen=order)
    for i, (t, t_next) in enumerate(pairwise(sigmas)):
        D, shift = ask(x, t)
        slopes.appendleft((x - D) / t)
        weights = ADAMS_BASHFORTH[len(slopes) - 1]
        d = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
        x = arrived(x + (t_next - t) * (d - shift / t), i, t, on_step)
    return x

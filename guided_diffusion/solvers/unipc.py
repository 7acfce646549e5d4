"""UniPC: a predictor, and a corrector that reuses the next evaluation (Zhao et al., 2023)."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from torch import Tensor

from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, arrived, in_parts, solver

VARIANTS = {"bh1": lambda h: h, "bh2": lambda h: -math.expm1(-h)}  # B(h), where D is predicted
ORDERS = (2, 3)
_NODES, _NODE_WEIGHTS = (np.polynomial.legendre.leggauss(24)[k] / 2 for k in (0, 1))


@solver
def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: list[float],
    *,
    randn_like: RandnLike | None = None,
    on_step: OnStep | None = None,
    order: int = 2,
    variant: str = "bh2",
    split_guidance: bool = False,
) -> Tensor:
    """UniPC in lambda = -log sigma: UniP-`order` (2 or 3) and UniC-`order`, one evaluation per step.

    The first and the last steps have lower orders, as published. variant: B(h) is h ("bh1") or 1 - e^-h
    ("bh2"). It counts where a single difference is weighed, by B(h) / 2; with more of them the conditions of
    the order leave no choice. Raises ValueError for another order or variant.
    """
    if order not in ORDERS or variant not in VARIANTS:
        raise ValueError(f"unipc has the orders 2 and 3, bh1 and bh2, got order {order}, {variant!r}")
    ask, past = in_parts(denoise, split_guidance), deque[tuple[float, Tensor]](maxlen=order - 1)
    step: Callable[..., Tensor] = partial(_step, x)
    used: list[tuple[float, Tensor]] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        lam = -math.log(sigma)
        D, shift = ask(x, sigma)  # at the predicted x
        if i > 0:
            x = step([*used, (lam, D)])
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        linear = sigma_next / sigma * x + (1 - sigma_next / sigma) * (D + shift)
        step = partial(_step, linear, lam, D, h, VARIANTS[variant])
        p = min(order, i + 1, len(sigmas) - 1 - i)
        used = list(past)[: p - 1]
        x = arrived(step(used), i, sigma, on_step)
        past.appendleft((lam, D))
    return x


def _step(linear, lam_0, D_0, h, B, points):
    """The step of first order, and what the differences to D_0 at other points, (lambda, D), add to it."""
    if not points:
        return linear
    r = [(lam - lam_0) / h for lam, _ in points]
    return linear + sum(c * (D - D_0) for c, (_, D) in zip(_weights(r, h, B), points, strict=True))


def _weights(r: Sequence[float], h: float, B) -> Sequence[float]:
    """c_m with sum_m c_m r_m^k = h int_0^1 e^(-h (1 - u)) u^k du, k = 1 .. len(r): then sum_m c_m (D_m - D_0)
    is exact for polynomials in lambda up to that degree. Of a single point c is B(h) / (2 r).
    """
    if len(r) == 1:
        return [B(h) / (2 * r[0])]
    k, u = np.arange(1, len(r) + 1)[:, None], _NODES + 0.5
    moments = h * (np.exp(-h * (1 - u)) * u**k) @ _NODE_WEIGHTS
    return np.linalg.solve(np.asarray(r) ** k, moments).tolist()

"""Restart: new noise and a second walk through parts of the way (Xu et al., 2023), around any solver."""

import math
from collections.abc import Iterator, Sequence
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guided_diffusion.schedules import karras_sigmas
from guided_diffusion.solvers.walk import Denoise, OnStep, RandnLike, Solver, solver


class Interval(NamedTuple):
    """num_levels of noise, both ends included, from sigma_max down to sigma_min, walked `repeats` times."""

    num_levels: int
    repeats: int
    sigma_min: float
    sigma_max: float


def restart(inner: Solver, intervals: Sequence[Interval], *, rho: float = 7.0) -> Solver:
    """The solver `inner` with restarts: each time it comes to the level nearest to an interval's sigma_min,
    noise takes x back to sigma_max, and it walks down again on Karras levels.

    Further options of a call go to `inner`. randn_like: called once per restart, beside the calls of `inner`.
    on_step: called after the steps of the main way alone. Raises ValueError for intervals that cannot be.
    """
    walk = unwrap(inner)
    for interval in intervals:
        _, repeats, low, high = interval
        if interval.num_levels < 2 or repeats < 1 or not 0 < low < high < math.inf:
            raise ValueError(
                "a restart interval needs levels >= 2, repeats >= 1 and 0 < sigma_min < sigma_max, "
                f"got {tuple(interval)}"
            )

    @solver
    def restarted(
        denoise: Denoise,
        x: Tensor,
        sigmas: list[float],
        *,
        randn_like: RandnLike | None = None,
        on_step: OnStep | None = None,
        **options: Any,
    ) -> Tensor:
        options["randn_like"] = randn_like = randn_like or torch.randn_like
        for start, end, again in _stretches(sigmas, intervals):
            x = walk(denoise, x, sigmas[start : end + 1], on_step=_counted_from(start, on_step), **options)
            for num_levels, repeats, _, high in again:
                down = karras_sigmas(num_levels, sigmas[end], high, rho).tolist()
                for _ in range(repeats):
                    x = x + math.sqrt(high**2 - sigmas[end] ** 2) * randn_like(x)
                    x = walk(denoise, x, down, **options)
        return x

    return restarted


def _stretches(sigmas, intervals) -> Iterator[tuple[int, int, list[Interval]]]:
    """(first index, last index, the intervals that begin there) of the levels between two restarts."""
    levels = sigmas[:-1]
    places: dict[int, list[Interval]] = {}
    for interval in sorted(intervals, key=lambda interval: -interval.sigma_min):
        index = min(range(len(levels)), key=lambda k: abs(levels[k] - interval.sigma_min))
        if levels[index] >= interval.sigma_max:
            raise ValueError(
                f"restart interval {tuple(interval)}: the nearest level of the sampler is {levels[index]:g}; "
                "take more steps, or another interval"
            )
        places.setdefault(index, []).append(interval)
    start = 0
    for end in sorted({*places, len(sigmas) - 1}):
        yield start, end, places.get(end, [])
        start = end


def _counted_from(start, on_step):
    return on_step and (lambda i, x: on_step(start + i, x))

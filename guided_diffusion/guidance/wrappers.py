"""Wrappers: guidance -> guidance, about when or how it acts."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from guided_diffusion.guidance.step import Guidance, GuidanceStep, name_of


def wrapper(make: Callable[..., Guidance]) -> Callable[..., Guidance]:
    """Decorate a function (guidance, ...) -> guidance: what it returns looks at what the wrapped rule looks
    at.
    """

    @wraps(make)
    def wrapped(guidance: Guidance, *args, **kwargs) -> Guidance:
        rule = make(guidance, *args, **kwargs)
        rule.__name__ = f"{make.__name__}({name_of(guidance)})"
        if hasattr(guidance, "looks_at"):
            rule.looks_at = guidance.looks_at  # type: ignore[attr-defined]
        return rule

    return wrapped


def no_shift(x: Tensor) -> Tensor:
    """The shift that changes no bit of what it is added to: -0.0, since -0.0 + 0.0 would be 0.0."""
    return torch.full_like(x, -0.0)


@wrapper
def within_interval(guidance: Guidance, sigma_lo: float, sigma_hi: float) -> Guidance:
    """Guide only where sigma_lo < step.sigma <= sigma_hi (Kynkäänniemi et al., 2024); elsewhere the
    classifier is not called. Raises ValueError for an empty interval.
    """
    if not 0 <= sigma_lo < sigma_hi:
        raise ValueError(
            f"guidance interval {sigma_lo},{sigma_hi} is empty; it takes 0 <= lo < hi, noise levels sigma"
        )

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        return guidance(x, y, step) if sigma_lo < step.sigma <= sigma_hi else no_shift(x)

    return guided

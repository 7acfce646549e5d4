"""Strengths: step -> what a unit of gradient is worth at a step, a number, a tensor or a `PerFrequency`.

The rule from the posterior. The denoiser of the images of class y is D + sigma^2 grad_x log p(y | x). With
log p(y | x) ~ log p(y | D(x)) the gradient is J^T g, g the classifier's gradient at D, and J = dD/dx =
Cov[x_0 | x] / sigma^2 (Tweedie's formula, of second order): the prediction moves by Cov[x_0 | x] g. That is
exact for Gaussian data and a classifier whose direction is linear. `scalar`, `frequency` and `learned` are
three approximations of the covariance.

A sampler that adds the shift to something else than the prediction says what the prediction is worth there,
`step.denoised_weight`. The ancestral mean is coef1 D + coef2 x_t (Ho et al., 2020, eq. 7), so it moves by
coef1 Cov[x_0 | x] g, coef1 = beta_t sqrt(alpha_bar_(t-1)) / (1 - alpha_bar_t).
"""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor

from guided_diffusion.guidance.frequency import PerFrequency
from guided_diffusion.guidance.step import GuidanceStep

Strength = Callable[[GuidanceStep], float | Tensor | PerFrequency]
Spectrum = Callable[[int, int, int], Tensor]
STRENGTHS = ("sampler", "ddim", "posterior")


def named_strength(strength: str | Strength, gamma_factor: float = 0.0, sigma_data: float = 0.5) -> Strength:
    """The strength of a name, with the options that belong to it: "sampler" (gamma_factor), "ddim",
    "posterior" (sigma_data, scalar); a function as it is. Raises ValueError for another name, and for a
    gamma_factor or a sigma_data that cannot be.
    """
    if callable(strength):
        return strength
    if strength not in STRENGTHS:
        raise ValueError(f"unknown strength {strength!r}; choose {', '.join(STRENGTHS)}, or a function")
    if strength == "sampler":
        return partial(sine_schedule, gamma_factor=gamma_factor)
    if gamma_factor:
        raise ValueError(
            f"gamma_factor {gamma_factor} belongs to strength 'sampler', not to {strength!r}: drop it"
        )
    if strength == "ddim":
        return ddim_rule
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data must be above 0, got {sigma_data}")
    return partial(scalar_posterior, sigma_data=sigma_data)


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


def ddim_rule(step: GuidanceStep) -> float:
    """`ddim_strength`, under every sampler."""
    return step.denoised_weight * ddim_strength(step.sigma)


def posterior_variance(sigma: float, sigma_data: float = 0.5) -> float:
    """Var[x_0 | x] where x_0 has variance sigma_data^2: sigma^2 sigma_data^2 / (sigma^2 + sigma_data^2).

    It grows as sigma^2 and stays below sigma_data^2, where `ddim_strength` grows without bounds.
    """
    return sigma**2 * sigma_data**2 / (sigma**2 + sigma_data**2)


def scalar_posterior(step: GuidanceStep, sigma_data: float) -> float:
    """The posterior's variance, one number for all pixels."""
    return step.denoised_weight * posterior_variance(step.sigma, sigma_data)


def frequency_posterior(step: GuidanceStep, spectrum: Spectrum) -> PerFrequency:
    """The posterior's variance of every frequency: l sigma^2 / (l + sigma^2), where the cosine transform of
    the data has the variances l = spectrum(C, H, W).
    """

    def variances(*shape: int) -> Tensor:
        levels = spectrum(*shape)
        return levels * step.sigma**2 / (levels + step.sigma**2)

    return step.denoised_weight * PerFrequency(variances)


def learned_posterior(step: GuidanceStep) -> Tensor:
    """The posterior's variance of every pixel, by the network's own account. Raises ValueError where the
    network gives none.
    """
    if step.denoised_variance is None:
        raise ValueError(
            "the learned posterior needs a network that predicts its variance: choose scalar or frequency"
        )
    return step.denoised_weight * step.denoised_variance


def released_edm_schedule(step: GuidanceStep, max_guidance: float, add_factor: float) -> float:
    """The strength of EluCD's EDM code at step i of N: a line down from max_guidance, and add_factor of it as
    a sine on top.
    """
    i, n = step.index, step.num_steps
    line = max(max_guidance * (n + 1 - i) / (n + 1), 1e-5)
    return line + math.sin(math.pi * i / n) * max_guidance * add_factor

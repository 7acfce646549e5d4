"""Noise schedules and timestep respacing, as pure float64 functions."""

import math
from functools import cache

import numpy as np


def get_named_beta_schedule(schedule_name, num_diffusion_timesteps):
    """Return (T,) float64 betas of the "linear" (Ho et al., 2020) or "cosine" (Nichol and Dhariwal, 2021, eq.
    17) schedule.

    The linear schedule runs from 1e-4 to 0.02 at T = 1000 and is scaled to keep the same total noise at other
    T. Raises ValueError for another name.
    """
    if num_diffusion_timesteps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, got {num_diffusion_timesteps}")
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 1e-4, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(
            num_diffusion_timesteps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        )
    raise ValueError(f"unknown noise schedule {schedule_name!r}; choose linear or cosine")


def betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar, max_beta=0.999):
    """Return the (T,) float64 betas whose cumulative product of 1 - beta follows `alpha_bar`, a function on
    [0, 1].
    """
    edges = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - b / a, max_beta) for a, b in zip(edges, edges[1:], strict=False)])


def karras_sigmas(num_steps, sigma_min, sigma_max, rho):
    """Return the (num_steps,) float64 noise levels from sigma_max down to sigma_min, without the closing 0
    (Karras et al., 2022, eq. 5).

    The rho-th roots of the levels are evenly spaced: the larger rho, the shorter the steps near sigma_min.
    One step is sigma_max alone. Raises ValueError unless num_steps >= 1, 0 < sigma_min <= sigma_max < inf and
    0 < rho < inf.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if not (0 < sigma_min <= sigma_max < math.inf and 0 < rho < math.inf):
        raise ValueError(
            f"noise levels need 0 < sigma_min <= sigma_max < inf and 0 < rho < inf, got {sigma_min}, {sigma_max}, rho {rho}"
        )
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=np.float64) ** rho


def linear_timestep(sigma):
    """Return the timestep, 0 .. 999, of the linear 1000-step process whose noise level is nearest to `sigma`
    (> 0), as a ratio.
    """
    return int(np.searchsorted(_borders_of_linear_timesteps(), sigma))


@cache
def _borders_of_linear_timesteps():
    alphas_cumprod = np.cumprod(1 - get_named_beta_schedule("linear", 1000))
    sigmas = np.sqrt(1 / alphas_cumprod - 1)
    return np.sqrt(sigmas[:-1] * sigmas[1:])


def space_timesteps(num_timesteps, section_counts):
    """Return the set of original timesteps that a respaced process keeps.

    section_counts: "250" (evenly over the whole range), "10,15,20" or a list of ints (that many in each of
    equal sections), or "ddimN" (exactly N steps at an integer stride from 0, as in the DDIM paper). Raises
    ValueError where that cannot be done.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _integer_stride(num_timesteps, _positive_int(section_counts[4:], section_counts))
        section_counts = [_positive_int(part, section_counts) for part in section_counts.split(",")]
    size, longer = divmod(num_timesteps, len(section_counts))
    kept, start = set(), 0
    for i, count in enumerate(section_counts):
        section = size + (i < longer)
        if section < count:
            raise ValueError(f"cannot divide section of {section} steps into {count}")
        # A float accumulated step by step and Python's rounding of halves to even decide which steps a
        # published run used.
        stride, position = (section - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.add(start + round(position))
            position += stride
        start += section
    return kept


def _integer_stride(num_timesteps, count):
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise ValueError(f"cannot create exactly {count} of {num_timesteps} steps with an integer stride")


def _positive_int(text, whole):
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"timestep_respacing {whole!r} is not understood; write 250, 10,10,20 or ddim25")
    return int(text)

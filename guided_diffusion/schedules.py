"""Noise schedules and timestep respacing, as pure float64 functions."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

DISCRETIZATIONS = ("vp", "ve", "iddpm", "edm")
LEVELS = ("karras", "logsnr", "uniform")
EPSILON_S = 1e-3  # where VP's time ends; it begins at 1


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
            "noise levels need 0 < sigma_min <= sigma_max < inf and 0 < rho < inf, "
            f"got {sigma_min}, {sigma_max}, rho {rho}"
        )
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=np.float64) ** rho


def named_levels(
    name: str,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    *,
    rho: float = 7.0,
    log_sigmas: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """(num_steps,) levels for a solver, from sigma_max down to sigma_min, without the closing 0.

    "karras": even in sigma^(1 / rho). "logsnr": even in log sigma. "uniform": even in t, of a process whose
    timesteps 0, 1, .. have the levels exp(log_sigmas), rising; without it, of the VP process between the two
    levels. One step is sigma_max alone. Raises ValueError for another name and for levels that cannot be.
    """
    if name not in LEVELS:
        raise ValueError(f"unknown levels {name!r}; choose {', '.join(LEVELS)}")
    if name != "uniform" or log_sigmas is None:
        return noise_levels(
            {"karras": "edm", "logsnr": "ve", "uniform": "vp"}[name], num_steps, sigma_min, sigma_max, rho
        )
    karras_sigmas(num_steps, sigma_min, sigma_max, 1)  # refuses what cannot be
    timesteps = np.arange(len(log_sigmas))
    first, last = np.interp(np.log([sigma_max, sigma_min]), log_sigmas, timesteps)
    return np.exp(np.interp(np.linspace(first, last, num_steps), timesteps, log_sigmas))


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


# The noise levels of EDM's sampler: Karras et al., 2022, table 1


@dataclass(frozen=True)
class VPSchedule:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), the noise level of the variance-preserving
    process.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def sigma(self, t: float) -> float:
        return math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t))

    def sigma_deriv(self, t: float) -> float:
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (sigma + 1 / sigma) / 2

    def sigma_inv(self, sigma: float) -> float:
        return (
            math.sqrt(self.beta_min**2 + 2 * self.beta_d * math.log1p(sigma**2)) - self.beta_min
        ) / self.beta_d


def noise_levels(
    disc: str, num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> NDArray[np.float64]:
    """(num_steps,) levels from sigma_max down to sigma_min, without the closing 0; `rho` counts for "edm"
    alone.

    "iddpm" takes them from the 1000 levels of improved DDPM, so that its ends are the nearest of these within
    the range. One step is sigma_max alone. Raises ValueError for another name and for levels that cannot be.
    """
    if disc not in DISCRETIZATIONS:
        raise ValueError(f"unknown discretization {disc!r}; choose {', '.join(DISCRETIZATIONS)}")
    if disc == "edm":
        return karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    karras_sigmas(num_steps, sigma_min, sigma_max, 1)  # refuses what cannot be
    progress = np.linspace(0, 1, num_steps)
    if disc == "ve":
        return sigma_max * (sigma_min / sigma_max) ** progress
    if disc == "vp":
        vp = vp_between(sigma_min, sigma_max)
        if vp.beta_d + vp.beta_min < 0:  # the slope of its exponent at t = 1
            raise ValueError(
                f"vp has no falling levels from {sigma_max:g} to {sigma_min:g}: "
                "give a smaller sigma_min, such as 0.01"
            )
        return np.array([vp.sigma(t) for t in 1 + progress * (EPSILON_S - 1)])
    levels = np.array(iddpm_levels(1000, 0.001, 0.008))
    slack = 1e-6  # a network holds these levels in float32
    within = levels[(levels >= sigma_min * (1 - slack)) & (levels <= sigma_max * (1 + slack))]
    if len(within) < num_steps:
        raise ValueError(
            f"iddpm has {len(within)} levels from {sigma_min:g} to {sigma_max:g}, "
            f"fewer than {num_steps} steps"
        )
    return within[np.rint((len(within) - 1) * progress).astype(int)]


def default_levels(disc: str) -> tuple[float, float]:
    """(sigma_min, sigma_max) that a discretization is used with by default."""
    vp = VPSchedule()
    return {
        "vp": (vp.sigma(EPSILON_S), vp.sigma(1)),
        "ve": (0.02, 100.0),
        "iddpm": (0.002, 81.0),
        "edm": (0.002, 80.0),
    }[disc]


def iddpm_levels(M: int, C_1: float, C_2: float) -> list[float]:
    """u_0 .. u_M = 0, the noise levels of improved DDPM's cosine schedule, by the recursion of appendix C.3,
    which begins at u_M.

    C_1: the least ratio of two neighbouring alpha_bar. C_2: the schedule's offset.
    """

    def alpha_bar(j):
        return math.sin(math.pi / 2 * j / (M * (C_2 + 1))) ** 2

    u = [0.0]
    for j in range(M, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), C_1) - 1))
    return u[::-1]


def vp_between(sigma_min, sigma_max):
    """The VP schedule with sigma(EPSILON_S) = sigma_min and sigma(1) = sigma_max."""
    beta_d = 2 * (math.log1p(sigma_min**2) / EPSILON_S - math.log1p(sigma_max**2)) / (EPSILON_S - 1)
    return VPSchedule(beta_d, math.log1p(sigma_max**2) - beta_d / 2)

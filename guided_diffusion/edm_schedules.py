"""The time axis of EDM's sampler: which noise levels it visits, and how noise level and scale of x follow
from t. Float64 throughout.

Karras et al., 2022, "Elucidating the Design Space of Diffusion-Based Generative Models": table 1, whose
columns VP, VE, iDDPM and EDM can be mixed as there: the discretization chooses the levels, the schedule
sigma(t), the scaling s(t).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from guided_diffusion.schedules import karras_sigmas

DISCRETIZATIONS, SCHEDULES, SCALINGS = ("vp", "ve", "iddpm", "edm"), ("vp", "ve", "linear"), ("vp", "none")
EPSILON_S = 1e-3  # where VP's time ends; it begins at 1


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


class VESchedule:
    """sigma(t) = sqrt(t), the noise level of the variance-exploding process."""

    def sigma(self, t: float) -> float:
        return math.sqrt(t)

    def sigma_deriv(self, t: float) -> float:
        return 0.5 / math.sqrt(t)

    def sigma_inv(self, sigma: float) -> float:
        return sigma**2


class LinearSchedule:
    """sigma(t) = t, EDM's own choice."""

    def sigma(self, t: float) -> float:
        return t

    def sigma_deriv(self, t: float) -> float:
        return 1.0

    def sigma_inv(self, sigma: float) -> float:
        return sigma


class NoiseProcess:
    """x(t) = s(t) (x_0 + sigma(t) noise), of a schedule, "vp", "ve" or "linear", and a scaling, "vp" or
    "none".

    sigma_min, sigma_max: the levels at the ends of VP's time. Raises ValueError for an unknown name.
    """

    def __init__(self, schedule: str, scaling: str, sigma_min: float, sigma_max: float):
        if schedule not in SCHEDULES or scaling not in SCALINGS:
            raise ValueError(
                f"schedule {schedule!r} with scaling {scaling!r}: choose of {', '.join(SCHEDULES)} and {', '.join(SCALINGS)}"
            )
        self._schedule = {
            "vp": lambda: _vp_between(sigma_min, sigma_max),
            "ve": VESchedule,
            "linear": LinearSchedule,
        }[schedule]()
        self._scaled = scaling == "vp"
        self.sigma, self.sigma_deriv, self.sigma_inv = (
            self._schedule.sigma,
            self._schedule.sigma_deriv,
            self._schedule.sigma_inv,
        )

    def s(self, t: float) -> float:
        """The scale of x; under "vp" the one that keeps the variance of unit data."""
        return 1 / math.sqrt(1 + self.sigma(t) ** 2) if self._scaled else 1.0

    def s_deriv(self, t: float) -> float:
        return -self.sigma(t) * self.sigma_deriv(t) * self.s(t) ** 3 if self._scaled else 0.0


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
        vp = _vp_between(sigma_min, sigma_max)
        if vp.beta_d + vp.beta_min < 0:  # the slope of its exponent at t = 1
            raise ValueError(
                f"vp has no falling levels from {sigma_max:g} to {sigma_min:g}: give a smaller sigma_min, such as 0.01"
            )
        return np.array([vp.sigma(t) for t in 1 + progress * (EPSILON_S - 1)])
    levels = np.array(iddpm_levels(1000, 0.001, 0.008))
    slack = 1e-6  # a network holds these levels in float32
    within = levels[(levels >= sigma_min * (1 - slack)) & (levels <= sigma_max * (1 + slack))]
    if len(within) < num_steps:
        raise ValueError(
            f"iddpm has {len(within)} levels from {sigma_min:g} to {sigma_max:g}, fewer than {num_steps} steps"
        )
    return within[np.rint((len(within) - 1) * progress).astype(int)]


def time_steps(
    net: Any,
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    disc: str,
    schedule: str,
    scaling: str,
) -> tuple[NoiseProcess, list[float]]:
    """What `edm_sampler` steps through: the process and t_0 .. t_(N-1), 0, at levels that the network knows.

    Raises ValueError for what cannot be, before anything is sampled.
    """
    low, high = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    if 1e9 < high < math.inf:
        raise ValueError(f"sigma_max {high:g} is beyond what a network in float32 can take; EDM's is 80")
    try:
        levels = noise_levels(disc, num_steps, low, high, rho)
        process = NoiseProcess(schedule, scaling, low, high)
        return process, [*(nearest_time(net, process, level) for level in levels), 0.0]
    except OverflowError as error:
        raise ValueError(
            f"sigma_min {low:g}, sigma_max {high:g} and rho {rho:g} lead to numbers beyond all bounds"
        ) from error


def nearest_time(net: Any, process: NoiseProcess, level: float) -> float:
    """The t of the level nearest to this one that the network knows, by its `round_sigma`."""
    return process.sigma_inv(float(net.round_sigma(torch.as_tensor(level, dtype=torch.float64))))


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


def _vp_between(sigma_min, sigma_max):
    """The VP schedule with sigma(EPSILON_S) = sigma_min and sigma(1) = sigma_max."""
    beta_d = 2 * (math.log1p(sigma_min**2) / EPSILON_S - math.log1p(sigma_max**2)) / (EPSILON_S - 1)
    return VPSchedule(beta_d, math.log1p(sigma_max**2) - beta_d / 2)

"""EDM's stochastic sampler and the time axis that it steps along, in float64.

Method: "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022): algorithm
2, and table 1, whose columns VP, VE, iDDPM and EDM can be mixed as there: the discretization chooses the
levels, the schedule sigma(t), the scaling s(t). The networks around it are in preconditioning.py, and are
named here too.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import require_finite
from guided_diffusion.guidance import Guidance, GuidanceStep, require_input
from guided_diffusion.preconditioning import (
    EDMPrecond,
    VEPrecond,
    VPPrecond,
    create_edm_network,
    iDDPMPrecond,
    load_edm_network,
)
from guided_diffusion.schedules import noise_levels, vp_between
from guided_diffusion.solvers import STEPS

__all__ = [
    "EDMPrecond",
    "VEPrecond",
    "VPPrecond",
    "create_edm_network",
    "edm_sampler",
    "iDDPMPrecond",
    "load_edm_network",
]

SCHEDULES, SCALINGS = ("vp", "ve", "linear"), ("vp", "none")


@torch.no_grad()
def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    *,
    guidance: Guidance | None = None,
    y: Tensor | None = None,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    solver: str = "heun",
    disc: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample by Algorithm 2 of Karras et al., 2022: (N, C, H, W) float64, the image, in the units of the
    network's training data.

    net(x, sigma, class_labels) -> the denoised image, with the attributes sigma_min, sigma_max and
    round_sigma; x and sigma are float64.
    latents: (N, C, H, W), standard normal. class_labels: (N, label_dim), one-hot. randn_like: called once per
    step, in order, the last step and S_churn = 0 included. guidance: called once per step at x_cur / s, its
    shift times s goes to x_hat and so through Euler's step and Heun's; `step.index` is i, 0 .. num_steps - 1.
    y: (N,) int64, its wanted classes, by default those of `class_labels`. solver, disc, schedule, scaling:
    the other columns of the paper's table 1, see solvers.STEPS and schedules. on_step(i, x): called after
    each step. Raises NonFiniteError where the trajectory leaves the finite numbers.
    """
    _check_options(S_churn, solver)
    require_input(guidance, "noisy", "edm_sampler")
    wanted = _wanted_classes(guidance, y, class_labels, len(latents))
    process, t_steps = time_steps(net, num_steps, sigma_min, sigma_max, rho, disc, schedule, scaling)
    sigma, s, slope = process.sigma, process.s, partial(_slope, net, process, class_labels)
    x_next = latents.double() * (sigma(t_steps[0]) * s(t_steps[0]))
    memory: dict[Any, Any] = {}  # of guidance, over this trajectory
    for i, (t_cur, t_next) in enumerate(pairwise(t_steps)):
        x_cur = x_next

        # Raise the noise level for a moment: the new noise makes up for errors of earlier steps.
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= sigma(t_cur) <= S_max else 0
        t_hat = nearest_time(net, process, (1 + gamma) * sigma(t_cur))
        added = math.sqrt(max(sigma(t_hat) ** 2 - sigma(t_cur) ** 2, 0))
        x_hat = s(t_hat) / s(t_cur) * x_cur + s(t_hat) * added * S_noise * randn_like(x_cur)
        if guidance is not None:
            step = GuidanceStep(i, num_steps, 1.0, 1.0, sigma(t_cur), i / num_steps, memory=memory)
            x_hat = x_hat + s(t_hat) * guidance(x_cur / s(t_cur), wanted, step)

        x_next = STEPS[solver](slope, x_hat, t_hat, t_next)
        require_finite(x_next, "network output", i)
        if on_step is not None:
            on_step(i, x_next)
    return x_next


def _slope(net, process, class_labels, x, t):
    """dx/dt: eq. 4 of the paper, as in its algorithm 1."""
    sigma, s = process.sigma(t), process.s(t)
    labels = () if class_labels is None else (class_labels,)
    denoised = net(x / s, x.new_tensor(sigma), *labels).double()
    return process.sigma_deriv(t) / sigma * (x - s * denoised) + process.s_deriv(t) / s * x


def _check_options(S_churn, solver):
    if S_churn < 0:
        raise ValueError(f"S_churn must be 0 (no new noise) or more, got {S_churn}")
    if solver not in STEPS:
        raise ValueError(f"unknown solver {solver!r}; choose {' or '.join(STEPS)}")


def _wanted_classes(guidance, y, class_labels, n):
    if guidance is None:
        return None
    if y is None and class_labels is None:
        raise ValueError("guidance needs the wanted classes: pass y, (N,) int64, or one-hot class_labels")
    y = class_labels.argmax(dim=1) if y is None else y
    if y.shape != (n,):
        raise ValueError(f"y has shape {tuple(y.shape)}, but {n} images need ({n},): one class each")
    return y


# The time axis


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
                f"schedule {schedule!r} with scaling {scaling!r}: choose of {', '.join(SCHEDULES)} "
                f"and {', '.join(SCALINGS)}"
            )
        self._schedule = {
            "vp": lambda: vp_between(sigma_min, sigma_max),
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

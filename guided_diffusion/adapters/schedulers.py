"""A scheduler of diffusers as a process of ours.

Every kind comes down to one: the network is asked for what it was trained to predict, and its answer is
turned into eps or the clean image of the variance-preserving process with the same noise levels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
BETAS = (
    *(f"{name}Scheduler" for name in ("DDPM", "DDIM", "PNDM", "LMSDiscrete", "UniPCMultistep")),
    *(f"{name}Scheduler" for name in ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")),
    *(f"{name}Scheduler" for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE")),
    *(f"{name}Scheduler" for name in ("DEISMultistep", "KDPM2Discrete", "KDPM2AncestralDiscrete")),
)
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
SPACINGS = ("leading", "trailing", "linspace")
# What would make another process of the same betas: other times, the straight way from the other end, a
# variance that is no share of the range.
_UNKNOWN = {"timestep_type": "continuous", "invert_sigmas": True, "variance_type": "learned"}
# Where a process ends in noise alone, its level would be infinite.
HIGHEST_LEVEL = 1e6


def require_known_scheduler(name: str) -> None:
    """Raise ValueError unless the process of a scheduler of this class is known."""
    if name not in (*FLOW, *BETAS):
        known = ", ".join(known.removesuffix("Scheduler") for known in (*BETAS, *FLOW))
        raise ValueError(f"the process of {name} is not known: give a pipeline with one of {known}")


class TrainedSchedule:
    """What a network was trained for, by its scheduler's configuration.

    prediction: one of PREDICTIONS. log_sigmas: (T,) float64, rising, of the timesteps 0 .. T - 1. scheduler:
    any of BETAS or FLOW; only its configuration and its betas are read.

    Raises ValueError for another scheduler or prediction, and for a configuration of another process.
    """

    def __init__(self, scheduler: Any):
        self.name, self.config = type(scheduler).__name__, scheduler.config
        require_known_scheduler(self.name)
        for key, value in _UNKNOWN.items():
            if self.config.get(key) == value:
                raise ValueError(f"the process of a {self.name} with {key} {value} is not known")
        self.prediction = "flow_prediction" if self.name in FLOW else self.config.prediction_type
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"unknown prediction_type {self.prediction!r}; known are {', '.join(PREDICTIONS)}"
            )
        self.is_flow = self.prediction == "flow_prediction"
        self.num_timesteps = self.config.num_train_timesteps
        alphas_cumprod = self._of_flow() if self.is_flow else np.cumprod(1 - scheduler.betas.double().numpy())
        self.alphas_cumprod = np.maximum(alphas_cumprod, 1 / (1 + HIGHEST_LEVEL**2))
        self.log_sigmas = torch.from_numpy(np.log(1 / self.alphas_cumprod - 1) / 2)

    def _of_flow(self):
        """Of the straight way x_s = (1 - s) x_0 + s noise: the level is s / (1 - s), whatever the scale."""
        s = np.arange(1, self.num_timesteps + 1) / self.num_timesteps
        shift = self.config.get("flow_shift", self.config.get("shift")) or 1.0
        if not self.config.get("use_dynamic_shifting"):  # which depends on the size of the image
            s = shift * s / (1 + (shift - 1) * s)
        return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)

    def timesteps(self, steps: int, spacing: str = "") -> set[int]:
        """The timesteps of so many steps, as DDIM of diffusers takes them (Lin et al., 2024, table 2).

        spacing: one of SPACINGS; by default the scheduler's own. An offset of "leading" does not lead beyond
        the last timestep. Raises ValueError for more steps than there are timesteps.
        """
        trained = self.num_timesteps
        spacing = spacing or self.config.get("timestep_spacing") or "linspace"
        if not 1 <= steps <= trained:
            raise ValueError(f"steps must be from 1 to {trained}, as many as the process has, got {steps}")
        if spacing == "leading":
            found = np.arange(steps) * (trained // steps)
            found = found + min(self.config.get("steps_offset") or 0, trained - 1 - found[-1])
        elif spacing == "trailing":
            found = np.round(trained - np.arange(steps) * (trained / steps)) - 1
        elif spacing == "linspace":
            found = np.round(np.linspace(trained - 1, 0, steps))
        else:
            raise ValueError(f"unknown timestep spacing {spacing!r}; choose {', '.join(SPACINGS)}")
        return {int(t) for t in found}

    def process(
        self, learned_variance: bool, steps: int | None = None, spacing: str = ""
    ) -> GaussianDiffusion:
        """The process, over the timesteps of so many steps, or all. It is for networks that answer eps where
        `prediction` is epsilon, else the clean image.
        """
        large = self.config.get("variance_type") in ("fixed_large", "fixed_large_log")
        fixed = ModelVarType.FIXED_LARGE if large else ModelVarType.FIXED_SMALL
        return GaussianDiffusion(
            betas=1 - self.alphas_cumprod / np.append(1.0, self.alphas_cumprod[:-1]),
            model_mean_type=ModelMeanType.EPSILON if self.prediction == "epsilon" else ModelMeanType.START_X,
            model_var_type=ModelVarType.LEARNED_RANGE if learned_variance else fixed,
            use_timesteps=self.timesteps(steps, spacing) if steps else None,
        )

    # Around the network

    def asked(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is to be given for x_t, (N, C, H, W) of variance 1, and t, (N,), int or float."""
        if not self.is_flow:
            return x_t, t
        sigma = self.sigma(t, x_t.ndim)
        s = sigma / (1 + sigma)
        x_s = x_t * ((1 + sigma**2).sqrt() / (1 + sigma)).to(x_t.dtype)
        return x_s, (s.flatten() * self.num_timesteps).to(x_t.dtype)

    def answered(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps, where `prediction` is epsilon, else the clean image, from what the network said; like x_t."""
        if self.prediction in ("epsilon", "sample"):
            return prediction
        sigma = self.sigma(t, x_t.ndim)
        if self.is_flow:  # v = noise - x_0
            x_s, _ = self.asked(x_t, t)
            return x_s - (sigma / (1 + sigma)).to(x_t.dtype) * prediction
        alpha = 1 / (1 + sigma**2).sqrt()  # v = alpha eps - sigma alpha x_0 (Salimans and Ho, 2022)
        return alpha.to(x_t.dtype) * x_t - (sigma * alpha).to(x_t.dtype) * prediction

    def sigma(self, t: Tensor, ndim: int) -> Tensor:
        """The level of each timestep, linear in log sigma between two, as `DiscreteDenoiser` has it: (N, 1,
        ..) float64.
        """
        table = self.log_sigmas.to(t.device)
        below = t.floor().long().clamp(max=len(table) - 2)
        log_sigma = torch.lerp(table[below], table[below + 1], t.double() - below)
        return log_sigma.exp().view(-1, *[1] * (ndim - 1))

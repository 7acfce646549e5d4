"""Denoisers: what every solver asks, and what answers it.

    denoised = denoise(x, sigma)

x = clean + sigma * noise is (N, C, H, W); sigma is a float, one level for the batch; the answer is like x.
Beside the call a denoiser has `sigma_min`, `sigma_max`, the levels that it may be asked for, and
`round_sigma(sigma)`, the nearest level that it knows. Labels and other conditions are bound before: a solver
never sees them. EDM's preconditionings answer as they are (preconditioning.py). Denoisers compose: a solver
takes GuidedDenoiser(DiscreteDenoiser(...), ...).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import require_finite
from guided_diffusion.guidance import Guidance, GuidanceStep, ddim_strength, no_shift, require_input
from guided_diffusion.guidance.universal import differentiable
from guided_diffusion.mixed_denoisers import CFGDenoiser, answer_with_variance
from guided_diffusion.process import DiffusionProcess, ModelMeanType
from guided_diffusion.schedules import linear_timestep

__all__ = ["CFGDenoiser", "DiscreteDenoiser", "GuidedDenoiser"]

# How far a level may lie from a timestep's, in timesteps, and be taken for it: what float arithmetic leaves.
_SAME_TIMESTEP = 1e-6


class DiscreteDenoiser:
    """A network of the discrete process as a denoiser: ADM's or DiT's, that predicts eps or x_0, its variance
    or not.

    model(x_t, timesteps, **model_kwargs), as the sampling loops call it. diffusion: its process; of a
    respaced one all trained timesteps count. clip_denoised: clamp the answer to [-1, 1], for pixels. At the
    level of a timestep the answer is `p_mean_variance`'s pred_xstart; between two, t is interpolated linearly
    in log sigma and goes to the model as a float. The network computes in float32, the answer has x's dtype.

    Raises ValueError for a level outside the trained ones, NonFiniteError where the network answers NaN or
    infinity.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        diffusion: DiffusionProcess,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        clip_denoised: bool = True,
    ):
        self.model, self.diffusion, self.model_kwargs = model, diffusion, model_kwargs
        self.clip_denoised = clip_denoised
        self.log_sigmas = np.log(1 / diffusion.trained_alphas_cumprod - 1) / 2  # rising with t
        self.sigma_min, self.sigma_max = (float(np.exp(self.log_sigmas[i])) for i in (0, -1))

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self._ask(x, float(sigma))[0]

    def with_variance(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """See `answer_with_variance`; None where the network predicts no variance."""
        denoised, fraction = self._ask(x, float(sigma))
        if fraction is None:
            return denoised, None
        return denoised, self.diffusion.denoised_variance(fraction, self.timestep(float(sigma))).to(x.dtype)

    def _ask(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor | None]:
        t = self.timestep(sigma)
        x_t = (x / math.sqrt(1 + sigma**2)).float()
        prediction, fraction = self.diffusion.ask(self.model, x_t, self._timesteps(t, x), self.model_kwargs)
        require_finite(prediction, "network output", round(t), sigma)
        prediction = prediction.to(x.dtype)
        predicts_x0 = self.diffusion.model_mean_type is ModelMeanType.START_X
        denoised = prediction if predicts_x0 else x - sigma * prediction
        return denoised.clamp(-1, 1) if self.clip_denoised else denoised, fraction

    def timestep(self, sigma: float) -> float:
        """The original timestep of a level; whole at the trained levels. Raises ValueError outside them."""
        slack = 1e-6
        if not self.sigma_min * (1 - slack) <= sigma <= self.sigma_max * (1 + slack):
            trained = f"{self.sigma_min:.4g} to {self.sigma_max:.4g}"
            raise ValueError(f"noise level {sigma:g} is outside those of this network, {trained}")
        t = float(np.interp(math.log(sigma), self.log_sigmas, np.arange(len(self.log_sigmas))))
        return float(round(t)) if abs(t - round(t)) < _SAME_TIMESTEP else t

    def _timesteps(self, t: float, x: Tensor) -> Tensor:
        if self.diffusion.rescale_timesteps:
            return torch.full((len(x),), t * 1000 / self.diffusion.original_num_steps, device=x.device)
        dtype = torch.int64 if t.is_integer() else torch.float32
        return torch.full((len(x),), t, dtype=dtype, device=x.device)

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """The nearest level that the network knows: sigma itself, since levels between timesteps are answered
        too.
        """
        return torch.as_tensor(sigma)


class LabelledDenoiser:
    """EDM's net(x, sigma, class_labels) with its labels bound; class_labels: one-hot, or None for none."""

    def __init__(self, net: Any, class_labels: Tensor | None):
        self.net, self.class_labels = net, class_labels
        self.sigma_min, self.sigma_max, self.round_sigma = net.sigma_min, net.sigma_max, net.round_sigma

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.net(x, sigma, self.class_labels)


class GuidedDenoiser:
    """Guidance for every solver: it answers like `net`, with guidance's shift added.

    The shift is taken at the answer, clamped to [-1, 1] where `clip_denoised` (pixels; latents have no such
    bounds). The step's variance is `ddim_strength`: Euler steps under it are DDIM under `guidance`. Its
    denoised_variance is the net's, where that answers `with_variance`. y: (N,) int64, the wanted classes.
    Further arguments of a call go to `net`; attributes (sigma_min, round_sigma, ...) are the net's.

    One is for one trajectory: what rules remember lasts as long as it does. Build another one for the next
    batch, around the same guidance.

    Raises ValueError for a rule that looks at the noisy sample, and where sigma is not one level for all
    images.
    """

    def __init__(
        self, net: Callable[..., Tensor], guidance: Guidance, y: Tensor, *, clip_denoised: bool = True
    ):
        require_input(guidance, "denoised", "GuidedDenoiser")
        self.net, self.guidance, self.y, self.clip_denoised = net, guidance, y, clip_denoised
        self._memory: dict[Any, Any] = {}  # no level says where a trajectory begins: samplers add noise

    def __call__(self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        denoised, shift = self.parts(x, sigma, *args, **kwargs)
        return denoised + shift

    def parts(self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The net's answer and guidance's shift; their sum is the answer. For solvers that split guidance."""
        variance = pull_back = None
        if getattr(self.guidance, "through_network", False):
            denoised, pull_back = differentiable(self.net, x, sigma, *args, **kwargs)
        else:
            denoised, variance = answer_with_variance(self.net, x, sigma, *args, **kwargs)
        if not denoised.isfinite().all():
            return denoised, no_shift(denoised)  # not guidance's fault: the sampler says whose
        seen = denoised.clamp(-1, 1) if self.clip_denoised else denoised
        step = _denoising_step(sigma, variance)
        step = replace(step, memory=self._memory, pull_back=pull_back)
        return denoised, self.guidance(seen, self.y, step)

    def __getattr__(self, name: str) -> Any:
        # Without __getattribute__, a copy in the making, which has no net yet, would ask itself for one for
        # ever.
        return getattr(object.__getattribute__(self, "net"), name)


def _denoising_step(sigma: float | Tensor, denoised_variance: Tensor | None) -> GuidanceStep:
    low, high = (float(level) for level in torch.as_tensor(sigma, dtype=torch.float64).aminmax())
    if low != high:
        raise ValueError(
            f"guidance takes one noise level for the whole batch, got sigma from {low:g} to {high:g}"
        )
    variance = ddim_strength(low)
    counts = (linear_timestep(low), 1000, variance, variance, low)
    return GuidanceStep.counting_down(*counts, denoised_variance=denoised_variance)

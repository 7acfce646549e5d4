"""Guidance of ours in a pipeline's own loop.

pipe(prompt, latents=latents, callback_on_step_end=guided_step_callback(guidance, y, latents))
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from guided_diffusion.adapters.schedulers import HIGHEST_LEVEL
from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.guidance import Guidance

Coefficients = tuple[float, float]  # of clean image and noise in the sample
# Options under which a step is not the sum below: the prediction is clamped and its noise is not, or noise is
# added.
_NO_SUM = {
    "DDIMScheduler": ("clip_sample", "thresholding"),
    "FlowMatchEulerDiscreteScheduler": ("stochastic_sampling",),
}


def guided_step_callback(
    guidance: Guidance, y: Tensor, latents: Tensor | None = None
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """What a pipeline takes as `callback_on_step_end`, to be guided by a rule that looks at the predicted
    clean image: of a latent one, whose classifier takes latents.

    y: (N,) int64, the wanted classes, one for each image that the pipeline makes. latents: those that the
    pipeline is given, (N, C, h, w) of variance 1; without them the first step is not guided.

    A pipeline shows the sample after a step, not the prediction D that made it. Where a step adds no noise,
    sample' = a' D + (b' / b) (sample - a D), so that both samples tell D, and a shift of D is a sum: under
    DDIM and Euler the same as GuidedDenoiser, under DPM-Solver++ guidance outside the solver's memory. No
    network is asked again. A pipeline is to give DDIM eta 0, its default. Raises ValueError for schedulers of
    another kind, and for options of theirs under which this does not hold.
    """
    return _GuidedSteps(guidance, y, latents)


class _GuidedSteps:
    def __init__(self, guidance, y, latents):
        self.guidance, self.y, self.latents = guidance, y, latents

    def __call__(
        self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        after = callback_kwargs["latents"]
        before_step, after_step = _coefficients(pipe.scheduler, timestep)
        if step == 0:
            self._begin(pipe.scheduler, after.device)
        if self._sample is not None:
            shift = self._shift(after.float(), before_step, after_step)
            after = (after + shift).to(after.dtype)
        self._sample = after.float()
        return {**callback_kwargs, "latents": after}

    def _begin(self, scheduler, device):
        start, scale = self.latents, float(getattr(scheduler, "init_noise_sigma", 1.0))
        self._sample = None if start is None else (start * scale).float().to(device)
        # The pipeline's own prediction stands for a network's.
        self._denoiser = GuidedDenoiser(
            lambda denoised, sigma: denoised, self.guidance, self.y.to(device), clip_denoised=False
        )

    def _shift(self, after, before_step, after_step):
        (a, b), (a_next, b_next) = before_step, after_step
        weight = a_next - a * b_next / b
        denoised = (after - b_next / b * self._sample) / weight
        sigma = min(b / a, HIGHEST_LEVEL) if a else HIGHEST_LEVEL
        return weight * self._denoiser.parts(denoised, sigma)[1]


def _coefficients(scheduler: Any, timestep: Any) -> tuple[Coefficients, Coefficients]:
    """The coefficients (a, b) of the sample before a step that was just made, and after it."""
    name, config = type(scheduler).__name__, scheduler.config
    if name not in ("DDIMScheduler", *_OF_LEVELS) or "sde" in str(config.get("algorithm_type")):
        known = ", ".join(["DDIMScheduler", *_OF_LEVELS])
        raise ValueError(
            f"{name} cannot be guided from outside: give the pipeline one of {known} without noise"
        )
    for key in _NO_SUM.get(name, ()):
        if config.get(key):
            raise ValueError(f"{name} with {key} cannot be guided from outside: set {key} to False")
    if name == "DDIMScheduler":
        return _ddim_coefficients(scheduler, int(timestep))
    of_level = _flow if config.get("use_flow_sigmas") else _OF_LEVELS[name]
    levels = [float(level) for level in scheduler.sigmas[scheduler.step_index - 1 :][:2]]
    return of_level(levels[0]), of_level(levels[1])


def _ddim_coefficients(scheduler, t):
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    last = scheduler.final_alpha_cumprod
    alphas_cumprod = (
        scheduler.alphas_cumprod[t],
        scheduler.alphas_cumprod[previous] if previous >= 0 else last,
    )
    return tuple((float(abar) ** 0.5, (1 - float(abar)) ** 0.5) for abar in alphas_cumprod)


def _exploding(sigma: float) -> Coefficients:
    return 1.0, sigma


def _preserving(sigma: float) -> Coefficients:
    scale = (1 + sigma**2) ** -0.5
    return scale, scale * sigma


def _flow(s: float) -> Coefficients:
    return 1 - s, s


_OF_LEVELS: Mapping[str, Callable[[float], Coefficients]] = {
    "EulerDiscreteScheduler": _exploding,
    "DPMSolverMultistepScheduler": _preserving,
    "FlowMatchEulerDiscreteScheduler": _flow,
}

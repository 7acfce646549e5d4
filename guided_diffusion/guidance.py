"""Guidance: from what the network believes the clean image is to one tensor that the sampler adds.

The contract, the same under every sampler (the README's "Writing a guidance rule" is an example):

    step = GuidanceStep(index, num_steps, variance, variance_max, sigma)    made by the sampler
    shift = guidance(x, y, step)                                            same shape, dtype and device as x, detached

x is (N, C, H, W), the predicted clean image (or latent; the noisy sample in EDM's released recipe); y is (N,)
int64, the wanted classes. A rule that reshapes the logits is a function like `log_prob`; a rule about when or
how strongly is a wrapper around a guidance, like `within_interval`.

Method: "Elucidating The Design Space of Classifier-Guided Diffusion Generation" (Ma et al., ICLR 2024).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_diffusion.files.nonfinite import nonfinite_images, require_finite
from guided_diffusion.schedules import linear_timestep

Guidance = Callable[[Tensor, Tensor, "GuidanceStep"], Tensor]


@dataclass(frozen=True)
class GuidanceStep:
    """Where the sampler stands.

    index: the respaced t, T-1 .. 0 (DDPM, DDIM), or i, 0 .. N-1 (EDM). num_steps: T or N. variance: what one
    unit of gradient is worth at this step, a float or a tensor that broadcasts to x. variance_max: float, the
    largest variance so far. sigma: noise level of the sample in EDM's units.
    """

    index: int
    num_steps: int
    variance: float | Tensor
    variance_max: float
    sigma: float | None = None


# The four choices of the paper, one function each: the input is chosen by the sampler (the predicted clean
# image) and by the classifier's input transform, the smoothness by the classifier; direction, gradient and
# schedule stand here.


def log_prob(
    logits: Tensor, y: Tensor, joint_temperature: float = 1.0, marginal_temperature: float = 1.0
) -> Tensor:
    """tau_1 f_y - log sum_i exp(tau_2 f_i): (N, classes) logits, (N,) labels -> (N,) float32 (float64 if the
    logits are).

    tau_1 = tau_2 = 1 is the log-probability; a smaller tau_2 leans from the conditional to the joint
    direction.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    f_y = logits.gather(1, y[:, None])[:, 0]
    return joint_temperature * f_y - torch.logsumexp(marginal_temperature * logits, dim=1)


def input_gradient(
    classifier: Callable[[Tensor], Tensor], x: Tensor, direction: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum of direction(logits), (N,), with respect to x: like x; and the logits. Both
    detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = classifier(x)
        return torch.autograd.grad(direction(logits).sum(), x)[0], logits.detach()


def sine_schedule(step: GuidanceStep, gamma_factor: float) -> float | Tensor:
    """variance + gamma * variance_max * sin(pi t / T), the strength of a step (Ma et al., 2024)."""
    sine = max(math.sin(math.pi * step.index / step.num_steps), 0.0)
    return step.variance + gamma_factor * step.variance_max * sine


def without_nonfinite(
    gradient: Tensor, on_nonfinite: str, step_index: int, sigma: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradient with the images that hold a NaN or Inf set to zero, and (N,) bool, which images
    those are.

    Raises NonFiniteError if there are any and `on_nonfinite` is "stop".
    """
    if on_nonfinite == "stop":
        require_finite(gradient, "guidance gradient", step_index, sigma)
    bad = nonfinite_images(gradient)
    return torch.where(bad.view(-1, *[1] * (gradient.ndim - 1)), 0, gradient), bad


def no_shift(x: Tensor) -> Tensor:
    """The shift that changes no bit of what it is added to: -0.0, since -0.0 + 0.0 would be 0.0."""
    return torch.full_like(x, -0.0)


@dataclass(frozen=True)
class Observation:
    """What guidance saw and found at one step, for whoever watches: `observe(Observation(...))`.

    index, sigma: those of the step; where a noisy classifier guides, its timestep t and None. x: (N, C, H,
    W), what the classifier was shown. y: (N,). logits: (N, classes). gradient: like x, scaled, before the
    step's strength. skipped: (N,) bool, the images whose gradient was not finite, and is zero here.
    """

    index: int
    sigma: float | None
    x: Tensor
    y: Tensor
    logits: Tensor
    gradient: Tensor
    skipped: Tensor


Observe = Callable[[Observation], None]


class ClassifierGuidance:
    """Off-the-shelf classifier guidance: strength of the step x gradient of `log_prob` at x.

    classifier: any callable, [-1, 1] (N, C, H, W) -> logits (N, classes). The marginal temperature is
    absolute; the flag `margin_temperature_discount` is its ratio to the joint one. on_nonfinite: "stop"
    raises NonFiniteError, "skip" drops the guidance of those images at this step. observe: called at
    each step with an Observation.
    """

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        *,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        classifier_scale: float = 1.0,
        gamma_factor: float = 0.0,
        on_nonfinite: str = "stop",
        observe: Observe | None = None,
    ):
        _check_policy(on_nonfinite)
        self.classifier = classifier
        self.joint_temperature = joint_temperature
        self.marginal_temperature = marginal_temperature
        self.classifier_scale = classifier_scale
        self.gamma_factor = gamma_factor
        self.on_nonfinite = on_nonfinite
        self.observe = observe

    def __call__(self, x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if self.classifier_scale == 0:
            return no_shift(x)
        log_p = partial(
            log_prob,
            y=y,
            joint_temperature=self.joint_temperature,
            marginal_temperature=self.marginal_temperature,
        )
        gradient, logits = input_gradient(self.classifier, x, log_p)
        gradient, skipped = without_nonfinite(
            gradient * self.classifier_scale, self.on_nonfinite, step.index, step.sigma
        )
        if self.observe is not None:
            self.observe(Observation(step.index, step.sigma, x, y, logits, gradient, skipped))
        return (sine_schedule(step, self.gamma_factor) * gradient).to(x.dtype).detach()


def released_edm_schedule(step: GuidanceStep, max_guidance: float, add_factor: float) -> float:
    """The strength of EluCD's EDM code at step i of N: a line down from max_guidance, and add_factor of it as
    a sine on top.
    """
    i, n = step.index, step.num_steps
    line = max(max_guidance * (n + 1 - i) / (n + 1), 1e-5)
    return line + math.sin(math.pi * i / n) * max_guidance * add_factor


def released_edm_guidance(
    classifier: Callable[[Tensor], Tensor],
    *,
    joint_temperature: float,
    marginal_temperature: float,
    max_guidance: float,
    add_factor: float,
    on_nonfinite: str = "stop",
    observe: Observe | None = None,
) -> Guidance:
    """Return the guidance of EluCD's released EDM code, for `edm_sampler`: x is the noisy sample, index i
    runs from 0 to N - 1.

    The classifier, float32, sees the sample divided by its RMS r where that is above 1; the shift is the
    gradient there, at unit RMS, times r and `released_edm_schedule`. It does not look at the variances of the
    step. max_guidance 0 is off; the schedule's floor applies above. An image whose gradient is zero gets no
    shift. on_nonfinite, observe: as in `ClassifierGuidance`, x after the division, the gradient as it came
    from the classifier.
    """
    _check_policy(on_nonfinite)
    if not 0 <= max_guidance < math.inf:
        raise ValueError(f"max_guidance must be 0 (off) or a positive number, got {max_guidance}")

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if max_guidance == 0:
            return no_shift(x)
        r = _root_mean_square(x)
        z = (x / r.clamp(min=1)).float()
        log_p = partial(
            log_prob, y=y, joint_temperature=joint_temperature, marginal_temperature=marginal_temperature
        )
        gradient, logits = input_gradient(classifier, z, log_p)
        gradient, skipped = without_nonfinite(gradient, on_nonfinite, step.index, step.sigma)
        if observe is not None:
            observe(Observation(step.index, step.sigma, z, y, logits, gradient, skipped))
        length = _root_mean_square(gradient)
        direction = gradient / torch.where(length > 0, length, 1)
        return (released_edm_schedule(step, max_guidance, add_factor) * r * direction).to(x.dtype)

    return guided


def _root_mean_square(x: Tensor) -> Tensor:
    """RMS of each image, (N, 1, ...) float64: in float32 the squares of a small gradient would be 0."""
    return x.double().square().flatten(1).mean(dim=1).sqrt().view(-1, *[1] * (x.ndim - 1))


class GuidedDenoiser:
    """Guidance for every sampler that asks `denoised = net(x, sigma, ...)`: it answers like `net`, with
    guidance's shift added.

    The shift is taken at the answer clamped to [-1, 1] and weighed by sigma^2 / sqrt(1 + sigma^2), which is
    DDIM's rule in EDM's units: Euler steps under it are DDIM under `guidance`. As the denoiser knows no
    steps, `step.index` of `num_steps` is the timestep of the linear 1000-step process with this noise level,
    so that a schedule over t / T acts here as it does there. y: (N,) int64.
    sigma: a number or tensor, the same level for all images, else ValueError. Attributes (sigma_min, round_sigma, ...) are the net's.
    """

    def __init__(self, net: Callable[..., Tensor], guidance: Guidance, y: Tensor):
        self.net, self.guidance, self.y = net, guidance, y

    def __call__(self, x: Tensor, sigma: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        denoised = self.net(x, sigma, *args, **kwargs)
        if not denoised.isfinite().all():
            return denoised  # not guidance's fault: the sampler says whose
        return denoised + self.guidance(denoised.clamp(-1, 1), self.y, _denoising_step(sigma))

    def __getattr__(self, name: str) -> Any:
        # Without __getattribute__, a copy in the making, which has no net yet, would ask itself for one for
        # ever.
        return getattr(object.__getattribute__(self, "net"), name)


def _denoising_step(sigma: Tensor | float) -> GuidanceStep:
    low, high = (float(level) for level in torch.as_tensor(sigma).aminmax())
    if low != high:
        raise ValueError(
            f"guidance takes one noise level for the whole batch, got sigma from {low:g} to {high:g}"
        )
    variance = low**2 / math.sqrt(1 + low**2)
    return GuidanceStep(linear_timestep(low), 1000, variance, variance, low)


def within_interval(guidance: Guidance, sigma_lo: float, sigma_hi: float) -> Guidance:
    """Guide only where sigma_lo < step.sigma <= sigma_hi (Kynkäänniemi et al., 2024); elsewhere the
    classifier is not called.
    """
    if not 0 <= sigma_lo < sigma_hi:
        raise ValueError(
            f"guidance interval {sigma_lo},{sigma_hi} is empty; it takes 0 <= lo < hi, noise levels sigma"
        )

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if step.sigma is None:
            raise ValueError("a guidance interval needs step.sigma, which this sampler does not give")
        return guidance(x, y, step) if sigma_lo < step.sigma <= sigma_hi else no_shift(x)

    return guided


def noisy_classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    classifier_scale: float = 1.0,
    on_nonfinite: str = "stop",
    observe: Observe | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the classic `cond_fn(x, t, y)` of a classifier that was trained on noisy images (Dhariwal and
    Nichol, 2021).

    classifier(x_t, t) -> logits. The result goes to the loops as `cond_fn=`, not as `guidance=`: it is taken
    at x_t. on_nonfinite and observe: as in `ClassifierGuidance`, but that the original timestep t stands in
    the place of the index, in the error as well.
    """
    _check_policy(on_nonfinite)

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        def direction(logits: Tensor) -> Tensor:
            return F.log_softmax(logits.float(), dim=1).gather(1, y[:, None])[:, 0]

        index = int(t[0])
        gradient, logits = input_gradient(lambda x_t: classifier(x_t, t), x, direction)
        gradient, skipped = without_nonfinite(gradient * classifier_scale, on_nonfinite, index)
        if observe is not None:
            observe(Observation(index, None, x, y, logits, gradient, skipped))
        return gradient

    return cond_fn


def _check_policy(on_nonfinite: str) -> None:
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"unknown on_nonfinite {on_nonfinite!r}; choose stop or skip")

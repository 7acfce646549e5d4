"""The rules of the paper and of its released EDM code, made of a direction, a gradient and a strength."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from guided_diffusion.guidance.directions import Direction, log_prob
from guided_diffusion.guidance.gradient import ClassifierGradient, Observe
from guided_diffusion.guidance.step import Guidance, GuidanceStep, looks_at
from guided_diffusion.guidance.strength import Strength, named_strength, released_edm_schedule
from guided_diffusion.guidance.wrappers import no_shift, root_mean_square

ChangeGradient = Callable[[Guidance], Guidance]


class ClassifierGuidance:
    """Off-the-shelf classifier guidance: strength of the step x scale x gradient of a direction at the
    predicted clean image.

    classifier: any callable, [-1, 1] (N, C, H, W) -> logits (N, classes). The direction is `log_prob` at the
    two temperatures; the marginal one is absolute (the flag `margin_temperature_discount` is its ratio to the
    joint one). strength: "sampler" is the sampler's variance with the sine term of `gamma_factor` on top;
    "ddim" is DDIM's rule under every sampler; "posterior" is the variance of the clean image, of standard
    deviation sigma_data, given the noisy one; or a function of the step. direction: another one in the place
    of `log_prob`. gradient: (gradient) -> gradient, a wrapper that changes it before scale and strength.
    classifier_scale: factor of the gradient; at 0 the classifier is not called and the shift changes no bit.
    on_nonfinite, observe: see `ClassifierGradient`.
    """

    looks_at = "denoised"

    def __init__(
        self,
        classifier: Callable[[Tensor], Tensor],
        *,
        joint_temperature: float = 1.0,
        marginal_temperature: float = 1.0,
        classifier_scale: float = 1.0,
        gamma_factor: float = 0.0,
        direction: Direction | None = None,
        strength: str | Strength = "sampler",
        sigma_data: float = 0.5,
        gradient: ChangeGradient | None = None,
        on_nonfinite: str = "stop",
        observe: Observe | None = None,
    ):
        self.classifier, self.classifier_scale = classifier, classifier_scale
        self.strength = named_strength(strength, gamma_factor, sigma_data)
        gradient_of = ClassifierGradient(
            direction or tempered(joint_temperature, marginal_temperature),
            scale=classifier_scale,
            on_nonfinite=on_nonfinite,
            observe=observe,
        )
        self._gradient = (gradient or _as_it_is)(_at_steps(gradient_of, classifier))
        self.through_network = getattr(self._gradient, "through_network", False)

    def __call__(self, x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if self.classifier_scale == 0:
            return no_shift(x)
        gradient = self._gradient(x, y, step) * self.classifier_scale
        return (self.strength(step) * gradient).to(x.dtype).detach()


def released_edm_guidance(
    classifier: Callable[[Tensor], Tensor],
    *,
    joint_temperature: float,
    marginal_temperature: float,
    max_guidance: float,
    add_factor: float,
    direction: Direction | None = None,
    strength: Strength | None = None,
    gradient: ChangeGradient | None = None,
    on_nonfinite: str = "stop",
    observe: Observe | None = None,
) -> Guidance:
    """Return the guidance of EluCD's released EDM code, for `edm_sampler`: x is the noisy sample.

    The classifier, float32, sees the sample divided by its RMS r where that is above 1; the shift is the
    gradient there, at unit RMS, times r and `released_edm_schedule`. It does not look at the variances of the
    step. max_guidance 0 is off; the schedule's floor applies above. An image whose gradient is zero gets no
    shift.
    direction, strength: in the place of `log_prob` at the temperatures and of the released schedule.
    gradient: (gradient) -> gradient, a wrapper that changes it before it is brought to unit RMS.
    on_nonfinite, observe: see `ClassifierGradient`; x is observed after the division, the gradient as it came
    from the classifier.
    """
    if not 0 <= max_guidance < math.inf:
        raise ValueError(f"max_guidance must be 0 (off) or a positive number, got {max_guidance}")
    strength = strength or partial(released_edm_schedule, max_guidance=max_guidance, add_factor=add_factor)
    gradient_of = ClassifierGradient(
        direction or tempered(joint_temperature, marginal_temperature),
        on_nonfinite=on_nonfinite,
        observe=observe,
    )
    gradient_at = (gradient or _as_it_is)(_at_steps(gradient_of, classifier))

    @looks_at("noisy")
    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        if max_guidance == 0:
            return no_shift(x)
        r = root_mean_square(x)
        g = gradient_at((x / r.clamp(min=1)).float(), y, step)
        length = root_mean_square(g)
        unit = g / torch.where(length > 0, length, 1)
        return (strength(step) * r * unit).to(x.dtype)

    guided.__name__ = "released_edm_guidance"
    return guided


def tempered(joint_temperature: float, marginal_temperature: float) -> Direction:
    """`log_prob` at these temperatures."""
    return partial(log_prob, joint_temperature=joint_temperature, marginal_temperature=marginal_temperature)


def _at_steps(gradient_of: ClassifierGradient, classifier: Callable[[Tensor], Tensor]) -> Guidance:
    """The gradient as a function (x, y, step), which wrappers take as they take a guidance."""

    def gradient(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        return gradient_of(classifier, x, y, step.index, step.sigma)

    return gradient


def _as_it_is(gradient: Guidance) -> Guidance:
    return gradient

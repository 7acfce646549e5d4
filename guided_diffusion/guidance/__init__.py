"""Guidance: from what the network believes the clean image is to one tensor that the sampler adds.

The contract, the same under every sampler (docs/guidance-rules.md has an example):

    shift = guidance(x, y, step)       same shape, dtype and device as x, detached

x is (N, C, H, W), the predicted clean image or latent (the noisy sample in EDM's released recipe); y is (N,)
int64, the wanted classes; step is a `GuidanceStep`, made by the sampler. One idea per file:

    step         where the sampler stands; which input a rule looks at
    directions   (logits, y) -> (N,), what is to grow
    gradient     its gradient with respect to the classifier's input, with the policy and the observer
    strength     step -> number, tensor or PerFrequency, how far to go
    frequency    the cosine transform of images, and the spectrum of data
    classifier   the rules made of these: ClassifierGuidance, released_edm_guidance
    wrappers     guidance -> guidance, about when or how
    stateful     wrappers of the gradient that remember earlier steps
    universal    the gradient with respect to the noisy sample, through the network
    networks     guidance by a second network: the classic noisy classifier

Method: "Elucidating The Design Space of Classifier-Guided Diffusion Generation" (Ma et al., ICLR 2024).
"""

from guided_diffusion.guidance.classifier import ClassifierGuidance, released_edm_guidance
from guided_diffusion.guidance.directions import Direction, log_prob
from guided_diffusion.guidance.frequency import PerFrequency, natural_spectrum, read_spectrum
from guided_diffusion.guidance.gradient import Observation, Observe, input_gradient
from guided_diffusion.guidance.networks import noisy_classifier_gradient
from guided_diffusion.guidance.step import Guidance, GuidanceStep, looks_at, require_input
from guided_diffusion.guidance.strength import (
    Strength,
    ddim_strength,
    frequency_posterior,
    learned_posterior,
    named_strength,
    posterior_variance,
    released_edm_schedule,
    sine_schedule,
)
from guided_diffusion.guidance.wrappers import no_shift, of_class, within_interval, wrapper

__all__ = [
    "ClassifierGuidance",
    "Direction",
    "Guidance",
    "GuidanceStep",
    "Observation",
    "Observe",
    "PerFrequency",
    "Strength",
    "ddim_strength",
    "frequency_posterior",
    "input_gradient",
    "learned_posterior",
    "log_prob",
    "looks_at",
    "named_strength",
    "natural_spectrum",
    "no_shift",
    "noisy_classifier_gradient",
    "of_class",
    "posterior_variance",
    "read_spectrum",
    "released_edm_guidance",
    "released_edm_schedule",
    "require_input",
    "sine_schedule",
    "within_interval",
    "wrapper",
]

"""When the flags of guidance mean anything."""

from typing import Any

from guided_diffusion.flags.fields import Need
from guided_diffusion.solvers import STEPS


def _unguided(config: Any) -> str:
    return f"without an off-the-shelf classifier: add {config.HOW_TO_GUIDE}"


OFF_THE_SHELF = Need(
    lambda config: config.guided_off_the_shelf,
    _unguided,
)
A_CLASSIFIER = Need(
    lambda config: config.guided_off_the_shelf or config.guided_by_noisy_classifier,
    lambda config: f"without a classifier: add {config.HOW_TO_GUIDE}",
)
SCALABLE = Need(
    lambda config: A_CLASSIFIER.met(config) or config.classifier_scale == 0,
    lambda config: f"without a classifier: add {config.HOW_TO_GUIDE}",
)
NOT_FIXED = Need(
    lambda config: config.guided_off_the_shelf and not config.fixed_length,
    lambda config: (
        "with --fixed_length, which sets the length at last: keep one"
        if config.guided_off_the_shelf
        else _unguided(config)
    ),
)
SIZED = Need(
    lambda config: NOT_FIXED.met(config) and not config.unit_gradient,
    lambda config: (
        "with --guidance_form released, which brings the gradient to unit length: add --guidance_form score"
        if config.guided_off_the_shelf and config.unit_gradient
        else NOT_FIXED.text(config)  # type: ignore[misc]
    ),
)
GUIDES_DENOISER = Need(
    lambda config: config.guides_denoiser,
    lambda config: f"where guidance does not see the network: add {config.HOW_TO_GUIDE_DENOISER}",
)
SINGLE_STEPS = Need(
    lambda config: config.takes_single_steps,
    lambda config: f"without a sampler that can repeat its steps: add --sampler {' or '.join(STEPS)}",
)

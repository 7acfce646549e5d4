"""When the flags of guidance mean anything."""

from collections.abc import Callable
from typing import Any

from guided_diffusion.flags.fields import Need


def _unguided(config: Any) -> str:
    return f"without an off-the-shelf classifier: add {config.HOW_TO_GUIDE}"


def _at_noisy() -> str:
    return "with --looks_at noisy, whose gradient is used as it is: drop one"


OFF_THE_SHELF = Need(
    lambda config: config.guided_off_the_shelf,
    _unguided,
)
WORDS = Need(
    lambda config: config.guided_by_words,
    lambda config: "without a classifier that knows words: add --classifier_type clip:FOLDER",
)
A_CLASSIFIER = Need(
    lambda config: config.guided_off_the_shelf or config.guided_by_noisy_classifier,
    lambda config: f"without a classifier: add {config.HOW_TO_GUIDE}",
)
SCALABLE = Need(
    lambda config: A_CLASSIFIER.met(config) or config.classifier_scale == 0,
    lambda config: f"without a classifier: add {config.HOW_TO_GUIDE}",
)
# Of what a guidance may do beyond its direction: a cond_fn is given no step.
A_RULE = Need(
    lambda config: config.guided_off_the_shelf and not config.shown_noisy,
    lambda config: _at_noisy() if config.shown_noisy else _unguided(config),
)
NOT_FIXED = Need(
    lambda config: A_RULE.met(config) and not config.fixed_length,
    lambda config: (
        "with --fixed_length, which sets the length at last: keep one"
        if A_RULE.met(config)
        else A_RULE.text(config)  # type: ignore[misc]
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


def _strengthless(config: Any, otherwise: str) -> str:
    """What is missing where a rule has no strength to choose; `otherwise` where it has one."""
    if not config.guided_off_the_shelf:
        return _unguided(config)
    if config.shown_noisy:
        return _at_noisy()
    if config.unit_gradient:
        return "with --guidance_form released, which has a schedule of its own: add --guidance_form score"
    if not config.has_strength:
        return "with --through_network True, whose strength is sigma^2: drop one"
    return otherwise


def _strength(name: str, also: Callable[[Any], bool] = lambda config: True, hint: str = "") -> Need:
    flags = f"--guidance_strength {name}{hint}"
    return Need(
        lambda config: config.has_strength and config.guidance_strength == name and also(config),
        lambda config: _strengthless(config, f"without {flags}, to which it belongs: add that, or drop it"),
    )


STRENGTH = Need(lambda config: config.has_strength, lambda config: _strengthless(config, ""))
SAMPLERS_STRENGTH = _strength("sampler")
POSTERIOR = _strength("posterior")
FREQUENCY = _strength("posterior", lambda config: config.posterior == "frequency", " --posterior frequency")
SIGMA_DATA = _strength(
    "posterior",
    lambda config: config.posterior == "scalar" or (config.posterior == "frequency" and not config.spectrum),
    " --posterior scalar, or frequency without --spectrum",
)

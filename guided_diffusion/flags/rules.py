"""The flags of guidance rules, and what they build.

A rule is added here as one field. Its keyword says which part of guidance it changes, and how:

    direction=   (direction, value) -> direction     what is to grow, see guidance/directions.py
    gradient=    (gradient, value) -> gradient       before scale and strength, see guidance/stateful.py
    strength=    (strength, value) -> strength       how far to go, see guidance/strength.py
    guidance=    (guidance, value) -> guidance       when or how, see guidance/wrappers.py

The function is called where the value is not the default. The fields are applied in the order in which they
stand; a field may change several parts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from guided_diffusion.flags.fields import Flags, at_least, between, finite, flag, some_numbers
from guided_diffusion.flags.needs import A_RULE, GUIDES_DENOISER, NOT_FIXED, OFF_THE_SHELF, SIZED
from guided_diffusion.flags.parser import parse_floats, parse_interval
from guided_diffusion.guidance import Guidance, directions, stateful, within_interval, wrappers
from guided_diffusion.guidance.universal import noise_variance, through_network


def _spread(make: Callable[..., Any]) -> Callable[[Any, str], Any]:
    """(part, "0.3,0.9") -> make(part, 0.3, 0.9)."""
    return lambda part, text: make(part, *parse_floats(text))


def _interval(guidance: Guidance, text: str) -> Guidance:
    return within_interval(guidance, *parse_interval(text, "--guidance_interval"))


@dataclass(frozen=True, kw_only=True)
class RuleFlags(Flags):
    """Guidance rules."""

    # Rules about the logits
    reverse_kl: str = flag(
        "",
        "WEIGHT[,SMOOTHING]: less WEIGHT * KL(p || q), q the wanted answer",
        check=some_numbers(1, 2),
        needs=OFF_THE_SHELF,
        direction=_spread(directions.reverse_kl),
    )
    forward_kl: str = flag(
        "",
        "WEIGHT[,SMOOTHING]: less WEIGHT * KL(q || p)",
        check=some_numbers(1, 2),
        needs=OFF_THE_SHELF,
        direction=_spread(directions.forward_kl),
    )
    jensen_shannon: str = flag(
        "",
        "WEIGHT[,SMOOTHING]: less WEIGHT * the Jensen-Shannon divergence of p and q",
        check=some_numbers(1, 2),
        needs=OFF_THE_SHELF,
        direction=_spread(directions.jensen_shannon),
    )
    reference_contrast: float = flag(
        0.0,
        "weight of the wanted logit over the strongest other one",
        check=finite,
        needs=OFF_THE_SHELF,
        direction=directions.reference_contrast,
    )
    entropy_scaling: float = flag(
        0.0,
        "EDS: divide by the entropy of the classifier's answer as a share of the largest, not below this; "
        "0 is off",
        check=between(0, 1),
        needs=SIZED,
        direction=directions.entropy_scaling,
    )
    # Rules about the gradient; the last ones see what the first ones made
    augmentations: int = flag(
        0,
        "average the gradient over so many shifted copies of the image",
        check=at_least(0),
        needs=A_RULE,
        gradient=wrappers.augmentations,
    )
    through_network: bool = flag(
        False,
        "the universal form: the gradient goes through the network, times sigma^2",
        needs=GUIDES_DENOISER,
        gradient=lambda gradient, on: through_network(gradient),
        strength=lambda strength, on: noise_variance,
    )
    momentum: float = flag(
        0.0,
        "share of the earlier gradients that is added; APG's is -0.75",
        check=finite,
        needs=A_RULE,
        gradient=stateful.momentum,
    )
    adam: str = flag(
        "",
        "B1,B2: the gradient as Adam's step, its entries about 1: choose the scale anew",
        check=some_numbers(2),
        needs=A_RULE,
        gradient=_spread(stateful.adam),
    )
    guidance_every: int = flag(
        1,
        "ask the classifier at every so many calls, and use its gradient until the next",
        check=at_least(1),
        needs=A_RULE,
        gradient=stateful.every,
    )
    # Rules about the shift
    max_shift: float = flag(
        0.0,
        "largest root mean square of an image's shift; 0 is off",
        check=at_least(0),
        needs=NOT_FIXED,
        guidance=wrappers.max_shift,
    )
    parallel_part: float = flag(
        1.0,
        "APG: share that is kept of the part along the predicted image; 0 is the orthogonal part alone",
        check=finite,
        needs=A_RULE,
        guidance=wrappers.parallel_part,
    )
    band_weights: str = flag(
        "",
        "LOW,HIGH: factors of the shift's low and high frequencies",
        check=some_numbers(2),
        needs=A_RULE,
        guidance=_spread(wrappers.band_weights),
    )
    fixed_length: float = flag(
        0.0,
        "root mean square of every image's shift; 0 leaves it as it is",
        check=at_least(0),
        needs=A_RULE,
        guidance=wrappers.fixed_length,
    )
    damping: float = flag(
        0.0,
        "less of a shift that is large beside the image, exp(-ALPHA |shift| / |image|); MAMBO-G's is 8",
        check=at_least(0),
        needs=A_RULE,
        guidance=wrappers.damping,
    )
    # The last, so that nothing is asked and nothing remembered outside
    guidance_interval: str = flag(
        "",
        "LO,HI: guide only while the noise level sigma is in (LO, HI]",
        needs=A_RULE,
        guidance=_interval,
    )

"""The flags of guidance by an off-the-shelf classifier, and what they build.

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
from functools import partial
from typing import Any

from torch import Tensor

from guided_diffusion.flags.fields import Flags, at_least, between, finite, flag, flag_fields, some_numbers
from guided_diffusion.flags.needs import (
    A_CLASSIFIER,
    GUIDES_DENOISER,
    NOT_FIXED,
    OFF_THE_SHELF,
    SCALABLE,
    SINGLE_STEPS,
    SIZED,
)
from guided_diffusion.flags.parser import parse_floats, parse_interval
from guided_diffusion.guidance import (
    ClassifierGuidance,
    Guidance,
    Observe,
    Strength,
    directions,
    sine_schedule,
    stateful,
    within_interval,
    wrapper,
    wrappers,
)
from guided_diffusion.guidance.classifier import tempered
from guided_diffusion.guidance.universal import noise_variance, through_network
from guided_diffusion.solvers import STEPS

WRAPPED = ("gradient", "guidance")  # called as (x, y, step)


def _spread(make: Callable[..., Any]) -> Callable[[Any, str], Any]:
    """(part, "0.3,0.9") -> make(part, 0.3, 0.9)."""
    return lambda part, text: make(part, *parse_floats(text))


def _interval(guidance: Guidance, text: str) -> Guidance:
    return within_interval(guidance, *parse_interval(text, "--guidance_interval"))


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags(Flags):
    """Guidance."""

    classifier_type: str = flag("", "off-the-shelf classifier: a torchvision name, or FILE.py:builder")
    classifier_path: str = flag(
        "", "weights of a noisy classifier, or of --classifier_type: a file, IMAGENET1K_V2, random"
    )
    classifier_checkpoint_key: str = flag(
        "", "which state dict, where the file of --classifier_path holds several", needs=A_CLASSIFIER
    )
    classifier_scale: float = flag(1.0, "factor of the gradient; 0 is unguided", check=finite, needs=SCALABLE)
    softplus_beta: float = flag(
        float("inf"),
        "sharpness of the Softplus in the place of each ReLU; inf keeps ReLU",
        needs=OFF_THE_SHELF,
    )
    joint_temperature: float = flag(
        1.0, "tau_1, factor of the wanted class's logit", check=finite, needs=OFF_THE_SHELF
    )
    gamma_factor: float = flag(
        0.0, "weight of the sine term in the strength of a step", check=finite, needs=OFF_THE_SHELF
    )
    classifier_input: str = flag(
        "paper",
        "paper: the raw image; imagenet: resized and normalised",
        choices=("paper", "imagenet"),
        needs=OFF_THE_SHELF,
    )
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
        needs=OFF_THE_SHELF,
        gradient=wrappers.augmentations,
    )
    through_network: bool = flag(
        False,
        "the universal form: the gradient goes through the network, times sigma^2",
        needs=GUIDES_DENOISER,
        gradient=lambda gradient, on: through_network(gradient),
        strength=lambda strength, on: noise_variance,
    )
    recurrence: int = flag(
        1,
        "do every step so many times, noise between them",
        check=at_least(1),
        needs=SINGLE_STEPS,
    )
    momentum: float = flag(
        0.0,
        "share of the earlier gradients that is added; APG's is -0.75",
        check=finite,
        needs=OFF_THE_SHELF,
        gradient=stateful.momentum,
    )
    adam: str = flag(
        "",
        "B1,B2: the gradient as Adam's step, its entries about 1: choose the scale anew",
        check=some_numbers(2),
        needs=OFF_THE_SHELF,
        gradient=_spread(stateful.adam),
    )
    guidance_every: int = flag(
        1,
        "ask the classifier at every so many calls, and use its gradient until the next",
        check=at_least(1),
        needs=OFF_THE_SHELF,
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
        needs=OFF_THE_SHELF,
        guidance=wrappers.parallel_part,
    )
    band_weights: str = flag(
        "",
        "LOW,HIGH: factors of the shift's low and high frequencies",
        check=some_numbers(2),
        needs=OFF_THE_SHELF,
        guidance=_spread(wrappers.band_weights),
    )
    fixed_length: float = flag(
        0.0,
        "root mean square of every image's shift; 0 leaves it as it is",
        check=at_least(0),
        needs=OFF_THE_SHELF,
        guidance=wrappers.fixed_length,
    )
    damping: float = flag(
        0.0,
        "less of a shift that is large beside the image, exp(-ALPHA |shift| / |image|); MAMBO-G's is 8",
        check=at_least(0),
        needs=OFF_THE_SHELF,
        guidance=wrappers.damping,
    )
    # The last, so that nothing is asked and nothing remembered outside
    guidance_interval: str = flag(
        "",
        "LO,HI: guide only while the noise level sigma is in (LO, HI]",
        needs=OFF_THE_SHELF,
        guidance=_interval,
    )
    # Batches that were finished under "stop" are those of "skip" too.
    on_nonfinite: str = flag(
        "stop",
        "skip drops that image's guidance for that step and counts it",
        choices=("stop", "skip"),
        needs=A_CLASSIFIER,
        compared=False,
    )
    log_guidance: bool = flag(
        False, "write what guidance did at each step into metrics.jsonl", needs=A_CLASSIFIER
    )

    HOW_TO_GUIDE = "--classifier_type, for example resnet101"
    HOW_TO_GUIDE_DENOISER = "--classifier_type and --sampler euler or heun"

    @property
    def guided_off_the_shelf(self) -> bool:
        """Whether an off-the-shelf classifier guides."""
        return bool(self.classifier_type)

    @property
    def guided_by_noisy_classifier(self) -> bool:
        """Whether a classifier of noisy images guides."""
        return bool(self.classifier_path) and not self.classifier_type

    @property
    def guides_denoiser(self) -> bool:
        """Whether an off-the-shelf classifier guides a denoiser, by `GuidedDenoiser`."""
        raise NotImplementedError

    @property
    def unit_gradient(self) -> bool:
        """Whether the rule brings the gradient to unit length."""
        return False

    @property
    def takes_single_steps(self) -> bool:
        """Whether the sampler is a solver that does not look at earlier steps."""
        return getattr(self, "sampler", None) in STEPS

    @property
    def marginal_temperature(self) -> float:
        """tau_2, absolute."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        if self.through_network and "gamma_factor" in self.given:
            raise ValueError(
                f"--gamma_factor {self.gamma_factor} has no place in --through_network True, "
                "whose strength is sigma^2: drop one"
            )
        if self.guided_off_the_shelf:
            self.build_guidance(lambda x: x, None)  # raises for what the parts of the rule refuse

    def build_guidance(self, classifier: Callable[[Tensor], Tensor], observe: Observe | None) -> Guidance:
        """The rule that the flags describe, around a classifier of [-1, 1] images."""
        direction = tempered(self.joint_temperature, self.marginal_temperature)
        rule = self.rule(
            classifier,
            direction=self._built("direction", direction),
            strength=self._built("strength", self.strength()),
            gradient=partial(self._built, "gradient"),
            on_nonfinite=self.on_nonfinite,
            observe=observe,
        )
        return self._built("guidance", rule)

    def rule(self, classifier: Callable[[Tensor], Tensor], **parts: Any) -> Guidance:
        """The rule itself, of a direction and a strength."""
        return ClassifierGuidance(classifier, classifier_scale=self.classifier_scale, **parts)

    def strength(self) -> Strength:
        """The strength before any field changes it."""
        return partial(sine_schedule, gamma_factor=self.gamma_factor)

    def _built(self, kind: str, part: Any) -> Any:
        """A part of guidance as the fields of this kind change it."""
        for each in flag_fields(self):
            build, value = each.metadata["builds"].get(kind), getattr(self, each.name)
            if build and value != each.default:
                part = wrapper(build)(part, value) if kind in WRAPPED else build(part, value)
        return part

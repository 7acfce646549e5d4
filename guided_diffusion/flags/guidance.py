"""The flags of guidance by an off-the-shelf classifier, and what they build; its rules are in rules.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from guided_diffusion.flags.fields import finite, flag, flag_fields
from guided_diffusion.flags.needs import A_CLASSIFIER, OFF_THE_SHELF, SCALABLE
from guided_diffusion.flags.rules import RuleFlags
from guided_diffusion.guidance import ClassifierGuidance, Guidance, Observe, Strength, sine_schedule, wrapper
from guided_diffusion.guidance.classifier import tempered
from guided_diffusion.solvers import STEPS

WRAPPED = ("gradient", "guidance")  # called as (x, y, step)


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags(RuleFlags):
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

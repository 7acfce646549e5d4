"""The flags of guidance by an off-the-shelf classifier, and what they build; its rules are in rules.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from guided_diffusion.files.prompts import prompts_file
from guided_diffusion.flags.fields import above, finite, flag, flag_fields
from guided_diffusion.flags.needs import (
    A_CLASSIFIER,
    FREQUENCY,
    OFF_THE_SHELF,
    POSTERIOR,
    SAMPLERS_STRENGTH,
    SCALABLE,
    SIGMA_DATA,
    STRENGTH,
    WORDS,
)
from guided_diffusion.flags.rules import RuleFlags
from guided_diffusion.guidance import (
    ClassifierGuidance,
    Direction,
    Guidance,
    Observe,
    Strength,
    frequency_posterior,
    learned_posterior,
    named_strength,
    natural_spectrum,
    of_class,
    read_spectrum,
    wrapper,
)
from guided_diffusion.guidance.classifier import tempered
from guided_diffusion.guidance.strength import STRENGTHS

WRAPPED = ("gradient", "guidance")  # called as (x, y, step)
CLASSIFIER_TYPE = (
    "off-the-shelf classifier: a torchvision name, timm:NAME, hf:FOLDER, clip:FOLDER, or FILE.py:builder; "
    "a+b averages the log-probabilities of several"
)


def _of_prompts(guidance: Guidance, prompts: str) -> Guidance:
    """A single prompt is wanted of every image, whatever the label that the network is given."""
    return guidance if prompts_file(prompts) else of_class(guidance, 0)


@dataclass(frozen=True, kw_only=True)
class GuidanceFlags(RuleFlags):
    """Guidance."""

    classifier_type: str = flag("", CLASSIFIER_TYPE)
    classifier_path: str = flag(
        "",
        "weights of a noisy classifier, or of --classifier_type: a file, IMAGENET1K_V2, random, or a+b",
    )
    classifier_checkpoint_key: str = flag(
        "", "which state dict, where the file of --classifier_path holds several", needs=A_CLASSIFIER
    )
    classifier_scale: float = flag(1.0, "factor of the gradient; 0 is unguided", check=finite, needs=SCALABLE)
    prompts: str = flag(
        "",
        "what clip:FOLDER compares images with: a file with a prompt for each class, or the text of one",
        needs=WORDS,
        guidance=_of_prompts,
    )
    softplus_beta: float = flag(
        float("inf"),
        "sharpness of the smooth form of ReLU and its kin; inf keeps them as they are",
        needs=OFF_THE_SHELF,
    )
    joint_temperature: float = flag(
        1.0, "tau_1, factor of the wanted class's logit", check=finite, needs=OFF_THE_SHELF
    )
    gamma_factor: float = flag(
        0.0, "weight of the sine term in the sampler's strength", check=finite, needs=SAMPLERS_STRENGTH
    )
    guidance_strength: str = flag(
        "sampler",
        "what a unit of gradient is worth: the sampler's variance, DDIM's rule, or the posterior's variance",
        choices=STRENGTHS,
        needs=STRENGTH,
    )
    posterior: str = flag(
        "scalar",
        "its variance: one number, per frequency, or per pixel by the network's own learned variance",
        choices=("scalar", "frequency", "learned"),
        needs=POSTERIOR,
    )
    sigma_data: float = flag(
        0.5, "standard deviation of the data, in [-1, 1]", check=above(0), needs=SIGMA_DATA
    )
    spectrum: str = flag(
        "",
        "of --posterior frequency: a file of scripts/data_spectrum.py; by default that of natural images",
        needs=FREQUENCY,
    )
    classifier_input: str = flag(
        "paper",
        "paper: the raw image, but to timm:, hf: and clip: what they were trained on; imagenet: resized and "
        "normalised",
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
    HOW_TO_GUIDE_DENOISER = "--classifier_type and a solver, such as --sampler heun"

    @property
    def guided_off_the_shelf(self) -> bool:
        """Whether an off-the-shelf classifier guides."""
        return bool(self.classifier_type)

    @property
    def guided_by_words(self) -> bool:
        """Whether a classifier guides that compares images with prompts."""
        named = self.classifier_type.split("+")
        return self.guided_off_the_shelf and any(name.startswith("clip:") for name in named)

    @property
    def has_strength(self) -> bool:
        """Whether a rule guides whose strength is to choose."""
        settled = self.shown_noisy or self.unit_gradient or (self.through_network and self.guides_denoiser)
        return self.guided_off_the_shelf and not settled

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
    def shown_noisy(self) -> bool:
        """Whether an off-the-shelf classifier guides as one of noisy images does, by a `cond_fn`."""
        return False

    @property
    def marginal_temperature(self) -> float:
        """tau_2, absolute."""
        raise NotImplementedError

    def check(self) -> None:
        super().check()
        if self.guided_by_words and not self.prompts:
            raise ValueError(
                f"--classifier_type {self.classifier_type} compares images with words: add --prompts, a file "
                "with a prompt for each class, or the text of one"
            )
        if self.guided_off_the_shelf:
            self.build_guidance(lambda x: x, None)  # raises for what the parts of the rule refuse

    def build_guidance(self, classifier: Callable[[Tensor], Tensor], observe: Observe | None) -> Guidance:
        """The rule that the flags describe, around a classifier of [-1, 1] images."""
        rule = self.rule(
            classifier,
            direction=self.direction(),
            strength=self._built("strength", self.strength()),
            gradient=partial(self._built, "gradient"),
            on_nonfinite=self.on_nonfinite,
            observe=observe,
        )
        return self._built("guidance", rule)

    def direction(self) -> Direction:
        """What is to grow."""
        return self._built("direction", tempered(self.joint_temperature, self.marginal_temperature))

    def rule(self, classifier: Callable[[Tensor], Tensor], **parts: Any) -> Guidance:
        """The rule itself, of a direction and a strength."""
        return ClassifierGuidance(classifier, classifier_scale=self.classifier_scale, **parts)

    def strength(self) -> Strength:
        """The strength before any field changes it. Raises what `read_spectrum` does."""
        if self.guidance_strength != "posterior" or self.posterior == "scalar":
            gamma_factor = self.gamma_factor if self.guidance_strength == "sampler" else 0.0
            return named_strength(self.guidance_strength, gamma_factor, self.sigma_data)
        if self.posterior == "learned":
            return learned_posterior
        if not self.spectrum:
            return partial(
                frequency_posterior, spectrum=partial(natural_spectrum, sigma_data=self.sigma_data)
            )
        measured = read_spectrum(self.spectrum)
        return partial(frequency_posterior, spectrum=lambda *shape: measured)

    def guidance_files(self) -> dict[str, Callable[[], Path | None]]:
        """The files that these flags name beside the classifier's, as a Job has them."""
        idle = self.idle()
        files: dict[str, Callable[[], Path | None]] = {}
        if "spectrum" not in idle:
            files["spectrum"] = lambda: Path(self.spectrum) if self.spectrum else None
        if "prompts" not in idle:
            files["prompts"] = partial(prompts_file, self.prompts)
        return files

    def _built(self, kind: str, part: Any) -> Any:
        """A part of guidance as the fields of this kind change it."""
        for each in flag_fields(self):
            build, value = each.metadata["builds"].get(kind), getattr(self, each.name)
            if build and value != each.default:
                part = wrapper(build)(part, value) if kind in WRAPPED else build(part, value)
        return part

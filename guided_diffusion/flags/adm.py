"""The flags of scripts/classifier_sample.py: guided-diffusion's, EluCD's, and a few more."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion.flags.fields import Flags, Need, at_least, finite, flag
from guided_diffusion.flags.guidance import OFF_THE_SHELF, GuidanceFlags
from guided_diffusion.flags.mixed import MixedFlags
from guided_diffusion.flags.needs import A_RULE
from guided_diffusion.flags.networks import DiffusionFlags, NoisyClassifierFlags, UNetFlags
from guided_diffusion.flags.run import RunFlags
from guided_diffusion.flags.solvers import SolverFlags
from guided_diffusion.solvers import SOLVERS

NUM_CLASSES = 1000  # of ImageNet
LOOPS = ("ddpm", "ddim")  # of the process itself; the other samplers are solvers
SAMPLERS = (*LOOPS, *SOLVERS)

LABELS = Need(lambda config: config.class_cond)
FIXED_CLASS = Need(lambda config: config.fix_class, lambda config: "without --fix_class True: add it")
ANCESTRAL = Need(
    lambda config: A_RULE.met(config) and config.sampler == "ddpm",
    lambda config: (
        A_RULE.text(config)  # type: ignore[misc]
        if config.shown_noisy
        else "without the ancestral sampler under an off-the-shelf classifier: "
        "drop it, or add --sampler ddpm and --classifier_type"
    ),
)
LOOP_GUIDED = Need(
    lambda config: config.guided_off_the_shelf and not config.asks_denoiser,
    lambda config: (
        "without a loop of the process under an off-the-shelf classifier: "
        "drop it, or add --sampler ddpm or ddim and --classifier_type"
    ),
)


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """Sampling."""

    model_path: str = flag("", "the U-Net's checkpoint")
    checkpoint_key: str = flag("", "which state dict, where that file holds several, such as ema")
    num_samples: int = flag(10000, "images in all", check=at_least(1))
    sampler: str = flag(
        "ddpm",
        "ddpm (ancestral) and ddim are the process's own loops; the others are solvers",
        choices=SAMPLERS,
    )
    steps: int | None = flag(
        None, "steps, the same as --timestep_respacing N", kind=int, check=at_least(1), compared=False
    )
    use_ddim: bool = flag(False, "the same as --sampler ddim", compared=False)
    clip_denoised: bool = flag(True, "clamp the predicted clean image to [-1, 1]")
    compile: bool = flag(
        False,
        "torch.compile the network, which takes a C++ compiler and a minute for each size of batch, for "
        "faster steps, rounded otherwise",
    )
    variance_max: str = flag(
        "schedule",
        "first_pixel is EluCD's, where batches matter",
        choices=("schedule", "first_pixel"),
        needs=ANCESTRAL,
    )


@dataclass(frozen=True, kw_only=True)
class LabelFlags(Flags):
    """Labels."""

    labels: str = flag(
        "random", "random, balanced, a list such as 1,2,5-10, or a file of classes; stored shuffled"
    )
    fix_class: bool = flag(False, "every sample is of class --fix_class_index")
    fix_class_index: int = flag(0, "that class", needs=FIXED_CLASS)
    num_classes: int = flag(NUM_CLASSES, "of the network and of the classifier", check=at_least(1))
    unconditional: bool = flag(
        False, "give the network the null class; guidance still wants the labels", needs=LABELS
    )
    seed: int = flag(0, "of noise and labels")


class DiscreteFlags:
    """What the configurations of networks of the discrete process share."""

    @property
    def marginal_temperature(self: Any) -> float:
        """tau_2, from its ratio to tau_1."""
        return self.joint_temperature * self.margin_temperature_discount

    @staticmethod
    def with_levels(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with the levels that belong to their sampler: the process's own are too far apart for
        heun.
        """
        alone = values.get("sampler") == "heun" and "levels" not in values
        return {**values, "levels": "karras"} if alone else values

    @property
    def asks_denoiser(self: Any) -> bool:
        """Whether a solver samples, not a loop of the process's own."""
        return self.sampler not in LOOPS

    @property
    def guides_denoiser(self: Any) -> bool:
        """Whether an off-the-shelf classifier guides a denoiser."""
        return self.guided_off_the_shelf and self.asks_denoiser

    def check_draws(self: Any) -> None:
        """Raise ValueError for labels and seeds that cannot be."""
        if self.fix_class and "labels" in self.given:
            raise ValueError(f"--fix_class True and --labels {self.labels} contradict each other: keep one")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class ADMFlags(
    DiscreteFlags,
    LabelFlags,
    RunFlags,
    GuidanceFlags,
    MixedFlags,
    SolverFlags,
    SamplingFlags,
    NoisyClassifierFlags,
    DiffusionFlags,
    UNetFlags,
):
    """An ADM network, guided."""

    null_class: bool = flag(False, "the network was trained with one label more, num_classes, for no class")
    margin_temperature_discount: float = flag(
        1.0, "tau_2 / tau_1, tau_2 the factor inside the logsumexp", check=finite, needs=OFF_THE_SHELF
    )
    looks_at: str = flag(
        "denoised",
        "what the off-the-shelf classifier is shown: the predicted clean image, or the noisy sample x_t",
        choices=("denoised", "noisy"),
        needs=LOOP_GUIDED,
    )
    log_dir: str = flag("", "--out under EluCD's name", compared=False)

    @classmethod
    def of(cls, values: Mapping[str, Any], given: frozenset[str]) -> "ADMFlags":
        if "classifier_type" in given and "classifier_path" not in given:
            values = {**values, "classifier_path": ""}  # the preset's belongs to the preset's own classifier
        if "sampler" not in given and values.get("use_ddim"):
            values = {**values, "sampler": "ddim"}
        values = cls.with_levels(values)
        if "steps" in given and "timestep_respacing" not in given:
            values = {**values, "timestep_respacing": str(values["steps"])}
        config = super().of(values, given)
        return replace(config, labels=str(config.fix_class_index)) if config.fix_class else config

    @property
    def shown_noisy(self) -> bool:
        return self.guided_off_the_shelf and self.looks_at == "noisy"

    @property
    def folder(self) -> Path:
        """The output folder."""
        default = Path("results", self.preset or "samples")
        return Path(self.out or self.log_dir or os.environ.get("OPENAI_LOGDIR") or default)

    def check(self) -> None:
        super().check()
        self._check_sampler()
        self._check_labels()
        if not self.model_path:
            raise ValueError("--model_path is missing: give the U-Net's checkpoint, or a --preset")
        if self.out and self.log_dir and self.out != self.log_dir:
            raise ValueError(
                f"--out {self.out} and --log_dir {self.log_dir} are two names of one folder: keep one"
            )
        self.check_draws()

    def _check_sampler(self):
        if self.use_ddim and self.sampler != "ddim":
            raise ValueError(f"--use_ddim True and --sampler {self.sampler} contradict each other: keep one")
        if {"steps", "timestep_respacing"} <= self.given:
            raise ValueError(
                f"--steps {self.steps} and --timestep_respacing {self.timestep_respacing} "
                "are two names of one thing: keep one"
            )
        if self.steps and self.steps > self.diffusion_steps:
            raise ValueError(f"--steps {self.steps} is more than --diffusion_steps {self.diffusion_steps}")
        if self.posterior == "learned" and "posterior" not in self.idle() and not self.learn_sigma:
            raise ValueError(
                "--posterior learned needs a network that predicts its variance, with --learn_sigma True: "
                "choose scalar or frequency"
            )
        if self.guided_by_noisy_classifier and self.sampler not in LOOPS and self.classifier_scale != 0:
            raise ValueError(
                f"--sampler {self.sampler} takes no noisy classifier: "
                f"choose {' or '.join(LOOPS)}, or an off-the-shelf one by --classifier_type"
            )

    def _check_labels(self):
        if self.uses_cfg and (self.unconditional or not self.null_class):
            fix = "drop --unconditional" if self.unconditional else "add --null_class True if it has one"
            raise ValueError(f"--cfg_scale {self.cfg_scale} needs the labels and a null class: {fix}")
        if self.null_class and not self.class_cond:
            raise ValueError("--null_class True needs a class-conditional network: add --class_cond True")
        if self.unconditional and self.class_cond and not self.null_class:
            raise ValueError(
                "--unconditional True needs a network with a null class: add --null_class True if it has one"
            )

"""The flags of scripts/edm_sample.py: those of EDM's generate.py, EluCD's additions, and a few more."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from guided_diffusion.edm import SCALINGS, SCHEDULES
from guided_diffusion.flags.adm import NUM_CLASSES
from guided_diffusion.flags.fields import Flags, Need, at_least, finite, finite_from, flag
from guided_diffusion.flags.guidance import CLASSIFIER_TYPE, OFF_THE_SHELF, GuidanceFlags
from guided_diffusion.flags.mixed import MixedFlags
from guided_diffusion.flags.parser import parse_bool, parse_numbers
from guided_diffusion.flags.run import RunFlags
from guided_diffusion.flags.solvers import BY_SOLVER, TRAINED, SolverFlags
from guided_diffusion.guidance import Guidance, Strength, released_edm_guidance, released_edm_schedule
from guided_diffusion.schedules import DISCRETIZATIONS, LEVELS, default_levels
from guided_diffusion.solvers import SOLVERS, STEPS

FORMS = ("released", "score")
CHURN = Need(lambda config: config.S_churn > 0 and config.sampler == "edm")
EDM_SAMPLER = Need(
    lambda config: config.sampler == "edm",
    lambda config: f"with --sampler {config.sampler}: it belongs to EDM's own, --sampler edm",
)
KARRAS = Need(
    lambda config: config.disc == "edm" if config.sampler == "edm" else config.levels == "karras",
    lambda config: (
        f"with --{f'disc {config.disc}' if config.sampler == 'edm' else f'levels {config.levels}'}: drop it"
    ),
)
PNGS = Need(lambda config: config.format == "png", lambda config: "without PNGs: drop it, or --format npz")


def _form(name: str) -> Need:
    def text(config: Any) -> str:
        if not config.use_classifier:
            return f"without an off-the-shelf classifier: add {config.HOW_TO_GUIDE}"
        return f"without --guidance_form {name}, to which it belongs: drop it"

    return Need(lambda config: config.use_classifier and config.guidance_form == name, text)


RELEASED, SCORE = map(_form, FORMS)


@dataclass(frozen=True, kw_only=True)
class EDMSamplingFlags(Flags):
    """Sampling."""

    network: str = flag("", "EDM's .pkl, or the .safetensors that scripts/convert_checkpoint.py made of one")
    use_fp16: bool | None = flag(
        None,
        "the network in float16 (bfloat16 on a CPU); by default as its file says",
        kind=parse_bool,
    )
    seeds: str = flag("0-63", "one image per seed: numbers and ranges such as 1,2,5-10")
    class_idx: int | None = flag(
        None, "every sample is of this class; by default they are drawn", kind=int, names=("class",)
    )
    labels: str = flag(
        "random",
        "random: drawn by each seed, as EDM does; or by the seeds' numbers: balanced, a list such as "
        "1,2,5-10, or a file of classes, shuffled",
    )
    unconditional: bool = flag(False, "give the network no labels; guidance still wants them")
    num_classes: int = flag(
        NUM_CLASSES, "of the classifier, where the network itself has no labels", check=at_least(1)
    )
    sampler: str = flag("edm", "EDM's own, with its churn, or a solver", choices=("edm", *SOLVERS))
    steps: int = flag(18, "N; Heun asks the network 2 N - 1 times, the others N times", check=at_least(1))
    rho: float = flag(7.0, "exponent of --disc edm and of --levels karras", check=finite, needs=KARRAS)
    S_churn: float = flag(
        0.0, "how much new noise, over all steps; 0 is none", check=finite_from(0), needs=EDM_SAMPLER
    )
    S_min: float = flag(0.0, "lowest noise level that gets new noise", needs=CHURN)
    S_max: float = flag(math.inf, "highest noise level that gets new noise", needs=CHURN)
    S_noise: float = flag(1.0, "factor of the new noise", check=finite, needs=CHURN)
    solver: str = flag("heun", "the step of --sampler edm", choices=tuple(STEPS), needs=EDM_SAMPLER)
    disc: str = flag(
        "edm", "which noise levels --sampler edm visits", choices=DISCRETIZATIONS, needs=EDM_SAMPLER
    )
    schedule: str = flag("linear", "sigma(t)", choices=SCHEDULES, needs=EDM_SAMPLER)
    scaling: str = flag("none", "s(t)", choices=SCALINGS, needs=EDM_SAMPLER)
    format: str = flag("png", "a PNG per seed, or one npz", choices=("png", "npz"))
    subdirs: bool = flag(False, "PNGs in a folder for every 1000 seeds", needs=PNGS)


@dataclass(frozen=True, kw_only=True)
class EDMFlags(RunFlags, GuidanceFlags, MixedFlags, SolverFlags, EDMSamplingFlags):
    """An EDM network, guided."""

    levels: str = flag(
        "karras",
        "noise levels of a solver: karras, logsnr, uniform (in VP's t), a list such as 80,10,1, or a file of "
        "scripts/optimize_levels.py",
        needs=BY_SOLVER,
    )

    batch_size: int = flag(64, "images per step", names=("batch_size", "batch"), check=at_least(1))
    out: str = flag("", "output folder; by default results/PRESET", names=("out", "outdir"), compared=False)
    use_classifier: bool = flag(False, "guide; False is unguided")
    guidance_form: str = flag(
        "released",
        "released: EluCD's; score: added to the denoised image",
        choices=FORMS,
        needs=OFF_THE_SHELF,
    )
    classifier_type: str = flag("resnet101", CLASSIFIER_TYPE, needs=OFF_THE_SHELF)
    classifier_path: str = flag("", "its weights: a file, IMAGENET1K_V2, random, or a+b", needs=OFF_THE_SHELF)
    softplus_beta: float = flag(
        5.0,
        "sharpness of the smooth form of ReLU and its kin; inf keeps them as they are",
        needs=OFF_THE_SHELF,
    )
    uncond_temperature: float = flag(
        1.0,
        "tau_2, the factor inside the logsumexp; not a ratio to tau_1 here",
        check=finite,
        needs=OFF_THE_SHELF,
    )
    max_guidance: float = flag(
        0.001,
        "released form: strength at the first step, as a share of the sample's RMS",
        check=finite,
        needs=RELEASED,
    )
    add_factor: float = flag(0.0, "released form: weight of the sine on top", check=finite, needs=RELEASED)
    classifier_scale: float = flag(1.0, "score form: factor of the gradient", check=finite, needs=SCORE)

    HOW_TO_GUIDE = "--use_classifier True"
    HOW_TO_GUIDE_DENOISER = "--use_classifier True and --guidance_form score"

    @classmethod
    def of(cls, values: Mapping[str, Any], given: frozenset[str]) -> "EDMFlags":
        if "classifier_type" in given and "classifier_path" not in given:
            values = {**values, "classifier_path": ""}  # the preset's belongs to the preset's own classifier
        return super().of(values, given)

    @property
    def guided_off_the_shelf(self) -> bool:
        return self.use_classifier

    @property
    def guided_by_noisy_classifier(self) -> bool:
        return False

    @property
    def guides_denoiser(self) -> bool:
        return self.use_classifier and not self.unit_gradient

    @property
    def unit_gradient(self) -> bool:
        return self.guidance_form == "released"

    @property
    def leaves_levels(self) -> str:
        return "--S_churn" if CHURN.met(self) else super().leaves_levels

    @property
    def marginal_temperature(self) -> float:
        return self.uncond_temperature

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out or Path("results", self.preset or "edm"))

    @cached_property
    def seed_list(self) -> list[int]:
        """The seeds, one for each image. Raises ValueError where they are not different numbers from 0 on."""
        seeds = parse_numbers(self.seeds, "--seeds")
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"--seeds {self.seeds} must be different whole numbers from 0 on: each gives one image"
            )
        return seeds

    def ends(self) -> tuple[float, float]:
        """(sigma_min, sigma_max), those of --disc where they are not given."""
        low, high = default_levels(self.disc)
        return (
            low if self.sigma_min is None else self.sigma_min,
            high if self.sigma_max is None else self.sigma_max,
        )

    def rule(self, classifier: Callable[[Tensor], Tensor], **parts: Any) -> Guidance:
        if self.guidance_form == "score":
            return super().rule(classifier, **parts)
        return released_edm_guidance(
            classifier,
            joint_temperature=self.joint_temperature,
            marginal_temperature=self.marginal_temperature,
            max_guidance=self.max_guidance,
            add_factor=self.add_factor,
            **parts,
        )

    def strength(self) -> Strength:
        if self.guidance_form == "score":
            return super().strength()
        return partial(released_edm_schedule, max_guidance=self.max_guidance, add_factor=self.add_factor)

    def check(self) -> None:
        super().check()
        if not self.network:
            raise ValueError("--network is missing: give an EDM network, or a --preset")
        if self.uses_cfg and self.unconditional:
            raise ValueError(f"--cfg_scale {self.cfg_scale} needs the labels: drop --unconditional")
        if self.class_idx is not None and "labels" in self.given:
            raise ValueError(f"--class {self.class_idx} and --labels {self.labels} say two things: keep one")
        self._check_sampler()
        if self.S_min > self.S_max:
            raise ValueError(f"--S_min must be at most --S_max, got {self.S_min} and {self.S_max}")
        self.seed_list  # noqa: B018, raises for what cannot be

    def _check_sampler(self):
        if self.posterior == "learned" and "posterior" not in self.idle():
            raise ValueError(
                "--posterior learned: EDM's networks do not predict a variance; choose scalar or frequency"
            )
        if self.sampler == "edm":
            return
        if self.use_classifier and self.guidance_form == "released":
            raise ValueError(
                "--guidance_form released looks at the noisy sample, and "
                f"--sampler {self.sampler} hands over the denoised image: add --guidance_form score, "
                "or keep --sampler edm"
            )
        if self.levels == TRAINED:
            raise ValueError(
                f"--levels {TRAINED}: EDM's networks have no levels of their own; choose {', '.join(LEVELS)}"
            )

"""The flags of scripts/pipeline_sample.py: a diffusers pipeline, how it is sampled, and guidance's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion.flags.adm import SAMPLERS
from guided_diffusion.flags.dit import DTYPES, ONE_BATCH, LatentFlags, OneBatchFlags
from guided_diffusion.flags.fields import Flags, Need, above, at_least, between, finite, flag, some_numbers
from guided_diffusion.flags.guidance import GuidanceFlags
from guided_diffusion.flags.mixed import MixedFlags
from guided_diffusion.flags.needs import OFF_THE_SHELF, SIGMA_DATA, STRENGTH
from guided_diffusion.flags.run import RunFlags
from guided_diffusion.flags.solvers import SolverFlags
from guided_diffusion.guidance.strength import STRENGTHS

TEXT = Need(
    lambda config: config.prompt is not None,
    lambda config: "without a prompt: add --prompt, or drop it",
)


@dataclass(frozen=True, kw_only=True)
class PipelineSamplingFlags(Flags):
    """Sampling."""

    pipeline: str = flag("", "the folder of a diffusers pipeline")
    prompt: str | None = flag(None, "the text of every sample, of a pipeline that is told one", kind=str)
    negative_prompt: str = flag("", "the text that classifier-free guidance leads away from", needs=TEXT)
    sizes: str = flag(
        "",
        "what SD-XL is told, in pixels: height and width of the original, top and left that were cut off, "
        "height and width of the target; by default the image's and 0,0",
        check=some_numbers(6),
    )
    labels: str = flag(
        "random",
        "classes: random, balanced, a list such as 1,2,5-10, or a file; stored shuffled",
        names=("labels", "class_labels"),
    )
    num_classes: int | None = flag(
        None,
        "of the classifier and of the network; by default all that the network knows, else 1000",
        kind=int,
        check=at_least(1),
    )
    image_size: int | None = flag(
        None, "height and width of the images; by default the pipeline's", kind=int, check=at_least(1)
    )
    num_samples: int = flag(1000, "images in all", check=at_least(1))
    sampler: str = flag(
        "ddim",
        "ddpm (ancestral) and ddim are the process's own loops; the others are solvers",
        choices=SAMPLERS,
    )
    steps: int = flag(50, "steps", check=at_least(1))
    timestep_spacing: str = flag(
        "",
        "which timesteps of the process; by default as the pipeline's scheduler",
        choices=("", "leading", "trailing", "linspace"),
    )
    clip_denoised: bool = flag(True, "clamp the predicted clean image to [-1, 1]; latents never are")
    dtype: str = flag("float32", "of the network and of the text encoder", choices=DTYPES)
    seed: int = flag(0, "of noise and labels", check=between(0, 2**63 - 1))
    format: str = flag("npz", "one npz, or a PNG for each image beside it", choices=("npz", "png"))


@dataclass(frozen=True, kw_only=True)
class PipelineFlags(
    OneBatchFlags, RunFlags, GuidanceFlags, MixedFlags, SolverFlags, LatentFlags, PipelineSamplingFlags
):
    """A pipeline, guided."""

    cfg_scale: float = flag(
        1.0, "weight of classifier-free guidance: 1 is none, 0 the network without labels or prompt",
        check=finite,
    )  # fmt: skip
    cfg_channels: int | None = flag(
        None,
        "guide only the first so many channels; by default all",
        kind=int,
        check=at_least(1),
        needs=ONE_BATCH,
    )
    guidance_strength: str = flag(
        "posterior",
        "what a unit of gradient is worth: the sampler's variance, DDIM's rule, or the posterior's variance",
        choices=STRENGTHS,
        needs=STRENGTH,
    )
    sigma_data: float = flag(
        None,
        "standard deviation of the data; by default 0.5 for pixels and 1 for scaled latents",
        kind=float,
        check=above(0),
        needs=SIGMA_DATA,
    )
    margin_temperature_discount: float = flag(
        1.0, "tau_2 / tau_1, tau_2 the factor inside the logsumexp", check=finite, needs=OFF_THE_SHELF
    )

    variance_max = "schedule"  # what ADM's flags choose

    @classmethod
    def of(cls, values: Mapping[str, Any], given: frozenset[str]) -> "PipelineFlags":
        return super().of(cls.with_levels(values), given)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out or Path("results", self.preset or Path(self.pipeline).name))

    @property
    def autoencoder(self) -> Path:
        """The folder of the autoencoder."""
        return Path(self.pipeline, "vae")

    def strength(self) -> Any:
        return super().strength() if self.sigma_data else self.for_data(0.5).strength()

    def for_data(self, sigma_data: float) -> "PipelineFlags":
        """The same with this standard deviation where the flags say none."""
        return self if self.sigma_data else replace(self, sigma_data=sigma_data)

    def check(self) -> None:
        super().check()
        if not self.pipeline:
            raise ValueError("--pipeline is missing: give the folder of a diffusers pipeline")

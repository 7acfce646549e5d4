"""The flags of scripts/dit_sample.py: those of DiT's sample_ddp.py, guidance's, and a few more."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guided_diffusion.dit import DIT_MODELS
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.adm import NUM_CLASSES, SAMPLERS, DiscreteFlags, LabelFlags
from guided_diffusion.flags.fields import Flags, Need, above, at_least, finite, flag
from guided_diffusion.flags.guidance import OFF_THE_SHELF, GuidanceFlags
from guided_diffusion.flags.mixed import MixedFlags
from guided_diffusion.flags.needs import SIGMA_DATA
from guided_diffusion.flags.run import RunFlags
from guided_diffusion.flags.solvers import SolverFlags

DECODERS = ("vae", "tiny", "linear")  # as classifiers/decoders.py has them
DTYPES = ("float32", "bfloat16", "float16")
VAES = ("ema", "mse")  # Stable Diffusion's autoencoder, fine-tuned by Stability AI

DECODER_FILE = Need(
    lambda config: config.guided_off_the_shelf and config.latent_decoder != "vae",
    lambda config: "without a decoder of its own: add --latent_decoder tiny or linear, or drop it",
)
CHECKPOINTED = Need(
    lambda config: config.guided_off_the_shelf and config.latent_decoder != "linear",
    lambda config: "without an autoencoder to guide through: drop it",
)
ONE_BATCH = Need(
    lambda config: config.cfg_scale != 1,
    lambda config: "without classifier-free guidance: add --cfg_scale",
)


@dataclass(frozen=True, kw_only=True)
class DiTSamplingFlags(Flags):
    """Sampling."""

    ckpt: str = flag("", "DiT's checkpoint, or diffusers' folder", names=("ckpt", "model_path"))
    checkpoint_key: str = flag("", "which state dict, where the file holds several; by default ema")
    model: str = flag(
        "",
        "the size that the checkpoint must have, such as DiT-XL/2",
        choices=("", *DIT_MODELS),
        compared=False,
    )
    vae: str = flag(
        "ema", "Stability AI's autoencoder, ema or mse, in pretrained_models/; or diffusers' folder"
    )
    image_size: int = flag(
        256, "height and width of the images", names=("image_size", "image-size"), check=at_least(1)
    )
    num_samples: int = flag(
        50000, "images in all", names=("num_samples", "num-fid-samples", "num_fid_samples"), check=at_least(1)
    )
    steps: int = flag(
        250, "steps", names=("steps", "num-sampling-steps", "num_sampling_steps"), check=at_least(1)
    )
    sampler: str = flag(
        "ddpm",
        "ddpm (ancestral) and ddim are the process's own loops; the others are solvers",
        choices=SAMPLERS,
    )
    tf32: bool = flag(True, "on CUDA: products of matrices in TF32; the published figures moved by it")
    no_tf32: bool = flag(False, "the same as --tf32 False", names=("no-tf32", "no_tf32"), compared=False)
    format: str = flag("png", "a PNG for each image beside the npz, or the npz alone", choices=("png", "npz"))


@dataclass(frozen=True, kw_only=True)
class LatentFlags(Flags):
    """Guidance of latents."""

    latent_decoder: str = flag(
        "vae",
        "what shows the predicted latent to the classifier: the autoencoder, a tiny one, or a linear map",
        choices=DECODERS,
        needs=OFF_THE_SHELF,
    )
    decoder_path: str = flag(
        "",
        "diffusers' folder of the tiny one, or a file of scripts/fit_linear_decoder.py; a linear one is by "
        "default the public map of Stable Diffusion's",
        needs=DECODER_FILE,
    )
    decode_dtype: str = flag("float32", "of that decoder", choices=DTYPES, needs=CHECKPOINTED)
    decode_checkpointing: bool = flag(
        False, "compute its activations again instead of keeping them", needs=CHECKPOINTED
    )

    def check(self: Any) -> None:
        super().check()
        if self.classifier_path and not self.classifier_type:
            raise ValueError(
                f"--classifier_path {self.classifier_path}: of which network? add --classifier_type, such as "
                "resnet101"
            )
        if self.guided_off_the_shelf and self.latent_decoder == "tiny" and not self.decoder_path:
            raise ValueError(
                "--latent_decoder tiny needs --decoder_path: diffusers' folder of an AutoencoderTiny"
            )


class OneBatchFlags(DiscreteFlags):
    """What the configurations share whose networks take labels and no labels in one batch."""

    @property
    def guided_by_noisy_classifier(self: Any) -> bool:
        return False

    @property
    def in_one_batch(self: Any) -> bool:
        """Whether labels and no labels are asked in one batch, under any sampler."""
        return self.cfg_rule == "cfg" and self.cfg_scale != 1

    @property
    def uses_cfg(self: Any) -> bool:
        """Whether two denoisers are mixed: under a solver, by another rule than the published one."""
        return self.asks_denoiser and self.cfg_rule != "cfg"


@dataclass(frozen=True, kw_only=True)
class DiTFlags(
    OneBatchFlags, LabelFlags, RunFlags, GuidanceFlags, MixedFlags, SolverFlags, LatentFlags, DiTSamplingFlags
):
    """A DiT, guided."""

    batch_size: int = flag(
        32,
        "images per step",
        names=("batch_size", "per-proc-batch-size", "per_proc_batch_size"),
        check=at_least(1),
    )
    num_classes: int = flag(
        NUM_CLASSES,
        "of the network and of the classifier",
        names=("num_classes", "num-classes"),
        check=at_least(1),
    )
    seed: int = flag(0, "of noise and labels", names=("seed", "global-seed", "global_seed"))
    out: str = flag(
        "",
        "output folder; by default results/PRESET",
        names=("out", "sample-dir", "sample_dir"),
        compared=False,
    )
    cfg_scale: float = flag(
        1.5,
        "weight of classifier-free guidance: 1 is none, 0 the network without labels",
        names=("cfg_scale", "cfg-scale"),
        check=finite,
    )
    cfg_channels: int | None = flag(
        3,
        "guide only the first so many channels; 3 is published",
        kind=int,
        check=at_least(1),
        needs=ONE_BATCH,
    )
    margin_temperature_discount: float = flag(
        1.0, "tau_2 / tau_1, tau_2 the factor inside the logsumexp", check=finite, needs=OFF_THE_SHELF
    )
    sigma_data: float = flag(
        1.0, "standard deviation of the scaled latents", check=above(0), needs=SIGMA_DATA
    )

    class_cond, clip_denoised, variance_max = True, False, "schedule"  # what ADM's flags choose

    @classmethod
    def of(cls, values: Mapping[str, Any], given: frozenset[str]) -> "DiTFlags":
        values = cls.with_levels(values)
        if values.get("no_tf32"):
            values = {**values, "tf32": False}
        config = super().of(values, given)
        return replace(config, labels=str(config.fix_class_index)) if config.fix_class else config

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out or Path("results", self.preset or "dit"))

    @property
    def autoencoder(self) -> Path:
        """The folder of the autoencoder."""
        return PRETRAINED_DIR / f"sd-vae-ft-{self.vae}" if self.vae in VAES else Path(self.vae)

    def check(self) -> None:
        super().check()
        if not self.ckpt:
            raise ValueError("--ckpt is missing: give DiT's checkpoint or folder, or a --preset")
        if self.unconditional and (self.in_one_batch or self.uses_cfg):
            raise ValueError(
                f"--cfg_scale {self.cfg_scale} needs the labels: drop --unconditional, or add --cfg_scale 1"
            )
        self.check_draws()
        if self.no_tf32 and "tf32" in self.given:
            raise ValueError("--tf32 and --no-tf32 are two names of one thing: keep one")

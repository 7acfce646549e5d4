"""The flags of scripts/image_train.py and scripts/classifier_train.py: guided-diffusion's, and a few more."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from guided_diffusion.flags.adm import NUM_CLASSES
from guided_diffusion.flags.fields import Flags, Need, above, at_least, between, finite_from, flag
from guided_diffusion.flags.networks import DiffusionFlags, NoisyClassifierFlags, UNetFlags

LOSSES = ("ddpm", "edm")
EDM_MODELS = ("DhariwalUNet", "SongUNet")
# Of the U-Net's flags, those that EDM's networks have too.
EDM_HAS = {"image_size", "num_channels", "num_res_blocks", "channel_mult", "attention_resolutions"}
EDM_HAS |= {"dropout", "class_cond", "use_fp16"}
# Of the process's flags, those that mean nothing to a classifier of noisy images.
NO_CLASSIFIER_HAS = {"learn_sigma", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas"}


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(Flags):
    """Training."""

    trains: ClassVar[bool] = True

    data_dir: str = flag("", "a folder, zip or npz of images, or torchvision's CIFAR10 folder")
    out: str = flag("", "output folder; by default $OPENAI_LOGDIR, else results/training", compared=False)
    num_classes: int = flag(NUM_CLASSES, "of the labels", check=at_least(1))
    lr: float = flag(1e-4, "the rate of the optimizer", check=above(0), compared=False)
    warmup: int = flag(0, "steps over which the rate rises to --lr", check=at_least(0), compared=False)
    weight_decay: float = flag(0.0, "of the optimizer", check=finite_from(0))
    max_seconds: float = flag(
        0.0,
        "end after so long at the latest, the rate at 0 if it is annealed; 0: no limit",
        check=finite_from(0),
        compared=False,
    )
    batch_size: int = flag(1, "images of a step, in each process", check=at_least(1))
    microbatch: int = flag(
        -1, "images that go through the network at once; -1: the whole batch", compared=False
    )
    seed: int = flag(0, "of weights, data order, noise and dropout", check=between(0, 2**63 - 1))
    log_interval: int = flag(10, "steps between rows of progress.csv", check=at_least(1), compared=False)
    save_interval: int = flag(10000, "steps between checkpoints", check=at_least(1), compared=False)
    keep: int = flag(3, "how many of the latest checkpoints stay; 0: all", check=at_least(0), compared=False)
    resume_checkpoint: str = flag(
        "", "modelS.pt to go on from; by default the latest in --out, if any", compared=False
    )
    use_bf16: bool = flag(False, "compute in bfloat16; weights and optimizer stay in float32")
    fp16_scale_growth: float = flag(
        1e-3,
        "growth of log2 of the loss's scale in a step, in float16",
        check=above(0),
        needs=Need(lambda config: config.half_precision),
        compared=False,
    )
    compile: bool = flag(
        False, "torch.compile the network: a minute at the start, faster steps", compared=False
    )
    device: str = flag("", "cpu, cuda, cuda:1; by default the accelerator if there is one", compared=False)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.out or os.environ.get("OPENAI_LOGDIR") or "results/training")

    @property
    def half_precision(self: Any) -> bool:
        """Whether float16 is asked for."""
        return self.use_fp16

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """What the network computes in there: on a CPU, where float16 is emulated and slow, bfloat16 in its
        place.
        """
        if self.use_bf16 or (self.half_precision and device.type == "cpu"):
            return torch.bfloat16
        return torch.float16 if self.half_precision else torch.float32

    def _with(self, idle, names):
        """The idle fields, and those of these names."""
        more = sorted(names - {each.name for each in idle})
        return [*idle, *(self.__dataclass_fields__[name] for name in more)]

    def check(self) -> None:
        super().check()
        if not self.data_dir:
            raise ValueError("--data_dir is missing: give a folder, zip or npz of images")
        if self.use_bf16 and self.half_precision:
            raise ValueError("--use_bf16 and float16 contradict each other: keep one")
        if self.microbatch != -1 and self.microbatch < 1:
            raise ValueError(f"--microbatch must be -1 or at least 1, got {self.microbatch}")


@dataclass(frozen=True, kw_only=True)
class ImageTrainFlags(TrainingFlags, DiffusionFlags, UNetFlags):
    """A network that denoises."""

    loss: str = flag(
        "ddpm", "ddpm: guided-diffusion's; edm: EDM's network, weights and noise", choices=LOSSES
    )
    edm_model: str = flag(
        "DhariwalUNet",
        "the network inside EDM's preconditioning",
        choices=EDM_MODELS,
        needs=Need(lambda config: config.loss == "edm"),
    )
    labels_dropout: float = flag(
        0.0,
        "chance that a label is replaced by the null class, which the network then has",
        check=between(0, 1),
        needs=Need(lambda config: config.class_cond),
    )
    schedule_sampler: str = flag(
        "uniform",
        "which timesteps are drawn",
        choices=("uniform", "loss-second-moment"),
        needs=Need(lambda config: config.loss == "ddpm"),
    )
    lr_anneal_steps: int = flag(
        0, "steps over which the rate falls to 0; 0: no end", check=at_least(0), compared=False
    )
    ema_rate: str = flag("0.9999", "rates of the averages of the weights, commas between them")
    flip: bool = flag(True, "mirror half of the images")
    samples: int = flag(
        64, "images in the picture that is drawn beside each checkpoint", check=at_least(0), compared=False
    )

    @property
    def rates(self) -> tuple[str, ...]:
        """The rates of the averages, as they are written."""
        return tuple(rate.strip() for rate in self.ema_rate.split(","))

    def check(self) -> None:
        super().check()
        for rate in self.rates:
            try:
                fits = 0 <= float(rate) < 1
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(f"--ema_rate takes numbers in [0, 1) such as 0.999,0.9999, got {rate!r}")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"--ema_rate has a rate twice: {self.ema_rate}")

    def _idle_fields(self):
        ours = set(UNetFlags.defaults()) | set(DiffusionFlags.defaults())
        return self._with(super()._idle_fields(), ours - EDM_HAS if self.loss == "edm" else set())


@dataclass(frozen=True, kw_only=True)
class ClassifierTrainFlags(TrainingFlags, DiffusionFlags, NoisyClassifierFlags):
    """A classifier."""

    image_size: int = flag(64, "height and width of the images", check=at_least(1))
    classifier_type: str = flag(
        "",
        "a classifier of clean images: cifar_resnet20, a torchvision name, FILE.py:builder; "
        "empty: guided-diffusion's of noisy images",
    )
    noised: bool = flag(True, "train on noisy images; of --classifier_type, on clean ones: False")
    val_data_dir: str = flag("", "images to measure the accuracy on, none of --data_dir's", compared=False)
    iterations: int = flag(150000, "steps of the optimizer", check=at_least(1), compared=False)
    anneal_lr: bool = flag(False, "let the rate fall to 0 over --iterations", compared=False)
    eval_interval: int = flag(
        5,
        "steps between two measurements of the accuracy",
        check=at_least(1),
        needs=Need(lambda config: bool(config.val_data_dir)),
        compared=False,
    )
    schedule_sampler: str = flag(
        "uniform",
        "which timesteps are drawn",
        choices=("uniform",),
        needs=Need(lambda config: config.noised),
    )
    optimizer: str = flag("adamw", "adamw, or sgd with Nesterov's momentum of 0.9", choices=("adamw", "sgd"))
    random_crop: int = flag(
        0, "pixels by which an image is shifted at most, grey coming in", check=at_least(0)
    )
    flip: bool = flag(True, "mirror half of the images")
    lr: float = flag(3e-4, "the rate of the optimizer", check=above(0), compared=False)
    batch_size: int = flag(4, "images of a step, in each process", check=at_least(1))

    @property
    def guided_by_noisy_classifier(self) -> bool:
        """Whether the flags of guided-diffusion's classifier mean something."""
        return not self.classifier_type

    @property
    def guided_off_the_shelf(self) -> bool:
        """Whether a classifier of clean images is trained."""
        return bool(self.classifier_type)

    @property
    def half_precision(self) -> bool:
        return self.classifier_use_fp16

    def check(self) -> None:
        super().check()
        if self.classifier_type and self.noised:
            raise ValueError(
                f"--classifier_type {self.classifier_type} sees no noise level: add --noised False"
            )
        if "+" in self.classifier_type or self.classifier_type.startswith("clip:"):
            raise ValueError(
                f"--classifier_type {self.classifier_type}: one network of classes can be trained"
            )

    def _idle_fields(self):
        lacking = NO_CLASSIFIER_HAS if self.noised else set(DiffusionFlags.defaults())
        return self._with(super()._idle_fields(), lacking)

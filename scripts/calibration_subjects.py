"""What scripts/calibrate.py measures, the same for all systems: a denoiser, what a classifier sees of it, and
the classifiers. It is no script of its own.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import _beside  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import classifiers
from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import configure, flag_fields, given_flags
from guided_diffusion.flags.networks import DiffusionFlags, NoisyClassifierFlags, UNetFlags
from guided_diffusion.runs import adm, dit, edm
from guided_diffusion.runs.discrete import load_off_the_shelf
from guided_diffusion.runs.systems import System
from guided_diffusion.runs.tally import Tally
from guided_diffusion.schedules import get_named_beta_schedule
from guided_diffusion.script_util import create_gaussian_diffusion

# The flags of the sampling scripts that say which networks there are, and on what they run.
USED = {
    each.name for group in (UNetFlags, DiffusionFlags, NoisyClassifierFlags) for each in flag_fields(group)
}
USED -= {"timestep_respacing", "classifier_use_fp16"}
USED |= {"preset", "batch_size", "device", "checkpoint_key", "num_classes", "unconditional"}
USED |= {f"classifier_{name}" for name in ("type", "path", "checkpoint_key", "input")}
USED |= {"model_path", "null_class", "clip_denoised", "network", "sigma_min", "sigma_max"}
USED |= {"ckpt", "model", "vae", "latent_decoder", "decoder_path", "decode_dtype"}
# Classifier-free guidance answers what no image has: the network is asked alone.
FIXED: Mapping[type, Mapping[str, Any]] = {
    ADMFlags: {},
    EDMFlags: {"use_classifier": True},
    DiTFlags: {"cfg_scale": 1.0},
}


@dataclass(frozen=True)
class Subject:
    """A denoiser, and what a classifier sees of it.

    denoiser_of: labels (n,) -> denoiser. sigmas: the noise levels of the timesteps 0, 1, .., rising. ends:
    the levels that a sampler may ask for. told: whether the network is given the labels. encode: images in
    [-1, 1] -> clean samples, which noise is added to. show: samples -> images.
    """

    denoiser_of: Callable[[Tensor], Callable[[Tensor, float], Tensor]]
    sigmas: np.ndarray
    ends: tuple[float, float]
    image_size: int
    num_classes: int
    told: bool
    encode: Callable[[Tensor], Tensor]
    show: Callable[[Tensor], Tensor]

    def levels(self, count: int) -> list[tuple[int, float]]:
        """`count` timesteps, even in t from the noisiest to the cleanest, each with its noise level. Raises
        ValueError where there are not so many.
        """
        low, high = (level * factor for level, factor in zip(self.ends, (1 - 1e-6, 1 + 1e-6), strict=True))
        (known,) = np.nonzero((self.sigmas >= low) & (self.sigmas <= high))
        if not 1 <= count <= len(known):
            raise ValueError(
                f"--num_levels {count} must be from 1 to {len(known)}, as many as there are timesteps"
            )
        timesteps = known[np.rint(np.linspace(len(known) - 1, 0, count)).astype(int)]
        return [(int(t), float(self.sigmas[t])) for t in timesteps]


def configured(system: System, argv: list[str]) -> Any:
    """The configuration of a system's sampling script. Raises ValueError for flags that decide nothing here,
    and without a classifier.
    """
    given = given_flags(system.config, None, system.presets, argv)
    for name in sorted(given.keys() - USED):
        hint = {"softplus_beta": "s", "joint_temperature": "s"}.get(name)
        fix = f"write --{name}{hint}" if hint else "drop it"
        raise ValueError(f"--{name} decides nothing about a classifier's calibration: {fix}")
    config = configure(system.config, system.presets, {**given, **FIXED[system.config]})
    if not config.guided_off_the_shelf and not config.guided_by_noisy_classifier:
        raise ValueError("there is no classifier to measure: add --classifier_type, for example resnet101")
    system.make_job(config, classifiers).found_files()
    return config


def load_subject(config: Any, device: torch.device) -> Subject:
    """The networks, loaded. Raises ValueError for flags that they contradict."""
    return {ADMFlags: _adm, EDMFlags: _edm, DiTFlags: _dit}[type(config)](config, device)


def load_classifiers(
    config: Any, subject: Subject, betas: list[float], seed: int, device: torch.device
) -> dict[float | None, Callable[[Tensor, Tensor], Tensor]]:
    """By its beta each smoothed classifier, (images, timesteps) -> logits. A noisy classifier has none."""
    if config.guided_by_noisy_classifier:
        scale = 1000 / len(subject.sigmas) if config.rescale_timesteps else 1
        noisy = adm.load_noisy_classifier(config, device)
        return {None: lambda x, t: noisy(x, t * scale)}
    return {beta: _smoothed(config, subject, beta, seed, device) for beta in betas}


def _smoothed(config, subject, beta, seed, device):
    torch.manual_seed(seed)  # for --classifier_path random: the same one for each beta
    classifier = load_off_the_shelf(
        replace(config, softplus_beta=beta), classifiers, subject.num_classes, subject.image_size
    ).to(device)
    return lambda x, t: classifier(x)


def _adm(config, device):
    network, diffusion = adm.load_network(config, device, Tally(device))
    shape = {"image_size": config.image_size, "num_classes": config.num_classes}
    told = config.class_cond and not config.unconditional
    return _discrete(network, diffusion, config.clip_denoised, told, _same, _same, **shape)


def _dit(config, device):
    net = dit.load_network(config, config.ckpt, device, Tally(device))
    autoencoder = classifiers.load_decoder("vae", config.autoencoder).to(device)
    dit.refuse_for_networks(config, net, autoencoder)
    decoder = dit.load_guide_decoder(config, classifiers, net).to(device)
    diffusion = create_gaussian_diffusion(learn_sigma=net.learn_sigma)

    def network(x, t, y):
        return net(x, t, torch.full_like(y, net.num_classes) if config.unconditional else y)

    def encode(images):
        latents = autoencoder.network.encode(images).latent_dist.mode()
        return (latents - autoencoder.shift) * autoencoder.scale

    shape = {"image_size": config.image_size, "num_classes": config.num_classes}
    return _discrete(network, diffusion, False, not config.unconditional, encode, decoder, **shape)


def _discrete(network, diffusion, clip_denoised, told, encode, show, **shape):
    def denoiser_of(y):
        return DiscreteDenoiser(network, diffusion, {"y": y}, clip_denoised=clip_denoised)

    known = denoiser_of(None)
    return Subject(
        denoiser_of=denoiser_of,
        sigmas=np.exp(known.log_sigmas),
        ends=(known.sigma_min, known.sigma_max),
        told=told,
        encode=encode,
        show=show,
        **shape,
    )


def _edm(config, device):
    net = edm.load_network(config, config.network, device, Tally(device))
    low, high = config.ends()
    told = bool(net.label_dim) and not config.unconditional

    def denoiser_of(y):
        labels = F.one_hot(y, net.label_dim).float() if told else None
        return lambda x, sigma: net(x, sigma, labels).clamp(-1, 1)  # as guidance is shown it

    alphas_cumprod = np.cumprod(1 - get_named_beta_schedule("linear", 1000))
    sigmas = [float(net.round_sigma(sigma)) for sigma in np.sqrt(1 / alphas_cumprod - 1)]
    return Subject(
        denoiser_of=denoiser_of,
        sigmas=np.array(sigmas),
        ends=(max(low, net.sigma_min), min(high, net.sigma_max)),
        image_size=net.img_resolution,
        num_classes=net.label_dim or config.num_classes,
        told=told,
        encode=_same,
        show=_same,
    )


def _same(x):
    return x


def in_process(x: Tensor, sigma: float) -> Tensor:
    """x_t of the variance-preserving process: clean + sigma * noise at the scale that such networks see."""
    return x / math.sqrt(1 + sigma**2)

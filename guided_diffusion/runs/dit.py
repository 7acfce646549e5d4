"""Runs of DiT: from the flags of scripts/dit_sample.py to a Job.

The process and its samplers are ADM's, on latents. Guidance sees the predicted clean latent: a decoder makes
the image of it that the classifier looks at, and the gradient goes back through both.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.dit import DIT_MODELS, DiT, dit_file, load_dit
from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.labels import labels_file
from guided_diffusion.flags.solvers import solver_files
from guided_diffusion.mixed_denoisers import in_one_batch
from guided_diffusion.runs.discrete import Drawn, Network, drawn_labels, load_off_the_shelf, sampler_of
from guided_diffusion.runs.job import Job, Sampler
from guided_diffusion.runs.tally import CLASSIFIER, NETWORK, Tally
from guided_diffusion.script_util import create_gaussian_diffusion

DECODED_PIXELS = 256**2  # at a time, or one image


def make_job(config: DiTFlags, classifiers: Any) -> Job:
    """What the flags ask for. classifiers: the package of that name, or what loads and finds classifiers and
    decoders as it does.

    Nothing is loaded. Raises ValueError for labels that cannot be.
    """
    files: dict[str, Callable[[], Path | None]] = {
        "ckpt": partial(dit_file, config.ckpt),
        "vae": partial(classifiers.autoencoder_weights, config.autoencoder),
        "labels": partial(labels_file, config.labels),
        **solver_files(config),
        **config.guidance_files(),
    }
    if config.guide_model:
        files["guide_model"] = partial(dit_file, config.guide_model)
    if config.guided_off_the_shelf:
        files |= classifiers.classifier_files(config.classifier_type, config.classifier_path)
        if config.decoder_path:
            find = classifiers.autoencoder_weights if config.latent_decoder == "tiny" else Path
            files["decoder_path"] = partial(find, config.decoder_path)
    labels_of, drawn_by = drawn_labels(config)
    return Job.of(
        config,
        files=files,
        build=partial(build, config, classifiers, labels_of),
        num_samples=config.num_samples,
        rounding="edm",
        drawn_by=drawn_by,
        png_name="{:06d}.png".format if config.format == "png" else None,
        npz_too=config.format == "png",
        packages=["diffusers", *classifiers.classifier_packages(config.classifier_type)],
    )


def build(
    config: DiTFlags, classifiers: Any, labels_of: Callable, device: torch.device, tally: Tally
) -> Sampler:
    """Load the networks; returns the Sampler. Raises ValueError for flags that the networks contradict."""
    torch.manual_seed(config.seed)  # for --classifier_path random; the samples' noise has streams of its own
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    net = load_network(config, config.ckpt, device, tally)
    autoencoder = classifiers.load_decoder("vae", config.autoencoder).to(device)
    refuse_for_networks(config, net, autoencoder)
    network = _network(config, net)
    diffusion = create_gaussian_diffusion(learn_sigma=net.learn_sigma, timestep_respacing=str(config.steps))
    guides, about = _guides(config, classifiers, net, device, tally)
    drawn = Drawn(
        device=device,
        network=network,
        diffusion=diffusion,
        denoiser_of=_denoisers(config, net, network, diffusion, device, tally)
        if config.asks_denoiser
        else None,
        guides=guides,
        shape=(net.in_channels, net.input_size, net.input_size),
        clip_denoised=False,
        labels_of=labels_of,
        decode=partial(decoded, autoencoder),
    )
    return sampler_of(config, drawn, config.image_size, [*_notes(config), *about])


def load_network(config: DiTFlags, path: str, device: torch.device, tally: Tally) -> DiT:
    """The network in a file or folder."""
    net = load_dit(path, config.checkpoint_key or None).to(device)
    tally.count(NETWORK, net)
    return net


def refuse_for_networks(config: DiTFlags, net: DiT, autoencoder: Any) -> None:
    """Raise ValueError where flags and networks contradict each other."""
    if config.model:
        with torch.device("meta"):
            named = DIT_MODELS[config.model](input_size=net.input_size)
        sizes = [(len(one.blocks), one.pos_embed.shape[-1], one.patch_size) for one in (named, net)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"--model {config.model}: {config.ckpt} is another one, with (depth, width, patch) {sizes[1]}"
            )
    if net.num_classes == config.num_classes - 1 and (
        config.in_one_batch or config.uses_cfg or config.unconditional
    ):
        raise ValueError(
            f"{config.ckpt} has {config.num_classes} labels and none for no class: it cannot be sampled "
            "without labels, add --cfg_scale 1"
        )
    if net.num_classes not in (config.num_classes, config.num_classes - 1):
        raise ValueError(
            f"--num_classes {config.num_classes}: {config.ckpt} was trained with {net.num_classes}"
        )
    if (size := net.input_size * autoencoder.factor) != config.image_size:
        raise ValueError(
            f"--image_size {config.image_size}: {config.ckpt} and {config.vae} make images of {size}"
        )
    refuse_for_channels(config.autoencoder, autoencoder, net)
    if config.cfg_channels and config.in_one_batch and config.cfg_channels > net.in_channels:
        raise ValueError(f"--cfg_channels {config.cfg_channels}: the latents have {net.in_channels}")


def refuse_for_channels(name: object, decoder: Any, net: Any) -> None:
    """Raise ValueError where a decoder is for other latents than the network's."""
    if net.in_channels != decoder.channels:
        raise ValueError(f"the latents have {net.in_channels} channels, but {name} is for {decoder.channels}")


def _network(config: DiTFlags, net: DiT) -> Network:
    """(x, t, y) -> the answer of the flags: with labels, without, or both mixed."""
    if config.unconditional:
        return lambda x, t, y: net(x, t, torch.full_like(y, net.num_classes))
    if config.in_one_batch:
        return in_one_batch(net, net.num_classes, config.cfg_scale, config.cfg_channels)
    return net


def _denoisers(config, net, network, diffusion, device, tally):
    """The function (labels, levels) -> denoiser that the flags describe; loads the --guide_model if any."""
    guide = load_network(config, config.guide_model, device, tally) if config.guide_model else None
    for name in ("input_size", "in_channels", "num_classes", "learn_sigma") if guide else ():
        if getattr(guide, name) != getattr(net, name):
            raise ValueError(
                f"--guide_model {config.guide_model} has {name} {getattr(guide, name)}, but --ckpt has "
                f"{getattr(net, name)}: give another checkpoint of the same network"
            )

    def part(network, y):
        return DiscreteDenoiser(network, diffusion, {"y": y}, clip_denoised=False)

    def denoiser_of(y, sigmas):
        null = part(net, torch.full_like(y, net.num_classes)) if config.uses_cfg else None
        worse = part(guide, y) if guide else None
        return config.mixed(part(network, y), null, worse, sigmas, clip_denoised=False)

    return denoiser_of


def _guides(config, classifiers, net, device, tally) -> tuple[Mapping[str, Callable], list[str]]:
    """Guidance by a classifier of decoded latents, or nothing; and what the log should say of it."""
    if not config.guided_off_the_shelf:
        return {}, []
    classifier = load_off_the_shelf(config, classifiers, config.num_classes, config.image_size)
    decoder = load_guide_decoder(config, classifiers, net)
    guide = classifiers.DecodedClassifier(classifier, decoder).to(device)
    tally.count(CLASSIFIER, guide)
    return {"guidance": tally.timed(config.build_guidance(guide, tally.observe))}, classifier.notes


def load_guide_decoder(config: Any, classifiers: Any, net: Any) -> torch.nn.Module:
    """What shows latents to the classifier, on the CPU. Raises ValueError for one that the network's do not
    fit.
    """
    path = config.autoencoder if config.latent_decoder == "vae" else config.decoder_path
    decoder = classifiers.load_decoder(
        config.latent_decoder, path, size=config.image_size, checkpointing=config.decode_checkpointing
    )
    refuse_for_channels(path or "the public linear map", decoder, net)
    if config.latent_decoder != "linear":
        if (size := net.input_size * decoder.factor) != config.image_size:
            raise ValueError(f"{path} makes images of {size}, and the run's are of {config.image_size}")
        return decoder.to(getattr(torch, config.decode_dtype))
    return decoder


def decoded(autoencoder: Any, latents: Tensor) -> Tensor:
    """The images, few at a time: a decoder holds activations of some hundred times an image."""
    side = latents.shape[-1] * autoencoder.factor
    with torch.no_grad():
        return torch.cat([autoencoder(z.float()) for z in latents.split(max(1, DECODED_PIXELS // side**2))])


def _notes(config):
    idle = config.without_effect()
    return [f"without effect in this run: {', '.join(f'--{name}' for name in idle)}"] if idle else []

"""Runs of diffusers' pipelines: from the flags of scripts/pipeline_sample.py to a Job.

The process is that of the pipeline's scheduler, the samplers are ours. A latent pipeline's images are made by
its autoencoder, and guidance looks at them through it, as for a DiT.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from guided_diffusion.adapters.diffusers import PipelineNetwork, load_pipeline
from guided_diffusion.adapters.pipeline_folder import pipeline_files, text_encoders_of
from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.flags.adm import NUM_CLASSES
from guided_diffusion.flags.labels import label_source, labels_file
from guided_diffusion.flags.parser import parse_floats
from guided_diffusion.flags.pipeline import PipelineFlags
from guided_diffusion.flags.solvers import solver_files
from guided_diffusion.mixed_denoisers import in_one_batch
from guided_diffusion.runs.discrete import Drawn, drawn_by, load_off_the_shelf, sampler_of
from guided_diffusion.runs.dit import decoded, load_guide_decoder, refuse_for_channels
from guided_diffusion.runs.job import Job, Sampler
from guided_diffusion.runs.tally import CLASSIFIER, NETWORK, Tally


def make_job(config: PipelineFlags, classifiers: Any) -> Job:
    """What the flags ask for. classifiers: the package of that name, or what loads and finds classifiers and
    decoders as it does.

    Nothing is loaded. Raises FileNotFoundError and ValueError for a folder that is no known pipeline.
    """
    files: dict[str, Callable[[], Path | None]] = {
        "labels": partial(labels_file, config.labels),
        **solver_files(config),
        **config.guidance_files(),
    }
    for flag, prefix in (("pipeline", ""), ("guide_model", "guide_model/")):
        if folder := getattr(config, flag):
            found = _named(flag, folder, lambda folder: list(pipeline_files(folder)))
            files |= {f"{prefix}{name}": partial(existing_file, path) for name, path in found}
    if config.guided_off_the_shelf:
        files |= classifiers.classifier_files(config.classifier_type, config.classifier_path)
        if config.decoder_path:
            find = classifiers.autoencoder_weights if config.latent_decoder == "tiny" else Path
            files["decoder_path"] = partial(find, config.decoder_path)
    return Job.of(
        config,
        files=files,
        build=partial(build, config, classifiers),
        num_samples=config.num_samples,
        rounding="edm",
        drawn_by=drawn_by(config),
        png_name="{:06d}.png".format if config.format == "png" else None,
        npz_too=config.format == "png",
        packages=_packages(config, classifiers),
    )


def _packages(config, classifiers):
    texts = ["transformers"] if text_encoders_of(config.pipeline) else []
    return sorted({"diffusers", *texts, *classifiers.classifier_packages(config.classifier_type)})


def build(config: PipelineFlags, classifiers: Any, device: torch.device, tally: Tally) -> Sampler:
    """Load the networks; returns the Sampler. Raises ValueError for flags that the pipeline contradicts."""
    torch.manual_seed(config.seed)  # for --classifier_path random; the samples' noise has streams of its own
    net = load_network(config, "pipeline", device, tally)
    autoencoder = classifiers.load_decoder("vae", config.autoencoder).to(device) if net.latent else None
    config = _completed(config, net, autoencoder)
    refuse_for_network(config, net, autoencoder)
    diffusion = _named("steps", config.steps, partial(net.process, spacing=config.timestep_spacing))
    network = net
    if config.in_one_batch:
        network = in_one_batch(net, net.require_null(), config.cfg_scale, config.cfg_channels)
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
        clip_denoised=config.clip_denoised and not net.latent,
        labels_of=label_source(config.labels, config.seed, config.num_classes),
        decode=partial(decoded, autoencoder) if autoencoder else None,
    )
    return sampler_of(config, drawn, config.image_size, [*_notes(config, net), *about])


def load_network(config: PipelineFlags, flag: str, device: torch.device, tally: Tally) -> PipelineNetwork:
    """The network of the pipeline that a flag names, with the texts of the flags bound."""
    folder = getattr(config, flag)
    parts = _named(flag, folder, partial(load_pipeline, dtype=getattr(torch, config.dtype)))
    told = {"prompt": config.prompt, "negative_prompt": config.negative_prompt}
    told["sizes"] = parse_floats(config.sizes) if config.sizes else None
    net = PipelineNetwork(parts, **told, num_classes=config.num_classes).to(device)
    tally.count(NETWORK, net)
    return net


def refuse_for_network(config: PipelineFlags, net: PipelineNetwork, autoencoder: Any) -> None:
    """Raise ValueError where the completed flags and the pipeline contradict each other."""
    if autoencoder:
        refuse_for_channels(config.autoencoder, autoencoder, net)
    elif given := sorted(
        config.given & {"latent_decoder", "decoder_path", "decode_dtype", "decode_checkpointing"}
    ):
        raise ValueError(f"--{given[0]}: {config.pipeline} makes pixels, not latents: drop it")
    elif net.in_channels != 3:
        raise ValueError(
            f"{config.pipeline} makes images of {net.in_channels} channels, and only 3 can be kept"
        )
    if net.num_classes not in (None, config.num_classes):
        raise ValueError(
            f"--num_classes {config.num_classes}: {config.pipeline} was trained with {net.num_classes}"
        )
    if (config.in_one_batch or config.uses_cfg) and net.null_class is None:
        how = ", or say by --num_classes that its last embedding is that of no class" if net.condition else ""
        raise ValueError(
            f"--cfg_scale {config.cfg_scale}: {config.pipeline} knows no null class: drop it{how}"
        )
    if not net.condition and not config.guided_off_the_shelf and "labels" in config.given:
        raise ValueError(
            f"--labels {config.labels}: {config.pipeline} is told nothing, and nothing guides it"
        )
    if config.cfg_channels and config.in_one_batch and config.cfg_channels > net.in_channels:
        raise ValueError(f"--cfg_channels {config.cfg_channels}: the samples have {net.in_channels}")
    if config.posterior == "learned" and "posterior" not in config.idle() and not net.learned_variance:
        raise ValueError(
            "--posterior learned needs a network that predicts its variance: choose scalar or frequency"
        )


def _completed(config, net, autoencoder):
    """The flags with what the pipeline says where they say nothing; the network is told the size."""
    factor = autoencoder.factor if autoencoder else 1
    size, multiple = config.image_size or net.input_size * factor, factor * net.multiple
    if size % multiple or (net.is_dit and size != net.input_size * factor):
        fits = f"is for {net.input_size * factor}" if net.is_dit else f"takes multiples of {multiple}"
        raise ValueError(f"--image_size {size}: {config.pipeline} {fits}")
    net.input_size = size // factor
    config = replace(
        config, image_size=size, num_classes=config.num_classes or net.num_classes or NUM_CLASSES
    )
    return config.for_data(1.0 if net.latent else 0.5)


def _denoisers(config, net, network, diffusion, device, tally):
    """The function (labels, levels) -> denoiser that the flags describe; loads the --guide_model if any."""
    guide = load_network(config, "guide_model", device, tally) if config.guide_model else None
    alike = ["in_channels", "condition", "num_classes", "learned_variance"]
    alike += ["input_size"] if net.is_dit else []  # the others take every size
    for name in alike if guide else ():
        if getattr(guide, name) != getattr(net, name):
            raise ValueError(
                f"--guide_model {config.guide_model} has {name} {getattr(guide, name)}, but --pipeline has "
                f"{getattr(net, name)}: give a pipeline of the same kind"
            )
    clip = config.clip_denoised and not net.latent
    worse_process = guide.process() if guide else None

    def part(network, y, process=diffusion, clip_denoised=False):
        return DiscreteDenoiser(network, process, {"y": y}, clip_denoised=clip_denoised)

    def denoiser_of(y, sigmas):
        if not config.uses_cfg and not guide:
            return part(network, y, clip_denoised=clip)
        null = part(net, torch.full_like(y, net.require_null())) if config.uses_cfg else None
        worse = part(guide, y, worse_process) if guide else None
        return config.mixed(part(network, y), null, worse, sigmas, clip_denoised=clip)

    return denoiser_of


def _guides(config, classifiers, net, device, tally):
    """Guidance by a classifier of images, of decoded ones where the samples are latents, or nothing; and what
    the log should say of it.
    """
    if not config.guided_off_the_shelf:
        return {}, []
    guide = load_off_the_shelf(config, classifiers, config.num_classes, config.image_size)
    notes = guide.notes
    if net.latent:
        guide = classifiers.DecodedClassifier(guide, load_guide_decoder(config, classifiers, net))
    tally.count(CLASSIFIER, guide.to(device))
    return {"guidance": tally.timed(config.build_guidance(guide, tally.observe))}, notes


def _notes(config, net):
    notes = [f"without effect in this run: --{name}" for name in config.without_effect()]
    if net.condition and net.null_class is not None and not config.in_one_batch and not config.uses_cfg:
        notes.append(
            "no classifier-free guidance: pipelines have --cfg_scale 4 (DiT), 7.5 (a text) or 5 (SD-XL)"
        )
    if net.condition == "text" and not config.guided_off_the_shelf and "labels" in config.given:
        notes.append("--labels are stored beside the samples: the network is told the prompt alone")
    if net.is_dit:
        notes.append(
            "the DiT computes as diffusers has it; scripts/dit_sample.py has the original arithmetic"
        )
    return notes


def _named(flag, value, load):
    """What `load` makes of a flag's value; its errors name the flag."""
    try:
        return load(value)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--{flag} {value}: {error}") from error

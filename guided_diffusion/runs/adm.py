"""Runs of ADM's networks: from the flags of scripts/classifier_sample.py to a Job."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import defaults_of
from guided_diffusion.flags.labels import labels_file
from guided_diffusion.flags.networks import NoisyClassifierFlags
from guided_diffusion.flags.rules import RuleFlags
from guided_diffusion.flags.solvers import solver_files
from guided_diffusion.flags.trained import NETWORKS, known_name, unlike_training
from guided_diffusion.guidance import noisy_classifier_gradient
from guided_diffusion.layers import memory_format
from guided_diffusion.runs.discrete import Drawn, Network, drawn_labels, load_off_the_shelf, sampler_of
from guided_diffusion.runs.job import Job, Sampler
from guided_diffusion.runs.tally import CLASSIFIER, NETWORK, Tally
from guided_diffusion.script_util import create_classifier, create_from_flags

CHANNELS = 3  # of the images


def make_job(config: ADMFlags, classifiers: Any) -> Job:
    """What the flags ask for. classifiers: the package of that name, or what loads and finds classifiers as
    it does.

    Nothing is loaded. Raises ValueError for labels that cannot be.
    """
    files = {
        "model_path": partial(existing_file, config.model_path),
        "labels": partial(labels_file, config.labels),
        **solver_files(config),
        **config.guidance_files(),
    }
    if config.mixes and config.guide_model:
        files["guide_model"] = partial(existing_file, config.guide_model)
    if config.guided_off_the_shelf:
        files |= classifiers.classifier_files(config.classifier_type, config.classifier_path)
    elif config.guided_by_noisy_classifier:
        files["classifier_path"] = partial(existing_file, config.classifier_path)
    labels_of, drawn_by = drawn_labels(config)
    return Job.of(
        config,
        files=files,
        build=partial(build, config, classifiers, labels_of),
        num_samples=config.num_samples,
        rounding="adm",
        drawn_by=drawn_by,
        remarks=partial(unlike_training_of, config),
        packages=classifiers.classifier_packages(config.classifier_type),
    )


def unlike_training_of(config: ADMFlags) -> dict[str, Any]:
    """What the run's record says of flags that a known network was not trained with; reads the files' names
    or hashes.
    """
    differing = unlike_training(config.model_path, config)
    if config.guided_by_noisy_classifier:
        differing |= unlike_training(config.classifier_path, config)
    return {"trained_with": differing} if differing else {}


def build(
    config: ADMFlags, classifiers: Any, labels_of: Callable, device: torch.device, tally: Tally
) -> Sampler:
    """Load the networks; returns the Sampler."""
    torch.manual_seed(config.seed)  # for --classifier_path random; the samples' noise has streams of its own
    network, diffusion = load_network(config, device, tally)
    guides, about = load_guides(config, classifiers, device, tally)
    drawn = Drawn(
        device=device,
        network=network,
        diffusion=diffusion,
        denoiser_of=load_denoiser(config, network, diffusion, device, tally)
        if config.asks_denoiser
        else None,
        guides=guides,
        shape=(CHANNELS, config.image_size, config.image_size),
        clip_denoised=config.clip_denoised,
        labels_of=labels_of,
    )
    return sampler_of(config, drawn, config.image_size, [*_notes(config, device), *about])


def load_denoiser(
    config: ADMFlags, network: Network, diffusion: Any, device: torch.device, tally: Tally
) -> Callable[[Tensor, Sequence[float]], Callable[..., Tensor]]:
    """The function (labels, levels) -> denoiser that the flags describe; loads the --guide_model if any."""
    guide = load_guide_model(config, device, tally) if config.guide_model else None
    clip_parts = config.clip_denoised and not config.mixes

    def part(network, diffusion, y):
        return DiscreteDenoiser(network, diffusion, {"y": y}, clip_denoised=clip_parts)

    def denoiser_of(y, sigmas):
        itself = part(network, diffusion, y)
        no_class = torch.full_like(y, config.num_classes)
        null = part(network, diffusion, no_class) if config.uses_cfg else None
        worse = part(*guide, y) if guide else None
        return config.mixed(itself, null, worse, sigmas, clip_denoised=config.clip_denoised)

    return denoiser_of


def load_guide_model(config: ADMFlags, device: torch.device, tally: Tally) -> tuple[Network, Any]:
    """The --guide_model and its process: of the architecture that it is known for, else of the network's."""
    known = known_name(config.guide_model)
    flags = {"model_path": config.guide_model, **(NETWORKS[known] if known else {})}
    return load_network(replace(config, **flags), device, tally)


def load_network(config: ADMFlags, device: torch.device, tally: Tally) -> tuple[Network, Any]:
    """The network as a function (x, t, y) -> output, and its process."""
    path = config.model_path
    with torch.device("meta"):
        model, diffusion = create_from_flags(config.record())
    weights = load_state_dict(path, config.checkpoint_key or None)
    load_into(model, weights, path)
    del weights
    # The file's tensors took the place of the network's own, and with it their memory format.
    model.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    model.reuse_activations(not config.compile)  # a compiler does that by itself
    if config.use_fp16:
        model.convert_to_fp16()
    called = torch.compile(model, dynamic=False) if config.compile else model
    tally.count(NETWORK, called)

    def network(x, t, y):
        if not config.class_cond:
            return called(x, t)
        return called(x, t, torch.full_like(y, config.num_classes) if config.unconditional else y)

    return network, diffusion


def load_guides(
    config: ADMFlags, classifiers: Any, device: torch.device, tally: Tally
) -> tuple[Mapping[str, Callable], list[str]]:
    """What the loops are to be given, guidance, cond_fn, or nothing; and what the log should say of it."""
    if config.guided_off_the_shelf:
        classifier = load_guide(config, classifiers, device)
        tally.count(CLASSIFIER, classifier)
        if config.shown_noisy and config.classifier_scale != 0:
            gradient = noisy_classifier_gradient(
                lambda x, t: classifier(x),
                config.classifier_scale,
                config.on_nonfinite,
                tally.observe,
                config.direction(),
            )
            return {"cond_fn": tally.stopwatch.wrap(gradient)}, classifier.notes
        guidance = config.build_guidance(classifier, tally.observe)
        return {"guidance": tally.timed(guidance)}, classifier.notes
    if config.guided_by_noisy_classifier and config.classifier_scale != 0:
        classifier = load_noisy_classifier(config, device)
        tally.count(CLASSIFIER, classifier)
        gradient = noisy_classifier_gradient(
            classifier, config.classifier_scale, config.on_nonfinite, tally.observe
        )
        return {"cond_fn": tally.stopwatch.wrap(gradient)}, []
    return {}, []


def load_guide(config: ADMFlags, classifiers: Any, device: torch.device) -> Any:
    """The off-the-shelf classifier that the flags describe."""
    classifier = load_off_the_shelf(config, classifiers, config.num_classes, config.image_size).to(device)
    return classifier.half() if config.classifier_use_fp16 and device.type != "cpu" else classifier


def load_noisy_classifier(config: ADMFlags, device: torch.device) -> torch.nn.Module:
    """The classifier of noisy images that the flags describe."""
    half = config.classifier_use_fp16 and device.type != "cpu"
    flags = {key: getattr(config, key) for key in defaults_of(NoisyClassifierFlags)}
    flags |= {"image_size": config.image_size, "classifier_use_fp16": half}
    with torch.device("meta"):
        classifier = create_classifier(**flags, num_classes=config.num_classes)
    weights = load_state_dict(config.classifier_path, config.classifier_checkpoint_key or None)
    load_into(classifier, weights, config.classifier_path)
    classifier.to(device, memory_format=memory_format(device)).eval().requires_grad_(False)
    if half:
        classifier.convert_to_fp16()
    return classifier


def _notes(config, device):
    """What the log should say at the start: flags without effect, and precisions that are not what they are
    called.
    """
    idle, lines = config.without_effect(), []
    for name, value in unlike_training_of(config).get("trained_with", {}).items():
        lines.append(
            f"WARNING: --{name} {getattr(config, name)!r}, but this network was trained with {value!r}: "
            "the samples will be wrong"
        )
    if idle:
        lines.append(f"without effect in this run: {', '.join(f'--{name}' for name in idle)}")
    about_guidance = set(defaults_of(RuleFlags)) | {"gamma_factor", "joint_temperature"}
    if config.classifier_scale == 0 and (given := sorted(about_guidance & config.given)):
        lines.append(f"without effect at --classifier_scale 0: {', '.join(f'--{name}' for name in given)}")
    if device.type == "cpu" and config.use_fp16:
        lines.append("--use_fp16 on a CPU: the U-Net runs in bfloat16")
    if (
        device.type == "cpu"
        and config.classifier_use_fp16
        and "classifier_use_fp16" not in config.not_compared()
    ):
        lines.append(
            "--classifier_use_fp16 on a CPU: the classifier stays in float32, "
            "bfloat16 gradients are off by over 10%"
        )
    return lines

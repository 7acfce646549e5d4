"""Runs of EDM's networks: from the flags of scripts/edm_sample.py to a Job."""

from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from guided_diffusion.denoisers import GuidedDenoiser, LabelledDenoiser
from guided_diffusion.edm import edm_sampler, load_edm_network, time_steps
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.labels import label_source, labels_file
from guided_diffusion.flags.solvers import solver_files
from guided_diffusion.guidance import Guidance
from guided_diffusion.layers import memory_format
from guided_diffusion.runs.discrete import load_off_the_shelf
from guided_diffusion.runs.job import Job, Sampler
from guided_diffusion.runs.noise import DRAWN_BY_INDEX, DRAWN_BY_SEED, DrawnAhead, SeedNoise
from guided_diffusion.runs.tally import CLASSIFIER, NETWORK, Tally


def make_job(config: EDMFlags, classifiers: Any) -> Job:
    """What the flags ask for. classifiers: the package of that name, or what loads and finds classifiers as
    it does.

    Nothing is loaded.
    """
    files = {
        "network": partial(existing_file, config.network),
        "labels": partial(labels_file, config.labels),
    }
    files |= {**solver_files(config), **config.guidance_files()}
    if config.use_classifier:
        files |= classifiers.classifier_files(config.classifier_type, config.classifier_path)
    if config.guide_model:
        files["guide_model"] = partial(existing_file, config.guide_model)
    seeds = config.seed_list
    listed = {} if config.class_idx is None else {"labels": f"--class {config.class_idx}"}
    if config.labels != "random":
        listed = {"labels": f"--labels {config.labels}, shuffled by {DRAWN_BY_INDEX['labels']}: seed 0"}
    return Job.of(
        config,
        files=files,
        build=partial(build, config, classifiers),
        num_samples=len(seeds),
        rounding="edm",
        drawn_by=DRAWN_BY_SEED | listed,
        png_name=partial(png_name, config) if config.format == "png" else None,
        name_of=lambda index: f"{index} (seed {seeds[index]})",
        packages=classifiers.classifier_packages(config.classifier_type) if config.use_classifier else (),
    )


def png_name(config: EDMFlags, index: int) -> str:
    """Where the PNG of a sample lies in the output folder, as generate.py puts it."""
    seed = config.seed_list[index]
    return f"{seed - seed % 1000:06d}/{seed:06d}.png" if config.subdirs else f"{seed:06d}.png"


def build(config: EDMFlags, classifiers: Any, device: torch.device, tally: Tally) -> Sampler:
    """Load the networks; returns the Sampler. Raises ValueError for flags that the network contradicts."""
    torch.manual_seed(0)  # for --classifier_path random; the samples' noise has generators of its own
    net = load_network(config, config.network, device, tally)
    _refuse_for_network(config, net)
    guide = _load_guide_model(config, net, device, tally)
    num_classes = net.label_dim or config.num_classes
    labels_of = None if config.labels == "random" else label_source(config.labels, 0, num_classes)
    guidance, about = load_guidance(config, classifiers, net, num_classes, device, tally)
    prepare = _edm_sampler if config.sampler == "edm" else _solver
    draw, num_steps, notes = prepare(config, net, guide, guidance)

    def sample(indices, tick):
        seeds = [config.seed_list[i] for i in indices]
        noise = SeedNoise(seeds)
        shape = (len(indices), net.img_channels, net.img_resolution, net.img_resolution)
        latents = noise.randn(shape).to(device)
        y = _labels(config, net, num_classes, noise, len(indices))
        y = (torch.from_numpy(labels_of(seeds)) if labels_of else y).to(device)
        class_labels = (
            F.one_hot(y, net.label_dim).float() if net.label_dim and not config.unconditional else None
        )
        with closing(DrawnAhead(noise, shape, dtype=torch.float64)) as ahead:
            images = draw(latents, class_labels, y, ahead, lambda i, x: tick())
        return images, y

    return Sampler(sample, num_steps, net.img_resolution, [*_notes(config, net, device), *about, *notes])


def _edm_sampler(config, net, guide, guidance):
    """The image by EDM's own sampler: a function, how many steps it takes, and what the log should say."""
    options, levels = _sampler_options(config, net)
    config.refuse_for_run(config.steps, net.img_channels)

    def draw(latents, class_labels, y, noise, on_step):
        denoiser, at_noisy = net, guidance
        if config.mixes:
            denoiser = _mixed(config, net, guide, class_labels, levels)
            class_labels = None  # bound
        if guidance and config.guidance_form == "score":
            denoiser, at_noisy = GuidedDenoiser(denoiser, guidance, y), None
        conditions = {"guidance": at_noisy, "y": y, "on_step": on_step}
        return edm_sampler(denoiser, latents, class_labels, noise, **conditions, **options)

    return draw, config.steps, []


def _solver(config, net, guide, guidance):
    """The image by a solver: as `_edm_sampler`."""
    low, high = config.ends()
    ends = (max(low, net.sigma_min), min(high, net.sigma_max))
    sigmas, notes = config.solver_levels(config.steps, ends, net.round_sigma, rho=config.rho)
    config.refuse_for_run(len(sigmas) - 1, net.img_channels)
    solver = config.build_solver()

    def draw(latents, class_labels, y, noise, on_step):
        denoise = _mixed(config, net, guide, class_labels, sigmas)
        if guidance:
            denoise = GuidedDenoiser(denoise, guidance, y)
        return solver(denoise, latents.double() * sigmas[0], sigmas, randn_like=noise, on_step=on_step)

    return draw, len(sigmas) - 1, notes


def _sampler_options(config, net):
    """The arguments of `edm_sampler`, and the noise levels of its run. Raises ValueError for what cannot be,
    before the folder is this run's.
    """
    low, high = config.ends()
    times = {
        **{name: getattr(config, name) for name in ("rho", "disc", "schedule", "scaling")},
        **{"num_steps": config.steps, "sigma_min": low, "sigma_max": high},
    }
    process, steps = time_steps(net, **times)
    levels = [*(process.sigma(t) for t in steps[:-1]), 0.0]
    return times | {
        name: getattr(config, name) for name in ("S_churn", "S_min", "S_max", "S_noise", "solver")
    }, levels


def load_network(config: EDMFlags, path: str, device: torch.device, tally: Tally) -> Any:
    """The network in a file, an EDM preconditioning."""
    net = load_edm_network(path).to(device, memory_format=memory_format(device)).requires_grad_(False)
    net.reuse_activations()
    if config.use_fp16 is not None:
        net.use_fp16 = config.use_fp16
    tally.count(NETWORK, net)
    return net


def _load_guide_model(config, net, device, tally):
    """The network of --guide_model, None where there is none. Raises ValueError for one of another kind."""
    if not config.guide_model:
        return None
    guide = load_network(config, config.guide_model, device, tally)
    for name in ("img_resolution", "img_channels", "label_dim"):
        theirs, ours = getattr(guide, name), getattr(net, name)
        if theirs != ours:
            raise ValueError(
                f"--guide_model {config.guide_model} has {name} {theirs}, but --network has {ours}: "
                "give a checkpoint of the same architecture"
            )
    return guide


def _mixed(config, net, guide, class_labels, levels):
    """The denoiser of the flags, with these labels bound."""
    null = LabelledDenoiser(net, None) if config.uses_cfg else None
    worse = LabelledDenoiser(guide, class_labels) if guide else None
    return config.mixed(LabelledDenoiser(net, class_labels), null, worse, levels, clip_denoised=False)


def _labels(config, net, num_classes, noise, n):
    """(n,) int64: drawn after the latents, as generate.py does; not at all where nobody asks for classes."""
    drawn = net.label_dim or config.use_classifier
    y = noise.randint(num_classes) if drawn else torch.zeros(n, dtype=torch.int64)
    return y if config.class_idx is None else torch.full_like(y, config.class_idx)


def _refuse_for_network(config, net):
    """Raise ValueError for a network that is not for pictures, and for flags that mean nothing to it."""
    if net.img_channels != 3:
        raise ValueError(
            f"{config.network} has img_channels {net.img_channels}, "
            "and only images of 3 channels can be written"
        )
    if net.label_dim and "num_classes" in config.given:
        raise ValueError(
            f"--num_classes {config.num_classes} is for networks without labels, "
            f"and this has {net.label_dim}: drop it"
        )
    if not net.label_dim and config.uses_cfg:
        raise ValueError(f"--cfg_scale {config.cfg_scale}: {config.network} has no labels, drop it")
    if not net.label_dim and config.unconditional:
        raise ValueError(f"--unconditional True: {config.network} has no labels in any case, drop it")
    for flag, value in (("class", config.class_idx), ("labels", config.labels)):
        if value not in (None, "random") and not net.label_dim and not config.use_classifier:
            raise ValueError(
                f"--{flag} {value} needs a network with labels or a classifier: add --use_classifier True"
            )
    num_classes = net.label_dim or config.num_classes
    if config.class_idx is not None and not 0 <= config.class_idx < num_classes:
        raise ValueError(
            f"--class {config.class_idx} is out of range, the classes are 0 to {num_classes - 1}"
        )


def load_guidance(
    config: EDMFlags, classifiers: Any, net: Any, num_classes: int, device: torch.device, tally: Tally
) -> tuple[Guidance | None, list[str]]:
    """The rule of the flags, around its classifier, None where nothing guides; and what the log should say of
    the classifier.
    """
    if not config.use_classifier:
        return None, []
    classifier = load_off_the_shelf(config, classifiers, num_classes, net.img_resolution).to(device)
    tally.count(CLASSIFIER, classifier)
    return tally.timed(config.build_guidance(classifier, tally.observe)), classifier.notes


def _notes(config, net, device):
    """What the log should say at the start: flags without effect, and a precision that is not what it is
    called.
    """
    lines = []
    if idle := config.without_effect():
        lines.append(f"without effect in this run: {', '.join(f'--{name}' for name in idle)}")
    if net.use_fp16 and device.type == "cpu":
        lines.append(
            "the network is to run in float16: on a CPU that is bfloat16, and --use_fp16 False is float32"
        )
    return lines

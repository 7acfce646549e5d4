"""What runs of the discrete process share: its own loops, and solvers, from noise by sample index to
images.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.denoisers import DiscreteDenoiser, GuidedDenoiser
from guided_diffusion.flags.adm import LOOPS
from guided_diffusion.flags.labels import label_source
from guided_diffusion.runs.job import Sampler
from guided_diffusion.runs.noise import DRAWN_BY_INDEX, DrawnAhead, SampleNoise

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class Drawn:
    """What a run draws with.

    network: (x_t, t, y) -> its output, for the loops. denoiser_of: (labels, levels) -> denoiser, for solvers;
    None under a loop. guides: what the loops are to be given, guidance or cond_fn; solvers take the guidance.
    shape: of one sample, (C, H, W). clip_denoised: clamp predictions to [-1, 1]. labels_of: indices ->
    labels. decode: from the samples to the images, for latents.
    """

    device: torch.device
    network: Network
    diffusion: Any
    denoiser_of: Callable[..., Any] | None
    guides: Mapping[str, Callable]
    shape: tuple[int, int, int]
    clip_denoised: bool
    labels_of: Callable[[range], np.ndarray]
    decode: Callable[[Tensor], Tensor] | None = None


def sampler_of(config: Any, drawn: Drawn, image_size: int, notes: list[str]) -> Sampler:
    """The Sampler that the flags describe. notes: what the log should say beside what is found here."""
    prepare = _loop if config.sampler in LOOPS else _solver
    draw, num_steps, more = prepare(config, drawn)

    def sample(indices, tick):
        y = torch.from_numpy(drawn.labels_of(indices)).to(drawn.device)
        shape = (len(indices), *drawn.shape)
        with closing(DrawnAhead(SampleNoise(config.seed, indices), shape)) as noise:
            samples = draw(shape, y, noise, tick)
        return drawn.decode(samples) if drawn.decode else samples, y

    def finish(count):
        return drawn.decode(torch.zeros(count, *drawn.shape, device=drawn.device))

    return Sampler(sample, num_steps, image_size, [*notes, *more], finish if drawn.decode else None)


def drawn_labels(config: Any) -> tuple[Callable[[Sequence[int]], np.ndarray], dict[str, str]]:
    """The function indices -> labels that the flags describe, and who draws what, for the record. Raises
    ValueError for labels that cannot be.
    """
    return label_source(config.labels, config.seed, config.num_classes), drawn_by(config)


def drawn_by(config: Any) -> dict[str, str]:
    """Who draws what under the flags, for the record."""
    listed = {} if config.labels == "random" else {"labels": f"--labels {config.labels}, shuffled"}
    return DRAWN_BY_INDEX | listed


def load_off_the_shelf(config: Any, classifiers: Any, num_classes: int, image_size: int) -> torch.nn.Module:
    """The off-the-shelf classifier that the flags describe, on the CPU, float32."""
    return classifiers.load_classifier(
        config.classifier_type,
        config.classifier_path or None,
        num_classes=num_classes,
        softplus_beta=config.softplus_beta,
        classifier_input=config.classifier_input,
        image_size=image_size,
        checkpoint_key=config.classifier_checkpoint_key or None,
        prompts=config.prompts,
    )


def _loop(config, drawn):
    """The sample by one of the process's own loops: a function, how many steps it takes, and what the log
    should say.
    """
    process = drawn.diffusion
    loops = {"ddpm": process.p_sample_loop_progressive, "ddim": process.ddim_sample_loop_progressive}
    conditions = {"clip_denoised": drawn.clip_denoised, **drawn.guides}
    if config.guided_off_the_shelf:
        conditions["variance_max"] = config.variance_max

    def draw(shape, y, noise, tick):
        options = {"device": y.device, "randn_like": noise, "model_kwargs": {"y": y}, **conditions}
        for out in loops[config.sampler](drawn.network, shape, **options):
            samples = out["sample"]
            tick()
        return samples

    return draw, process.num_timesteps, []


def _solver(config, drawn):
    """The sample by a solver: as `_loop`."""
    process, known = drawn.diffusion, DiscreteDenoiser(drawn.network, drawn.diffusion)  # for its levels
    sigmas, notes = config.solver_levels(
        process.num_timesteps,
        config.range_within(known.sigma_min, known.sigma_max),
        known.round_sigma,
        trained=[process.sigma(t) for t in range(process.num_timesteps - 1, -1, -1)],
        log_sigmas=known.log_sigmas,
    )
    config.refuse_for_run(len(sigmas) - 1, drawn.shape[0])
    solver = config.build_solver()

    def draw(shape, y, noise, tick):
        denoise = drawn.denoiser_of(y, sigmas)
        if drawn.guides:
            denoise = GuidedDenoiser(denoise, drawn.guides["guidance"], y, clip_denoised=drawn.clip_denoised)
        # The process begins with x_T ~ N(0, I), which is x / sqrt(1 + sigma^2).
        x = noise.randn(shape).to(y.device) * math.sqrt(1 + sigmas[0] ** 2)
        return solver(denoise, x, sigmas, randn_like=noise, on_step=lambda i, x: tick())

    return draw, len(sigmas) - 1, notes

"""Training of a denoiser on images, as scripts/image_train.py does it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.edm import EDMPrecond
from guided_diffusion.files.grid import save_grid
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.networks import channel_multipliers
from guided_diffusion.flags.training import ImageTrainFlags
from guided_diffusion.layers import memory_format
from guided_diffusion.resample import LossAwareSampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_from_flags, create_gaussian_diffusion
from guided_diffusion.training.checkpoints import write_half
from guided_diffusion.training.data import drop_labels, flip_some, to_floats
from guided_diffusion.training.ema import Average
from guided_diffusion.training.loop import Loop
from guided_diffusion.training.objectives import DiscreteObjective, EDMObjective
from guided_diffusion.training.run import Schedule
from guided_diffusion.training.session import Session

STEPS = 25  # of the process, for the picture of samples


def train_images(config: ImageTrainFlags) -> Path:
    """Train as the flags say; return the folder with the checkpoints."""
    with Session(config) as session:
        _train(config, session)
    return session.folder


def _train(config, session):
    network, arguments = build_network(config)
    network.to(session.device).to(memory_format=memory_format(session.device))
    objective = build_objective(config, session.compiled(network))
    averages = {rate: Average(network, float(rate)) for rate in config.rates}
    batches = session.batches(config.class_cond)
    optimizer = session.optimizer(network)
    loop = Loop(
        network, objective.losses, optimizer, averages.values(),
        precision=session.precision, microbatch=session.microbatch,
    )  # fmt: skip
    sampler = getattr(objective, "sampler", None)
    run = session.run(
        loop,
        partial(draw_batch, config, session, batches, objective),
        Schedule(config.lr, config.lr_anneal_steps, config.max_seconds, config.warmup, _anneals(config)),
        averages=averages,
        learner=sampler if isinstance(sampler, LossAwareSampler) else None,
    )
    if config.samples:
        run.on_save.append(partial(look, config, session, objective, averages))
    run.on_save.append(partial(export, session.folder, averages, arguments))
    session.begin(run)
    run.run()


def _anneals(config):
    return bool(config.lr_anneal_steps or config.max_seconds)


def build_network(config: ImageTrainFlags) -> tuple[nn.Module, dict[str, Any]]:
    """The network of the flags, float32, and what its file should say of it: for EDM's the constructor's
    arguments.
    """
    torch.manual_seed(config.seed)
    if config.loss == "edm":
        arguments = edm_arguments(config)
        return EDMPrecond(**arguments), {"class_name": "EDMPrecond", "arguments": json.dumps(arguments)}
    flags = {name: getattr(config, name) for name in config.__dataclass_fields__}
    null_class = config.class_cond and config.labels_dropout > 0
    network, _ = create_from_flags({**flags, "use_fp16": False, "null_class": null_class})
    return network, {}


def edm_arguments(config: ImageTrainFlags) -> dict[str, Any]:
    """The constructor's arguments of EDM's preconditioned network, from the U-Net's flags. Raises ValueError
    for channel multipliers that are not whole.
    """
    multipliers = channel_multipliers(config.image_size, config.channel_mult)
    if any(m != int(m) for m in multipliers):
        given = ",".join(map(str, multipliers))
        raise ValueError(f"--loss edm takes whole numbers as --channel_mult, such as 1,2,2; got {given}")
    return {
        "img_resolution": config.image_size,
        "img_channels": 3,
        "label_dim": config.num_classes if config.class_cond else 0,
        "model_type": config.edm_model,
        "model_channels": config.num_channels,
        "channel_mult": [int(m) for m in multipliers],
        "num_blocks": config.num_res_blocks,
        "attn_resolutions": [int(size) for size in config.attention_resolutions.split(",")],
        "dropout": config.dropout,
    }


def build_objective(config: ImageTrainFlags, network: nn.Module) -> DiscreteObjective | EDMObjective:
    """What `network`, compiled or not, is trained by."""
    if config.loss == "edm":
        return EDMObjective(network, config.num_classes if config.class_cond else 0)
    create = partial(
        create_gaussian_diffusion,
        steps=config.diffusion_steps,
        learn_sigma=config.learn_sigma,
        noise_schedule=config.noise_schedule,
        use_kl=config.use_kl,
        predict_xstart=config.predict_xstart,
        rescale_timesteps=config.rescale_timesteps,
        rescale_learned_sigmas=config.rescale_learned_sigmas,
    )
    diffusion = create(timestep_respacing=config.timestep_respacing)
    few_steps = create(timestep_respacing=str(min(STEPS, config.diffusion_steps)))
    sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion)
    return DiscreteObjective(network, diffusion, sampler, config.class_cond, few_steps)


def draw_batch(
    config: ImageTrainFlags, session: Session, batches: Any, objective: Any, step: int
) -> tuple[Tensor, ...]:
    """This process's part of a step's batch: images, labels, and what the objective draws. All random numbers
    are drawn for the whole batch, then cut.
    """
    generator = session.generator.at(step)
    n, device = session.whole_batch, session.device
    mirrored = torch.rand(n, device=device, generator=generator) < 0.5
    dropped = torch.rand(n, device=device, generator=generator)
    shape = (n, 3, config.image_size, config.image_size)
    drawn = [each[session.part] for each in objective.draw(shape, generator)]
    pixels, labels = batches.batch(step, session.part)
    images = to_floats(pixels.to(device, non_blocking=True))
    labels = labels.to(device, non_blocking=True)
    if config.flip:
        images = flip_some(images, mirrored[session.part])
    if config.labels_dropout:
        labels = drop_labels(labels, config.num_classes, config.labels_dropout, dropped[session.part])
    return images, labels, *drawn


def look(config: ImageTrainFlags, session: Session, objective: Any, averages: Any, step: int) -> None:
    """Draw samples of the first average, the classes in turn, always from the same noise: samplesS.png."""
    network = next(iter(averages.values())).module
    shape = (config.samples, 3, config.image_size, config.image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed)).to(session.device)
    labels = torch.arange(config.samples, device=session.device) % config.num_classes
    with session.precision.autocast(session.device), torch.no_grad():
        images = objective.sample(network, noise, labels)
    save_grid(
        session.folder / f"samples{step:06d}.png", [to_uint8(images.clamp(-1, 1)).cpu().numpy()], scale=2
    )


def export(folder: Path, averages: Any, arguments: dict, step: int) -> None:
    """Write each average in float16 as network_RATE.safetensors, which the samplers read; its metadata hold
    the step, and for EDM the network's class and arguments.
    """
    for rate, average in averages.items():
        about = {"step": str(step), **arguments}
        write_half(folder / f"network_{rate}.safetensors", average.module.state_dict(), about)

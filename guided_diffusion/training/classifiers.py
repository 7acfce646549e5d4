"""Training of a classifier, of noisy or of clean images, as scripts/classifier_train.py does it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.labelled import read_labelled
from guided_diffusion.layers import memory_format
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.checkpoints import write_half
from guided_diffusion.training.data import EpochBatches, crop, flip_some, to_floats
from guided_diffusion.training.loop import POSITION, Loop
from guided_diffusion.training.record import Record, means_of
from guided_diffusion.training.run import Schedule
from guided_diffusion.training.session import Session

EVALUATED_AT_ONCE = 500


class CleanObjective:
    """Cross-entropy of logits = model(images), images in [-1, 1]."""

    def __init__(self, model: nn.Module):
        self.model = model

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Nothing is drawn beside the batch."""
        return ()

    def losses(self, images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        """loss, and acc@1 and acc@5, (N,) each."""
        return figures_of(self.model(images), labels)


class NoisyObjective:
    """guided-diffusion's: cross-entropy of logits = model(x_t, t), t from the sampler."""

    def __init__(self, model: nn.Module, diffusion: Any, sampler: Any):
        self.model, self.diffusion, self.sampler = model, diffusion, sampler

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """(t, noise) for images of this shape."""
        t, _ = self.sampler.sample(shape[0], generator.device, generator)
        return t, torch.randn(shape, device=generator.device, generator=generator)

    def losses(self, images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
        """loss, acc@1 and acc@5, (N,) each, and where t lies in [0, 1)."""
        logits = self.model(self.diffusion.q_sample(images, t, noise), t)
        return {**figures_of(logits, labels), POSITION: t / self.diffusion.num_timesteps}


class UnnoisedObjective(CleanObjective):
    """guided-diffusion's with --noised False: cross-entropy of logits = model(images, 0)."""

    def losses(self, images: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
        """loss, and acc@1 and acc@5, (N,) each."""
        t = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        return figures_of(self.model(images, t), labels)


def noisy_objective(config: Any, model: nn.Module) -> NoisyObjective | UnnoisedObjective:
    """Over the process of the flags; with --noised False of clean images at t = 0."""
    if not config.noised:
        return UnnoisedObjective(model)
    diffusion = create_gaussian_diffusion(
        steps=config.diffusion_steps,
        noise_schedule=config.noise_schedule,
        timestep_respacing=config.timestep_respacing,
        rescale_timesteps=config.rescale_timesteps,
    )
    return NoisyObjective(model, diffusion, create_named_schedule_sampler(config.schedule_sampler, diffusion))


def figures_of(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """loss, acc@1 and acc@5, (N,) each, of (N, K) logits; acc@5 only where there are more than 5 classes."""
    logits = logits.float()
    figures = {"loss": F.cross_entropy(logits, labels, reduction="none")}
    for k in (1, 5):
        if k < logits.shape[1]:
            hit = (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1)
            figures[f"acc@{k}"] = hit.float()
    return figures


def train_classifier(
    config: Any, network: nn.Module, objective_of: Callable[[nn.Module], Any], called: nn.Module
) -> Path:
    """Train as the flags say; return the folder. network: what is written. called: what answers logits, the
    network or something around it. objective_of: makes the objective of it, compiled or not.
    """
    with Session(config) as session:
        _train(config, session, network, objective_of, called)
    return session.folder


def _train(config, session, network, objective_of, called):
    called.to(session.device).to(memory_format=memory_format(session.device))
    objective = objective_of(session.compiled(called))
    batches = session.batches(labelled=True)
    loop = Loop(
        network, objective.losses, session.optimizer(network, config.optimizer),
        precision=session.precision, microbatch=session.microbatch,
    )  # fmt: skip
    anneal = config.anneal_lr
    schedule = Schedule(config.lr, config.iterations, config.max_seconds, config.warmup, anneal)
    run = session.run(loop, partial(draw_batch, config, session, batches, objective), schedule, averages={})
    run.on_save.append(partial(_export, session.folder, network))
    session.begin(run)
    if config.val_data_dir and session.rank == 0:
        _Validation(config, session, objective_of(called), network).join(run)
    run.run()


def draw_batch(
    config: Any, session: Session, batches: EpochBatches, objective: Any, step: int
) -> tuple[Tensor, ...]:
    """This process's part of a step's batch: images, labels, and what the objective draws, all drawn for the
    whole batch, then cut.
    """
    generator = session.generator.at(step)
    n, device = session.whole_batch, session.device
    mirrored = torch.rand(n, device=device, generator=generator) < 0.5
    shifts = torch.randint(2 * config.random_crop + 1, (n, 2), device=device, generator=generator)
    shape = (n, 3, config.image_size, config.image_size)
    drawn = [each[session.part] for each in objective.draw(shape, generator)]
    pixels, labels = batches.batch(step, session.part)
    images = to_floats(pixels.to(device, non_blocking=True))
    if config.flip:
        images = flip_some(images, mirrored[session.part])
    if config.random_crop:
        images = crop(images, shifts[session.part], config.random_crop)
    return images, labels.to(device, non_blocking=True), *drawn


class _Validation:
    """Figures of images that are not trained on: of a batch every --eval_interval, into validation.csv, and
    of all beside each checkpoint, into accuracy.json.
    """

    def __init__(self, config, session, objective, network):
        self.config, self.session, self.objective, self.network = config, session, objective, network
        found = read_labelled(config.val_data_dir, config.image_size)
        found = found.numbered_as(session.classes, config.val_data_dir, config.data_dir)
        images, labels = session.placed(found, True, config.val_data_dir)
        self.batches = EpochBatches(images, labels, min(config.batch_size, len(images)), config.seed)
        self.record = Record(session.folder / "validation.csv")

    def join(self, run):
        self.record.resume_at(run.loop.step)
        run.every.append((self.config.eval_interval, self.one_batch))
        run.on_save.append(self.all)

    def one_batch(self, step):
        self.record.add({"step": step, **self._figures(*self.batches.batch(step))})

    def all(self, step):
        images, labels = self.batches.images, self.batches.labels
        figures = {"step": step, "images": len(images), **self._figures(images, labels)}
        write_json(self.session.folder / "accuracy.json", figures)
        self.session.say(f"step {step}, {len(images)} images of {self.config.val_data_dir}: {figures}")

    @torch.no_grad()
    def _figures(self, pixels, labels):
        self.network.eval()
        generator = torch.Generator(self.session.device).manual_seed(self.config.seed)
        parts = []
        for start in range(0, len(pixels), EVALUATED_AT_ONCE):
            rows = slice(start, start + EVALUATED_AT_ONCE)
            images = to_floats(pixels[rows].to(self.session.device))
            drawn = self.objective.draw(tuple(images.shape), generator)
            losses = dict(self.objective.losses(images, labels[rows].to(self.session.device), *drawn))
            losses.pop(POSITION, None)
            parts.append(losses)
        self.network.train()
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return means_of({name: torch.stack([x.sum(), x.new_tensor(len(x))]) for name, x in joined.items()})


def _export(folder, network, step):
    write_half(folder / "classifier.safetensors", network.state_dict(), {"step": str(step)})

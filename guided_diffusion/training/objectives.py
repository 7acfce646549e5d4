"""What a denoiser is trained by: the loss of the discrete process, or EDM's. Each draws its random numbers
for the whole batch, so that any number of processes share one, and samples with the averaged network.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.edm import edm_sampler
from guided_diffusion.losses import edm_loss, edm_sigmas
from guided_diffusion.nn import mean_flat
from guided_diffusion.resample import LossAwareSampler, ScheduleSampler
from guided_diffusion.training.loop import POSITION


class DiscreteObjective:
    """guided-diffusion's loss: model(x, t, y) predicts eps and perhaps the variance.

    class_cond: whether the network takes labels. few_steps: the same process over the steps that `sample`
    takes.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: Any,
        sampler: ScheduleSampler,
        class_cond: bool,
        few_steps: Any = None,
    ):
        self.model, self.diffusion, self.sampler, self.class_cond = model, diffusion, sampler, class_cond
        self.few_steps = few_steps

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """(t, weights, noise) for images of this shape, (N, C, H, W), on the generator's device."""
        t, weights = self.sampler.sample(shape[0], generator.device, generator)
        return t, weights, torch.randn(shape, device=generator.device, generator=generator)

    def losses(
        self, images: Tensor, labels: Tensor, t: Tensor, weights: Tensor, noise: Tensor
    ) -> Mapping[str, Tensor]:
        """The terms of the loss, (N,) each, and where t lies in [0, 1)."""
        condition = {"y": labels} if self.class_cond else {}
        terms = self.diffusion.training_losses(self.model, images, t, condition, noise)
        if isinstance(self.sampler, LossAwareSampler):
            self.sampler.update_with_local_losses(t, terms["loss"].detach())
        weighted = {name: term * weights for name, term in terms.items()}
        return {**weighted, POSITION: t / self.diffusion.num_timesteps}

    def sample(self, network: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        """Images from noise by the ancestral process, with the same new noise at every call."""
        condition = {"y": labels} if self.class_cond else {}
        generator = torch.Generator(noise.device).manual_seed(0)

        def randn_like(x):
            return torch.randn(x.shape, device=x.device, generator=generator)

        few = self.few_steps
        return few.p_sample_loop(network, noise.shape, noise, model_kwargs=condition, randn_like=randn_like)


class EDMObjective:
    """EDM's loss: net(x, sigma, class_labels) denoises. The label num_classes stands for no class."""

    def __init__(self, model: nn.Module, num_classes: int):
        self.model, self.num_classes = model, num_classes

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """(standard normal numbers that the noise levels are made of, (N,); noise) for images of this shape,
        (N, C, H, W), on the generator's device.
        """
        levels = torch.randn(shape[0], device=generator.device, generator=generator)
        return levels, torch.randn(shape, device=generator.device, generator=generator)

    def losses(self, images: Tensor, labels: Tensor, levels: Tensor, noise: Tensor) -> Mapping[str, Tensor]:
        """The weighted error, (N,), and the share of levels below each image's, in [0, 1]."""
        sigma = edm_sigmas(levels)[:, None, None, None]
        errors = edm_loss(self.model, images, self.one_hot(labels), sigma=sigma, noise=noise)
        below = 0.5 * (1 + torch.erf(levels / math.sqrt(2)))
        return {"loss": mean_flat(errors), POSITION: below}

    def one_hot(self, labels: Tensor) -> Tensor | None:
        """(N, num_classes) float; a row of zeros for no class. None for a network without labels."""
        if not self.num_classes:
            return None
        # Not torch's one_hot, which looks for the largest label.
        return (labels[:, None] == torch.arange(self.num_classes, device=labels.device)).float()

    def sample(self, network: nn.Module, noise: Tensor, labels: Tensor) -> Tensor:
        """Images from noise by EDM's sampler, 18 steps."""
        return edm_sampler(network, noise, self.one_hot(labels)).float()

"""Which timesteps training draws, under the names of openai/guided-diffusion.

A sampler draws t with a probability p(t) and gives the weight 1 / (T p(t)), so that the weighted loss has the
mean over all timesteps as its expectation. "loss-second-moment" is Nichol and Dhariwal, 2021, section 3.3.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.distributed as dist

HISTORY, UNIFORM_SHARE = 10, 0.001


def create_named_schedule_sampler(name, diffusion):
    """The sampler "uniform" or "loss-second-moment" over diffusion.num_timesteps. Raises ValueError for
    another name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown schedule_sampler {name!r}; choose {' or '.join(SAMPLERS)}")
    return SAMPLERS[name](diffusion)


class ScheduleSampler(ABC):
    """Draws timesteps in proportion to `weights()`, (T,) float64."""

    @abstractmethod
    def weights(self):
        """Positive, of any sum."""

    def sample(self, batch_size, device, generator=None):
        """(timesteps (batch_size,) int64, weights (batch_size,) float32) on the device.

        generator: torch's, of that device; by default the global one of the device.
        """
        p = self.weights() / np.sum(self.weights())
        table = torch.as_tensor(p, device=device)
        t = torch.multinomial(table, batch_size, replacement=True, generator=generator)
        return t, (1 / (len(p) * table[t])).float()


class UniformSampler(ScheduleSampler):
    """Every timestep alike, with weight 1. Draws on the device, without a look at it from the host."""

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device, generator=None):
        t = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return t, torch.ones(batch_size, device=device)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses."""

    def update_with_local_losses(self, local_ts, local_losses):
        """Learn from this process's (N,) losses at timesteps local_ts, and from the other processes' as well;
        all must call this with the same N.
        """
        both = torch.stack([local_ts.double(), local_losses.double()]).cpu()
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = [torch.empty_like(both) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, both)
            both = torch.cat(parts, dim=1)
        self.update_with_all_losses(both[0].long(), both[1])

    @abstractmethod
    def update_with_all_losses(self, ts, losses):
        """Learn from the losses of all processes, (N,) tensors on the CPU."""


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) in proportion to the root of the mean of the last 10 squared losses at t, once every t has so
    many; until then, and always with a share of 0.001, uniform.
    """

    def __init__(self, diffusion, history_per_term=HISTORY, uniform_prob=UNIFORM_SHARE):
        self.history_per_term, self.uniform_prob = history_per_term, uniform_prob
        self._losses = np.zeros((diffusion.num_timesteps, history_per_term))
        self._counts = np.zeros(diffusion.num_timesteps, dtype=np.int64)

    def weights(self):
        if not (self._counts >= self.history_per_term).all():
            return np.ones(len(self._counts))
        rms = np.sqrt((self._losses**2).mean(axis=1))
        return (1 - self.uniform_prob) * rms / rms.sum() + self.uniform_prob / len(rms)

    def update_with_all_losses(self, ts, losses):
        for step, loss in zip(ts.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):  # it would spoil the table: the training ends with its own error
                continue
            self._losses[step, self._counts[step] % self.history_per_term] = loss
            self._counts[step] += 1

    def state_dict(self):
        """name -> tensor: what the sampler has learned."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state):
        """Take what `state_dict` gave. Raises ValueError for another number of timesteps."""
        if state["losses"].shape != self._losses.shape:
            raise ValueError(
                f"the losses by timestep are of {len(state['counts'])} steps, but the process has "
                f"{len(self._counts)}: --diffusion_steps must stay as it was"
            )
        self._losses, self._counts = state["losses"].numpy().copy(), state["counts"].numpy().copy()


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}

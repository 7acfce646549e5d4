"""Diffusions over some of the timesteps, under the names of openai/guided-diffusion."""

from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.schedules import space_timesteps

__all__ = ["SpacedDiffusion", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion):
    """A GaussianDiffusion over `use_timesteps`, original timesteps such as `space_timesteps` returns.

    kwargs: GaussianDiffusion's others (betas, model_mean_type, model_var_type, loss_type, rescale_timesteps).
    """

    def __init__(self, use_timesteps, **kwargs):
        self.use_timesteps = set(use_timesteps)
        super().__init__(use_timesteps=self.use_timesteps, **kwargs)

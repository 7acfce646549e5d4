"""What the tests of guidance and samplers share: small data, a linear classifier, an exact denoiser, noise
that is known, and every sampler under one call.
"""

import math

import torch

from guided_diffusion.denoisers import DiscreteDenoiser, GuidedDenoiser
from guided_diffusion.edm import edm_sampler
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.guidance import ClassifierGuidance, GuidanceStep, released_edm_guidance
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps
from guided_diffusion.solvers import SOLVERS

N, CLASSES, SHAPE = 4, 5, (4, 3, 4, 4)
PIXELS = math.prod(SHAPE[1:])
Y = torch.tensor([0, 4, 2, 2])


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X = draws(*SHAPE)
WEIGHT, BIAS = draws(CLASSES, PIXELS, seed=1) / PIXELS**0.5, draws(CLASSES, seed=2)


# Classifiers


def linear(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype).T + BIAS.to(x.dtype)


def linear_gradient(x, y, joint=1.0, marginal=1.0):
    """tau_1 W_y - tau_2 softmax(tau_2 f) W, like x."""
    return (joint * WEIGHT[y] - marginal * torch.softmax(marginal * linear(x), dim=1) @ WEIGHT).view_as(x)


def refuse(x):
    raise AssertionError("the classifier was called")


def broken_at(positions, fault):
    """A linear classifier whose gradient at one pixel of some images is `fault`."""

    def classifier(x):
        factor = torch.ones_like(x)
        factor[positions, 0, 0, 0] = fault
        return linear(x.detach() + (x - x.detach()) * factor)

    return classifier


# Guidance


def a_step(**changes):
    values = {"index": 1, "num_steps": 2, "variance": 1.0, "variance_max": 1.0, "sigma": 1.0, "progress": 0.5}
    return GuidanceStep(**{**values, **changes})


def recorder(seen, shift=-0.0):
    """A rule that remembers (x, y, step); -0.0 changes no bit of what it is added to."""

    def guidance(x, y, step):
        seen.append((x.clone(), y, step))
        return torch.full_like(x, shift)

    return guidance


RECIPE = {"joint_temperature": 1.3, "marginal_temperature": 0.5, "max_guidance": 0.08, "add_factor": 0.6}


def rule(sampler, scale=1.0, classifier=linear, **options):
    """The rule of the paper for a sampler: EDM's looks at the noisy sample."""
    if sampler == "edm":
        return released_edm_guidance(
            classifier, **{**RECIPE, "max_guidance": scale * RECIPE["max_guidance"]}, **options
        )
    return ClassifierGuidance(classifier, classifier_scale=scale, gamma_factor=0.3, **options)


# Networks


def tanh_model(x, t, y=None):
    """Any network: eps that depends on everything that it is given."""
    return torch.tanh(x + 0.001 * t.view(-1, 1, 1, 1)) + (0 if y is None else 0.1 * y.view(-1, 1, 1, 1))


class GaussianDenoiser:
    """The exact denoiser of data that is normal with `mean` and standard deviation `std`; remembers what it
    was asked.
    """

    img_channels, img_resolution, label_dim = 3, 4, 0

    def __init__(self, mean=0.3, std=0.5, sigma_min=0.0, sigma_max=math.inf):
        self.mean, self.std, self.sigma_min, self.sigma_max = mean, std, sigma_min, sigma_max
        self.calls = []

    def __call__(self, x, sigma, class_labels=None):
        self.calls.append((x, float(sigma)))
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def round_sigma(self, sigma):
        return sigma

    def solution(self, x, sigma, until=0.0):
        """Where the exact probability flow takes x, from one level to another."""
        return self.mean + (x - self.mean) * math.hypot(self.std, until) / math.hypot(self.std, sigma)


# Processes and noise


def make_diffusion(
    steps=8, mean="EPSILON", var="FIXED_SMALL", schedule="linear", original=1000, rescale=False
):
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, original),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        rescale_timesteps=rescale,
        use_timesteps=space_timesteps(original, steps if isinstance(steps, str) else [steps]),
    )


class Draws:
    """A randn_like of its own stream, which remembers what it gave."""

    def __init__(self, seed=10):
        self.seed, self.given = seed, []

    def __call__(self, x):
        self.given.append(draws(*x.shape, seed=self.seed + 100 * len(self.given), dtype=x.dtype))
        return self.given[-1]


# Samplers

SAMPLERS = ("ddpm", "ddim", *SOLVERS, "edm")
LOOPS = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop"}


def process_levels(diffusion):
    """The noise levels of a process, the noisiest first, and 0."""
    return [*(diffusion.sigma(t) for t in reversed(range(diffusion.num_timesteps))), 0.0]


def sample(sampler, diffusion, model=tanh_model, *, noise=X, y=Y, guidance=None, randn_like=None, clip=True):
    """The image that a sampler makes of unit noise, (N, C, H, W), in as many steps as the process has."""
    randn_like = randn_like or Draws()
    if sampler in LOOPS:
        options = {"model_kwargs": {"y": y}, "guidance": guidance, "randn_like": randn_like}
        loop = getattr(diffusion, LOOPS[sampler])
        return loop(model, tuple(noise.shape), noise=noise, clip_denoised=clip, **options)
    denoise = DiscreteDenoiser(model, diffusion, {"y": y}, clip_denoised=clip)
    if sampler == "edm":
        options = {"num_steps": diffusion.num_timesteps, "S_churn": 1.0, "guidance": guidance, "y": y}
        return edm_sampler(denoise, noise, randn_like=randn_like, **options)
    if guidance is not None:
        denoise = GuidedDenoiser(denoise, guidance, y, clip_denoised=clip)
    sigmas = process_levels(diffusion)
    return SOLVERS[sampler](denoise, noise * math.sqrt(1 + sigmas[0] ** 2), sigmas, randn_like=randn_like)

"""What the tests of solvers and strengths share: data with exact denoisers, a classifier that tilts it, and how
a sampler maps a Gaussian to a Gaussian.
"""

import math
from functools import partial

import torch

from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.solvers import SOLVERS

SHAPE = (3, 4, 4)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
# Name -> (solver, the order at which its error falls).
ORDERS = {
    "euler": (SOLVERS["euler"], 1),
    "heun": (SOLVERS["heun"], 2),
    "dpmpp_2m": (SOLVERS["dpmpp_2m"], 2),
    "dpmpp_2m_sde": (SOLVERS["dpmpp_2m_sde"], 2),
    "ipndm 1": (partial(SOLVERS["ipndm"], order=1), 1),
    **{f"ipndm {k}": (partial(SOLVERS["ipndm"], order=k), 2) for k in (2, 3, 4)},
    **{
        f"unipc {k} {v}": (partial(SOLVERS["unipc"], order=k, variant=v), k + 1)
        for k in (2, 3)
        for v in ("bh1", "bh2")
    },
}
WITH_MEMORY = [name for name in ORDERS if name not in ("euler", "heun")]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TILT = draws(5, math.prod(SHAPE), seed=1)  # row y: the gradient of the logit of class y


def linear(x):
    return x.flatten(1) @ TILT.to(x.dtype).T


def tilting(**options):
    """Guidance whose direction is the linear logit of y alone: it turns p(x_0) into p(x_0) exp(w_y x_0)."""
    return ClassifierGuidance(linear, marginal_temperature=0.0, **options)


class GaussianDenoiser:
    """The exact denoiser of normal data: mean and standard deviation are numbers, or one for each pixel."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, mean=0.3, std=0.5):
        self.mean, self.std, self.calls = mean, std, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)

    def round_sigma(self, sigma):
        return sigma


class Impulses:
    """A randn_like for a batch whose image 2 + k gets noise at the k-th call alone, one in every pixel."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        noise = torch.zeros_like(x)
        if self.calls + 2 < len(x):
            noise[2 + self.calls] = 1
        self.calls += 1
        return noise


def gaussian_image(solver, denoise_of, sigmas, mean, variance, noises=0):
    """(mean, variance) of every pixel of what a solver makes of N(mean, variance), where denoise_of(n) is affine
    and does not mix pixels.

    The solver is affine in x and in each of its `noises` draws, so that its coefficients can be read off.
    """
    start, randn_like = torch.zeros(2 + noises, *SHAPE, dtype=torch.float64), Impulses()
    start[1] = 1
    images = solver(denoise_of(len(start)), start, sigmas, randn_like=randn_like)
    assert randn_like.calls == noises
    gain, weights = images[1] - images[0], images[2:] - images[0]
    return images[0] + gain * mean, gain**2 * variance + weights.square().sum(dim=0)

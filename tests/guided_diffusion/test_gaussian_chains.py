"""Normal data sent through the loops of the discrete process, against closed forms.

If the data are N(mu, s^2) in every pixel, then, with a the cumulative alpha, x_t is N(sqrt(a) mu, a s^2 + 1 -
a), and the best prediction of x_0 is mu + sqrt(a) s^2 / (a s^2 + 1 - a) (x_t - sqrt(a) mu), with the variance
s^2 (1 - a) / (a s^2 + 1 - a).
"""

import math

import numpy as np
import pytest
import torch
from toys import Draws, X, Y, draws, linear, linear_gradient, make_diffusion, sample

from guided_diffusion.guidance import ClassifierGuidance

MU, S = 0.4, 0.5


def gaussian_model(diffusion, learned=False):
    """The best eps for data N(MU, S^2), and, if learned, the true variance of x_{t-1} given x_t as a fraction
    of the range.
    """

    def model(x, t, y):
        index = int((torch.as_tensor(diffusion.timestep_map) == t[0]).nonzero())
        a = diffusion.alphas_cumprod[index]
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)
        if not learned:
            return eps
        low, high = diffusion.posterior_log_variance_clipped[index], math.log(diffusion.betas[index])
        of_x_0 = S**2 * (1 - a) / (a * S**2 + 1 - a)
        true = diffusion.posterior_variance[index] + diffusion.posterior_mean_coef1[index] ** 2 * of_x_0
        fraction = 2 * (math.log(true) - low) / (high - low) - 1 if index else 0.0
        return torch.cat([eps, torch.full_like(x, fraction)], 1)

    return model


def run(sampler, diffusion, noise, learned=False, **options):
    return sample(sampler, diffusion, gaussian_model(diffusion, learned), noise=noise, clip=False, **options)


def assert_gaussian(samples, mean, std, slack_mean, slack_std):
    """Five standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a standard deviation."""
    n = samples.numel()
    assert abs(float(samples.mean()) - mean) < 5 * std / math.sqrt(n) + slack_mean
    assert abs(float(samples.std()) - std) < 5 * std / math.sqrt(2 * n) + slack_std


@pytest.mark.parametrize("steps", [10, 100])
def test_ancestral_loop_with_the_true_variance_is_exact(steps):
    # The chain is then exact for any number of steps, but for its ends. It starts from N(0, 1), not from
    # x_T's marginal, whose mean is sqrt(a_T) MU: the error shrinks by at least sqrt(a_T) S on the way. It
    # ends in the mean of x_0, without its variance at t = 0.
    diffusion = make_diffusion(steps, var="LEARNED_RANGE")
    samples = run("ddpm", diffusion, draws(256, 1, 16, 16), learned=True)
    a_0, a_T = diffusion.alphas_cumprod[[0, -1]]
    std = math.sqrt(S**2 - S**2 * (1 - a_0) / (a_0 * S**2 + 1 - a_0))
    assert a_T < 1e-4 and S - std < 1e-3
    assert_gaussian(samples, MU, std, slack_mean=a_T * MU, slack_std=a_T)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE"])
def test_ancestral_loop_with_1000_steps_samples_the_gaussian(variance):
    diffusion = make_diffusion(1000, var=variance)
    samples = run("ddpm", diffusion, draws(64, 1, 16, 16))
    # The means are exact as above. Let M_t be the variance of x_t. A step of the exact chain gives M_{t-1} =
    # c^2 M_t + v, so that what is wrong with v reaches the end times at most S^2 / M_{t-1}. v lies between
    # the posterior's variance and beta, the two choices, so each is wrong by at most their difference, beta^2
    # a_{t-1} / (1 - a_t). At t = 0 a variance of at most 1 - a_0 is left out.
    a, previous, beta = diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev, diffusion.betas
    wrong = beta**2 * previous / (1 - a) * S**2 / (previous * S**2 + 1 - previous)
    slack = (wrong[1:].sum() + 1 - a[0] + a[-1]) / S
    assert slack < 0.02
    assert_gaussian(samples, MU, S, slack_mean=a[-1] * MU, slack_std=slack)


@pytest.mark.parametrize(("steps", "bound"), [(250, 0.03), (1000, 0.008)])
def test_ddim_follows_the_probability_flow(steps, bound):
    # With sigma^2 = (1 - a) / a, the flow keeps (x / sqrt(a) - MU) / g, g = sqrt(sigma^2 + S^2). DDIM is
    # Euler's rule in sigma: a step of h = sigma - sigma' multiplies by (g - h g'(sigma)) / g in place of
    # g(sigma') / g. As g is convex, that is too little, by at most h^2 / 2 times the largest g'' = S^2 / g^3
    # on the way, which is the one at sigma'. The relative errors add up.
    diffusion, x = make_diffusion(steps), draws(64, 1, 16, 16)
    got = run("ddim", diffusion, x)
    sigma = np.append(0.0, np.sqrt(1 / diffusion.alphas_cumprod - 1))
    g = np.sqrt(sigma**2 + S**2)
    error = float(np.sum(np.diff(sigma) ** 2 / 2 * S**2 / g[:-1] ** 4))
    assert error < bound
    exact = (x / math.sqrt(diffusion.alphas_cumprod[-1]) - MU) * S / g[-1]
    ratio = (got - MU) / exact
    assert ratio.min() > 1 - error
    assert ratio.max() < 1 + 1e-9
    # The flow maps N(0, 1) to a mean that is off by at most sqrt(a_T) MU S / g(T) < 1e-4.
    assert_gaussian(got, MU, S, slack_mean=1.03e-4, slack_std=bound * S)


def test_ddim_with_eta_one_is_the_ancestral_loop():
    # Song et al., 2021, section 4.1: with eta = 1 the step is that of DDPM with the posterior's variance,
    # noise included.
    diffusion, shape = make_diffusion(20), (4, 1, 8, 8)
    options = {"noise": draws(*shape), "clip_denoised": False, "model_kwargs": {"y": None}}
    ancestral, ddim = (
        loop(gaussian_model(diffusion), shape, randn_like=Draws(), **options, **eta)
        for loop, eta in ((diffusion.p_sample_loop, {}), (diffusion.ddim_sample_loop, {"eta": 1.0}))
    )
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_constant_gradient_moves_the_ancestral_gaussian_by_the_closed_form(gamma):
    diffusion = make_diffusion(50)
    guidance = ClassifierGuidance(linear, marginal_temperature=0.0, gamma_factor=gamma)
    plain, guided = (run("ddpm", diffusion, X, guidance=each) for each in (None, guidance))
    factor = 0.0
    for t in range(49, -1, -1):
        a, variance = diffusion.alphas_cumprod[t], diffusion.posterior_variance
        of_x_t = math.sqrt(a) * S**2 / (a * S**2 + 1 - a)
        strength = variance[t] + gamma * max(variance[t:]) * math.sin(math.pi * t / 50)
        kept = diffusion.posterior_mean_coef1[t] * of_x_t + diffusion.posterior_mean_coef2[t]
        factor = kept * factor + strength
    expected = factor * linear_gradient(X, Y, 1.0, 0.0)
    torch.testing.assert_close(guided - plain, expected, rtol=1e-9, atol=1e-12)

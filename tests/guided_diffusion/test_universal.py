"""The universal form: the gradient through the network, against finite differences and closed forms."""

import math

import pytest
import torch

from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.guidance import ClassifierGuidance, GuidanceStep, log_prob
from guided_diffusion.guidance.universal import differentiable, noise_variance, through_network
from guided_diffusion.solvers import SOLVERS, STEPS, recurrent

N, SHAPE, CLASSES = 3, (2, 4, 4), 5
Y = torch.tensor([0, 4, 2])


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, WEIGHT = draws(N, *SHAPE), draws(CLASSES, math.prod(SHAPE), seed=1)
KERNEL = draws(2, 2, 3, 3, seed=2) / 4


def linear(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype).T


def network(x, sigma):
    """A small network that mixes pixels, and none with those of other images."""
    return torch.nn.functional.conv2d(x / (1 + sigma**2) ** 0.5, KERNEL, padding=1).tanh()


class Gaussian:
    """The exact denoiser of normal data."""

    def __init__(self, std):
        self.std = std

    def __call__(self, x, sigma):
        return self.std**2 / (self.std**2 + sigma**2) * x


def universal(classifier=linear, **options):
    return ClassifierGuidance(classifier, gradient=through_network, strength=noise_variance, **options)


def shift(denoise, guidance, x, sigma):
    return GuidedDenoiser(denoise, guidance, Y, clip_denoised=False)(x, sigma) - denoise(x, sigma)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_gradient_equals_finite_differences(sigma):
    def value(x):
        return log_prob(linear(network(x, sigma)), Y)

    got, h = shift(network, universal(), X, sigma) / sigma**2, 1e-5
    for at in [(0, 0, 0), (1, 2, 3), (0, 3, 1), (1, 1, 1)]:
        up, down = X.clone(), X.clone()
        up[(slice(None), *at)] += h
        down[(slice(None), *at)] -= h
        slope = (value(up) - value(down)) / (2 * h)
        torch.testing.assert_close(got[(slice(None), *at)], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.01, 0.7, 30.0])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_for_gaussian_data_it_is_the_posteriors_variance_times_the_gradient(sigma, std):
    posterior = ClassifierGuidance(
        linear, strength=lambda step: step.sigma**2 * std**2 / (step.sigma**2 + std**2)
    )
    net = Gaussian(std)
    torch.testing.assert_close(shift(net, universal(), X, sigma), shift(net, posterior, X, sigma))


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
def test_the_scale_counts_once_and_0_asks_nobody(scale):
    got = shift(network, universal(linear if scale else None, classifier_scale=scale), X, 0.5)
    torch.testing.assert_close(got, scale * shift(network, universal(), X, 0.5))


def test_it_leaves_no_graph_and_works_where_gradients_are_off():
    with torch.no_grad():
        answer = GuidedDenoiser(network, universal(), Y)(X, 0.5)
        assert not torch.is_grad_enabled()
    assert not answer.requires_grad and X.grad is None
    denoised, pull_back = differentiable(network, X, 0.5)
    assert not denoised.requires_grad and torch.equal(denoised, network(X, 0.5))
    assert torch.equal(pull_back(X), pull_back(X))  # as often as one likes


def test_a_sampler_that_does_not_offer_it_is_named():
    with pytest.raises(ValueError, match="go through the network, which this sampler does not offer"):
        universal()(X, Y, GuidanceStep(0, 1, 1.0, 1.0, 1.0, 0.0))


# Recurrence

LEVELS = [8.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("name", STEPS)
def test_one_round_is_the_solver_itself(name):
    net = Gaussian(0.5)
    assert torch.equal(recurrent(STEPS[name], 1)(net, X, LEVELS), SOLVERS[name](net, X, LEVELS))
    two = recurrent(STEPS[name], 2)(net, X, LEVELS, randn_like=None)  # torch's own, as under every solver
    assert two.isfinite().all() and not torch.equal(two, recurrent(STEPS[name], 2)(net, X, LEVELS))


def test_rounds_ask_as_many_times_and_the_noise_brings_each_back_to_its_level():
    asked, drawn, done = [], [], []

    def denoise(x, sigma):
        asked.append((sigma, x))
        return torch.zeros_like(x)

    def randn_like(x):
        drawn.append(x)
        return torch.ones_like(x)

    solve = recurrent(STEPS["euler"], 3)
    solve(denoise, X, LEVELS, randn_like=randn_like, on_step=lambda i, x: done.append(i))
    assert [sigma for sigma, _ in asked] == [8.0] * 3 + [3.0] * 3 + [1.0] * 3
    assert len(drawn) == 6 and done == [0, 1, 2]
    torch.testing.assert_close(asked[1][1], X * 3 / 8 + math.sqrt(8**2 - 3**2))
    with pytest.raises(ValueError, match="got 0"):
        recurrent(STEPS["euler"], 0)


def test_recurrence_keeps_the_variance_of_the_level():
    """Normal data under the exact denoiser: the samples at the end have its deviation."""
    x = 8.0 * draws(2000, 1, 1, 1, seed=3)
    levels = [*torch.linspace(8, 0.05, 60).tolist(), 0.0]
    noise = torch.Generator().manual_seed(4)
    got = recurrent(STEPS["heun"], 2)(
        Gaussian(0.5), x, levels, randn_like=lambda x: torch.randn(x.shape, generator=noise, dtype=x.dtype)
    )
    assert got.std() == pytest.approx(0.5, rel=0.06)

"""Denoisers made of denoisers, against their formulas on small maps."""

import copy

import pytest
import torch

from guided_diffusion.denoisers import CFGDenoiser, GuidedDenoiser
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.guidance.universal import through_network
from guided_diffusion.mixed_denoisers import CFGPlusPlusDenoiser, CFGZeroStarDenoiser
from guided_diffusion.solvers import SOLVERS

N, SHAPE = 3, (4, 5, 5)
LEVELS = [9.0, 3.0, 1.0, 0.2, 0.0]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = draws(N, *SHAPE)


class Part:
    """A denoiser that answers a map of its own, and counts how often it was asked."""

    sigma_min, sigma_max, img_channels = 0.01, 90.0, 4

    def __init__(self, seed):
        self.to, self.factor, self.asked = draws(*SHAPE, seed=seed), 0.1 + 0.2 * seed, 0

    def __call__(self, x, sigma, *conditions):
        self.asked += 1
        return self.to + self.factor / (1 + sigma) * x.roll(1, dims=-1)

    def round_sigma(self, sigma):
        return round(float(sigma), 1)


@pytest.fixture
def parts():
    return Part(1), Part(2)


def dot(a, b):
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, -1.0])
def test_cfg_extrapolates_from_the_unconditional_answer(parts, scale):
    d_c, d_u = (part(X, 1.5) for part in parts)
    mixed = CFGDenoiser(*parts, scale)(X, 1.5)
    torch.testing.assert_close(mixed, (1 - scale) * d_u + scale * d_c)
    clipped = CFGDenoiser(*parts, scale, clip_denoised=True)(X, 1.5)
    assert torch.equal(clipped, mixed.clamp(-1, 1)) and not torch.equal(clipped, mixed)


@pytest.mark.parametrize("mixed", [CFGDenoiser, CFGZeroStarDenoiser])
def test_scale_1_is_the_conditional_answer_bit_for_bit_and_asks_nobody_else(parts, mixed):
    assert torch.equal(mixed(*parts, 1)(X, 1.5), parts[0](X, 1.5))
    assert parts[1].asked == 0


def test_only_the_first_channels_are_guided(parts):
    d_c, all_four = parts[0](X, 1.5), CFGDenoiser(*parts, 3.0)(X, 1.5)
    three = CFGDenoiser(*parts, 3.0, channels=3)(X, 1.5)
    assert torch.equal(three[:, :3], all_four[:, :3]) and torch.equal(three[:, 3:], d_c[:, 3:])
    with pytest.raises(ValueError, match="5 channels are to be guided, but the network answers 4"):
        CFGDenoiser(*parts, 3.0, channels=5)(X, 1.5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        CFGDenoiser(*parts, 3.0, channels=0)


def test_it_answers_like_its_parts(parts):
    for mixed in (CFGDenoiser(*parts, 2.0), copy.deepcopy(CFGDenoiser(*parts, 2.0))):
        assert (mixed.sigma_min, mixed.sigma_max, mixed.img_channels) == (0.01, 90.0, 4)
        assert mixed.round_sigma(0.26) == 0.3
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = mixed.no_such_name


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_cfg_between_two_means_samples_the_mean_beyond_them(name):
    """Exact denoisers of normal data with one deviation: so is their mixture, with the mean beyond."""

    def normal(mean):
        return lambda x, sigma: mean + 0.25 / (0.25 + sigma**2) * (x - mean)

    mixed = SOLVERS[name](CFGDenoiser(normal(0.5), normal(0.2), 3.0), X, LEVELS)
    torch.testing.assert_close(mixed, SOLVERS[name](normal(1.1), X, LEVELS))


@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_under_euler_renoises_with_the_unconditional_noise(parts, scale):
    x = X
    for sigma, below in zip(LEVELS, LEVELS[1:], strict=False):
        d_c, d_u = (part(x, sigma) for part in parts)
        x = d_u + scale * (d_c - d_u) + below * (x - d_u) / sigma
    got = SOLVERS["euler"](CFGPlusPlusDenoiser(*parts, scale, LEVELS), X, LEVELS)
    torch.testing.assert_close(got, x)


def test_cfg_plus_plus_says_what_it_cannot(parts):
    with pytest.raises(ValueError, match="from 0 to 1, got 3"):
        CFGPlusPlusDenoiser(*parts, 3.0, LEVELS)
    for sigma in (9.0 * 1.1, 5.0, 0.0):
        with pytest.raises(ValueError, match=f"noise level {sigma:g} is not one of the run"):
            CFGPlusPlusDenoiser(*parts, 0.5, LEVELS)(X, sigma)
    CFGPlusPlusDenoiser(*parts, 0.5, LEVELS)(X, torch.tensor(LEVELS[3]))  # as float32 has it


def test_cfg_zero_star_extrapolates_from_the_projection(parts):
    d_c, d_u = (part(X, 1.5) for part in parts)
    mixed = CFGZeroStarDenoiser(*parts, 3.0)(X, 1.5)
    along = dot(d_c, d_u) / dot(d_u, d_u) * d_u
    torch.testing.assert_close(mixed, along + 3 * (d_c - along))
    torch.testing.assert_close(dot(mixed, d_u), dot(d_c, d_u))  # the part along D_u is not blown up
    alone = [CFGZeroStarDenoiser(*parts, 3.0)(X[i : i + 1], 1.5) for i in range(N)]
    torch.testing.assert_close(torch.cat(alone), mixed)
    nothing = CFGZeroStarDenoiser(parts[0], lambda x, sigma: 0 * x, 3.0)(X, 1.5)
    torch.testing.assert_close(nothing, 3 * d_c)  # no direction to project on


def test_cfg_zero_star_only_lowers_the_noise_at_first(parts):
    mixed, after = CFGZeroStarDenoiser(*parts, 3.0, zero_above=LEVELS[2]), []
    SOLVERS["euler"](mixed, X, LEVELS, on_step=lambda i, x: after.append(x))
    torch.testing.assert_close(after[1], X * LEVELS[2] / LEVELS[0])
    assert parts[0].asked == 2
    assert mixed(X, torch.tensor(LEVELS[2] * (1 + 1e-7), dtype=torch.float64)).any()  # rounding is not a step
    # Guidance through the network meets no network there, and does nothing.
    rule = through_network(lambda x, y, step: torch.ones_like(x))
    assert not GuidedDenoiser(mixed, rule, torch.zeros(N))(X, LEVELS[0]).any()


class Learned(Part):
    """A denoiser that tells its variance."""

    def with_variance(self, x, sigma):
        return self(x, sigma), torch.full_like(x, self.factor)


def mixtures(conditional, other):
    return [
        CFGDenoiser(conditional, other, 3.0),
        CFGPlusPlusDenoiser(conditional, other, 0.5, LEVELS),
        CFGZeroStarDenoiser(conditional, other, 3.0),
        CFGZeroStarDenoiser(conditional, other, 3.0, zero_above=1.0),
        CFGDenoiser(CFGDenoiser(conditional, other, 2.0), other, 3.0, clip_denoised=True),
    ]


def test_the_variance_is_that_of_the_conditional_part(parts):
    seen = []

    def rule(x, y, step):
        seen.append(step.denoised_variance)
        return 0 * x

    for mixed in mixtures(Learned(1), parts[1]):
        answer, variance = mixed.with_variance(X, 3.0)
        assert torch.equal(answer, mixed(X, 3.0)) and (variance == 0.1 + 0.2).all()
        GuidedDenoiser(mixed, rule, torch.zeros(N))(X, 3.0)
        assert torch.equal(seen[-1], variance)
    assert all(mixed.with_variance(X, 3.0)[1] is None for mixed in mixtures(*parts))
    conditional = Learned(1)
    CFGDenoiser(conditional, parts[1], 3.0).with_variance(X, 3.0)
    assert conditional.asked == 1


def test_a_classifier_guides_the_mixture(parts):
    seen = []
    guidance = ClassifierGuidance(lambda x: seen.append(x) or x.flatten(1)[:, :2], strength=lambda step: 1.0)
    mixed = CFGDenoiser(*parts, 3.0)
    guided = GuidedDenoiser(mixed, guidance, torch.tensor([0, 1, 1]), clip_denoised=False)(X, 1.5)
    assert torch.equal(seen[0], mixed(X, 1.5)) and not torch.equal(guided, mixed(X, 1.5))

"""The strength from the posterior, in closed form: Gaussian data and a linear classifier, which tilts N(m, C)
to N(m + C w, C). Every sampler must end there.
"""

import math
from functools import partial

import pytest
import torch
from exact_posteriors import (
    MEAN,
    ORDERS,
    SHAPE,
    SIGMA_MAX,
    SIGMA_MIN,
    SPECTRUM,
    WITH_MEMORY,
    GaussianDenoiser,
    InFrequencies,
    W,
    draws,
    gaussian_image,
    guided,
    labels,
    levels,
    per_frequency,
    tilting,
)

from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.guidance import (
    ClassifierGuidance,
    GuidanceStep,
    ddim_strength,
    learned_posterior,
)
from guided_diffusion.guidance.frequency import dct
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps
from guided_diffusion.solvers import SOLVERS, Interval, restart

PIXEL_STD = 0.2 + 0.7 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
SPLITS = [(name, False) for name in ORDERS] + [(name, True) for name in WITH_MEMORY]


def errors(solver, num_steps, std, noises=0, **options):
    """(error of the mean, error of the variance) of the images, beside the tilted Gaussian. The step to 0
    hands over the denoised image, whose variance is less by std^2 / (std^2 + sigma_min^2).
    """
    mean, variance = MEAN + std**2 * W, std**2
    found = gaussian_image(
        solver, partial(guided, std=std, **options), levels(num_steps), mean, variance + SIGMA_MAX**2, noises
    )
    last = variance**2 / (variance + SIGMA_MIN**2)
    return [float((got - exact).abs().max()) for got, exact in zip(found, (mean, last), strict=True)]


@pytest.mark.parametrize("std", [0.25, 0.5, 2.0])
@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_every_solver_reaches_the_tilted_gaussian(name, split, std):
    """At every level D + shift is the exact denoiser of the tilted data: its mean is kept from the first step
    on, and the variance's error falls as the solver's order. Split, the shift is a step of first order.
    """
    solver, order = ORDERS[name]
    solver = partial(solver, split_guidance=True) if split else solver
    counts = (40, 80) if name == "dpmpp_2m_sde" else (80, 160)
    found = [errors(solver, n, std, noises=n if name == "dpmpp_2m_sde" else 0) for n in counts]
    means, variances = zip(*found, strict=True)
    assert math.log2(variances[0] / variances[1]) == pytest.approx(order, abs=0.3)
    assert variances[1] < 0.12 * std**2 / 3 ** (order - 1)
    if split and name != "ipndm 1":
        assert math.log2(means[0] / means[1]) == pytest.approx(1, abs=0.25)
        assert means[1] < 0.1 * std**2 * W.abs().max()
    else:
        assert max(means) < 1e-12 * SIGMA_MAX


def test_restart_reaches_it_too():
    def error(n):
        intervals = [Interval(n, 2, 0.3, 1.5), Interval(n, 1, 0.05, 0.2)]
        return errors(restart(SOLVERS["heun"], intervals), n, 0.5, noises=3)

    (first, coarse), (second, fine) = error(20), error(40)
    assert max(first, second) < 1e-12 and fine < 0.01
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.4)


def moved(strength, num_steps=200):
    """By how much guidance moves the end of a trajectory, in units of the classifier's gradient."""
    start = torch.zeros(1, *SHAPE, dtype=torch.float64)
    ends = [
        SOLVERS["heun"](net, start, levels(num_steps))
        for net in (guided(1, strength=strength), GaussianDenoiser(MEAN))
    ]
    return ((ends[0] - ends[1])[0] / W).mean()


def test_ddims_rule_goes_too_far_and_by_how_much():
    """With u = (x - m) / sqrt(s^2 + sigma^2) the flow is
    du / dsigma = -strength w / (sigma sqrt(s^2 + sigma^2)),
    so that the end moves by s times the integral. With DDIM's rule that grows as the logarithm of sigma_max.
    """
    s, top = 0.5, SIGMA_MAX
    exact = s**2 * (1 - s / math.hypot(s, top))
    ddim = s * math.log((math.hypot(1, top) + math.hypot(s, top)) / (1 + s))
    assert moved("posterior") == pytest.approx(exact, rel=2e-3)
    assert moved("ddim") == pytest.approx(ddim, rel=2e-3)
    assert moved("sampler") == moved("ddim")
    assert ddim / exact == pytest.approx(9.4, abs=0.1)


# Learned, per pixel


def process(steps, schedule="linear"):
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, 1000),
        model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.LEARNED_RANGE,
        use_timesteps=space_timesteps(1000, [steps]),
    )


class LearnedNetwork:
    """A network that knows mean and variance of each pixel: its variance channels are those of the exact
    posterior of one step of the trained process.
    """

    def __init__(self, schedule="linear"):
        self.whole = process(1000, schedule)

    def __call__(self, x_t, t, y=None):
        n = max(int(t[0]), 1)
        alpha_bar = self.whole.alphas_cumprod[int(t[0])]
        sigma = math.sqrt(1 / alpha_bar - 1)
        x = x_t.double() / math.sqrt(alpha_bar)
        denoised = GaussianDenoiser(MEAN, PIXEL_STD)(x, sigma)
        low, high = self.whole.posterior_variance[n], self.whole.betas[n]
        v = low + self.whole.posterior_mean_coef1[n] ** 2 * posterior_at(self.whole, n)
        f = (v.log() - math.log(low)) / (math.log(high) - math.log(low))
        return torch.cat([denoised, (2 * f - 1).expand_as(denoised)], dim=1)


def posterior_at(diffusion, t):
    sigma = diffusion.sigma(t)
    return PIXEL_STD**2 * sigma**2 / (PIXEL_STD**2 + sigma**2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_networks_variance_is_that_of_the_clean_image(schedule):
    network = LearnedNetwork(schedule)
    denoise = DiscreteDenoiser(network, process(7, schedule), clip_denoised=False)
    for t in (1, 2, 50, 500, 990):
        _, variance = denoise.with_variance(draws(2, *SHAPE), network.whole.sigma(t))
        assert variance.dtype == torch.float64
        expected = posterior_at(network.whole, t).expand_as(variance)
        torch.testing.assert_close(variance, expected, rtol=1e-3 if schedule == "linear" else 1e-2, atol=0)
    below = network.whole.denoised_variance(torch.tensor([-3.0, -1.0]), 500)
    assert below.tolist() == [0, 0]  # where the network says less than none


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ipndm 4", "unipc 3 bh2", "dpmpp_2m_sde"])
def test_the_learned_form_reaches_a_gaussian_of_other_variances_in_each_pixel(name):
    diffusion, target = process(25), MEAN + PIXEL_STD**2 * W
    sigmas = [*(diffusion.sigma(t) for t in reversed(range(25))), 0.0]
    denoise = DiscreteDenoiser(LearnedNetwork(), diffusion, clip_denoised=False)
    ends = {}
    for form, strength in (("learned", learned_posterior), ("scalar", "posterior")):
        net = guided(1, net=denoise, strength=strength, std=0.5)
        ends[form] = ORDERS[name][0](net, target[None], sigmas, randn_like=torch.zeros_like)[0]
    torch.testing.assert_close(ends["learned"], target, rtol=5e-3, atol=5e-3)
    assert (ends["scalar"] - target).abs().max() > 0.1


def test_a_network_that_predicts_no_variance_is_refused():
    with pytest.raises(ValueError, match="needs a network that predicts its variance"):
        guided(1, strength=learned_posterior)(torch.zeros(1, *SHAPE), 1.0)


# The ancestral loop


@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize("form", ["scalar", "frequency", "learned"])
def test_the_ancestral_chain_keeps_the_tilted_mean_at_any_number_of_steps(form, steps):
    """E[x_(t-1) | x_t, y] is coef1 E[x_0 | x_t, y] + coef2 x_t, so the mean moves by coef1 Cov w."""
    diffusion = process(steps)
    network, strength, target = {
        "scalar": (GaussianDenoiser(MEAN, 0.5), "posterior", MEAN + 0.25 * W[None]),
        "frequency": (InFrequencies(), per_frequency(), MEAN + dct(dct(W[None]) * SPECTRUM, inverse=True)),
        "learned": (None, learned_posterior, MEAN + PIXEL_STD**2 * W[None]),
    }[form]

    def model(x_t, t, y):
        alpha_bar = diffusion.trained_alphas_cumprod[int(t[0])]
        denoised = network(x_t.double() / math.sqrt(alpha_bar), math.sqrt(1 / alpha_bar - 1))
        return torch.cat([denoised, denoised], dim=1)

    start = target * math.sqrt(diffusion.alphas_cumprod[-1])
    image = diffusion.p_sample_loop(
        LearnedNetwork() if network is None else model, start.shape, noise=start, clip_denoised=False,
        model_kwargs={"y": labels(1)}, guidance=tilting(strength=strength), randn_like=torch.zeros_like,
    )  # fmt: skip
    torch.testing.assert_close(image, target, rtol=2e-3, atol=2e-3)


def test_ddims_rule_in_the_ancestral_mean_is_the_prediction_moved_by_it():
    diffusion, x, y, moves = process(9), draws(1, *SHAPE), labels(1), []
    network, t = LearnedNetwork(), torch.tensor([4])
    for guidance in (None, tilting(strength="ddim")):
        options = {"clip_denoised": False, "model_kwargs": {"y": y}, "guidance": guidance, "noise": 0 * x}
        moves.append(diffusion.p_sample(network, x, t, **options)["sample"])
    shift = ddim_strength(diffusion.sigma(4)) * diffusion.posterior_mean_coef1[4] * W
    torch.testing.assert_close(moves[1] - moves[0], shift[None], rtol=1e-5, atol=1e-6)


# Names


def a_step(sigma, **changes):
    return GuidanceStep(**{"index": 1, "num_steps": 2, "variance": 3.0, "variance_max": 4.0, "sigma": sigma,
                           "progress": 0.5, **changes})  # fmt: skip


@pytest.mark.parametrize(
    ("strength", "expected"),
    [
        ("sampler", 3.0),
        ("ddim", 0.2 * 4 / math.sqrt(5)),
        ("posterior", 0.2 * 4 * 0.09 / 4.09),
        (lambda step: 7, 7),
    ],
)
def test_strengths_by_name(strength, expected):
    rule = ClassifierGuidance(
        lambda x: x.flatten(1), marginal_temperature=0.0, strength=strength, sigma_data=0.3
    )
    shift = rule(torch.zeros(1, 1, 1, 2), torch.tensor([1]), a_step(2.0, denoised_weight=0.2))
    assert shift.flatten().tolist() == pytest.approx([0, expected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": "other"}, "unknown strength 'other'; choose sampler, ddim, posterior"),
        ({"strength": "ddim", "gamma_factor": 0.3}, "gamma_factor 0.3 belongs to strength 'sampler'"),
        ({"strength": "posterior", "gamma_factor": 0.3}, "gamma_factor 0.3 belongs to strength 'sampler'"),
        ({"strength": "posterior", "sigma_data": 0.0}, "sigma_data must be above 0, got 0"),
    ],
)
def test_strengths_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(lambda x: x, **options)

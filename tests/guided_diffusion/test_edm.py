"""EDM's noise levels, sampler and network, against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from guided_diffusion.edm import SCALINGS, SCHEDULES, SOLVERS, edm_sampler, iDDPMPrecond
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import ClassifierGuidance, GuidedDenoiser, released_edm_guidance
from guided_diffusion.schedules import DISCRETIZATIONS, karras_sigmas, noise_levels

N, SHAPE = 3, (3, 4, 4)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS = draws(N, *SHAPE)


class GaussianDenoiser:
    """The exact denoiser of data that is normal with `mean` and standard deviation `std`; remembers what it
    was asked.
    """

    def __init__(self, mean=0.3, std=0.5, sigma_min=0.0, sigma_max=math.inf):
        self.mean, self.std, self.sigma_min, self.sigma_max = mean, std, sigma_min, sigma_max
        self.calls = []

    def __call__(self, x, sigma, class_labels=None):
        self.calls.append((x, float(sigma)))
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def round_sigma(self, sigma):
        return sigma

    def solution(self, latents, sigma_max):
        """Where the exact probability flow takes sigma_max * latents."""
        return self.mean + (sigma_max * latents - self.mean) * self.std / math.hypot(self.std, sigma_max)


class Draws:
    """A randn_like that remembers what it gave."""

    def __init__(self):
        self.given = []

    def __call__(self, x):
        self.given.append(draws(*x.shape, seed=len(self.given) + 10))
        return self.given[-1]


# Noise levels


def test_karras_sigmas():
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(karras_sigmas(18, 0.002, 80, 7), expected, rtol=1e-13)
    np.testing.assert_allclose(karras_sigmas(4, 1, 10, 1), [10, 7, 4, 1], rtol=1e-13)
    np.testing.assert_allclose(karras_sigmas(3, 4, 16, 2), [16, 9, 4], rtol=1e-13)
    assert karras_sigmas(1, 0.002, 80, 7) == pytest.approx([80], rel=1e-13)
    assert karras_sigmas(5, 0.002, 80, 7).dtype == np.float64


@pytest.mark.parametrize(
    "arguments",
    [(5, 0, 80, 7), (5, 2, 1, 7), (5, 1, math.inf, 7), (5, 1, 2, 0), (5, math.nan, 2, 7), (0, 1, 2, 7)],
)
def test_karras_sigmas_that_cannot_be(arguments):
    with pytest.raises(
        ValueError,
        match=r"num_steps must be at least 1, got 0|noise levels need 0 < sigma_min <= sigma_max.*got",
    ):
        karras_sigmas(*arguments)


# Sampler


def error(num_steps):
    net = GaussianDenoiser()
    return (
        (edm_sampler(net, LATENTS, num_steps=num_steps, sigma_max=20) - net.solution(LATENTS, 20))
        .abs()
        .max()
        .item()
    )


def test_heun_converges_at_second_order():
    # Twice as many steps, a quarter of the error, while the last step, Euler's from sigma_min, is not felt.
    assert 3.5 < error(32) / error(64) < 4.5
    assert error(256) < 2e-4


def test_one_step_is_the_denoiser_at_sigma_max():
    net, noise = GaussianDenoiser(), Draws()
    final = edm_sampler(net, LATENTS, randn_like=noise, num_steps=1, sigma_max=20)
    assert [sigma for _, sigma in net.calls] == pytest.approx([20], rel=1e-13)
    assert len(noise.given) == 1
    torch.testing.assert_close(final, net(20 * LATENTS, 20.0), rtol=0, atol=1e-12)


def test_two_steps_by_hand():
    net = GaussianDenoiser(std=1.0, mean=0.0)  # dx/dt = x t / (1 + t^2)
    x, a, b = 10 * LATENTS, 10.0, 1.0
    slope = x * a / (1 + a**2)
    euler = x + (b - a) * slope
    heun = x + (b - a) * (slope + euler * b / (1 + b**2)) / 2
    final = edm_sampler(net, LATENTS, num_steps=2, sigma_min=b, sigma_max=a)
    torch.testing.assert_close(final, heun - b * heun * b / (1 + b**2), rtol=0, atol=1e-12)


def test_levels_stay_within_what_the_network_knows():
    net = GaussianDenoiser(sigma_min=0.1, sigma_max=5)
    edm_sampler(net, LATENTS, num_steps=4)
    levels = karras_sigmas(4, 0.1, 5, 7)
    assert [sigma for _, sigma in net.calls] == pytest.approx(np.repeat(levels, 2)[1:].tolist(), rel=1e-13)


def test_levels_are_rounded_to_those_that_the_network_knows():
    net = GaussianDenoiser()
    net.round_sigma = lambda sigma: (2 * sigma).round() / 2
    edm_sampler(net, LATENTS, num_steps=6, sigma_min=0.5, sigma_max=20, S_churn=2)
    levels = [sigma for _, sigma in net.calls]
    assert levels == [round(2 * sigma) / 2 for sigma in levels]
    assert levels[0] > 20  # churn came before the rounding


def test_noise_is_drawn_once_per_step_in_order_and_scaled_by_what_churn_adds():
    net, noise = GaussianDenoiser(), Draws()
    options = {"S_churn": 3, "S_min": 0.05, "S_max": 10, "S_noise": 1.1}
    edm_sampler(net, LATENTS, randn_like=noise, num_steps=6, sigma_max=20, **options)
    t = [*karras_sigmas(6, 0.002, 20, 7), 0]
    gammas = [min(3 / 6, math.sqrt(2) - 1) if 0.05 <= level <= 10 else 0 for level in t[:-1]]
    assert len(noise.given) == 6
    assert {0, math.sqrt(2) - 1} == set(gammas)
    x = t[0] * LATENTS
    for i, (gamma, draw) in enumerate(zip(gammas, noise.given, strict=True)):
        t_hat = t[i] * (1 + gamma)
        x_hat, sigma = net.calls[2 * i]
        assert sigma == pytest.approx(t_hat, rel=1e-12)
        torch.testing.assert_close(
            x_hat, x + math.sqrt(t_hat**2 - t[i] ** 2) * 1.1 * draw, rtol=0, atol=1e-10
        )
        slope = (x_hat - net(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * slope
        if i < 5:
            x = x_hat + (t[i + 1] - t_hat) * (slope + (x - net(x, t[i + 1])) / t[i + 1]) / 2


def test_churn_below_its_cap():
    net = GaussianDenoiser()
    edm_sampler(net, LATENTS, num_steps=10, sigma_max=20, S_churn=1)
    levels = karras_sigmas(10, 0.002, 20, 7)
    assert [sigma for _, sigma in net.calls[::2]] == pytest.approx((1.1 * levels).tolist(), rel=1e-12)


def test_noise_without_churn_changes_nothing():
    first, second = (
        edm_sampler(GaussianDenoiser(), LATENTS, randn_like=fill, num_steps=5)
        for fill in (torch.ones_like, torch.zeros_like)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trajectory_is_float64_around_a_float32_network(dtype):
    net = GaussianDenoiser()
    exact, seen = edm_sampler(net, LATENTS.float().double(), num_steps=12), []

    class Float32(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            seen.append((x.dtype, sigma.dtype))
            return super().__call__(x.float(), sigma.float())

    got = edm_sampler(Float32(), LATENTS.float().to(dtype), num_steps=12)
    assert got.dtype == torch.float64
    assert set(seen) == {(torch.float64, torch.float64)}
    # Twelve answers rounded to 24 bits, each relative to entries below 1: the trajectory itself, of size 80,
    # adds nothing.
    assert 0 < (got - exact).abs().max() < 1e-6


def test_labels_go_to_the_network_as_they_are():
    labels, seen = torch.eye(N), []

    class Conditional(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            seen.append(class_labels)
            return super().__call__(x, sigma)

    edm_sampler(Conditional(), LATENTS, labels, num_steps=3)
    assert len(seen) == 5
    assert all(given is labels for given in seen)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_non_finite_answer_stops_with_step_and_position(fault):
    class Broken(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            out = super().__call__(x, sigma)
            out[1, 0, 0, 0] = fault if sigma < 1 else 0
            return out

    with pytest.raises(NonFiniteError) as caught:
        edm_sampler(Broken(), LATENTS, num_steps=10)
    assert caught.value.positions == [1]
    # Heun's correction of the step before looks at the first level below 1 already.
    assert caught.value.step_index == (karras_sigmas(10, 0.002, 80, 7) >= 1).sum() - 1


def test_negative_churn():
    with pytest.raises(ValueError, match=r"S_churn.*-1"):
        edm_sampler(GaussianDenoiser(), LATENTS, S_churn=-1)


# Every solver with every discretization, schedule and scaling: table 1's columns, mixed

COLUMNS = {"solver": SOLVERS, "disc": DISCRETIZATIONS, "schedule": SCHEDULES, "scaling": SCALINGS}
EVERY = [dict(zip(COLUMNS, choice, strict=True)) for choice in itertools.product(*COLUMNS.values())]
SOME = [EVERY[i] for i in (1, 8, 21, 30, 34, 47)]  # each name of each column is among them
ENDS = {"sigma_min": 0.05, "sigma_max": 20.0}


def name(columns):
    return "-".join(columns.values())


class Time:
    """sigma(t), its inverse, s(t) and the exact solution of GaussianDenoiser(), worked out without the
    sampler's code.
    """

    def __init__(self, columns):
        # beta_d / 2 and beta_min of VP: sigma(0.001) and sigma(1) are the ends.
        a, b = np.linalg.solve(
            [[1e-6, 1e-3], [1.0, 1.0]], [math.log1p(ENDS[end] ** 2) for end in ("sigma_min", "sigma_max")]
        )
        self.sigma, self.inverse = {
            "vp": (
                lambda t: math.sqrt(math.expm1(a * t**2 + b * t)),
                lambda v: (math.sqrt(b**2 + 4 * a * math.log1p(v**2)) - b) / (2 * a),
            ),
            "ve": (math.sqrt, lambda v: v**2),
            "linear": (float, float),
        }[columns["schedule"]]
        self.scaled = columns["scaling"] == "vp"

    def s(self, t):
        return 1 / math.hypot(1, self.sigma(t)) if self.scaled else 1.0

    def flow(self, x, t, until):
        """Where the solution through x at t is at `until`."""
        ratio = math.hypot(0.5, self.sigma(until)) / math.hypot(0.5, self.sigma(t))
        return self.s(until) * (0.3 + (x / self.s(t) - 0.3) * ratio)

    def slope(self, x, t):
        return (self.flow(x, t, t * (1 + 1e-5)) - self.flow(x, t, t * (1 - 1e-5))) / (2e-5 * t)


def walk(columns, num_steps, net=None, latents=LATENTS, **options):
    """(times, states) of a run: t_0 .. t_N = 0, and x there, the final one last."""
    time, steps, later = Time(columns), [], []

    def on_step(i, x):
        steps.append(i)
        later.append(x)

    options = {
        "num_steps": num_steps,
        "randn_like": Draws(),
        "on_step": on_step,
        **ENDS,
        **columns,
        **options,
    }
    final = edm_sampler(net or GaussianDenoiser(), latents, **options)
    assert steps == list(range(num_steps))
    assert torch.equal(later[-1], final)
    levels = [float(level) for level in noise_levels(columns["disc"], num_steps, **ENDS)]
    times = [*map(time.inverse, levels), 0.0]
    return times, [time.s(times[0]) * levels[0] * latents, *later]


@pytest.mark.parametrize("columns", EVERY, ids=name)
def test_three_steps_of_every_column_by_hand(columns):
    time, (t, x) = Time(columns), walk(columns, 3)
    for i in range(3):
        step, slope = t[i + 1] - t[i], time.slope(x[i], t[i])
        if columns["solver"] == "heun" and i < 2:
            slope = (slope + time.slope(x[i] + step * slope, t[i + 1])) / 2
        torch.testing.assert_close(x[i + 1], x[i] + step * slope, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("columns", EVERY, ids=name)
def test_every_column_converges_to_the_exact_solution(columns):
    time, errors = Time(columns), []
    for num_steps in (200, 400):
        t, x = walk(columns, num_steps)
        # At the last level: the step from there to 0 is Euler's, and does not shrink.
        errors.append((x[-2] - time.flow(x[0], t[0], t[-2])).abs().max().item() / time.s(t[-2]))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(
        {"euler": 1, "heun": 2}[columns["solver"]], abs=0.15
    )
    assert errors[1] < {"euler": 0.1, "heun": 0.003}[columns["solver"]]


@pytest.mark.parametrize("columns", SOME, ids=name)
def test_churn_under_the_columns(columns):
    # The network is asked at x / s, which gets the same noise whatever the scaling is.
    net, noise, time = GaussianDenoiser(), Draws(), Time(columns)
    churn = {"S_churn": 2, "S_min": 0.1, "S_max": 10, "S_noise": 1.1}
    t, x = walk(columns, 6, net, randn_like=noise, **churn)
    first = net.calls[:: 2 if columns["solver"] == "heun" else 1]
    assert (len(first), len(noise.given)) == (6, 6)
    for i, (asked, sigma) in enumerate(first):
        level = time.sigma(t[i])
        gamma = 2 / 6 if 0.1 <= level <= 10 else 0
        assert sigma == pytest.approx(level * (1 + gamma), rel=1e-9)
        expected = x[i] / time.s(t[i]) + level * math.sqrt((1 + gamma) ** 2 - 1) * 1.1 * noise.given[i]
        torch.testing.assert_close(asked, expected, rtol=0, atol=1e-8 * level)


@pytest.mark.parametrize("columns", [c for c in SOME if c["solver"] == "heun"], ids=name)
def test_churn_keeps_the_distribution(columns):
    # Standard errors of n draws: mean 0.5 / sqrt(n), standard deviation 0.5 / sqrt(2 n), five of each.
    n = 30_000
    final = walk(columns, 256, latents=draws(1, 3, 100, 100), S_churn=40)[1][-1]
    still = walk(columns, 256, latents=draws(1, 3, 100, 100))[1][-1]
    assert float((final - still).abs().mean()) > 0.1
    assert abs(float(final.mean()) - 0.3) < 5 * 0.5 / math.sqrt(n)
    assert abs(float(final.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * n)


# Guidance under the columns

Y = torch.tensor([0, 2, 1])
WEIGHT = draws(3, math.prod(SHAPE), seed=4)


def linear(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype).T


def released(strength):
    return released_edm_guidance(
        linear, joint_temperature=1.0, marginal_temperature=0.5, max_guidance=strength, add_factor=0.3
    )


@pytest.mark.parametrize("columns", EVERY, ids=name)
def test_guidance_is_called_at_x_over_s_and_its_shift_goes_into_what_the_network_is_asked(columns):
    net, noise, time, calls = GaussianDenoiser(), Draws(), Time(columns), []

    def guidance(x, y, step):
        calls.append((x, y, step))
        return torch.sin(x) + step.index

    t, x = walk(columns, 4, net, randn_like=noise, guidance=guidance, y=Y, S_churn=1)
    first = net.calls[:: 2 if columns["solver"] == "heun" else 1]
    assert [(step.index, step.num_steps, step.variance, step.variance_max) for *_, step in calls] == [
        (i, 4, 1, 1) for i in range(4)
    ]
    for i, (point, y, step) in enumerate(calls):
        level = time.sigma(t[i])
        assert y is Y
        assert step.sigma == pytest.approx(level, rel=1e-9)
        torch.testing.assert_close(point, x[i] / time.s(t[i]), rtol=1e-9, atol=1e-9)
        x_hat = point + level * math.sqrt(1.25**2 - 1) * noise.given[i]
        torch.testing.assert_close(first[i][0], x_hat + torch.sin(point) + i, rtol=1e-9, atol=1e-8)


def guided(columns, form, num_steps):
    """x / s at the last level."""
    options = {"guidance": released(0.5 / num_steps), "y": Y} if form == "released" else {}
    score = GuidedDenoiser(GaussianDenoiser(), ClassifierGuidance(linear, classifier_scale=0.05), Y)
    t, x = walk(columns, num_steps, None if options else score, **options)
    return x[-2] / Time(columns).s(t[-2])


@pytest.mark.parametrize("form", ["released", "score"])
@pytest.mark.parametrize("columns", [c for c in EVERY if c["scaling"] == "none"], ids=name)
def test_scaling_does_not_matter_to_guidance_in_the_limit_of_many_steps(columns, form):
    # Over N steps of strength 1 / N the released recipe tends to a limit, as the score form does by itself.
    apart = [
        (guided(columns, form, n) - guided({**columns, "scaling": "vp"}, form, n)).abs().max().item()
        for n in (50, 100)
    ]
    assert (guided(columns, form, 100) - walk(columns, 100)[1][-2]).abs().max() > 0.05
    assert math.log2(apart[0] / apart[1]) == pytest.approx(
        {"euler": 1, "heun": 2}[columns["solver"]], abs=0.3
    )


@pytest.mark.parametrize("columns", EVERY, ids=name)
@pytest.mark.parametrize("S_churn", [0, 2])
def test_strength_0_changes_no_bit_under_any_column(columns, S_churn):
    unguided = walk(columns, 3, S_churn=S_churn)[1][-1]
    off = ClassifierGuidance(linear, classifier_scale=0.0, gamma_factor=0.3)
    for options in (
        {"guidance": off, "y": Y},
        {"guidance": released(0.0), "y": Y},
        {"net": GuidedDenoiser(GaussianDenoiser(), off, Y)},
    ):
        assert torch.equal(walk(columns, 3, S_churn=S_churn, **options)[1][-1], unguided)


def test_iddpm_steps_over_the_levels_of_its_network():
    net, seen = (
        iDDPMPrecond(4, 3, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()).eval(),
        [],
    )
    net.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    edm_sampler(net, LATENTS, num_steps=10, sigma_min=0.002, sigma_max=81, disc="iddpm", solver="euler")
    assert set(seen) <= set(net.u.tolist())
    assert (seen[0], seen[-1]) == (net.u[8], net.u[999])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; choose euler or heun"),
        ({"disc": "ddim"}, "unknown discretization 'ddim'; choose vp, ve, iddpm, edm"),
        ({"schedule": "cosine"}, "schedule 'cosine'.*choose of vp, ve, linear"),
        ({"scaling": "ve"}, "scaling 've'.*vp, none"),
    ],
)
def test_unknown_columns(option, message):
    with pytest.raises(ValueError, match=message):
        edm_sampler(GaussianDenoiser(), LATENTS, **option)

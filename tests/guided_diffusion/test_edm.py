"""EDM's sampler against closed forms: its steps, its churn, and table 1's columns mixed."""

import itertools
import math

import numpy as np
import pytest
import torch
from toys import RECIPE, Draws, GaussianDenoiser, X, Y, draws, linear

from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.edm import SCALINGS, SCHEDULES, edm_sampler, iDDPMPrecond
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import ClassifierGuidance, released_edm_guidance
from guided_diffusion.schedules import DISCRETIZATIONS, karras_sigmas, noise_levels
from guided_diffusion.solvers import STEPS


def test_one_step_is_the_denoiser_at_sigma_max():
    net, noise = GaussianDenoiser(), Draws()
    final = edm_sampler(net, X, randn_like=noise, num_steps=1, sigma_max=20)
    assert [sigma for _, sigma in net.calls] == pytest.approx([20], rel=1e-13)
    assert len(noise.given) == 1
    torch.testing.assert_close(final, net(20 * X, 20.0), rtol=0, atol=1e-12)


def test_levels_stay_within_what_the_network_knows_and_are_rounded_to_it():
    net, levels = GaussianDenoiser(sigma_min=0.1, sigma_max=5), karras_sigmas(4, 0.1, 5, 7)
    edm_sampler(net, X, num_steps=4)
    assert [sigma for _, sigma in net.calls] == pytest.approx(np.repeat(levels, 2)[1:].tolist(), rel=1e-13)
    net = GaussianDenoiser()
    net.round_sigma = lambda sigma: (2 * sigma).round() / 2
    edm_sampler(net, X, num_steps=6, sigma_min=0.5, sigma_max=20, S_churn=2)
    asked = [sigma for _, sigma in net.calls]
    assert asked == [round(2 * sigma) / 2 for sigma in asked]
    assert asked[0] > 20  # churn came before the rounding


def test_without_churn_noise_is_drawn_and_changes_nothing():
    fills = (torch.ones_like, torch.zeros_like)
    first, second = (edm_sampler(GaussianDenoiser(), X, randn_like=fill, num_steps=5) for fill in fills)
    assert torch.equal(first, second)


def test_the_trajectory_is_float64_around_a_float32_network_that_gets_the_labels_as_they_are():
    labels, seen = torch.eye(len(X)), []

    class Float32(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            seen.append((x.dtype, sigma.dtype, class_labels is labels))
            return super().__call__(x.float(), sigma.float())

    exact = edm_sampler(GaussianDenoiser(), X.float(), num_steps=12)
    got = edm_sampler(Float32(), X.float(), labels, num_steps=12)
    assert got.dtype == torch.float64
    assert seen == [(torch.float64, torch.float64, True)] * 23
    # Twelve answers rounded to 24 bits, each relative to entries below 1: the trajectory itself, of size 80,
    # adds nothing.
    assert 0 < (got - exact).abs().max() < 1e-6


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_an_answer_that_is_not_finite_stops_with_step_and_position(fault):
    class Broken(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            out = super().__call__(x, sigma)
            out[1, 0, 0, 0] = fault if sigma < 1 else 0
            return out

    with pytest.raises(NonFiniteError) as caught:
        edm_sampler(Broken(), X, num_steps=10)
    # Heun's correction of the step before looks at the first level below 1 already.
    step = (karras_sigmas(10, 0.002, 80, 7) >= 1).sum() - 1
    assert (caught.value.positions, caught.value.step_index) == ([1], step)


# Every solver with every discretization, schedule and scaling: table 1's columns, mixed

COLUMNS = {"solver": STEPS, "disc": DISCRETIZATIONS, "schedule": SCHEDULES, "scaling": SCALINGS}
EVERY = [dict(zip(COLUMNS, choice, strict=True)) for choice in itertools.product(*COLUMNS.values())]
SOME = [EVERY[i] for i in (1, 8, 21, 30, 34, 47)]  # each name of each column is among them
ENDS = {"sigma_min": 0.05, "sigma_max": 20.0}
ORDERS = {"euler": 1, "heun": 2}


def under(columns):
    return pytest.mark.parametrize("columns", columns, ids=lambda columns: "-".join(columns.values()))


class Time:
    """sigma(t), its inverse, s(t) and the exact solution of GaussianDenoiser(), worked out without the
    sampler's code.
    """

    def __init__(self, columns):
        # beta_d / 2 and beta_min of VP: sigma(0.001) and sigma(1) are the ends.
        ends = [math.log1p(level**2) for level in ENDS.values()]
        a, b = np.linalg.solve([[1e-6, 1e-3], [1.0, 1.0]], ends)
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
        return self.s(until) * GaussianDenoiser().solution(x / self.s(t), self.sigma(t), self.sigma(until))

    def slope(self, x, t):
        return (self.flow(x, t, t * (1 + 1e-5)) - self.flow(x, t, t * (1 - 1e-5))) / (2e-5 * t)


def walk(columns, num_steps, net=None, latents=X, **options):
    """(times, states) of a run: t_0 .. t_N = 0, and x there, the final one last."""
    time, steps = Time(columns), []
    run = {"num_steps": num_steps, "randn_like": Draws(), "on_step": lambda i, x: steps.append((i, x))}
    final = edm_sampler(net or GaussianDenoiser(), latents, **{**run, **ENDS, **columns, **options})
    numbers, later = zip(*steps, strict=True)
    assert numbers == tuple(range(num_steps))
    assert torch.equal(later[-1], final)
    levels = [float(level) for level in noise_levels(columns["disc"], num_steps, **ENDS)]
    times = [*map(time.inverse, levels), 0.0]
    return times, [time.s(times[0]) * levels[0] * latents, *later]


@under(EVERY)
def test_three_steps_of_every_column_by_hand(columns):
    time, (t, x) = Time(columns), walk(columns, 3)
    for i in range(3):
        step, slope = t[i + 1] - t[i], time.slope(x[i], t[i])
        if columns["solver"] == "heun" and i < 2:
            slope = (slope + time.slope(x[i] + step * slope, t[i + 1])) / 2
        torch.testing.assert_close(x[i + 1], x[i] + step * slope, rtol=1e-7, atol=1e-7)


@under(EVERY)
def test_every_column_converges_to_the_exact_solution(columns):
    time, errors, solver = Time(columns), [], columns["solver"]
    for num_steps in (200, 400):
        t, x = walk(columns, num_steps)
        # At the last level: the step from there to 0 is Euler's, and does not shrink.
        errors.append((x[-2] - time.flow(x[0], t[0], t[-2])).abs().max().item() / time.s(t[-2]))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.15)
    assert errors[1] < {"euler": 0.1, "heun": 0.003}[solver]


@under(EVERY)
@pytest.mark.parametrize(("guided", "S_churn"), [(True, 2), (False, 3)])  # 3 / 6 is above the cap
def test_churn_and_guidance_go_into_what_the_network_is_asked_under_any_column(columns, guided, S_churn):
    # The network is asked at x / s, which gets the same noise, one draw per step, whatever the scaling is.
    net, noise, time, calls = GaussianDenoiser(), Draws(), Time(columns), []

    def guidance(x, y, step):
        calls.append((x, y, step))
        return torch.sin(x) + step.index

    options = {"S_churn": S_churn, "S_min": 0.1, "S_max": 10, "S_noise": 1.1}
    t, x = walk(columns, 6, net, randn_like=noise, guidance=guidance if guided else None, y=Y, **options)
    asked = net.calls[:: 2 if columns["solver"] == "heun" else 1]
    assert (len(asked), len(noise.given), len(calls)) == (6, 6, 6 if guided else 0)
    for i, (x_hat, sigma) in enumerate(asked):
        level, point = time.sigma(t[i]), x[i] / time.s(t[i])
        gamma = min(S_churn / 6, math.sqrt(2) - 1) if 0.1 <= level <= 10 else 0
        assert sigma == pytest.approx(level * (1 + gamma), rel=1e-9)
        shift = torch.sin(point) + i if guided else 0
        expected = point + level * math.sqrt((1 + gamma) ** 2 - 1) * 1.1 * noise.given[i] + shift
        torch.testing.assert_close(x_hat, expected, rtol=1e-9, atol=1e-8 * (1 + level))
    for i, (at, y, step) in enumerate(calls):
        assert (step.index, step.num_steps, step.variance, step.variance_max) == (i, 6, 1, 1) and y is Y
        assert step.sigma == pytest.approx(time.sigma(t[i]), rel=1e-9)
        torch.testing.assert_close(at, x[i] / time.s(t[i]), rtol=1e-9, atol=1e-9)


@under([columns for columns in SOME if columns["solver"] == "heun"])
def test_churn_keeps_the_distribution(columns):
    # Standard errors of n draws: mean 0.5 / sqrt(n), standard deviation 0.5 / sqrt(2 n), five of each.
    n, latents = 30_000, draws(1, 3, 100, 100)
    final, still = (walk(columns, 256, latents=latents, S_churn=churn)[1][-1] for churn in (40, 0))
    assert float((final - still).abs().mean()) > 0.1
    assert abs(float(final.mean()) - 0.3) < 5 * 0.5 / math.sqrt(n)
    assert abs(float(final.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * n)


def guided(columns, form, num_steps):
    """x / s at the last level."""
    score = GuidedDenoiser(GaussianDenoiser(), ClassifierGuidance(linear, classifier_scale=0.35), Y)
    released = released_edm_guidance(linear, **{**RECIPE, "max_guidance": 0.5 / num_steps})
    options = {"guidance": released, "y": Y} if form == "released" else {"net": score}
    t, x = walk(columns, num_steps, **options)
    return x[-2] / Time(columns).s(t[-2])


@pytest.mark.parametrize("form", ["released", "score"])
@under([columns for columns in EVERY if columns["scaling"] == "none"])
def test_scaling_does_not_matter_to_guidance_in_the_limit_of_many_steps(columns, form):
    # Over N steps of strength 1 / N the released recipe tends to a limit, as the score form does by itself.
    scaled = {**columns, "scaling": "vp"}
    apart = [(guided(columns, form, n) - guided(scaled, form, n)).abs().max().item() for n in (50, 100)]
    assert (guided(columns, form, 100) - walk(columns, 100)[1][-2]).abs().max() > 0.05
    assert math.log2(apart[0] / apart[1]) == pytest.approx(ORDERS[columns["solver"]], abs=0.3)


@under(EVERY)
def test_strength_0_changes_no_bit_under_any_column(columns):
    off = ClassifierGuidance(linear, classifier_scale=0.0, gamma_factor=0.3)
    released = released_edm_guidance(linear, **{**RECIPE, "max_guidance": 0.0})
    for churn in ({"S_churn": 0}, {"S_churn": 2}):
        unguided = walk(columns, 3, **churn)[1][-1]
        assert torch.equal(walk(columns, 3, guidance=released, y=Y, **churn)[1][-1], unguided)
        guided = GuidedDenoiser(GaussianDenoiser(), off, Y)
        assert torch.equal(walk(columns, 3, guided, **churn)[1][-1], unguided)


def test_iddpm_steps_over_the_levels_of_its_network():
    net = iDDPMPrecond(4, 3, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()).eval()
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    edm_sampler(net, X, num_steps=10, sigma_min=0.002, sigma_max=81, disc="iddpm", solver="euler")
    assert set(seen) <= set(net.u.tolist())
    assert (seen[0], seen[-1]) == (net.u[8], net.u[999])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; choose euler or heun"),
        ({"disc": "ddim"}, "unknown discretization 'ddim'; choose vp, ve, iddpm, edm"),
        ({"schedule": "cosine"}, "schedule 'cosine'.*choose of vp, ve, linear"),
        ({"scaling": "ve"}, "scaling 've'.*vp, none"),
        ({"S_churn": -1}, "S_churn.*-1"),
        ({"sigma_max": 1e10}, r"sigma_max 1e\+10 is beyond"),
        ({"rho": 1e-3}, "rho 0.001 lead to numbers beyond all bounds"),
    ],
)
def test_options_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=message):
        edm_sampler(GaussianDenoiser(), X, **option)

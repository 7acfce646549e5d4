"""The solvers: orders, DDIM on the levels of a process, levels and callbacks."""

import math

import pytest
import torch
from toys import Draws, GaussianDenoiser, X, draws, linear, make_diffusion, process_levels, refuse, sample

from guided_diffusion.edm import edm_sampler
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.schedules import karras_sigmas
from guided_diffusion.solvers import SOLVERS, STEPS

ORDERS = {"euler": 1, "heun": 2}
every_solver = pytest.mark.parametrize("solver", STEPS)  # the others: test_fewstep_solvers.py


def levels(num_steps):
    return [*karras_sigmas(num_steps, 0.02, 20, 7), 0.0]


@every_solver
def test_the_error_falls_by_the_solvers_order(solver):
    # D(x, sigma) = x s^2 / (s^2 + sigma^2). The step to 0 is Euler's whatever the solver: look before it.
    net, errors = GaussianDenoiser(mean=0.0), []
    for num_steps in (100, 200):
        states = []
        SOLVERS[solver](net, 20 * X, levels(num_steps), on_step=lambda i, x, to=states: to.append(x))
        errors.append((states[-2] - net.solution(20 * X, 20, 0.02)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], abs=0.1)
    assert errors[1] < 0.02


@every_solver
def test_three_steps_by_hand(solver):
    net, (a, b, c) = GaussianDenoiser(mean=0.0, std=1.0), (10.0, 3.0, 0.5)  # dx/dt = x t / (1 + t^2)
    x, seen = 10 * X, []
    final = SOLVERS[solver](net, x, [a, b, c, 0.0], on_step=lambda i, x: seen.append((i, x)))
    for i, (now, then) in enumerate([(a, b), (b, c), (c, 0.0)]):
        slope = x * now / (1 + now**2)
        ahead = x + (then - now) * slope
        heun = solver == "heun" and then > 0
        x = x + (then - now) * (slope + ahead * then / (1 + then**2)) / 2 if heun else ahead
        assert seen[i][0] == i
        torch.testing.assert_close(seen[i][1], x, rtol=1e-12, atol=1e-12)
    assert len(seen) == 3 and torch.equal(final, seen[-1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_solver
def test_a_solver_is_edm_sampler_without_churn_in_float64(solver, dtype):
    noise = X.to(dtype)
    got = SOLVERS[solver](GaussianDenoiser(), noise.double() * 80.0, [*karras_sigmas(6, 0.002, 80, 7), 0.0])
    assert got.dtype == torch.float64
    expected = edm_sampler(GaussianDenoiser(), noise, num_steps=6, solver=solver)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", ["ddim25", 25, 200])
def test_euler_on_the_levels_of_a_process_is_ddim(steps, schedule, clip):
    diffusion = make_diffusion(steps, schedule=schedule, original=200 if steps == 200 else 1000)
    got, expected = (sample(name, diffusion, noise=X.float(), clip=clip) for name in ("euler", "ddim"))
    # float32 has 24 bits, and sigma falls from the largest level, which multiplies what eps is off by.
    scale = 1.0 if clip else max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=5e-5 * scale)


@pytest.mark.parametrize(
    ("steps", "scale", "gamma"),
    [("ddim25", 0.02, 0.0), ("ddim25", 0.02, 0.8), ("ddim50", -0.5, 0.3), (25, 0.5, 0.0)],
)
def test_euler_with_guidance_is_ddim_with_it(steps, scale, gamma):
    # The sine term counts timesteps of 1000 here and steps there: the same where the stride is whole.
    diffusion = make_diffusion(steps)
    options = {"classifier_scale": scale, "marginal_temperature": 0.5, "gamma_factor": gamma}
    guidance = ClassifierGuidance(linear, **options)
    got, expected = (sample(name, diffusion, guidance=guidance) for name in ("euler", "ddim"))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-5)
    assert (got - sample("euler", diffusion)).abs().max() > 1e-3


@every_solver
def test_levels_that_do_not_fall_to_zero_are_refused_before_anything_is_asked(solver):
    for wrong in (
        [],
        [0.0],
        [1.0],
        [2.0, 1.0],
        [1.0, 2.0, 0.0],
        [1.0, 1.0, 0.0],
        [math.nan, 0.0],
        [1.0, 0.0, -1.0],
    ):
        with pytest.raises(ValueError, match="noise levels must fall, and end with 0, got"):
            SOLVERS[solver](refuse, X, wrong)


@every_solver
def test_a_trajectory_that_leaves_the_finite_numbers_stops_with_step_and_positions(solver):
    def broken(x, sigma):
        out = GaussianDenoiser()(x, sigma)
        out[2] = math.inf if sigma < 1 else 0
        return out

    with pytest.raises(NonFiniteError) as caught:
        SOLVERS[solver](broken, X, [4.0, 2.0, 0.5, 0.0])
    # Heun looks at the level of the next step already.
    assert (caught.value.step_index, caught.value.positions) == ({"euler": 2, "heun": 1}[solver], [2])


@every_solver
def test_a_solver_without_noise_draws_none_and_takes_no_gradients(solver):
    def denoise(x, sigma):
        assert not torch.is_grad_enabled()
        return GaussianDenoiser()(x, sigma)

    source, x = Draws(), draws(*X.shape).requires_grad_()
    sigmas = process_levels(make_diffusion(4))
    assert not SOLVERS[solver](denoise, x, sigmas, randn_like=source).requires_grad
    assert source.given == []

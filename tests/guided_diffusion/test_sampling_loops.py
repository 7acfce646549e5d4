"""The ancestral and the DDIM loop: what they call and when, and what one step of each adds."""

import math

import numpy as np
import pytest
import torch
from toys import (
    LOOPS,
    SHAPE,
    Draws,
    N,
    X,
    Y,
    draws,
    linear,
    linear_gradient,
    make_diffusion,
    recorder,
    tanh_model,
)

from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.schedules import space_timesteps

pytestmark = pytest.mark.filterwarnings("error")
both_loops = pytest.mark.parametrize("loop", LOOPS.values())
each_index = pytest.mark.parametrize("index", [0, 1, 4, 7])


def run(loop, diffusion, model=tanh_model, noise=X, **options):
    options = {"randn_like": Draws(), **options}
    return getattr(diffusion, loop)(model, tuple(noise.shape), noise=noise, **options)


# Noise


@pytest.mark.parametrize("eta", [{}, {"eta": 0.0}, {"eta": 1.0}])
def test_one_draw_like_x_per_step_the_last_included(eta):
    loop = "ddim_sample_loop" if eta else "p_sample_loop"
    source = Draws()
    steps = run(f"{loop}_progressive", make_diffusion(), randn_like=source, **eta)
    assert [len(source.given) for _ in steps] == list(range(1, 9))
    assert {(draw.shape, draw.dtype) for draw in source.given} == {(SHAPE, torch.float64)}


def test_ancestral_noise_is_used_in_order_and_not_at_the_last_step():
    diffusion, source, x = make_diffusion(4, mean="START_X"), Draws(), X
    got = run("p_sample_loop", diffusion, lambda x, t: torch.zeros_like(x), randn_like=source)
    for t, z in zip((3, 2, 1, 0), source.given, strict=True):
        x = diffusion.posterior_mean_coef2[t] * x + (t > 0) * diffusion.posterior_variance[t] ** 0.5 * z
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


class WithStart(Draws):
    """A source with a `randn` of its own for x_T."""

    def randn(self, shape):
        return torch.full(shape, 0.25)


@both_loops
def test_where_x_T_comes_from(loop):
    seen, diffusion = [], make_diffusion(3)

    def model(x, t):
        seen.append(x.clone())
        return tanh_model(x, t)

    run(loop, diffusion, model)
    source = Draws()
    getattr(diffusion, loop)(model, SHAPE, randn_like=source)
    getattr(diffusion, loop)(model, SHAPE, randn_like=WithStart())
    assert len(source.given) == 4
    for got, expected in zip(seen[::3], (X, source.given[0], torch.full(SHAPE, 0.25)), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(4, 3, 4, 4\)"):
        getattr(diffusion, loop)(model, SHAPE, noise=X[:2])


def test_default_noise_follows_the_global_seed():
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(make_diffusion(2).p_sample_loop(tanh_model, SHAPE))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


# Device


class Halt(Exception):
    pass


# A network whose parameters are on another device than the CPU, as far as a test without one can tell.
ON_META = torch.nn.Linear(1, 1, device="meta")


@both_loops
@pytest.mark.parametrize(
    ("model", "noise", "device", "expected"),
    [
        (tanh_model, None, None, "cpu"),
        (torch.nn.Identity(), None, None, "cpu"),
        (ON_META, None, None, "meta"),
        (ON_META, torch.zeros(SHAPE), None, "cpu"),
        (tanh_model, torch.zeros(SHAPE, device="meta"), None, "meta"),
        (tanh_model, torch.zeros(SHAPE), "meta", "meta"),
        (ON_META, None, torch.device("cpu"), "cpu"),
    ],
)
def test_device_is_the_one_asked_for_else_the_noises_else_the_models(loop, model, noise, device, expected):
    def randn_like(x):
        raise Halt(x.device.type)

    with pytest.raises(Halt, match=expected):
        getattr(make_diffusion(), loop)(model, SHAPE, noise=noise, device=device, randn_like=randn_like)


# What is handed to the callables


@both_loops
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("steps", "original"), [(4, 1000), (5, 100)])
def test_model_and_cond_fn_see_the_original_timesteps_and_model_kwargs(loop, rescale, steps, original):
    seen = {"model": [], "cond_fn": []}

    def model(x, t, y, extra):
        assert y is Y and extra == 7
        seen["model"].append(t.tolist())
        return tanh_model(x, t)

    def cond_fn(x, t, y, extra):
        assert y is Y and extra == 7
        seen["cond_fn"].append(t.tolist())
        return torch.zeros_like(x)

    diffusion = make_diffusion(steps, original=original, rescale=rescale)
    run(loop, diffusion, model, cond_fn=cond_fn, model_kwargs={"y": Y, "extra": 7})
    kept, factor = sorted(space_timesteps(original, [steps]), reverse=True), 1000 / original if rescale else 1
    assert seen["model"] == seen["cond_fn"] == [[t * factor] * N for t in kept]


@both_loops
@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_is_the_callers_own_between_steps_and_off_in_the_model(loop, enabled):
    modes = []

    def model(x, t, y):
        modes.append(torch.is_grad_enabled())
        return tanh_model(x, t)

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(linear(x)[:, 0].sum(), x)[0]

    conditions = {"model_kwargs": {"y": Y}, "guidance": ClassifierGuidance(linear), "cond_fn": cond_fn}
    steps = run(f"{loop}_progressive", make_diffusion(), model, X.clone().requires_grad_(), **conditions)
    with torch.set_grad_enabled(enabled):
        for out in steps:
            assert torch.is_grad_enabled() == enabled
            assert not out["sample"].requires_grad
    assert modes == [False] * 8


@both_loops
def test_the_progressive_form_with_and_without_clamping(loop):
    diffusion, largest = make_diffusion(3), []
    for clip in (True, False):
        steps = list(run(f"{loop}_progressive", diffusion, clip_denoised=clip))
        assert len(steps) == 3
        assert torch.equal(steps[-1]["sample"], run(loop, diffusion, clip_denoised=clip))
        largest.append(max(out["pred_xstart"].abs().max() for out in steps))
    assert largest[0] <= 1 < largest[1]
    for out in run(f"{loop}_progressive", diffusion, denoised_fn=lambda x: x.abs() + 10):
        assert torch.equal(out["pred_xstart"], torch.ones_like(X))  # it comes before the clamp


@both_loops
def test_what_cannot_be(loop):
    for model_kwargs in (None, {}, {"other": 1}, {"y": None}):
        with pytest.raises(ValueError, match=r"guidance.*model_kwargs.*y"):
            run(loop, make_diffusion(), guidance=ClassifierGuidance(linear), model_kwargs=model_kwargs)
    choice = {"p_sample_loop": "batch", "ddim_sample_loop": "first_pixel"}[loop]
    with pytest.raises(ValueError, match=rf"variance_max '{choice}'.*schedule"):
        run(loop, make_diffusion(), variance_max=choice)


# The variances that guidance is told


def learned_model(x, t, y):
    """A learned variance that rises and falls over the steps, with the label and from pixel to pixel."""
    fraction = torch.sin(t.double() * 0.01 + y).view(-1, 1, 1, 1) + 0.1 * torch.arange(4)
    return torch.cat([tanh_model(x, t), fraction.to(x.dtype).expand(x.shape)], 1)


@pytest.mark.parametrize("choice", ["schedule", "first_pixel"])
def test_ancestral_guidance_is_told_the_models_variance_and_a_running_maximum(choice):
    diffusion, seen = make_diffusion(var="LEARNED_RANGE"), []
    told = {"guidance": recorder(seen), "model_kwargs": {"y": Y}, "variance_max": choice}
    outs = list(run("p_sample_loop_progressive", diffusion, learned_model, **told))
    pixels = [float(out["variance"][0, 0, 0, 0]) for out in outs]
    posterior = diffusion.posterior_variance[::-1]
    maxima = np.maximum.accumulate(pixels if choice == "first_pixel" else posterior)
    assert [step.variance_max for _, _, step in seen] == maxima.tolist()
    assert len(set(pixels)) == 8
    for out, (x, y, step) in zip(outs, seen, strict=True):
        assert y is Y and torch.equal(x, out["pred_xstart"]) and x.abs().max() <= 1
        assert torch.equal(step.variance, out["variance"])


def test_running_maximum_of_the_published_schedule():
    seen = []
    run("p_sample_loop", make_diffusion(250), guidance=recorder(seen), model_kwargs={"y": Y})
    for _, _, step in seen:
        assert step.variance_max == pytest.approx(0.077519 if step.index >= 209 else 0.08072, abs=5e-7)


@pytest.mark.parametrize(("choice", "depends"), [("schedule", False), ("first_pixel", True)])
def test_only_first_pixel_depends_on_batch_mates(choice, depends):
    diffusion, guidance = make_diffusion(var="LEARNED_RANGE"), ClassifierGuidance(linear, gamma_factor=0.3)
    options = {"guidance": guidance, "noise": X[:2], "variance_max": choice}
    apart = [
        run(
            "p_sample_loop", diffusion, learned_model, model_kwargs={"y": torch.tensor([label, 2])}, **options
        )
        for label in (0, 4)
    ]
    # The same numbers in float64, in which a difference of the maximum of 1e-3 would be seen.
    assert ((apart[0][1] - apart[1][1]).abs().max() > 1e-6) == depends


# What one step adds


@each_index
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
def test_one_ancestral_step_by_hand(variance, clip, index):
    diffusion, z, t = make_diffusion(var=variance), draws(*SHAPE, seed=3), torch.full((N,), index)
    model = learned_model if variance == "LEARNED_RANGE" else tanh_model
    options = {"clip_denoised": clip, "model_kwargs": {"y": Y}}
    guidance = ClassifierGuidance(
        linear, joint_temperature=1.5, marginal_temperature=0.5, classifier_scale=2.0, gamma_factor=0.3
    )
    got = diffusion.p_sample(model, X, t, guidance=guidance, noise=z, **options)["sample"]

    p = diffusion.p_mean_variance(model, X, t, **options)
    strength = p["variance"] + 0.3 * max(diffusion.posterior_variance[index:]) * math.sin(math.pi * index / 8)
    shift = strength * 2.0 * linear_gradient(p["pred_xstart"], Y, 1.5, 0.5)
    expected = p["mean"] + shift + (index > 0) * torch.exp(0.5 * p["log_variance"]) * z
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@each_index
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_one_ddim_step_by_hand(clip, eta, index):
    diffusion, z, t = make_diffusion(), draws(*SHAPE, seed=3), torch.full((N,), index)
    guidance = ClassifierGuidance(linear, marginal_temperature=0.0, classifier_scale=2.0, gamma_factor=0.3)
    options = {"clip_denoised": clip, "model_kwargs": {"y": Y}}
    got = diffusion.ddim_sample(tanh_model, X, t, guidance=guidance, noise=z, eta=eta, **options)

    a, previous = diffusion.alphas_cumprod[index], diffusion.alphas_cumprod_prev[index]
    strength = (1 - a) / math.sqrt(a) * (1 + 0.3 * math.sin(math.pi * index / 8))
    x_0 = diffusion.p_mean_variance(tanh_model, X, t, **options)["pred_xstart"]
    x_0 = x_0 + strength * 2.0 * linear_gradient(X, Y, 1.0, 0.0)  # not clamped again
    eps = (X - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    sigma = eta * math.sqrt((1 - previous) / (1 - a)) * math.sqrt(1 - a / previous)
    expected = math.sqrt(previous) * x_0 + math.sqrt(max(1 - previous - sigma**2, 0)) * eps + sigma * z
    # eps is a quotient by sqrt(1 - a) >= 0.01: 1e-16 times 100 times numbers below 100.
    torch.testing.assert_close(got["sample"], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(got["pred_xstart"], x_0, rtol=1e-12, atol=1e-11)


@each_index
def test_cond_fn_moves_the_ancestral_mean_by_variance_times_gradient_and_the_eps_of_ddim(index):
    diffusion, t, gradient = make_diffusion(var="FIXED_LARGE"), torch.full((N,), index), draws(*SHAPE, seed=2)
    gradient, still = gradient.float(), torch.zeros_like(X)
    plain, moved = (
        diffusion.p_sample(tanh_model, X, t, cond_fn=cond_fn, noise=still)["sample"]
        for cond_fn in (None, lambda x, t: gradient)
    )
    variance = diffusion.betas[index] if index else diffusion.posterior_variance[1]
    torch.testing.assert_close(moved - plain, variance * gradient.double(), rtol=0, atol=1e-12)

    got = diffusion.ddim_sample(tanh_model, X, t, clip_denoised=False, cond_fn=lambda x, t: gradient)
    a, previous = diffusion.alphas_cumprod[index], diffusion.alphas_cumprod_prev[index]
    eps = tanh_model(X, torch.full((N,), diffusion.timestep_map[index]))
    eps = eps - math.sqrt(1 - a) * gradient.double()
    expected = math.sqrt(previous) * (X - math.sqrt(1 - a) * eps) / math.sqrt(a)
    # x_0 is a quotient by sqrt(a) >= 0.006: 1e-16 times a few hundred times numbers below 1000.
    torch.testing.assert_close(got["sample"], expected + math.sqrt(1 - previous) * eps, rtol=0, atol=1e-10)

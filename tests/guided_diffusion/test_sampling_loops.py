"""The ancestral and the DDIM loop: what they call and when, what they add, and an analytic denoiser sent
through them.

If the data are N(mu, s^2) in every pixel, then, with a the cumulative alpha, x_t is N(sqrt(a) mu, a s^2 + 1 -
a), and the best prediction of x_0 is mu + sqrt(a) s^2 / (a s^2 + 1 - a) (x_t - sqrt(a) mu), with the variance
s^2 (1 - a) / (a s^2 + 1 - a).
"""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    ModelMeanType,
    ModelVarType,
)
from guided_diffusion.guidance import ClassifierGuidance
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps

N, SHAPE = 3, (3, 3, 8, 8)
Y = torch.tensor([0, 3, 1])
LOOPS = ["p_sample_loop", "ddim_sample_loop"]
EPSILON, START_X = ModelMeanType.EPSILON, ModelMeanType.START_X
SMALL, LARGE, LEARNED = ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE, ModelVarType.LEARNED_RANGE


def make_diffusion(steps=8, mean=EPSILON, var=SMALL, schedule="linear", original=1000, **options):
    return GaussianDiffusion(
        betas=get_named_beta_schedule(schedule, original),
        model_mean_type=mean,
        model_var_type=var,
        use_timesteps=space_timesteps(original, [steps]),
        **options,
    )


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_source(seed=0):
    """A randn_like of its own stream; `calls` counts the draws."""
    generator = torch.Generator().manual_seed(seed)

    def randn_like(x):
        randn_like.calls += 1
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    randn_like.calls = 0
    return randn_like


def tanh_model(x, t, y=None):
    """Any network: eps that depends on everything that it is given."""
    return torch.tanh(x + 0.001 * t.view(-1, 1, 1, 1)) + (0 if y is None else 0.1 * y.view(-1, 1, 1, 1))


WEIGHT = draws(5, 3 * 8 * 8, seed=1)


def linear(x):
    return 0.1 * x.flatten(1) @ WEIGHT.to(x.dtype).T


def run(loop, diffusion, model=tanh_model, noise=None, seed=5, **options):
    noise = draws(*SHAPE, seed=9, dtype=torch.float32) if noise is None else noise
    return getattr(diffusion, loop)(
        model, tuple(noise.shape), noise=noise, randn_like=random_source(seed), **options
    )


class Halt(Exception):
    """Ends a loop from within a callable."""


# Off means off


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", [SMALL, LARGE])
@pytest.mark.parametrize("loop", LOOPS)
def test_no_guidance_and_scale_zero_are_the_unguided_sampler_bit_for_bit(loop, variance, clip):
    diffusion = make_diffusion(var=variance)
    options = {"model_kwargs": {"y": Y}, "clip_denoised": clip}
    plain = run(loop, diffusion, **options)
    off = ClassifierGuidance(linear, classifier_scale=0.0, gamma_factor=0.3)
    on = ClassifierGuidance(linear)
    assert torch.equal(run(loop, diffusion, guidance=None, **options), plain)
    assert torch.equal(run(loop, diffusion, guidance=off, **options), plain)
    assert not torch.equal(run(loop, diffusion, guidance=on, **options), plain)


@pytest.mark.parametrize("loop", LOOPS)
def test_guidance_shifts_the_last_step_too(loop):
    def last_step_alone(x, y, step):
        return torch.full_like(x, 0.25 if step.index == 0 else 0.0)

    options = {"model_kwargs": {"y": Y}}
    shifted = run(loop, make_diffusion(), guidance=last_step_alone, **options)
    torch.testing.assert_close(shifted, run(loop, make_diffusion(), **options) + 0.25)


def test_half_precision_images_are_not_sampled_with_half_precision_tables():
    diffusion, x = make_diffusion(), draws(*SHAPE, dtype=torch.float32)
    t = torch.zeros(len(x), dtype=torch.int64)
    torch.testing.assert_close(
        diffusion.q_sample(x.half(), t, x.half()), diffusion.q_sample(x.half().float(), t, x.half().float())
    )


def test_a_network_that_answers_infinity_is_named_before_the_clamp_hides_it():
    def model(x, t, **_):
        output = tanh_model(x, t)
        output[1, 0, 0, 0] = float("inf")
        return output

    with pytest.raises(NonFiniteError) as caught:
        run("p_sample_loop", make_diffusion(steps=8), model)
    assert (caught.value.step_index, caught.value.positions) == (7, [1])


# Noise


@pytest.mark.parametrize(
    ("loop", "options"), [("p_sample_loop", {}), ("ddim_sample_loop", {}), ("ddim_sample_loop", {"eta": 1.0})]
)
def test_one_draw_per_step_the_last_included(loop, options):
    source, x = random_source(), draws(*SHAPE, dtype=torch.float32)
    steps = getattr(make_diffusion(steps=8), f"{loop}_progressive")(
        tanh_model, SHAPE, noise=x, randn_like=source, **options
    )
    assert [source.calls for _ in steps] == list(range(1, 9))


@pytest.mark.parametrize("loop", LOOPS)
def test_draws_have_the_shape_and_dtype_of_x(loop):
    seen = []

    def randn_like(x):
        seen.append((x.shape, x.dtype))
        return torch.zeros_like(x)

    getattr(make_diffusion(steps=3), loop)(tanh_model, SHAPE, noise=draws(*SHAPE), randn_like=randn_like)
    assert seen == [(SHAPE, torch.float64)] * 3


def test_ancestral_noise_is_used_in_order_and_not_at_the_last_step():
    diffusion, model = make_diffusion(steps=4, mean=START_X), lambda x, t: torch.zeros_like(x)
    noises = [draws(1, 1, 2, 2, seed=i) for i in range(5)]
    remaining = iter(noises[1:])
    got = diffusion.p_sample_loop(model, (1, 1, 2, 2), noise=noises[0], randn_like=lambda x: next(remaining))
    x = noises[0]
    for t, z in zip((3, 2, 1, 0), noises[1:], strict=True):
        x = diffusion.posterior_mean_coef2[t] * x + (t > 0) * diffusion.posterior_variance[t] ** 0.5 * z
    assert next(remaining, None) is None
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loop", LOOPS)
def test_initial_noise_is_the_one_given(loop):
    seen, x = [], draws(*SHAPE, dtype=torch.float32)

    def model(x, t):
        seen.append(x.clone())
        return tanh_model(x, t)

    run(loop, make_diffusion(), model, noise=x)
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("loop", LOOPS)
def test_initial_noise_from_randn_if_the_object_has_one(loop):
    class Source:
        def __init__(self):
            self.asked = []

        def randn(self, shape):
            self.asked.append(tuple(shape))
            return torch.full(shape, 0.25)

        def __call__(self, x):
            self.asked.append("like")
            return torch.zeros_like(x)

    source, seen = Source(), []

    def model(x, t):
        seen.append(x.clone())
        return tanh_model(x, t)

    getattr(make_diffusion(steps=3), loop)(model, SHAPE, randn_like=source)
    assert source.asked == [SHAPE, "like", "like", "like"]
    assert torch.equal(seen[0], torch.full(SHAPE, 0.25))


@pytest.mark.parametrize("loop", LOOPS)
def test_initial_noise_is_else_the_first_draw(loop):
    diffusion, source = make_diffusion(steps=3), random_source(4)
    got = getattr(diffusion, loop)(tanh_model, SHAPE, randn_like=source)
    assert source.calls == 4
    replay = random_source(4)
    first = replay(torch.empty(SHAPE))
    assert torch.equal(got, getattr(diffusion, loop)(tanh_model, SHAPE, noise=first, randn_like=replay))


def test_default_noise_follows_the_global_seed():
    torch.manual_seed(3)
    first = make_diffusion(steps=2).p_sample_loop(tanh_model, SHAPE)
    torch.manual_seed(3)
    assert torch.equal(first, make_diffusion(steps=2).p_sample_loop(tanh_model, SHAPE))
    assert not torch.equal(first, make_diffusion(steps=2).p_sample_loop(tanh_model, SHAPE))


@pytest.mark.parametrize("loop", LOOPS)
def test_noise_of_another_shape_is_refused(loop):
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(3, 3, 8, 8\)"):
        getattr(make_diffusion(), loop)(tanh_model, SHAPE, noise=torch.zeros(2, 3, 8, 8))


# Device


class OnMeta(torch.nn.Module):
    """A network whose parameters are on another device than the CPU, as far as a test without one can
    tell.
    """

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1, device="meta"))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("model", "noise", "device", "expected"),
    [
        (tanh_model, None, None, "cpu"),
        (torch.nn.Identity(), None, None, "cpu"),
        (OnMeta(), None, None, "meta"),
        (OnMeta(), torch.zeros(SHAPE), None, "cpu"),
        (tanh_model, torch.zeros(SHAPE, device="meta"), None, "meta"),
        (tanh_model, None, "meta", "meta"),
        (tanh_model, torch.zeros(SHAPE), "meta", "meta"),
        (OnMeta(), None, "cpu", "cpu"),
        (OnMeta(), None, torch.device("cpu"), "cpu"),
    ],
)
def test_device_is_the_one_asked_for_else_the_noises_else_the_parameters_else_the_cpu(
    loop, model, noise, device, expected
):
    def randn_like(x):
        raise Halt(x.device.type)

    with pytest.raises(Halt, match=expected):
        getattr(make_diffusion(), loop)(model, SHAPE, noise=noise, device=device, randn_like=randn_like)


# What is handed to the callables


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("steps", "original"), [(4, 1000), (5, 100)])
def test_model_and_cond_fn_see_the_original_timesteps_and_model_kwargs(loop, rescale, steps, original):
    diffusion = make_diffusion(steps=steps, original=original, rescale_timesteps=rescale)
    seen = {"model": [], "cond_fn": []}

    def model(x, t, y, extra):
        assert y is Y and extra == 7
        seen["model"].append(t.tolist())
        return tanh_model(x, t)

    def cond_fn(x, t, y, extra):
        assert y is Y and extra == 7
        seen["cond_fn"].append(t.tolist())
        return torch.zeros_like(x)

    run(loop, diffusion, model, cond_fn=cond_fn, model_kwargs={"y": Y, "extra": 7})
    kept = sorted(space_timesteps(original, [steps]), reverse=True)
    factor = 1000 / original if rescale else 1
    assert seen["model"] == [[t * factor] * N for t in kept]
    assert seen["cond_fn"] == seen["model"]


@pytest.mark.parametrize("loop", LOOPS)
def test_model_sees_no_gradients_but_cond_fn_can_take_them(loop):
    modes = []

    def model(x, t):
        modes.append(torch.is_grad_enabled())
        return tanh_model(x, t)

    def cond_fn(x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(linear(x)[:, 0].sum(), x)[0]

    with torch.enable_grad():
        sample = run(
            loop,
            make_diffusion(),
            model,
            cond_fn=cond_fn,
            noise=draws(*SHAPE, dtype=torch.float32).requires_grad_(),
        )
    assert modes == [False] * 8
    assert not sample.requires_grad
    assert not torch.equal(
        sample, run(loop, make_diffusion(), model, noise=draws(*SHAPE, dtype=torch.float32))
    )


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode_of_the_caller_is_its_own_between_steps(loop, enabled):
    steps = getattr(make_diffusion(), f"{loop}_progressive")(
        tanh_model, SHAPE, model_kwargs={"y": Y}, guidance=ClassifierGuidance(linear)
    )
    with torch.set_grad_enabled(enabled):
        assert [torch.is_grad_enabled() for _ in steps] == [enabled] * 8


@pytest.mark.parametrize("loop", LOOPS)
def test_progressive_form_ends_in_the_result_of_the_loop(loop):
    diffusion = make_diffusion()
    steps = list(run(f"{loop}_progressive", diffusion))
    assert len(steps) == 8
    assert all({"sample", "pred_xstart"} <= set(out) for out in steps)
    assert all(torch.isfinite(out["sample"]).all() for out in steps)
    assert torch.equal(steps[-1]["sample"], run(loop, diffusion))


@pytest.mark.parametrize("loop", LOOPS)
def test_denoised_fn_comes_before_the_clamp(loop):
    seen = []

    def denoised_fn(x):
        seen.append(float(x.abs().max()))
        return x.abs() + 10

    for out in run(f"{loop}_progressive", make_diffusion(steps=3), denoised_fn=denoised_fn):
        assert torch.equal(out["pred_xstart"], torch.ones(SHAPE))
    assert len(seen) == 3
    assert max(seen) > 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("clip", [True, False])
def test_clip_denoised(loop, clip):
    predictions = [
        out["pred_xstart"] for out in run(f"{loop}_progressive", make_diffusion(steps=3), clip_denoised=clip)
    ]
    assert (max(float(p.abs().max()) for p in predictions) <= 1) == clip


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("model_kwargs", [None, {}, {"other": 1}, {"y": None}])
def test_guidance_without_labels(loop, model_kwargs):
    with pytest.raises(ValueError, match=r"guidance.*model_kwargs.*y"):
        run(loop, make_diffusion(), guidance=ClassifierGuidance(linear), model_kwargs=model_kwargs)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("variance", "channels"), [(LEARNED, 3), (SMALL, 6), (LARGE, 6), (LEARNED, 4), (SMALL, 1)]
)
def test_wrong_number_of_channels_names_learn_sigma(loop, variance, channels):
    with pytest.raises(ValueError, match="learn_sigma") as caught:
        run(loop, make_diffusion(var=variance), lambda x, t: torch.zeros(len(x), channels, 8, 8))
    assert f"({N}, {channels}, 8, 8)" in str(caught.value)


@pytest.mark.parametrize(
    ("loop", "choice"), [("p_sample_loop", "batch"), ("ddim_sample_loop", "first_pixel")]
)
def test_variance_max_that_the_loop_does_not_know(loop, choice):
    with pytest.raises(ValueError, match=rf"variance_max '{choice}'.*schedule"):
        run(loop, make_diffusion(), variance_max=choice)


# Variances


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_tables_follow_from_the_betas(schedule, steps):
    diffusion = make_diffusion(steps=steps, schedule=schedule)
    betas = get_named_beta_schedule(schedule, 1000)
    kept = sorted(space_timesteps(1000, [steps]))
    np.testing.assert_allclose(diffusion.alphas_cumprod, np.cumprod(1 - betas)[kept], rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - diffusion.betas), diffusion.alphas_cumprod, rtol=1e-12)
    previous = np.append(1.0, diffusion.alphas_cumprod[:-1])
    expected = diffusion.betas * (1 - previous) / (1 - diffusion.alphas_cumprod)
    np.testing.assert_allclose(diffusion.posterior_variance, expected, rtol=1e-12)
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == np.float64
    assert diffusion.num_timesteps == steps


@pytest.mark.parametrize("fraction", [-1.0, -0.3, 0.0, 1.0])
@pytest.mark.parametrize("t", [0, 1, 5, 7])
def test_learned_variance_interpolates_in_log_space(fraction, t):
    diffusion, x = make_diffusion(var=LEARNED), draws(2, 3, 4, 4)
    out = diffusion.p_mean_variance(
        lambda x, t: torch.cat([x, torch.full_like(x, fraction)], 1), x, torch.tensor([t, t])
    )
    low, high = math.log(diffusion.posterior_variance[max(t, 1)]), math.log(diffusion.betas[t])
    expected = high * (fraction + 1) / 2 + low * (1 - fraction) / 2
    torch.testing.assert_close(out["log_variance"], torch.full_like(x, expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(out["variance"], torch.full_like(x, math.exp(expected)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0, 1, 5, 7])
@pytest.mark.parametrize("variance", [SMALL, LARGE])
def test_fixed_variances(variance, t):
    diffusion, x = make_diffusion(var=variance), draws(2, 3, 4, 4)
    out = diffusion.p_mean_variance(lambda x, t: x, x, torch.tensor([t, t]))
    clipped = diffusion.posterior_variance[max(t, 1)]
    expected_log = clipped if variance is SMALL or t == 0 else diffusion.betas[t]
    expected = diffusion.posterior_variance[t] if variance is SMALL else expected_log
    torch.testing.assert_close(out["variance"], torch.full_like(x, expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        out["log_variance"], torch.full_like(x, math.log(expected_log)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("mean", [EPSILON, START_X])
def test_mean_is_the_posteriors_at_the_prediction(mean):
    diffusion, x = make_diffusion(mean=mean), draws(2, 3, 4, 4)
    t = torch.tensor([2, 6])
    out = diffusion.p_mean_variance(lambda x, t: 0.1 * x, x, t, clip_denoised=False)
    a, previous, beta = (
        table[[2, 6]] for table in (diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev, diffusion.betas)
    )
    a, previous, beta = (torch.tensor(v).view(2, 1, 1, 1) for v in (a, previous, beta))
    x_0 = 0.1 * x if mean is START_X else (x - (1 - a).sqrt() * 0.1 * x) / a.sqrt()
    torch.testing.assert_close(out["pred_xstart"], x_0, rtol=1e-12, atol=1e-12)
    expected = (previous.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - previous) * x) / (1 - a)
    torch.testing.assert_close(out["mean"], expected, rtol=1e-12, atol=1e-12)


def test_q_sample_draws_from_the_marginal():
    diffusion, x, noise = make_diffusion(), draws(2, 3, 4, 4), draws(2, 3, 4, 4, seed=1)
    a = torch.tensor(diffusion.alphas_cumprod[[0, 7]]).view(2, 1, 1, 1)
    got = diffusion.q_sample(x, torch.tensor([0, 7]), noise)
    torch.testing.assert_close(got, a.sqrt() * x + (1 - a).sqrt() * noise, rtol=1e-12, atol=1e-12)


# What guidance is told


def recorder(steps):
    def guidance(x, y, step):
        steps.append((x.clone(), y, step))
        return torch.full_like(x, -0.0)

    return guidance


def test_ancestral_guidance_is_told_the_models_variance_and_the_schedules_maximum():
    diffusion, seen = make_diffusion(var=LEARNED), []

    def model(x, t, y):
        return torch.cat([tanh_model(x, t), torch.full_like(x, 0.2)], 1)

    outs = list(
        run("p_sample_loop_progressive", diffusion, model, guidance=recorder(seen), model_kwargs={"y": Y})
    )
    assert [step.index for _, _, step in seen] == list(range(7, -1, -1))
    for out, (x, y, step) in zip(outs, seen, strict=True):
        assert y is Y and step.num_steps == 8
        assert torch.equal(x, out["pred_xstart"]) and x.abs().max() <= 1
        assert torch.equal(step.variance, out["variance"])
        assert step.variance_max == max(diffusion.posterior_variance[step.index :])
        a = diffusion.alphas_cumprod[step.index]
        assert step.sigma == pytest.approx(math.sqrt((1 - a) / a), rel=1e-12)


def test_ddim_guidance_is_told_the_rule_for_eps_in_terms_of_x0():
    diffusion, seen = make_diffusion(), []
    run("ddim_sample_loop", diffusion, guidance=recorder(seen), model_kwargs={"y": Y})
    assert [step.index for _, _, step in seen] == list(range(7, -1, -1))
    for x, y, step in seen:
        a = diffusion.alphas_cumprod[step.index]
        assert y is Y and step.num_steps == 8
        assert x.abs().max() <= 1
        assert step.variance == pytest.approx((1 - a) / math.sqrt(a), rel=1e-12)
        assert step.variance_max == step.variance
        assert step.sigma == pytest.approx(math.sqrt((1 - a) / a), rel=1e-12)


def test_running_maximum_of_the_published_schedule():
    seen = []
    diffusion = make_diffusion(steps=250, var=LEARNED)
    run(
        "p_sample_loop",
        diffusion,
        lambda x, t, y: torch.cat([x, x], 1),
        guidance=recorder(seen),
        model_kwargs={"y": Y},
    )
    for _, _, step in seen:
        assert step.variance_max == pytest.approx(0.077519 if step.index >= 209 else 0.08072, abs=5e-7)


def first_pixel_model(x, t, y):
    """A learned variance that rises and falls over the steps, with the label and from pixel to pixel."""
    fraction = torch.sin(t.double() * 0.01 + y).view(-1, 1, 1, 1) + 0.1 * torch.arange(8)
    return torch.cat([tanh_model(x, t), fraction.to(x.dtype).expand(x.shape)], 1)


def test_first_pixel_is_the_running_maximum_over_the_steps_of_the_first_image():
    seen = []
    outs = run(
        "p_sample_loop_progressive", make_diffusion(var=LEARNED), first_pixel_model,
        guidance=recorder(seen), model_kwargs={"y": Y}, variance_max="first_pixel",
    )  # fmt: skip
    pixels = [float(out["variance"][0, 0, 0, 0]) for out in outs]
    assert [step.variance_max for _, _, step in seen] == list(np.maximum.accumulate(pixels))
    assert len(set(pixels)) == 8


@pytest.mark.parametrize(("choice", "depends"), [("schedule", False), ("first_pixel", True)])
def test_only_first_pixel_depends_on_batch_mates(choice, depends):
    diffusion, guidance = make_diffusion(var=LEARNED), ClassifierGuidance(linear, gamma_factor=0.3)
    noises = draws(8, *SHAPE, seed=3)
    results = []
    for neighbour in (0, 4):
        pair = torch.tensor([neighbour, 2])
        steps = iter(noises[:, :2])
        options = {
            "noise": noises[-1, :2],
            "randn_like": lambda x, steps=steps: next(steps),
            "variance_max": choice,
        }
        sample = diffusion.p_sample_loop(
            first_pixel_model, (2, *SHAPE[1:]), model_kwargs={"y": pair}, guidance=guidance, **options
        )
        results.append(sample[1])
    # The same numbers in float64, in which a difference of the maximum of 1e-3 would be seen.
    assert ((results[0] - results[1]).abs().max() > 1e-6) == depends


# What the loops add


@pytest.mark.parametrize("index", [0, 1, 4, 7])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", [SMALL, LARGE, LEARNED])
def test_one_ancestral_step_by_hand(variance, clip, index):
    diffusion, x, z = make_diffusion(var=variance), draws(*SHAPE), draws(*SHAPE, seed=1)
    t = torch.full((N,), index)

    def model(x, t, y):
        return (
            tanh_model(x, t, y)
            if variance is not LEARNED
            else torch.cat([tanh_model(x, t, y), torch.tanh(x)], 1)
        )

    guidance = ClassifierGuidance(
        linear, joint_temperature=1.5, marginal_temperature=0.5, classifier_scale=2.0, gamma_factor=0.3
    )
    got = diffusion.p_sample(
        model, x, t, clip_denoised=clip, model_kwargs={"y": Y}, guidance=guidance, noise=z
    )["sample"]

    p = diffusion.p_mean_variance(model, x, t, clip_denoised=clip, model_kwargs={"y": Y})
    w = 0.1 * WEIGHT
    gradient = (1.5 * w[Y] - 0.5 * torch.softmax(0.5 * linear(p["pred_xstart"]), 1) @ w).view(SHAPE)
    strength = p["variance"] + 0.3 * max(diffusion.posterior_variance[index:]) * math.sin(math.pi * index / 8)
    expected = p["mean"] + strength * 2.0 * gradient + (index > 0) * torch.exp(0.5 * p["log_variance"]) * z
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1, 4, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_one_ddim_step_by_hand(clip, eta, index):
    diffusion, x, z = make_diffusion(), draws(*SHAPE), draws(*SHAPE, seed=1)
    t = torch.full((N,), index)
    guidance = ClassifierGuidance(linear, marginal_temperature=0.0, classifier_scale=2.0, gamma_factor=0.3)
    options = {"clip_denoised": clip, "model_kwargs": {"y": Y}}
    got = diffusion.ddim_sample(tanh_model, x, t, guidance=guidance, noise=z, eta=eta, **options)

    a, previous = diffusion.alphas_cumprod[index], diffusion.alphas_cumprod_prev[index]
    x_0 = diffusion.p_mean_variance(tanh_model, x, t, **options)["pred_xstart"]
    strength = (1 - a) / math.sqrt(a) * (1 + 0.3 * math.sin(math.pi * index / 8))
    x_0 = x_0 + strength * 2.0 * 0.1 * WEIGHT[Y].view(SHAPE)
    eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
    sigma = eta * math.sqrt((1 - previous) / (1 - a)) * math.sqrt(1 - a / previous)
    expected = math.sqrt(previous) * x_0 + math.sqrt(max(1 - previous - sigma**2, 0)) * eps + sigma * z
    # eps is a quotient by sqrt(1 - a) >= 0.01: 1e-16 times 100 times numbers below 100.
    torch.testing.assert_close(got["sample"], expected, rtol=0, atol=1e-11)


def test_ddim_does_not_clamp_the_guided_prediction_again():
    guidance = ClassifierGuidance(linear, classifier_scale=100.0)
    outs = run(
        "ddim_sample_loop_progressive", make_diffusion(steps=3), guidance=guidance, model_kwargs={"y": Y}
    )
    assert next(outs)["pred_xstart"].abs().max() > 1


@pytest.mark.parametrize("index", [0, 1, 4, 7])
def test_cond_fn_moves_the_ancestral_mean_by_variance_times_gradient(index):
    diffusion, x, t = make_diffusion(var=LARGE), draws(*SHAPE), torch.full((N,), index)
    gradient = draws(*SHAPE, seed=2, dtype=torch.float32)
    plain, moved = (
        diffusion.p_sample(tanh_model, x, t, cond_fn=cond_fn, noise=torch.zeros_like(x))["sample"]
        for cond_fn in (None, lambda x, t: gradient)
    )
    variance = diffusion.betas[index] if index else diffusion.posterior_variance[1]
    torch.testing.assert_close(moved - plain, variance * gradient.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 4, 7])
def test_cond_fn_moves_the_eps_of_ddim(index):
    diffusion, x, t = make_diffusion(), draws(*SHAPE), torch.full((N,), index)
    gradient = draws(*SHAPE, seed=2, dtype=torch.float32)
    got = diffusion.ddim_sample(tanh_model, x, t, clip_denoised=False, cond_fn=lambda x, t: gradient)[
        "sample"
    ]
    a, previous = diffusion.alphas_cumprod[index], diffusion.alphas_cumprod_prev[index]
    eps = (
        tanh_model(x, torch.full((N,), diffusion.timestep_map[index])) - math.sqrt(1 - a) * gradient.double()
    )
    expected = (
        math.sqrt(previous) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - previous) * eps
    )
    # x_0 is a quotient by sqrt(a) >= 0.006: 1e-16 times a few hundred times numbers below 1000.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


# The analytic denoiser

MU, S = 0.4, 0.5


def gaussian_model(diffusion, learned=False):
    """The best eps for data N(MU, S^2), and, if learned, the true variance of x_{t-1} given x_t as a fraction
    of the range.
    """

    def model(x, t):
        index = int((torch.as_tensor(diffusion.timestep_map) == t[0]).nonzero())
        a = diffusion.alphas_cumprod[index]
        eps = math.sqrt(1 - a) * (x - math.sqrt(a) * MU) / (a * S**2 + 1 - a)
        if not learned:
            return eps
        low, high = diffusion.posterior_log_variance_clipped[index], math.log(diffusion.betas[index])
        true = diffusion.posterior_variance[index] + diffusion.posterior_mean_coef1[index] ** 2 * S**2 * (
            1 - a
        ) / (a * S**2 + 1 - a)
        fraction = 2 * (math.log(true) - low) / (high - low) - 1 if index else 0.0
        return torch.cat([eps, torch.full_like(x, fraction)], 1)

    return model


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
    diffusion = make_diffusion(steps=steps, var=LEARNED)
    samples = diffusion.p_sample_loop(
        gaussian_model(diffusion, learned=True), (256, 1, 16, 16), clip_denoised=False,
        noise=draws(256, 1, 16, 16), randn_like=random_source(1),
    )  # fmt: skip
    a_0, a_T = diffusion.alphas_cumprod[[0, -1]]
    std = math.sqrt(S**2 - S**2 * (1 - a_0) / (a_0 * S**2 + 1 - a_0))
    assert a_T < 1e-4 and S - std < 1e-3
    assert_gaussian(samples, MU, std, slack_mean=a_T * MU, slack_std=a_T)


@pytest.mark.parametrize("variance", [SMALL, LARGE])
def test_ancestral_loop_with_1000_steps_samples_the_gaussian(variance):
    diffusion = make_diffusion(steps=1000, var=variance)
    samples = diffusion.p_sample_loop(
        gaussian_model(diffusion),
        (64, 1, 16, 16),
        clip_denoised=False,
        noise=draws(64, 1, 16, 16),
        randn_like=random_source(1),
    )
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
    diffusion, x = make_diffusion(steps=steps), draws(4, 1, 8, 8)
    got = diffusion.ddim_sample_loop(
        gaussian_model(diffusion), tuple(x.shape), noise=x, clip_denoised=False, randn_like=torch.zeros_like
    )
    sigma = np.append(0.0, np.sqrt(1 / diffusion.alphas_cumprod - 1))
    g = np.sqrt(sigma**2 + S**2)
    error = float(np.sum(np.diff(sigma) ** 2 / 2 * S**2 / g[:-1] ** 4))
    assert error < bound
    exact = (x / math.sqrt(diffusion.alphas_cumprod[-1]) - MU) * S / g[-1]
    ratio = (got - MU) / exact
    assert ratio.min() > 1 - error
    assert ratio.max() < 1 + 1e-9


def test_ddim_with_250_steps_samples_the_gaussian():
    # The flow is within 3% of exact (above), and maps N(0, 1) to a mean that is off by at most sqrt(a_T) MU S
    # / g(T) < 1e-4.
    diffusion = make_diffusion(steps=250)
    x = draws(64, 1, 16, 16)
    got = diffusion.ddim_sample_loop(gaussian_model(diffusion), tuple(x.shape), noise=x, clip_denoised=False)
    assert_gaussian(got, MU, S, slack_mean=1e-4 + 0.03 * 1e-4, slack_std=0.03 * S)


def test_ddim_with_eta_one_is_the_ancestral_loop():
    # Song et al., 2021, section 4.1: with eta = 1 the step is that of DDPM with the posterior's variance,
    # noise included.
    diffusion, x = make_diffusion(steps=20), draws(4, 1, 8, 8)
    model = gaussian_model(diffusion)
    ancestral, ddim = (
        loop(model, tuple(x.shape), noise=x, clip_denoised=False, randn_like=random_source(2), **options)
        for loop, options in ((diffusion.p_sample_loop, {}), (diffusion.ddim_sample_loop, {"eta": 1.0}))
    )
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_constant_gradient_moves_the_ancestral_gaussian_by_the_closed_form(gamma):
    diffusion, x = make_diffusion(steps=50), draws(N, 3, 8, 8)
    guidance = ClassifierGuidance(linear, marginal_temperature=0.0, gamma_factor=gamma)

    unconditional = gaussian_model(diffusion)

    def model(x, t, y):
        return unconditional(x, t)

    plain, guided = (
        run(
            "p_sample_loop", diffusion, model, noise=x, clip_denoised=False, model_kwargs={"y": Y}, guidance=g
        )
        for g in (None, guidance)
    )
    factor = 0.0
    for t in range(49, -1, -1):
        a = diffusion.alphas_cumprod[t]
        k = math.sqrt(a) * S**2 / (a * S**2 + 1 - a)
        strength = diffusion.posterior_variance[t] + gamma * max(diffusion.posterior_variance[t:]) * math.sin(
            math.pi * t / 50
        )
        factor = (
            diffusion.posterior_mean_coef1[t] * k + diffusion.posterior_mean_coef2[t]
        ) * factor + strength
    torch.testing.assert_close(
        guided - plain, factor * 0.1 * WEIGHT[Y].view(N, 3, 8, 8), rtol=1e-9, atol=1e-12
    )

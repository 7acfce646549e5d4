"""Guidance under EDM: the released recipe and the score form, against closed forms."""

import copy
import math

import pytest
import torch
from toys import (
    RECIPE,
    SHAPE,
    WEIGHT,
    GaussianDenoiser,
    N,
    X,
    Y,
    a_step,
    broken_at,
    draws,
    linear,
    linear_gradient,
    recorder,
    refuse,
)

from guided_diffusion.denoisers import GuidedDenoiser
from guided_diffusion.edm import edm_sampler
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import ClassifierGuidance, released_edm_guidance, released_edm_schedule
from guided_diffusion.schedules import linear_timestep
from guided_diffusion.script_util import create_gaussian_diffusion

RELEASED = released_edm_guidance(linear, **RECIPE)


def each_rms(x):
    return x.double().square().flatten(1).mean(dim=1).sqrt().view(-1, 1, 1, 1)


# The released recipe


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_schedule(num_steps):
    for i in range(num_steps):
        line, sine = 0.08 * (num_steps + 1 - i) / (num_steps + 1), math.sin(math.pi * i / num_steps)
        got = released_edm_schedule(a_step(index=i, num_steps=num_steps), 0.08, 0.6)
        assert got == pytest.approx(line + 0.6 * 0.08 * sine, rel=1e-14)
    assert released_edm_schedule(a_step(index=num_steps - 1, num_steps=num_steps), 1e-6, 0.0) == 1e-5


@pytest.mark.parametrize("scale", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("index", [0, 3, 9])
def test_shift(scale, index):
    x, step = scale * X, a_step(index=index, num_steps=10)
    r = each_rms(x)
    g = linear_gradient(torch.where(r > 1, x / r, x), Y, 1.3, 0.5)
    got, expected = RELEASED(x, Y, step), released_edm_schedule(step, 0.08, 0.6) * r * g / each_rms(g)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * scale)  # the classifier is in float32


def test_the_classifier_sees_float32_at_an_rms_of_at_most_one():
    seen, x = [], torch.cat([0.3 * X[:2], 50 * X[2:]])
    released_edm_guidance(lambda x: (seen.append(x.detach()), linear(x))[1], **RECIPE)(x, Y, a_step())
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0][:2], x[:2].float())
    torch.testing.assert_close(each_rms(seen[0][2:]), torch.ones(2, 1, 1, 1).double(), rtol=0, atol=1e-6)


def test_a_gradient_of_zero_gives_no_shift_and_a_tiny_one_a_full_one():
    def classifier(x):  # flat for image 0, steep by 1e-30, whose square float32 does not hold, for the others
        factor = torch.full((N, 1), 1e-30)
        factor[0] = 0
        return (x.flatten(1) @ WEIGHT.float().T) * factor

    x, step = 10 * X, a_step(index=2, num_steps=10)
    got = released_edm_guidance(classifier, **RECIPE)(x, Y, step)
    assert (got[0] == 0).all()
    ratio, expected = each_rms(got[1:]) / each_rms(x[1:]), released_edm_schedule(step, 0.08, 0.6)
    torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=1e-6, atol=0)


def test_another_direction_and_another_strength():
    # The shift has the strength as its RMS, in units of the sample's, and points where logit 1 rises.
    parts = {"direction": lambda logits, y: logits[:, 1], "strength": lambda step: 0.25}
    got = released_edm_guidance(linear, **RECIPE, **parts)(X, Y, a_step())
    unit = WEIGHT[1].view(1, *SHAPE[1:]) / WEIGHT[1].square().mean().sqrt()
    torch.testing.assert_close(got, 0.25 * each_rms(X) * unit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_gradients_that_are_not_finite_stop_or_are_skipped(fault):
    step, seen, sound = a_step(index=7, num_steps=10), [], [0, 1, 3]
    with pytest.raises(NonFiniteError) as caught:
        released_edm_guidance(broken_at([2], fault), **RECIPE)(X, Y, step)
    assert (caught.value.step_index, caught.value.positions) == (7, [2])
    skip = {"on_nonfinite": "skip", "observe": seen.append}
    got = released_edm_guidance(broken_at([2], fault), **RECIPE, **skip)(X, Y, step)
    assert (got[2] == 0).all()
    assert torch.equal(got[sound], RELEASED(X, Y, step)[sound])
    [observation] = seen
    assert (observation.index, observation.skipped.tolist()) == (7, [False, False, True, False])
    assert (observation.gradient[2] == 0).all()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        *(
            ("max_guidance", value, f"max_guidance must be 0 .*{value}")
            for value in (-0.1, math.nan, math.inf)
        ),
        ("on_nonfinite", "ignore", "on_nonfinite 'ignore'"),
    ],
)
def test_options_that_cannot_be(option, value, message):
    with pytest.raises(ValueError, match=message):
        released_edm_guidance(linear, **{**RECIPE, option: value})


def test_wanted_classes_come_from_the_labels_unless_given():
    seen, one_hot, net = [], torch.eye(5)[Y], GaussianDenoiser()
    for options in ({}, {"y": torch.tensor([3, 3, 3, 3])}):
        edm_sampler(net, X, one_hot, guidance=recorder(seen), num_steps=1, **options)
    assert [y.tolist() for _, y, _ in seen] == [Y.tolist(), [3, 3, 3, 3]]
    with pytest.raises(ValueError, match=r"pass y, \(N,\) int64, or one-hot class_labels"):
        edm_sampler(net, X, guidance=recorder([]))
    with pytest.raises(ValueError, match=r"y has shape \(2,\), but 4 images"):
        edm_sampler(net, X, guidance=recorder([]), y=Y[:2])


# The score form


@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda sigma: torch.full((N,), sigma)])
def test_score_form(sigma, form):
    seen, denoised = [], GaussianDenoiser(std=0.9)(3 * X, sigma)
    GuidedDenoiser(lambda x, s: denoised, recorder(seen), Y)(3 * X, form(sigma))
    [(point, y, step)] = seen
    assert torch.equal(point, denoised.clamp(-1, 1)) and y is Y
    assert step.sigma == pytest.approx(sigma, rel=1e-7)
    assert step.variance == step.variance_max == pytest.approx(sigma**2 / math.sqrt(1 + sigma**2), rel=1e-6)
    for clip, at in ((True, point), (False, denoised)):
        guided = GuidedDenoiser(lambda x, s: denoised, ClassifierGuidance(linear), Y, clip_denoised=clip)
        expected = denoised + step.variance * linear_gradient(at, Y)
        torch.testing.assert_close(guided(3 * X, form(sigma)), expected, rtol=0, atol=1e-12 * (1 + sigma))


def test_score_form_answers_like_the_network():
    net = GaussianDenoiser()
    guided = GuidedDenoiser(net, ClassifierGuidance(refuse, classifier_scale=0.0), Y)
    names = ("sigma_min", "sigma_max", "round_sigma", "img_channels", "img_resolution", "label_dim")
    assert [getattr(guided, name) for name in names] == [getattr(net, name) for name in names]
    assert torch.equal(guided(X, 1.0, class_labels=None), net(X, 1.0))
    assert torch.equal(copy.deepcopy(guided)(X, 1.0), net(X, 1.0))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = guided.no_such_name


def test_score_form_takes_one_noise_level():
    guided = GuidedDenoiser(lambda x, sigma: x, ClassifierGuidance(linear), Y)
    with pytest.raises(ValueError, match=r"one noise level.*from 1 to 2"):
        guided(X, torch.tensor([1.0, 2.0, 1.0, 1.0]).view(-1, 1, 1, 1))


def test_timestep_of_a_noise_level():
    diffusion = create_gaussian_diffusion()
    assert [linear_timestep(diffusion.sigma(t)) for t in range(1000)] == list(range(1000))
    assert [linear_timestep(sigma) for sigma in (1e-9, 0.002, 1e9)] == [0, 0, 999]
    between = math.sqrt(diffusion.sigma(500) * diffusion.sigma(501))
    assert [linear_timestep(between * factor) for factor in (0.9999, 1.0001)] == [500, 501]


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_score_form_under_heun_in_closed_form(std):
    """A constant gradient b moves the end of the exact flow by std * b * the integral of sigma / sqrt((1 +
    sigma^2) (std^2 + sigma^2)).
    """
    b, sigma_max, net = 0.1 * draws(*SHAPE[1:], seed=5), 20.0, GaussianDenoiser(0.2, std)
    guided = GuidedDenoiser(net, lambda x, y, step: (step.variance * b).expand_as(x), Y)
    ends = [edm_sampler(each, X, num_steps=400, sigma_max=sigma_max) for each in (guided, net)]
    integral = math.log((math.hypot(1, sigma_max) + math.hypot(std, sigma_max)) / (1 + std))
    # Heun's error falls with the square of the 400 steps.
    torch.testing.assert_close(ends[0] - ends[1], (std * integral * b).expand_as(X), rtol=1e-3, atol=0)

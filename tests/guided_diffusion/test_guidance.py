"""The guidance module: log-probabilities, gradients and strengths in closed form, and what happens where
there is nothing to add.
"""

import dataclasses
import math

import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import (
    ClassifierGuidance,
    GuidanceStep,
    log_prob,
    noisy_classifier_gradient,
    within_interval,
)

N, CLASSES, SHAPE = 4, 5, (3, 4, 4)
PIXELS = math.prod(SHAPE)
Y = torch.tensor([0, 4, 2, 2])
TEMPERATURES = [(1.0, 1.0), (1.0, 0.5), (1.0, 0.0), (2.0, 0.7), (0.0, 1.0)]
UNIT = GuidanceStep(index=1, num_steps=2, variance=1.0, variance_max=1.0, sigma=1.0)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


WEIGHT, BIAS = draws(CLASSES, PIXELS, seed=1) / PIXELS**0.5, draws(CLASSES, seed=2)


def linear(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype).T + BIAS.to(x.dtype)


def linear_gradient(x, y, joint, marginal):
    """tau_1 W_y - tau_2 softmax(tau_2 f) W, like x."""
    return (joint * WEIGHT[y] - marginal * torch.softmax(marginal * linear(x), dim=1) @ WEIGHT).view_as(x)


def shift(x, y=Y, step=UNIT, classifier=linear, **options):
    return ClassifierGuidance(classifier, **options)(x, y, step)


def same_bits(a, b):
    """Equal, the sign of zero included."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


# log_prob


def test_temperatures_of_one_give_the_log_softmax():
    logits = draws(N, CLASSES)
    expected = torch.log_softmax(logits, dim=1)[range(N), Y]
    torch.testing.assert_close(log_prob(logits, Y, 1.0, 1.0), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("joint", [0.0, 1.0, 2.5])
def test_marginal_temperature_zero_leaves_the_joint_logit(joint):
    logits = draws(N, CLASSES)
    expected = joint * logits[range(N), Y] - math.log(CLASSES)
    torch.testing.assert_close(log_prob(logits, Y, joint, 0.0), expected, rtol=0, atol=1e-12)


def test_temperatures_act_on_the_logits_they_are_named_after():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    expected = 2 * 3 - math.log(math.exp(0.5) + math.exp(1) + math.exp(1.5))
    assert log_prob(logits, torch.tensor([2]), 2.0, 0.5).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [0, 1])
def test_logits_of_200_stay_finite(dtype, wanted):
    logits = torch.tensor([[200.0, -200.0]], dtype=dtype, requires_grad=True)
    result = log_prob(logits, torch.tensor([wanted]), 1.0, 1.0)
    result.sum().backward()
    # The other class has probability exp(-400) = 1.9e-174, which is 0 in all but float64.
    assert result.item() == (0 if wanted == 0 else -400)
    assert logits.grad[0].tolist() == pytest.approx([0, 0] if wanted == 0 else [-1, 1], abs=2e-174)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(dtype, computed):
    logits = (5 * draws(N, CLASSES)).to(dtype)
    result = log_prob(logits, Y, 1.0, 0.5)
    assert result.shape == (N,)
    assert result.dtype == computed
    assert torch.equal(result, log_prob(logits.to(computed), Y, 1.0, 0.5))


# Gradient and strength


@pytest.mark.parametrize(("joint", "marginal"), TEMPERATURES)
def test_gradient_of_a_linear_classifier(joint, marginal):
    x = draws(N, *SHAPE)
    got = shift(x, joint_temperature=joint, marginal_temperature=marginal)
    torch.testing.assert_close(got, linear_gradient(x, Y, joint, marginal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, -2.0, 0.25])
@pytest.mark.parametrize("index", [0, 1, 12, 24])
@pytest.mark.parametrize(
    "variance", [0.3, torch.linspace(0.1, 0.4, N).view(N, 1, 1, 1).double(), draws(N, *SHAPE, seed=7).exp()]
)
def test_shift_is_strength_times_scale_times_gradient(scale, index, variance):
    x = draws(N, *SHAPE)
    step = GuidanceStep(index=index, num_steps=25, variance=variance, variance_max=0.8)
    strength = variance + 0.3 * 0.8 * math.sin(math.pi * index / 25)
    got = shift(x, step=step, classifier_scale=scale, gamma_factor=0.3)
    torch.testing.assert_close(got, strength * scale * linear_gradient(x, Y, 1.0, 1.0), rtol=0, atol=1e-12)


def test_defaults_are_the_plain_classifier():
    x = draws(N, *SHAPE)
    options = {
        "joint_temperature": 1.0,
        "marginal_temperature": 1.0,
        "classifier_scale": 1.0,
        "gamma_factor": 0.0,
    }
    assert torch.equal(shift(x), shift(x, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("variance", [0.5, torch.full((N, *SHAPE), 0.5)])
def test_shift_is_like_x(dtype, variance):
    x = draws(N, *SHAPE, dtype=dtype)
    got = shift(x, step=dataclasses.replace(UNIT, variance=variance), gamma_factor=0.3)
    assert (got.shape, got.dtype, got.device) == (x.shape, dtype, x.device)


def test_half_precision_logits_give_a_gradient_of_a_float32_image():
    # float16 has 11 significant bits: the product of a gradient's entry is off by a few times 2**-11 of the
    # largest entry.
    x = draws(N, *SHAPE, dtype=torch.float32)
    got = shift(x, classifier=lambda x: linear(x.half()))
    expected = linear_gradient(x.double(), Y, 1.0, 1.0)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 8 * 2**-11 * expected.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_shift_is_detached_in_either_grad_mode(mode):
    x = draws(N, *SHAPE)
    with mode():
        before = torch.is_grad_enabled()
        got = shift(x.clone().requires_grad_())
        assert torch.is_grad_enabled() == before
    assert not got.requires_grad
    assert torch.equal(got, shift(x))


def test_shift_is_detached_from_the_variance():
    variance = torch.full((N, 1, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    assert not shift(draws(N, *SHAPE), step=dataclasses.replace(UNIT, variance=variance)).requires_grad


def test_inputs_and_parameters_keep_no_gradient():
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, CLASSES)).double()
    x = draws(N, *SHAPE).requires_grad_()
    before = x.detach().clone()
    shift(x, classifier=classifier)
    assert torch.equal(x, before)
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_an_image_does_not_depend_on_its_neighbours():
    x = draws(N, *SHAPE)
    for i in range(N):
        alone = shift(x[i : i + 1], Y[i : i + 1])
        others = x.clone()
        others[torch.arange(N) != i] *= -7
        torch.testing.assert_close(shift(others)[i : i + 1], alone, rtol=0, atol=1e-12)


def test_step_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        UNIT.index = 3


# Nothing to add


SIGNED = torch.tensor([0.0, -0.0, 1.5, -1e-40, math.inf]).repeat(N, 3, 4, 1)


def refuse(x):
    raise AssertionError("the classifier was called")


def test_scale_zero_changes_no_bit_and_calls_nobody():
    assert same_bits(
        SIGNED + shift(SIGNED, classifier=refuse, classifier_scale=0.0, gamma_factor=0.3), SIGNED
    )


@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.001, 150.0])
def test_outside_the_interval_no_bit_changes_and_nobody_is_called(sigma):
    guidance = within_interval(ClassifierGuidance(refuse), 0.3, 5.0)
    assert same_bits(SIGNED + guidance(SIGNED, Y, dataclasses.replace(UNIT, sigma=sigma)), SIGNED)


@pytest.mark.parametrize("sigma", [0.3001, 1.0, 5.0])
def test_inside_the_interval_the_guidance_is_as_without_one(sigma):
    x = draws(N, *SHAPE)
    got = within_interval(ClassifierGuidance(linear), 0.3, 5.0)(x, Y, dataclasses.replace(UNIT, sigma=sigma))
    assert torch.equal(got, shift(x))


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (5.0, 0.3), (-1.0, 2.0), (math.nan, 1.0), (0.0, math.nan)])
def test_empty_interval(bounds):
    with pytest.raises(ValueError, match=r"guidance interval.*0 <= lo < hi"):
        within_interval(ClassifierGuidance(linear), *bounds)


def test_interval_without_a_noise_level():
    with pytest.raises(ValueError, match="sigma"):
        within_interval(ClassifierGuidance(linear), 0.3, 5.0)(
            draws(N, *SHAPE), Y, GuidanceStep(1, 2, 1.0, 1.0)
        )


# Non-finite gradients


def broken_at(positions, fault):
    """A linear classifier whose gradient at one pixel of some images is `fault`."""

    def classifier(x):
        factor = torch.ones_like(x)
        factor[positions, 0, 0, 0] = fault
        return linear(x.detach() + (x - x.detach()) * factor)

    return classifier


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("positions", [[2], [0, 3]])
def test_stop_names_step_and_positions(fault, positions):
    with pytest.raises(NonFiniteError) as caught:
        shift(
            draws(N, *SHAPE), step=dataclasses.replace(UNIT, index=17), classifier=broken_at(positions, fault)
        )
    assert isinstance(caught.value, FloatingPointError)
    assert (caught.value.step_index, caught.value.positions) == (17, positions)
    assert "17" in str(caught.value)
    assert all(str(p) in str(caught.value) for p in positions)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("positions", [[2], [0, 3], [0, 1, 2, 3]])
def test_skip_drops_those_images_only_and_counts_them(fault, positions):
    x, seen = draws(N, *SHAPE), []
    options = {"on_nonfinite": "skip", "classifier_scale": 2.0, "gamma_factor": 0.3, "observe": seen.append}
    got = shift(x, classifier=broken_at(positions, fault), **options)
    sound = [i for i in range(N) if i not in positions]
    assert got.isfinite().all()
    assert (got[positions] == 0).all()
    assert torch.equal(got[sound], shift(x, classifier_scale=2.0, gamma_factor=0.3)[sound])
    [observation] = seen
    assert (observation.index, observation.sigma) == (UNIT.index, UNIT.sigma)
    assert observation.skipped.tolist() == [i in positions for i in range(N)]
    assert torch.equal(observation.gradient[sound], shift(x, classifier_scale=2.0)[sound])
    assert (observation.gradient[positions] == 0).all()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_observe_sees_sound_steps_under_either_policy(policy):
    x, seen = draws(N, *SHAPE), []
    shift(x, on_nonfinite=policy, observe=seen.append)
    [observation] = seen
    assert observation.index == UNIT.index
    assert torch.equal(observation.x, x)
    assert torch.equal(observation.gradient, shift(x))
    assert observation.skipped.tolist() == [False] * N


def test_unknown_policy_lists_the_choices():
    with pytest.raises(ValueError, match=r"on_nonfinite 'ignore'.*stop.*skip"):
        ClassifierGuidance(linear, on_nonfinite="ignore")


# The classic noisy classifier


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_noisy_classifier_gradient(scale):
    x, t, seen = draws(N, *SHAPE), torch.arange(N), []

    def classifier(x, t):
        seen.append(t)
        return linear(x)

    with torch.no_grad():
        got = noisy_classifier_gradient(classifier, scale)(x, t, y=Y)
    assert seen[0] is t
    # The log-softmax is taken in float32: relative error 2**-24 per operation, a handful of them, on entries
    # below 1.
    torch.testing.assert_close(got, scale * linear_gradient(x, Y, 1.0, 1.0), rtol=0, atol=1e-6)
    assert not got.requires_grad

"""The guidance room: log-probabilities, gradients and strengths in closed form, and what happens where there
is nothing to add.
"""

import dataclasses
import math

import pytest
import torch
from toys import (
    CLASSES,
    PIXELS,
    SHAPE,
    WEIGHT,
    N,
    X,
    Y,
    a_step,
    broken_at,
    draws,
    linear,
    linear_gradient,
    refuse,
)

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import (
    ClassifierGuidance,
    log_prob,
    noisy_classifier_gradient,
    within_interval,
    wrapper,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GAMMA = {"gamma_factor": 0.3}


def shift(x=X, y=Y, step=None, classifier=linear, **options):
    return ClassifierGuidance(classifier, **options)(x, y, step or a_step())


# log_prob


@pytest.mark.parametrize("joint", [0.0, 1.0, 2.5])
def test_log_prob_in_closed_form(joint):
    logits = draws(N, CLASSES)
    plain = torch.log_softmax(logits, dim=1)[range(N), Y]
    torch.testing.assert_close(log_prob(logits, Y), plain, rtol=0, atol=1e-12)
    without_marginal = joint * logits[range(N), Y] - math.log(CLASSES)
    torch.testing.assert_close(log_prob(logits, Y, joint, 0.0), without_marginal, rtol=0, atol=1e-12)
    by_hand = joint * 3 - math.log(math.exp(0.5) + math.exp(1) + math.exp(1.5))
    one = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64)
    assert log_prob(one, torch.tensor([2]), joint, 0.5).item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(("dtype", "computed"), [(F16, F32), (BF16, F32), (F32, F32), (F64, F64)])
def test_precision_of_log_prob(dtype, computed):
    logits = (5 * draws(N, CLASSES)).to(dtype)
    result = log_prob(logits, Y, 1.0, 0.5)
    assert (result.shape, result.dtype) == ((N,), computed)
    assert torch.equal(result, log_prob(logits.to(computed), Y, 1.0, 0.5))
    for wanted, value, gradient in ((0, 0, [0, 0]), (1, -400, [-1, 1])):
        extreme = torch.tensor([[200.0, -200.0]], dtype=dtype, requires_grad=True)
        result = log_prob(extreme, torch.tensor([wanted]))
        result.sum().backward()
        # The other class has probability exp(-400) = 1.9e-174, which is 0 in all but float64.
        assert result.item() == value
        assert extreme.grad[0].tolist() == pytest.approx(gradient, abs=2e-174)


# Gradient and strength


@pytest.mark.parametrize(("joint", "marginal"), [(1.0, 1.0), (1.0, 0.5), (1.0, 0.0), (2.0, 0.7), (0.0, 1.0)])
def test_gradient_of_a_linear_classifier(joint, marginal):
    got = shift(joint_temperature=joint, marginal_temperature=marginal)
    torch.testing.assert_close(got, linear_gradient(X, Y, joint, marginal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, -2.0])
@pytest.mark.parametrize("index", [0, 1, 12, 24])
@pytest.mark.parametrize(
    "variance", [0.3, torch.linspace(0.1, 0.4, N).view(N, 1, 1, 1).double(), draws(*SHAPE, seed=7).exp()]
)
def test_shift_is_strength_times_scale_times_gradient(scale, index, variance):
    step = a_step(index=index, num_steps=25, variance=variance, variance_max=0.8)
    strength = variance + 0.3 * 0.8 * math.sin(math.pi * index / 25)
    got = shift(step=step, classifier_scale=scale, **GAMMA)
    torch.testing.assert_close(got, strength * scale * linear_gradient(X, Y), rtol=0, atol=1e-12)


def test_another_direction_and_another_strength():
    got = shift(
        direction=lambda logits, y: 3 * logits[:, 1], strength=lambda step: step.sigma, step=a_step(sigma=7.0)
    )
    torch.testing.assert_close(got, 21 * WEIGHT[1].expand(N, -1).view_as(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("variance", [0.5, torch.full(SHAPE, 0.5)])
def test_shift_is_like_x(dtype, variance):
    got = shift(X.to(dtype), step=a_step(variance=variance), **GAMMA)
    assert (got.shape, got.dtype, got.device) == (X.shape, dtype, X.device)


def test_half_precision_logits_give_a_gradient_of_a_float32_image():
    # float16 has 11 significant bits: an entry is off by a few times 2**-11 of the largest one.
    got, expected = shift(X.float(), classifier=lambda x: linear(x.half())), linear_gradient(X, Y)
    assert got.dtype == F32
    assert (got - expected).abs().max() < 8 * 2**-11 * expected.abs().max()


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_keeps_a_gradient(enabled):
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(PIXELS, CLASSES)).double()
    x, variance = X.clone().requires_grad_(), torch.full((N, 1, 1, 1), 0.5, dtype=F64, requires_grad=True)
    with torch.set_grad_enabled(enabled):
        got = shift(x, classifier=classifier, step=a_step(variance=variance))
        assert torch.is_grad_enabled() == enabled
    assert not got.requires_grad
    assert torch.equal(x, X) and x.grad is None
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_an_image_does_not_depend_on_its_neighbours():
    for i in range(N):
        others = X.clone()
        others[torch.arange(N) != i] *= -7
        alone = shift(X[i : i + 1], Y[i : i + 1])
        torch.testing.assert_close(shift(others)[i : i + 1], alone, rtol=0, atol=1e-12)


def test_step_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_step().index = 3


# Nothing to add


def test_where_guidance_is_off_no_bit_changes_and_nobody_is_called():
    signed = torch.tensor([0.0, -0.0, 1.5, -1e-40, math.inf]).repeat(N, 3, 4, 1)
    off = [(ClassifierGuidance(refuse, classifier_scale=0.0, **GAMMA), 1.0)]
    interval = within_interval(ClassifierGuidance(refuse), 0.3, 5.0)
    for guidance, sigma in [*off, *((interval, sigma) for sigma in (0.0, 0.3, 5.001, 150.0))]:
        got = signed + guidance(signed, Y, a_step(sigma=sigma))
        assert torch.equal(got, signed) and torch.equal(got.signbit(), signed.signbit())


@pytest.mark.parametrize("sigma", [0.3001, 1.0, 5.0])
def test_inside_the_interval_the_guidance_is_as_without_one(sigma):
    got = within_interval(ClassifierGuidance(linear), 0.3, 5.0)(X, Y, a_step(sigma=sigma))
    assert torch.equal(got, shift())


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (5.0, 0.3), (-1.0, 2.0), (math.nan, 1.0), (0.0, math.nan)])
def test_empty_interval(bounds):
    with pytest.raises(ValueError, match=r"guidance interval.*0 <= lo < hi"):
        within_interval(ClassifierGuidance(linear), *bounds)


def test_a_wrapper_is_called_by_its_own_and_the_rules_name():
    @wrapper
    def doubled(guidance, factor):
        return lambda x, y, step: factor * guidance(x, y, step)

    rule = doubled(within_interval(ClassifierGuidance(linear), 0.3, 5.0), 2.0)
    assert rule.__name__ == "doubled(within_interval(ClassifierGuidance))"
    assert torch.equal(rule(X, Y, a_step()), 2 * shift())


# Gradients that are not finite


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("positions", [[2], [0, 3]])
def test_stop_names_the_step_and_skip_drops_those_images_only(fault, positions):
    broken, step, seen = broken_at(positions, fault), a_step(index=17), []
    with pytest.raises(NonFiniteError, match="17") as caught:
        shift(step=step, classifier=broken)
    assert isinstance(caught.value, FloatingPointError)
    assert (caught.value.step_index, caught.value.positions) == (17, positions)
    assert all(str(p) in str(caught.value) for p in positions)

    options = {"classifier_scale": 2.0, "step": step}
    got = shift(classifier=broken, on_nonfinite="skip", observe=seen.append, **options, **GAMMA)
    sound, [observation] = [i for i in range(N) if i not in positions], seen
    assert (got[positions] == 0).all() and (observation.gradient[positions] == 0).all()
    assert torch.equal(got[sound], shift(**options, **GAMMA)[sound])
    assert torch.equal(observation.gradient[sound], shift(**options)[sound])
    assert (observation.index, observation.sigma) == (17, step.sigma)
    assert observation.skipped.tolist() == [i in positions for i in range(N)]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_observe_sees_sound_steps_under_either_policy(policy):
    seen = []
    shift(on_nonfinite=policy, observe=seen.append)
    [observation] = seen
    assert observation.index == a_step().index
    assert torch.equal(observation.x, X) and torch.equal(observation.y, Y)
    assert torch.equal(observation.gradient, shift())
    assert torch.equal(observation.logits, linear(X))
    assert observation.skipped.tolist() == [False] * N


def test_unknown_policy_lists_the_choices():
    with pytest.raises(ValueError, match=r"on_nonfinite 'ignore'.*stop.*skip"):
        ClassifierGuidance(linear, on_nonfinite="ignore")


# The classic noisy classifier


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_noisy_classifier_gradient(scale):
    t, seen = torch.arange(N), []

    def classifier(x, t):
        seen.append(t)
        return linear(x)

    with torch.no_grad():
        got = noisy_classifier_gradient(classifier, scale)(X, t, y=Y)
    assert seen[0] is t
    torch.testing.assert_close(got, scale * linear_gradient(X, Y), rtol=0, atol=1e-12)
    assert not got.requires_grad

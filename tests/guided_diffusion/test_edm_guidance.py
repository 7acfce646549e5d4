"""Guidance under EDM: the released recipe and the score form, against closed forms and against DDIM."""

import copy
import math

import pytest
import torch

from guided_diffusion.edm import EDMPrecond, edm_sampler
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.guidance import (
    ClassifierGuidance,
    GuidanceStep,
    GuidedDenoiser,
    released_edm_guidance,
    released_edm_schedule,
    within_interval,
)
from guided_diffusion.schedules import linear_timestep
from guided_diffusion.script_util import create_gaussian_diffusion

N, CLASSES, SHAPE = 4, 5, (3, 4, 4)
PIXELS = math.prod(SHAPE)
Y = torch.tensor([0, 4, 2, 2])
RECIPE = {"joint_temperature": 1.3, "marginal_temperature": 0.5, "max_guidance": 0.08, "add_factor": 0.6}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LATENTS = draws(N, *SHAPE)
WEIGHT, BIAS = draws(CLASSES, PIXELS, seed=1) / PIXELS**0.5, draws(CLASSES, seed=2)


def linear(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype).T + BIAS.to(x.dtype)


def linear_gradient(x, y, joint, marginal):
    return (joint * WEIGHT[y] - marginal * torch.softmax(marginal * linear(x), dim=1) @ WEIGHT).view_as(x)


def refuse(x):
    raise AssertionError("the classifier was called")


def each_rms(x):
    return x.double().square().flatten(1).mean(dim=1).sqrt().view(-1, 1, 1, 1)


class GaussianDenoiser:
    """The exact denoiser of normal data. With the small deviation of the tests no answer reaches 1, where
    guidance would clamp it.
    """

    sigma_min, sigma_max, img_channels, img_resolution, label_dim = 0.0, math.inf, 3, 4, 0

    def __init__(self, mean=0.2, std=0.1):
        self.mean, self.std = mean, std

    def __call__(self, x, sigma, class_labels=None):
        return self.mean + self.std**2 / (self.std**2 + sigma**2) * (x - self.mean)

    def round_sigma(self, sigma):
        return sigma


# The released recipe


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_schedule(num_steps):
    for i in range(num_steps):
        step = GuidanceStep(i, num_steps, 1.0, 1.0)
        expected = 0.08 * (num_steps + 1 - i) / (num_steps + 1) + 0.6 * 0.08 * math.sin(
            math.pi * i / num_steps
        )
        assert released_edm_schedule(step, 0.08, 0.6) == pytest.approx(expected, rel=1e-14)
    assert released_edm_schedule(GuidanceStep(num_steps - 1, num_steps, 1.0, 1.0), 1e-6, 0.0) == 1e-5


@pytest.mark.parametrize("scale", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("index", [0, 3, 9])
def test_shift(scale, index):
    x, step = scale * LATENTS, GuidanceStep(index, 10, 1.0, 1.0)
    r = each_rms(x)
    g = linear_gradient(torch.where(r > 1, x / r, x), Y, 1.3, 0.5)
    got = released_edm_guidance(linear, **RECIPE)(x, Y, step)
    assert got.dtype == torch.float64
    # The classifier computes in float32.
    torch.testing.assert_close(
        got, released_edm_schedule(step, 0.08, 0.6) * r * g / each_rms(g), rtol=1e-4, atol=1e-6 * scale
    )


def test_the_classifier_sees_float32_at_an_rms_of_at_most_one():
    seen = []

    def classifier(x):
        seen.append(x.detach())
        return linear(x)

    x = torch.cat([0.3 * LATENTS[:2], 50 * LATENTS[2:]])
    released_edm_guidance(classifier, **RECIPE)(x, Y, GuidanceStep(0, 10, 1.0, 1.0))
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0][:2], x[:2].float())
    torch.testing.assert_close(each_rms(seen[0][2:]), torch.ones(2, 1, 1, 1).double(), rtol=0, atol=1e-6)


def test_a_gradient_of_zero_gives_no_shift_and_a_tiny_one_a_full_one():
    def classifier(x):  # flat for image 0, steep by 1e-30, whose square float32 does not hold, for the others
        factor = torch.full((N, 1), 1e-30)
        factor[0] = 0
        return (x.flatten(1) @ WEIGHT.float().T) * factor

    x, step = 10 * LATENTS, GuidanceStep(2, 10, 1.0, 1.0)
    got = released_edm_guidance(classifier, **RECIPE)(x, Y, step)
    assert (got[0] == 0).all()
    ratio = each_rms(got[1:]) / each_rms(x[1:])
    torch.testing.assert_close(
        ratio, torch.full_like(ratio, released_edm_schedule(step, 0.08, 0.6)), rtol=1e-6, atol=0
    )


def test_an_image_does_not_depend_on_its_neighbours():
    options = {"num_steps": 6, "guidance": released_edm_guidance(linear, **RECIPE)}
    together = edm_sampler(GaussianDenoiser(), LATENTS, y=Y, **options)
    for i in range(N):
        alone = edm_sampler(GaussianDenoiser(), LATENTS[i : i + 1], y=Y[i : i + 1], **options)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


def broken(fault):
    def classifier(x):
        factor = torch.ones_like(x)
        factor[2, 0, 0, 0] = fault
        return linear(x.detach() + (x - x.detach()) * factor)

    return classifier


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_non_finite_gradients_stop_or_are_skipped(fault):
    step, seen = GuidanceStep(7, 10, 1.0, 1.0), []
    with pytest.raises(NonFiniteError) as caught:
        released_edm_guidance(broken(fault), **RECIPE)(LATENTS, Y, step)
    assert (caught.value.step_index, caught.value.positions) == (7, [2])
    guidance = released_edm_guidance(broken(fault), **RECIPE, on_nonfinite="skip", observe=seen.append)
    got, sound = guidance(LATENTS, Y, step), released_edm_guidance(linear, **RECIPE)(LATENTS, Y, step)
    assert (got[2] == 0).all()
    assert torch.equal(got[[0, 1, 3]], sound[[0, 1, 3]])
    [observation] = seen
    assert observation.index == step.index
    assert observation.skipped.tolist() == [False, False, True, False]
    assert (observation.gradient[2] == 0).all()


@pytest.mark.parametrize("max_guidance", [-0.1, math.nan, math.inf])
def test_strength_that_cannot_be(max_guidance):
    with pytest.raises(ValueError, match=f"max_guidance must be 0 .*{max_guidance}"):
        released_edm_guidance(linear, **{**RECIPE, "max_guidance": max_guidance})


def test_unknown_policy():
    with pytest.raises(ValueError, match="on_nonfinite 'ignore'"):
        released_edm_guidance(linear, **RECIPE, on_nonfinite="ignore")


# In the sampler


def test_the_sampler_calls_guidance_once_per_step_at_x_cur_and_adds_to_x_hat():
    calls, asked, offered = [], [], []

    def guidance(x, y, step):
        calls.append((x, y, step))
        return torch.full_like(x, 0.25)

    class Net(GaussianDenoiser):
        def __call__(self, x, sigma, class_labels=None):
            asked.append(x)
            return super().__call__(x, sigma)

    def randn_like(x):
        offered.append(x)
        return torch.ones_like(x)

    edm_sampler(Net(), LATENTS, randn_like=randn_like, guidance=guidance, y=Y, num_steps=5, S_churn=1)
    assert [step.index for *_, step in calls] == [0, 1, 2, 3, 4]
    for i, (x, y, step) in enumerate(calls):
        assert torch.equal(x, offered[i])
        assert y is Y
        assert (step.num_steps, step.variance, step.variance_max) == (5, 1, 1)
        t_hat = 1.2 * step.sigma
        torch.testing.assert_close(
            asked[2 * i], x + math.sqrt(t_hat**2 - step.sigma**2) + 0.25, rtol=0, atol=1e-10
        )
    assert len(asked) == 9


def test_wanted_classes_come_from_the_labels_unless_given():
    seen = []

    def guidance(x, y, step):
        seen.append(y.tolist())
        return torch.zeros_like(x)

    one_hot = torch.eye(CLASSES)[Y]
    edm_sampler(GaussianDenoiser(), LATENTS, one_hot, guidance=guidance, num_steps=1)
    edm_sampler(
        GaussianDenoiser(), LATENTS, one_hot, guidance=guidance, y=torch.tensor([3, 3, 3, 3]), num_steps=1
    )
    assert seen == [Y.tolist(), [3, 3, 3, 3]]
    with pytest.raises(ValueError, match=r"pass y, \(N,\) int64, or one-hot class_labels"):
        edm_sampler(GaussianDenoiser(), LATENTS, guidance=guidance)
    with pytest.raises(ValueError, match=r"y has shape \(2,\), but 4 images"):
        edm_sampler(GaussianDenoiser(), LATENTS, guidance=guidance, y=Y[:2])


OFF = {
    "released": released_edm_guidance(refuse, **{**RECIPE, "max_guidance": 0}),
    "scale 0": ClassifierGuidance(refuse, classifier_scale=0.0, gamma_factor=0.3),
    "interval": within_interval(ClassifierGuidance(refuse), 1e6, 1e7),
}


@pytest.mark.parametrize("name", OFF)
@pytest.mark.parametrize("S_churn", [0, 5])
def test_guidance_off_changes_no_bit(name, S_churn):
    torch.manual_seed(0)
    net = EDMPrecond(
        16, 3, model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(8,)
    ).eval()
    torch.nn.init.normal_(net.model.out_conv.weight, std=0.02)
    latents, options = (
        draws(2, 3, 16, 16, seed=3),
        {"randn_like": torch.cos, "num_steps": 4, "S_churn": S_churn},
    )
    unguided = edm_sampler(net, latents, **options)
    assert torch.equal(edm_sampler(net, latents, guidance=OFF[name], y=Y[:2], **options), unguided)
    assert torch.equal(edm_sampler(GuidedDenoiser(net, OFF[name], Y[:2]), latents, **options), unguided)


# The score form


@pytest.mark.parametrize("sigma", [0.002, 0.7, 80.0])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda sigma: torch.full((N,), sigma)])
def test_score_form(sigma, form):
    x, seen = 3 * LATENTS, []

    def guidance(x, y, step):
        seen.append((x, y, step))
        return ClassifierGuidance(linear)(x, y, step)

    net = GaussianDenoiser(std=0.9)
    denoised = net(x, sigma)
    got = GuidedDenoiser(lambda x, s: denoised, guidance, Y)(x, form(sigma))
    [(point, y, step)] = seen
    assert torch.equal(point, denoised.clamp(-1, 1))
    assert y is Y
    assert step.sigma == pytest.approx(sigma, rel=1e-7)
    assert step.variance == step.variance_max == pytest.approx(sigma**2 / math.sqrt(1 + sigma**2), rel=1e-6)
    expected = denoised + step.variance * linear_gradient(point, Y, 1.0, 1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12 * (1 + sigma))


def test_score_form_answers_like_the_network():
    net = GaussianDenoiser()
    guided = GuidedDenoiser(net, OFF["scale 0"], Y)
    names = ("sigma_min", "sigma_max", "round_sigma", "img_channels", "img_resolution", "label_dim")
    assert [getattr(guided, name) for name in names] == [getattr(net, name) for name in names]
    assert torch.equal(guided(LATENTS, 1.0, class_labels=None), net(LATENTS, 1.0))
    assert torch.equal(copy.deepcopy(guided)(LATENTS, 1.0), net(LATENTS, 1.0))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = guided.no_such_name


def test_score_form_takes_one_noise_level():
    guided = GuidedDenoiser(GaussianDenoiser(), ClassifierGuidance(linear), Y)
    with pytest.raises(ValueError, match=r"one noise level.*from 1 to 2"):
        guided(LATENTS, torch.tensor([1.0, 2.0, 1.0, 1.0]).view(-1, 1, 1, 1))


def test_timestep_of_a_noise_level():
    diffusion = create_gaussian_diffusion()
    assert [linear_timestep(diffusion.sigma(t)) for t in range(1000)] == list(range(1000))
    assert [linear_timestep(sigma) for sigma in (1e-9, 0.002, 1e9)] == [0, 0, 999]
    between = math.sqrt(diffusion.sigma(500) * diffusion.sigma(501))
    assert [linear_timestep(between * factor) for factor in (0.9999, 1.0001)] == [500, 501]


@pytest.mark.parametrize("gamma_factor", [0.0, 0.8])
def test_score_form_under_euler_is_ddim(gamma_factor):
    """DDIM over 25 of 1000 steps, and Euler's steps over the same noise levels in EDM's units, the sine term
    included.
    """
    net, original = GaussianDenoiser(), create_gaussian_diffusion()
    diffusion = create_gaussian_diffusion(timestep_respacing="ddim25")
    sigmas = [diffusion.sigma(t) for t in range(24, -1, -1)]
    guidance = ClassifierGuidance(
        linear, classifier_scale=0.02, marginal_temperature=0.5, gamma_factor=gamma_factor
    )

    def eps(x_t, t, y):
        sigma = original.sigma(int(t[0]))
        x = x_t * math.sqrt(1 + sigma**2)
        return (x - net(x, sigma)) / sigma

    def euler(net):
        x = LATENTS * math.sqrt(1 + sigmas[0] ** 2)
        for sigma, below in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
            x = x + (below - sigma) * (x - net(x, sigma)) / sigma
        return x

    def ddim(guidance):
        return diffusion.ddim_sample_loop(
            eps, LATENTS.shape, noise=LATENTS, model_kwargs={"y": Y}, guidance=guidance
        )

    torch.testing.assert_close(euler(net), ddim(None), rtol=0, atol=1e-10)
    guided = euler(GuidedDenoiser(net, guidance, Y))
    torch.testing.assert_close(guided, ddim(guidance), rtol=0, atol=1e-10)
    assert (guided - euler(net)).abs().max() > 1e-3


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_score_form_under_heun_in_closed_form(std):
    """A constant gradient b moves the end of the exact flow by std * b * the integral of sigma / sqrt((1 +
    sigma^2) (std^2 + sigma^2)).
    """
    b, sigma_max = 0.1 * draws(*SHAPE, seed=5), 20.0

    def guidance(x, y, step):
        return (step.variance * b).expand_as(x)

    net, options = GaussianDenoiser(std=std), {"num_steps": 400, "sigma_max": sigma_max}
    moved = edm_sampler(GuidedDenoiser(net, guidance, Y), LATENTS, **options) - edm_sampler(
        net, LATENTS, **options
    )
    integral = math.log((math.hypot(1, sigma_max) + math.hypot(std, sigma_max)) / (1 + std))
    # Heun's error falls with the square of the 400 steps.
    torch.testing.assert_close(moved, (std * integral * b).expand_as(moved), rtol=1e-3, atol=0)

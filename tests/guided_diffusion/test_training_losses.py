"""The training losses and their likelihood terms."""

import math

import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.losses import discretized_gaussian_log_likelihood, edm_loss, normal_kl
from guided_diffusion.schedules import get_named_beta_schedule

STEPS = 50
T = torch.tensor([0, 1, 7, 49])
EPSILON, LEARNED = ModelMeanType.EPSILON, ModelVarType.LEARNED_RANGE


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = draws(4, 3, 8, 8).clamp(-1, 1)
NOISE, MEAN, FRACTION = (draws(4, 3, 8, 8, seed=seed) for seed in (1, 2, 3))


def make_diffusion(loss=LossType.MSE, mean=EPSILON, var=LEARNED):
    betas = get_named_beta_schedule("linear", STEPS)
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss)


def terms_of(diffusion, mean, fraction=None, x_0=IMAGES, t=T):
    """The terms for a network that answers `mean` (and, where the variance is learned, `fraction`)."""
    output = mean if fraction is None else torch.cat([mean, fraction], 1)
    return diffusion.training_losses(lambda x, t: output, x_0, t, noise=NOISE[: len(t)])


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("mean", list(ModelMeanType))
@pytest.mark.parametrize("var", list(ModelVarType))
def test_one_finite_loss_per_image(loss, mean, var):
    fraction = 0.1 * FRACTION if var is LEARNED else None
    terms = terms_of(make_diffusion(loss, mean, var), MEAN, fraction)
    assert terms["loss"].shape == (4,) and (terms["loss"] > 0).all()
    assert all(term.isfinite().all() for term in terms.values())


@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_mse_is_against_what_the_network_predicts(mean):
    target = NOISE if mean is EPSILON else IMAGES
    loss = terms_of(make_diffusion(mean=mean, var=ModelVarType.FIXED_SMALL), MEAN)["loss"]
    torch.testing.assert_close(loss, (target - MEAN).square().mean(dim=(1, 2, 3)), rtol=1e-12, atol=0)


def test_model_gets_x_t_the_timesteps_and_model_kwargs():
    y, diffusion, seen = torch.arange(4), make_diffusion(var=ModelVarType.FIXED_SMALL), []

    def model(x, t, y):
        seen.append((x, t.tolist(), y))
        return x

    diffusion.training_losses(model, IMAGES, T, model_kwargs={"y": y}, noise=NOISE)
    [(x_t, t, labels)] = seen
    assert torch.equal(x_t, diffusion.q_sample(IMAGES, T, NOISE))
    assert t == T.tolist() and labels is y


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE])
def test_variance_learns_from_the_bound_and_the_mean_does_not(loss):
    mean, fraction = MEAN.clone().requires_grad_(), torch.zeros_like(MEAN).requires_grad_()
    terms = terms_of(make_diffusion(loss), mean, fraction)
    got = torch.autograd.grad(terms["loss"].sum(), [mean, fraction], retain_graph=True)
    bound = torch.autograd.grad(terms["vb"].sum(), fraction)[0]
    torch.testing.assert_close(got[0], -2 * (NOISE - MEAN) / MEAN[0].numel(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got[1], bound, rtol=1e-12, atol=1e-15)
    assert (got[1].abs().sum(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"], rtol=1e-12, atol=0)


def test_rescaling_weighs_the_bound_as_a_thousandth_of_its_sum_over_the_steps():
    plain, rescaled, kl = (terms_of(make_diffusion(loss), MEAN, 0.1 * FRACTION) for loss in LossType)
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * STEPS / 1000, rtol=1e-12, atol=0)
    torch.testing.assert_close(kl["loss"], plain["vb"] * STEPS, rtol=1e-12, atol=0)


# With fraction -1 the variance is the posterior's; means apart by d and variances v: KL = d^2 / (2 v) nats.
@pytest.mark.parametrize("distance", [0.0, 0.5])
def test_bound_is_the_kl_in_bits_per_dimension(distance):
    diffusion = make_diffusion(LossType.RESCALED_KL, ModelMeanType.START_X)
    loss = terms_of(diffusion, IMAGES + distance, -torch.ones_like(IMAGES))["loss"]
    apart = distance * diffusion.posterior_mean_coef1[T[1:].numpy()]
    expected = STEPS * apart**2 / (2 * diffusion.posterior_variance[T[1:].numpy()]) / math.log(2)
    torch.testing.assert_close(loss[1:], torch.from_numpy(expected), rtol=1e-10, atol=1e-10)
    assert loss[0] > 0  # the decoder's likelihood


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize(("var", "channels"), [(LEARNED, 3), (ModelVarType.FIXED_SMALL, 6)])
def test_wrong_number_of_channels_names_learn_sigma(loss, var, channels):
    with pytest.raises(ValueError, match="learn_sigma"):
        terms_of(make_diffusion(loss, var=var), torch.zeros(4, channels, 8, 8))


# Likelihood terms


def test_normal_kl():
    m1, v1, m2, v2 = (draws(50, seed=i) for i in range(4))
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, v1), (m2, v2)))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("mean", "log_scale"), [(0.1, -1.0), (-1.2, -3.0), (0.3, 0.0)])
def test_discretised_gaussian(mean, log_scale):
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, log_scale)
    )
    edges = torch.distributions.Normal(mean, math.exp(log_scale)).cdf(x[:-1] + 1 / 255)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    mass = torch.cat([ends[:1], edges, ends[1:]]).diff()
    torch.testing.assert_close(log_p.exp(), mass, rtol=1e-6, atol=1e-10)
    # Each of the 256 bins may have been raised to 1e-12.
    assert log_p.exp().sum().item() == pytest.approx(1, abs=256e-12)


# EDM's


def test_edm_loss_has_its_least_where_the_answer_is_the_image():
    images = IMAGES.float()
    assert edm_loss(lambda x, sigma, y: images, images, None).abs().max() == 0
    torch.manual_seed(0)
    seen = {}

    def off_by_one(x, sigma, y):
        seen.update(x=x, sigma=sigma)
        return images + 1

    loss = edm_loss(off_by_one, images, None, sigma_data=0.5)
    sigma = seen["sigma"]
    torch.testing.assert_close(loss, ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).expand_as(images))
    noise = (seen["x"] - images) / sigma
    assert noise.std().item() == pytest.approx(1, abs=0.1)

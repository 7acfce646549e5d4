"""The training loss and its likelihood terms."""

import math

import pytest
import torch

from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from guided_diffusion.schedules import get_named_beta_schedule

STEPS = 50
T = torch.tensor([0, 1, 7, 49])


def make_diffusion(loss=LossType.MSE, mean=ModelMeanType.EPSILON, var=ModelVarType.LEARNED_RANGE):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("linear", STEPS),
        model_mean_type=mean,
        model_var_type=var,
        loss_type=loss,
    )


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(seed=0):
    return draws(4, 3, 8, 8, seed=seed).clamp(-1, 1)


def as_model(mean, fraction=None):
    return lambda x, t, **kwargs: mean if fraction is None else torch.cat([mean, fraction], 1)


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("mean", list(ModelMeanType))
@pytest.mark.parametrize("var", list(ModelVarType))
def test_one_finite_loss_per_image(loss, mean, var):
    diffusion = make_diffusion(loss, mean, var)

    def model(x, t):
        return torch.cat([x, 0.1 * x], 1) if var is ModelVarType.LEARNED_RANGE else x

    terms = diffusion.training_losses(model, images(), T)
    assert terms["loss"].shape == (4,)
    assert all(term.isfinite().all() for term in terms.values())
    assert (terms["loss"] > 0).all()


@pytest.mark.parametrize("mean", list(ModelMeanType))
def test_mse_is_against_what_the_network_predicts(mean):
    diffusion = make_diffusion(mean=mean, var=ModelVarType.FIXED_SMALL)
    x_0, noise, output = images(), draws(4, 3, 8, 8, seed=1), draws(4, 3, 8, 8, seed=2)
    target = noise if mean is ModelMeanType.EPSILON else x_0
    terms = diffusion.training_losses(as_model(output), x_0, T, noise=noise)
    torch.testing.assert_close(
        terms["loss"], (target - output).square().mean(dim=(1, 2, 3)), rtol=1e-12, atol=0
    )


def test_model_gets_x_t_the_timesteps_and_model_kwargs():
    x_0, noise, y = images(), draws(4, 3, 8, 8, seed=1), torch.arange(4)
    diffusion, seen = make_diffusion(var=ModelVarType.FIXED_SMALL), []

    def model(x, t, y):
        seen.append((x, t.tolist(), y))
        return x

    diffusion.training_losses(model, x_0, T, model_kwargs={"y": y}, noise=noise)
    [(x_t, t, labels)] = seen
    assert torch.equal(x_t, diffusion.q_sample(x_0, T, noise))
    assert t == T.tolist()
    assert labels is y


@pytest.mark.parametrize("loss", [LossType.MSE, LossType.RESCALED_MSE])
def test_variance_learns_from_the_bound_and_the_mean_does_not(loss):
    x_0, noise = images(), draws(4, 3, 8, 8, seed=1)
    mean, fraction = (
        draws(4, 3, 8, 8, seed=2).requires_grad_(),
        torch.zeros(4, 3, 8, 8, dtype=torch.float64, requires_grad=True),
    )
    terms = make_diffusion(loss).training_losses(as_model(mean, fraction), x_0, T, noise=noise)
    got = torch.autograd.grad(terms["loss"].sum(), [mean, fraction], retain_graph=True)
    torch.testing.assert_close(got[0], -2 * (noise - mean.detach()) / mean[0].numel(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        got[1], torch.autograd.grad(terms["vb"].sum(), fraction)[0], rtol=1e-12, atol=1e-15
    )
    assert (got[1].abs().sum(dim=(1, 2, 3)) > 0).all()
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"], rtol=1e-12, atol=0)


def test_rescaling_weighs_the_bound_as_a_thousandth_of_its_sum_over_the_steps():
    x_0, noise, mean, fraction = (
        images(),
        draws(4, 3, 8, 8, seed=1),
        draws(4, 3, 8, 8, seed=2),
        0.1 * draws(4, 3, 8, 8, seed=3),
    )
    plain, rescaled, kl = (
        make_diffusion(loss).training_losses(as_model(mean, fraction), x_0, T, noise=noise)
        for loss in LossType
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * STEPS / 1000, rtol=1e-12, atol=0)
    torch.testing.assert_close(kl["loss"], plain["vb"] * STEPS, rtol=1e-12, atol=0)


def test_bound_of_a_perfect_prediction_is_zero_but_at_the_last_step():
    # With fraction -1 the variance is the posterior's, and with x_0 itself so is the mean.
    x_0 = images()
    diffusion = make_diffusion(LossType.RESCALED_KL, ModelMeanType.START_X)
    loss = diffusion.training_losses(as_model(x_0, -torch.ones_like(x_0)), x_0, T)["loss"]
    torch.testing.assert_close(loss[1:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    assert loss[0] > 0


def test_bound_is_the_kl_in_bits_per_dimension():
    # Means apart by d and equal variances v: KL = d^2 / (2 v) nats.
    x_0 = torch.zeros(3, 3, 8, 8, dtype=torch.float64)
    diffusion = make_diffusion(LossType.RESCALED_KL, ModelMeanType.START_X)
    loss = diffusion.training_losses(as_model(x_0 + 0.5, -torch.ones_like(x_0)), x_0, T[1:])["loss"]
    apart = 0.5 * diffusion.posterior_mean_coef1[T[1:].numpy()]
    expected = STEPS * apart**2 / (2 * diffusion.posterior_variance[T[1:].numpy()]) / math.log(2)
    torch.testing.assert_close(loss, torch.from_numpy(expected), rtol=1e-10, atol=0)


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize(
    ("var", "channels"), [(ModelVarType.LEARNED_RANGE, 3), (ModelVarType.FIXED_SMALL, 6)]
)
def test_wrong_number_of_channels_names_learn_sigma(loss, var, channels):
    with pytest.raises(ValueError, match="learn_sigma"):
        make_diffusion(loss, var=var).training_losses(as_model(torch.zeros(4, channels, 8, 8)), images(), T)


# Likelihood terms


def test_normal_kl():
    m1, v1, m2, v2 = (draws(50, seed=i) for i in range(4))
    p, q = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((m1, v1), (m2, v2)))
    torch.testing.assert_close(
        normal_kl(m1, v1, m2, v2), torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("mean", [-1.2, 0.0, 0.3])
@pytest.mark.parametrize("log_scale", [-3.0, 0.0])
def test_bins_of_the_discretised_gaussian_sum_to_one(mean, log_scale):
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, log_scale)
    )
    # Each of the 256 bins may have been raised to 1e-12.
    assert log_p.exp().sum().item() == pytest.approx(1, abs=256e-12)


@pytest.mark.parametrize("value", [0, 100, 255])
def test_bin_of_the_discretised_gaussian(value):
    x, normal = (
        torch.tensor([value / 127.5 - 1], dtype=torch.float64),
        torch.distributions.Normal(0.1, math.exp(-1.0)),
    )
    low = 0 if value == 0 else normal.cdf(x - 1 / 255)
    high = 1 if value == 255 else normal.cdf(x + 1 / 255)
    got = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, 0.1), log_scales=torch.full_like(x, -1.0)
    )
    torch.testing.assert_close(got, torch.log(high - low), rtol=1e-6, atol=0)

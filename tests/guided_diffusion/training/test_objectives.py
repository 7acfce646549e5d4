"""The losses equal what pencil and paper say of data whose best denoiser is known."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.losses import edm_loss
from guided_diffusion.resample import UniformSampler, create_named_schedule_sampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.objectives import DiscreteObjective, EDMObjective

STD = 0.5  # of the Gaussian data


def exact_edm(x, sigma, class_labels=None):
    """The best denoiser of N(0, STD^2)."""
    return x * STD**2 / (STD**2 + sigma**2)


def exact_eps(diffusion):
    """The best prediction of eps for the same data."""

    def model(x, t):
        alpha_bar = torch.as_tensor(diffusion.alphas_cumprod, dtype=torch.float32)[t].view(-1, 1, 1, 1)
        return x * (1 - alpha_bar).sqrt() / (alpha_bar * STD**2 + 1 - alpha_bar)

    return model


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0, 40.0])
def test_edms_loss_at_the_exact_denoiser_is_1_at_every_level(sigma):
    """Its weight is the inverse of the posterior's variance where sigma_data is the data's."""
    torch.manual_seed(0)
    images = STD * torch.randn(2000, 3, 4, 4)
    loss = edm_loss(exact_edm, images, None, sigma=torch.full((2000, 1, 1, 1), sigma))
    assert loss.mean().item() == pytest.approx(1, rel=0.02)


def test_edms_objective_sorts_by_quarters_of_the_levels():
    levels = torch.tensor([-1.0, -0.1, 0.1, 1.0])  # a quarter of a normal distribution ends at 0.6745
    losses = EDMObjective(exact_edm, 0).losses(torch.zeros(4, 3, 2, 2), None, levels, torch.ones(4, 3, 2, 2))
    assert (4 * losses["position"]).floor().tolist() == [0, 1, 2, 3]
    sigma = (1.2 * levels - 1.2).exp()
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(losses["loss"], weight * exact_edm(sigma, sigma) ** 2)


def test_a_label_of_no_class_is_a_row_of_zeros():
    rows = EDMObjective(exact_edm, 3).one_hot(torch.tensor([0, 2, 3]))
    assert rows.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert EDMObjective(exact_edm, 0).one_hot(torch.tensor([0])) is None


@pytest.mark.parametrize("t", [1, 10, 49])
def test_the_bound_of_a_gaussian(t):
    """KL(q(x_{t-1} | x_t, x_0) || p) of the exact eps is coef1^2 Var[x_0 | x_t] / (2 beta~) where p has the
    posterior's variance beta~.
    """
    diffusion = create_gaussian_diffusion(steps=50, noise_schedule="cosine", sigma_small=True, use_kl=True)
    alpha_bar = diffusion.alphas_cumprod[t]
    variance = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    kl = diffusion.posterior_mean_coef1[t] ** 2 * variance / (2 * diffusion.posterior_variance[t])
    torch.manual_seed(0)
    images = STD * torch.randn(4000, 3, 4, 4)
    steps = torch.full((4000,), t)
    losses = diffusion.training_losses(exact_eps(diffusion), images, steps)
    assert losses["loss"].mean().item() == pytest.approx(50 * kl / math.log(2), rel=0.02)


def test_the_error_of_the_exact_eps():
    """E |eps - E[eps | x_t]|^2 = alpha_bar s^2 / (alpha_bar s^2 + 1 - alpha_bar)."""
    diffusion = create_gaussian_diffusion(steps=50, noise_schedule="cosine")
    objective = DiscreteObjective(
        exact_eps(diffusion), diffusion, UniformSampler(diffusion), class_cond=False
    )
    torch.manual_seed(0)
    images, t = STD * torch.randn(4000, 3, 4, 4), torch.full((4000,), 20)
    losses = objective.losses(images, None, t, torch.ones(4000), torch.randn_like(images))
    alpha_bar = diffusion.alphas_cumprod[20]
    expected = alpha_bar * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    assert losses["loss"].mean().item() == pytest.approx(expected, rel=0.02)
    assert losses["position"][0].item() == pytest.approx(0.4)


# Which timesteps are drawn


class ThreeSteps:
    num_timesteps = 3


def test_loss_second_moment_equals_an_example_by_hand():
    sampler = create_named_schedule_sampler("loss-second-moment", ThreeSteps)
    sampler.uniform_prob = 0.1
    for _ in range(9):
        sampler.update_with_local_losses(torch.arange(3), torch.tensor([9.0, 9.0, 9.0]))
    assert sampler.weights().tolist() == [1, 1, 1]  # a loss short of ten
    for losses in [[1.0, 2.0, 5.0]] * 5 + [[3.0, 2.0, 5.0]] * 5:
        sampler.update_with_local_losses(torch.arange(3), torch.tensor(losses))
    # The last ten: roots of the mean squares are sqrt(5), 2 and 5.
    rms = np.array([5**0.5, 2, 5])
    expected = 0.9 * rms / rms.sum() + 0.1 / 3
    np.testing.assert_allclose(sampler.weights(), expected, rtol=1e-12)
    sampler.update_with_local_losses(torch.arange(2), torch.tensor([math.nan, math.inf]))  # are left out
    torch.manual_seed(0)
    t, weights = sampler.sample(30_000, "cpu")
    np.testing.assert_allclose(np.bincount(t) / 30_000, expected, atol=0.01)
    torch.testing.assert_close(weights, torch.from_numpy(1 / (3 * expected)).float()[t])
    other = create_named_schedule_sampler("loss-second-moment", ThreeSteps)
    other.load_state_dict(sampler.state_dict())
    np.testing.assert_allclose(other.weights(), rms / rms.sum() * 0.999 + 0.001 / 3)


def test_uniform_draws_all_with_weight_1():
    t, weights = create_named_schedule_sampler("uniform", ThreeSteps).sample(300, "cpu")
    assert set(t.tolist()) == {0, 1, 2} and (weights == 1).all()


def test_wrong_samplers():
    with pytest.raises(
        ValueError, match="unknown schedule_sampler 'best'; choose uniform or loss-second-moment"
    ):
        create_named_schedule_sampler("best", ThreeSteps)
    state = create_named_schedule_sampler("loss-second-moment", ThreeSteps).state_dict()
    four = type("FourSteps", (), {"num_timesteps": 4})
    with pytest.raises(ValueError, match="of 3 steps, but the process has 4"):
        create_named_schedule_sampler("loss-second-moment", four).load_state_dict(state)

"""The tables of the discrete process, and what a network says of a step, in closed form."""

import math

import numpy as np
import pytest
import torch
from toys import LOOPS, SHAPE, X, draws, make_diffusion, sample, tanh_model

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_tables_follow_from_the_betas(schedule, steps):
    diffusion, kept = make_diffusion(steps, schedule=schedule), sorted(space_timesteps(1000, [steps]))
    a = np.cumprod(1 - get_named_beta_schedule(schedule, 1000))[kept]
    np.testing.assert_allclose(diffusion.alphas_cumprod, a, rtol=1e-9)
    np.testing.assert_allclose(np.cumprod(1 - diffusion.betas), diffusion.alphas_cumprod, rtol=1e-12)
    previous = np.append(1.0, diffusion.alphas_cumprod[:-1])
    expected = diffusion.betas * (1 - previous) / (1 - diffusion.alphas_cumprod)
    np.testing.assert_allclose(diffusion.posterior_variance, expected, rtol=1e-12)
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == np.float64
    assert diffusion.num_timesteps == steps
    for t in range(steps):
        sigma = math.sqrt(1 / diffusion.alphas_cumprod[t] - 1)
        assert diffusion.sigma(t) == pytest.approx(sigma, rel=1e-12)


@pytest.mark.parametrize("betas", [[0.0, 0.1], [0.1, 1.1], [[0.1]], [-0.1], [math.nan]])
def test_betas_outside_their_range(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(
            betas=betas, model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL
        )


@pytest.mark.parametrize("t", [0, 1, 5, 7])
@pytest.mark.parametrize("fraction", [-1.0, -0.3, 0.0, 1.0])
def test_learned_variance_interpolates_in_log_space(fraction, t):
    diffusion = make_diffusion(var="LEARNED_RANGE")
    out = diffusion.p_mean_variance(
        lambda x, t: torch.cat([x, torch.full_like(x, fraction)], 1), X, torch.full((4,), t)
    )
    low, high = math.log(diffusion.posterior_variance[max(t, 1)]), math.log(diffusion.betas[t])
    expected = high * (fraction + 1) / 2 + low * (1 - fraction) / 2
    torch.testing.assert_close(out["log_variance"], torch.full_like(X, expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(out["variance"], torch.full_like(X, math.exp(expected)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [0, 1, 5, 7])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE"])
def test_fixed_variances(variance, t):
    diffusion = make_diffusion(var=variance)
    out = diffusion.p_mean_variance(lambda x, t: x, X, torch.full((4,), t))
    small, clipped = variance == "FIXED_SMALL", diffusion.posterior_variance[max(t, 1)]
    expected_log = clipped if small or t == 0 else diffusion.betas[t]
    expected = diffusion.posterior_variance[t] if small else expected_log
    log_variance = torch.full_like(X, math.log(expected_log))
    torch.testing.assert_close(out["variance"], torch.full_like(X, expected), rtol=1e-12, atol=0)
    torch.testing.assert_close(out["log_variance"], log_variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_mean_is_the_posteriors_at_the_prediction(mean):
    diffusion, x, t = make_diffusion(mean=mean), X[:2], [2, 6]
    out = diffusion.p_mean_variance(lambda x, t: 0.1 * x, x, torch.tensor(t), clip_denoised=False)
    tables = (diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev, diffusion.betas)
    a, previous, beta = (torch.tensor(table[t]).view(2, 1, 1, 1) for table in tables)
    x_0 = 0.1 * x if mean == "START_X" else (x - (1 - a).sqrt() * 0.1 * x) / a.sqrt()
    torch.testing.assert_close(out["pred_xstart"], x_0, rtol=1e-12, atol=1e-12)
    expected = (previous.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - previous) * x) / (1 - a)
    torch.testing.assert_close(out["mean"], expected, rtol=1e-12, atol=1e-12)


def test_q_sample_draws_from_the_marginal():
    diffusion, t, noise = make_diffusion(), torch.tensor([0, 7, 7, 0]), draws(*SHAPE, seed=1)
    a = torch.tensor(diffusion.alphas_cumprod[t]).view(4, 1, 1, 1)
    expected = a.sqrt() * X + (1 - a).sqrt() * noise
    torch.testing.assert_close(diffusion.q_sample(X, t, noise), expected, rtol=1e-12, atol=1e-12)
    # Half precision images are not sampled with half precision tables.
    half, t = X.half(), torch.zeros(4, dtype=torch.int64)
    torch.testing.assert_close(
        diffusion.q_sample(half, t, half), diffusion.q_sample(half.float(), t, half.float())
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_answers_that_cannot_be(loop):
    for variance, channels in (("LEARNED_RANGE", 3), ("FIXED_SMALL", 6), ("FIXED_LARGE", 4)):
        with pytest.raises(ValueError, match=rf"\(4, {channels}, 4, 4\).*learn_sigma"):
            sample(loop, make_diffusion(var=variance), lambda x, t, y, c=channels: x.new_zeros(4, c, 4, 4))

    def infinite(x, t, **_):
        output = tanh_model(x, t)
        output[1, 0, 0, 0] = math.inf  # the clamp would hide it
        return output

    with pytest.raises(NonFiniteError) as caught:
        sample(loop, make_diffusion(), infinite)
    assert (caught.value.step_index, caught.value.positions) == (7, [1])

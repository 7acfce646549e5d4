"""DiscreteDenoiser: the networks of the discrete process under the contract of every solver."""

import math

import pytest
import torch
from toys import X, Y, make_diffusion, process_levels, tanh_model

from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.files.nonfinite import NonFiniteError

PROCESSES = {
    "linear": {"steps": 200, "original": 200},
    "cosine": {"steps": 200, "original": 200, "schedule": "cosine"},
    "rescaled": {"steps": 200, "original": 200, "rescale": True},
    "respaced": {"steps": 7},
    "ddim": {"steps": "ddim25"},
    "cosine, respaced, rescaled": {"steps": 30, "original": 200, "schedule": "cosine", "rescale": True},
}


def asked_by(denoise_of, x, sigma):
    """(the answer, the timesteps that the model was asked for)."""
    seen = []

    def model(x, t, y):
        seen.append(t)
        return tanh_model(x, t, y)

    answer = denoise_of(model)(x, sigma)
    [t] = seen
    return answer, t


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("name", PROCESSES)
def test_at_a_level_of_the_process_it_is_p_mean_variance(name, mean, var, clip):
    diffusion, asked = make_diffusion(mean=mean, var=var, **PROCESSES[name]), []

    def model(x, t, y):
        asked.append((x, t, y))
        prediction = tanh_model(x, t, y)
        return torch.cat([prediction, x], 1) if var == "LEARNED_RANGE" else prediction

    denoise = DiscreteDenoiser(model, diffusion, {"y": Y}, clip_denoised=clip)
    for t, sigma in enumerate(process_levels(diffusion)[-2::-1]):
        x_t = (X / math.sqrt(1 + sigma**2)).float()
        options = {"clip_denoised": clip, "model_kwargs": {"y": Y}}
        expected = diffusion.p_mean_variance(model, x_t, torch.full((4,), t), **options)["pred_xstart"]
        got = denoise(X, sigma)
        (x_loop, t_loop, _), (x, asked_t, y) = asked[-2:]
        assert (got.dtype, x.dtype, asked_t.dtype) == (torch.float64, torch.float32, t_loop.dtype)
        assert torch.equal(x, x_loop) and y is Y
        torch.testing.assert_close(asked_t, t_loop, rtol=1e-6, atol=0)
        # float32's rounding of x_t and eps, times sigma where eps is predicted.
        torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5 * (1 + sigma))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("steps", [200, 20])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.999])
def test_between_two_levels_the_timestep_is_interpolated_in_log_sigma(steps, rescale, share):
    diffusion = make_diffusion(steps, original=200, rescale=rescale)
    levels = process_levels(make_diffusion(200, original=200))[-2::-1]  # the trained ones count, all of them
    for t in (0, 17, 198):
        sigma = levels[t] ** (1 - share) * levels[t + 1] ** share
        _, asked = asked_by(lambda model: DiscreteDenoiser(model, diffusion, {"y": Y}), X, sigma)
        assert asked.shape == (4,)
        assert asked.tolist() == pytest.approx([(t + share) * (5 if rescale else 1)] * 4, rel=1e-6, abs=1e-6)
        assert asked.dtype == (torch.int64 if share == 0 and not rescale else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [float, torch.tensor, lambda sigma: torch.tensor(sigma).double()])
def test_the_answer_has_the_dtype_of_x_whatever_the_level_is(dtype, form):
    denoise = DiscreteDenoiser(tanh_model, make_diffusion(1000), {"y": Y})
    got = denoise(X.to(dtype), form(1.0))
    assert (got.shape, got.dtype) == (X.shape, dtype)
    torch.testing.assert_close(got, denoise(X, 1.0).to(dtype), rtol=1e-5, atol=1e-5)
    assert float(denoise.round_sigma(form(1.2345))) == pytest.approx(1.2345)


def test_levels_outside_the_trained_ones_are_refused():
    diffusion = make_diffusion(10)
    denoise, levels = DiscreteDenoiser(tanh_model, diffusion), process_levels(make_diffusion(1000))
    assert (denoise.sigma_max, denoise.sigma_min) == pytest.approx((levels[0], levels[-2]), rel=1e-12)
    for sigma in (denoise.sigma_min, denoise.sigma_max):
        assert denoise(X, sigma).isfinite().all()
    for sigma in (0.0, -1.0, 0.99 * denoise.sigma_min, 1.01 * denoise.sigma_max, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"noise level {sigma:g} is outside those .*, 0.01 to 157\.4"):
            denoise(X, sigma)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [True, False])
def test_an_answer_that_is_not_finite_is_named(fault, clip):
    def broken(x, t):
        output = tanh_model(x, t)
        output[[1, 3], 0, 0, 0] = fault
        return output

    denoise = DiscreteDenoiser(broken, make_diffusion(1000), clip_denoised=clip)
    with pytest.raises(NonFiniteError) as caught:
        denoise(X, 1.0)
    assert caught.value.positions == [1, 3]
    assert caught.value.sigma == 1.0


def test_a_network_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 6, 4, 4\).*learn_sigma"):
        DiscreteDenoiser(lambda x, t: torch.cat([x, x], 1), make_diffusion())(X, 1.0)

"""Schedules, respacing, posterior tables, single posterior steps and rounding (golden set E_tables)."""

import numpy as np
import pytest
import torch
from goldens_util import load_golden, max_abs, random_input

from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.schedules import get_named_beta_schedule, space_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion

SETTINGS, ARRAYS = load_golden("E_tables")
TABLES = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
]


def cases(prefix):
    return sorted({key.split("/")[1] for key in ARRAYS if key.startswith(f"{prefix}/")})


def assert_table(actual, golden):
    """float64, rtol 1e-12, as set E_tables asks."""
    actual = np.asarray(actual)
    assert actual.dtype == np.float64
    np.testing.assert_allclose(actual, golden, rtol=1e-12, atol=0)


@pytest.mark.parametrize("counts", cases("respace"))
def test_respacing(counts):
    assert sorted(space_timesteps(1000, counts)) == ARRAYS[f"respace/{counts}/timesteps"].tolist()


@pytest.mark.parametrize("base, counts", [(300, "10,15,20"), (4000, "ddim50")])
def test_respacing_of_other_lengths(base, counts):
    assert sorted(space_timesteps(base, counts)) == ARRAYS[f"respace_T{base}/{counts}/timesteps"].tolist()


@pytest.mark.parametrize("counts", SETTINGS["refused"])
def test_impossible_respacing_is_refused(counts):
    with pytest.raises(ValueError):
        space_timesteps(1000, counts)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_betas(schedule):
    assert_table(get_named_beta_schedule(schedule, 1000), ARRAYS[f"betas/{schedule}_1000/betas"])


@pytest.mark.parametrize("name", cases("spaced"))
def test_spaced_tables(name):
    schedule, respacing = name.split("_")
    diffusion = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=respacing)
    assert list(diffusion.timestep_map) == ARRAYS[f"spaced/{name}/timestep_map"].tolist()
    for table in TABLES:
        assert_table(getattr(diffusion, table), ARRAYS[f"spaced/{name}/{table}"])


def single_step(name):
    """(diffusion, arguments of one step, gradient, golden arrays) for a model whose output is constant."""
    golden = {
        key.removeprefix(f"step/{name}/"): value for key, value in ARRAYS.items() if f"step/{name}/" in key
    }
    learn_sigma = name.startswith("learned_range")
    diffusion = create_gaussian_diffusion(learn_sigma=learn_sigma, timestep_respacing="250")
    shape = golden["mean"].shape
    model_out = random_input(3001, (shape[0], 3 * (1 + learn_sigma), *shape[2:]))
    arguments = {
        "model": lambda x, t, **kwargs: model_out,
        "x": random_input(3000, shape),
        "t": torch.from_numpy(golden["t"]),
        "clip_denoised": name.endswith("clip1"),
    }
    return diffusion, arguments, random_input(3002, shape), golden


def assert_step(actual, golden):
    """Set E_tables: 1e-5 of the largest entry, because x0 carries factors of order 100 at the largest t."""
    assert max_abs(actual, golden) <= 1e-5 * np.abs(golden).max()


@pytest.mark.parametrize("name", cases("step"))
def test_p_mean_variance(name):
    diffusion, arguments, _, golden = single_step(name)
    out = diffusion.p_mean_variance(**arguments)
    for key in ("mean", "variance", "log_variance", "pred_xstart"):
        assert_step(out[key].expand(golden[key].shape), golden[key])


@pytest.mark.parametrize("name", cases("step"))
def test_cond_fn_moves_the_mean_and_the_ddim_score(name):
    diffusion, arguments, grad, golden = single_step(name)
    arguments |= {"cond_fn": lambda x, t, **kw: grad, "noise": torch.zeros_like(grad)}
    # Without noise the sample is the mean.
    assert_step(diffusion.p_sample(**arguments)["sample"], golden["condition_mean"])
    assert_step(diffusion.ddim_sample(**arguments)["pred_xstart"], golden["condition_score_pred_xstart"])


def test_rounding_to_uint8():
    x = torch.from_numpy(ARRAYS["quantise/x"]).reshape(1, 3, 1, -1)
    golden = ARRAYS["quantise/ddpm_uint8"].reshape(x.shape).transpose(0, 2, 3, 1)
    images = to_uint8(x)
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images.numpy(), golden)  # exact: floor((x + 1) * 127.5), clamped

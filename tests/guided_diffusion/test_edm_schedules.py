"""EDM's time axis against table 1 and appendix C of Karras et al., 2022, written out here once more, and
against differences.
"""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.edm import NoiseProcess, iDDPMPrecond
from guided_diffusion.schedules import DISCRETIZATIONS, VPSchedule, default_levels, iddpm_levels, noise_levels

SIGMA_MIN, SIGMA_MAX = 0.01, 60.0
TIMES = {
    "vp": [0.001, 0.01, 0.2, 0.5, 0.9, 1.0],
    "ve": [1e-4, 0.3, 1.0, 50.0, 3600.0],
    "linear": [0.002, 0.3, 1.0, 20.0, 80.0],
}


def process(schedule, scaling="none", sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX):
    return NoiseProcess(schedule, scaling, sigma_min, sigma_max)


def slope(function, t):
    """The central difference, right to some 1e-9."""
    h = 1e-5 * t
    return (function(t + h) - function(t - h)) / (2 * h)


def cosine_levels(M=1000, C_1=0.001, C_2=0.008):
    """u_j = sqrt(alpha_bar_M / alpha_bar_j - 1): the ratios telescope, but for the last, at j = 0, which
    would be infinite.
    """
    alpha_bar = np.sin(math.pi / 2 * np.arange(M + 1) / (M * (C_2 + 1))) ** 2
    u = np.sqrt(alpha_bar[M] / alpha_bar[1:] - 1)
    return np.array([math.sqrt((u[0] ** 2 + 1) / C_1 - 1), *u])


# sigma(t) and s(t)


@pytest.mark.parametrize("schedule", TIMES)
def test_sigma(schedule):
    # The two conditions of appendix C.1 for beta_d and beta_min, solved as a linear system.
    rows = [[t**2 / 2, t] for t in (1e-3, 1.0)]
    beta_d, beta_min = np.linalg.solve(rows, [math.log(1 + SIGMA_MIN**2), math.log(1 + SIGMA_MAX**2)])
    formula = {
        "vp": lambda t: math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1),
        "ve": math.sqrt,
        "linear": float,
    }[schedule]
    for t in TIMES[schedule]:
        assert process(schedule).sigma(t) == pytest.approx(formula(t), rel=1e-9)
    assert process(schedule).sigma(0.0) == 0


@pytest.mark.parametrize("schedule", TIMES)
@pytest.mark.parametrize("scaling", ["vp", "none"])
def test_derivatives(schedule, scaling):
    p = process(schedule, scaling)
    for t in TIMES[schedule]:
        assert p.sigma_deriv(t) == pytest.approx(slope(p.sigma, t), rel=1e-7)
        assert p.s_deriv(t) == pytest.approx(slope(p.s, t), rel=1e-7, abs=1e-9 * p.s(t) / t)


@pytest.mark.parametrize("schedule", TIMES)
def test_inverse(schedule):
    p = process(schedule)
    for t in TIMES[schedule]:
        assert p.sigma_inv(p.sigma(t)) == pytest.approx(t, rel=1e-9)
    for sigma in np.geomspace(SIGMA_MIN, SIGMA_MAX, 20):
        assert p.sigma(p.sigma_inv(sigma)) == pytest.approx(sigma, rel=1e-9)


@pytest.mark.parametrize("schedule", TIMES)
def test_scale(schedule):
    scaled, plain = process(schedule, "vp"), process(schedule)
    for t in TIMES[schedule]:
        assert scaled.s(t) ** 2 * (1 + scaled.sigma(t) ** 2) == pytest.approx(
            1, rel=1e-13
        )  # unit data keep their variance
        assert (plain.s(t), plain.s_deriv(t)) == (1, 0)
    assert scaled.s(0.0) == 1


@pytest.mark.parametrize(
    ("sigma_min", "sigma_max"), [default_levels("vp"), (0.002, 80), (0.02, 100), (1e-4, 1), (0.05, 20)]
)
def test_vp_begins_and_ends_at_the_levels_that_are_asked_for(sigma_min, sigma_max):
    p = process("vp", "none", sigma_min, sigma_max)
    assert p.sigma(1e-3) == pytest.approx(sigma_min, rel=1e-8)
    assert p.sigma(1.0) == pytest.approx(sigma_max, rel=1e-12)


def test_vp_with_its_own_levels_has_the_published_betas():
    p = process("vp", "none", *default_levels("vp"))
    for t in TIMES["vp"]:
        assert p.sigma(t) == pytest.approx(math.sqrt(math.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), rel=1e-9)
        assert VPSchedule().sigma(t) == pytest.approx(p.sigma(t), rel=1e-9)


# Which levels


def test_default_levels():
    vp = [math.sqrt(math.exp(19.9 / 2 * t**2 + 0.1 * t) - 1) for t in (1e-3, 1)]
    expected = {"vp": vp, "ve": [0.02, 100], "iddpm": [0.002, 81], "edm": [0.002, 80]}
    assert {name: list(default_levels(name)) for name in DISCRETIZATIONS} == {
        k: pytest.approx(v, rel=1e-12) for k, v in expected.items()
    }


def closed_form(disc, n):
    """Table 1's row of time steps, as levels."""
    low, high = default_levels(disc)
    i = np.arange(n) / (n - 1)
    if disc == "vp":
        t = 1 + i * (1e-3 - 1)
        return np.sqrt(np.exp(19.9 / 2 * t**2 + 0.1 * t) - 1)
    if disc == "ve":
        return np.sqrt(high**2 * (low**2 / high**2) ** i)
    if disc == "iddpm":  # j_0 = 8
        return cosine_levels()[np.floor(8 + (1000 - 1 - 8) * i + 0.5).astype(int)]
    return (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7


@pytest.mark.parametrize("disc", DISCRETIZATIONS)
@pytest.mark.parametrize("num_steps", [2, 3, 18, 64, 511])
def test_levels(disc, num_steps):
    levels = noise_levels(disc, num_steps, *default_levels(disc))
    assert (levels.shape, levels.dtype) == ((num_steps,), np.float64)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels, closed_form(disc, num_steps), rtol=1e-9)


@pytest.mark.parametrize("disc", DISCRETIZATIONS)
@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(0.02, 40), (0.05, 20)])
def test_levels_between_ends_that_are_given(disc, sigma_min, sigma_max):
    levels, u = noise_levels(disc, 7, sigma_min, sigma_max), cosine_levels()
    ends = (sigma_max, sigma_min) if disc != "iddpm" else (u[u <= sigma_max].max(), u[u >= sigma_min].min())
    assert (levels[0], levels[-1]) == pytest.approx(ends, rel=1e-8)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("disc", DISCRETIZATIONS)
def test_one_step_is_the_first_level_alone(disc):
    assert noise_levels(disc, 1, *default_levels(disc)) == pytest.approx(closed_form(disc, 2)[:1], rel=1e-12)


def test_rho_counts_for_edm_alone():
    for disc in DISCRETIZATIONS:
        same = np.array_equal(noise_levels(disc, 5, 0.02, 40, 3), noise_levels(disc, 5, 0.02, 40, 7))
        assert same == (disc != "edm")


def test_iddpm_levels():
    np.testing.assert_allclose(iddpm_levels(1000, 0.001, 0.008), cosine_levels(), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(
        iddpm_levels(20, 0.01, 0.1), cosine_levels(20, 0.01, 0.1), rtol=1e-7, atol=1e-12
    )


def test_iddpm_levels_are_those_that_its_network_knows():
    net = iDDPMPrecond(8, 3, model_channels=4, channel_mult=(1,), num_blocks=1)
    levels = torch.from_numpy(noise_levels("iddpm", 50, *default_levels("iddpm")))
    nearest = net.round_sigma(levels)
    assert set(nearest.tolist()) <= set(net.u.tolist())
    # The network's are a recursion in float32, as published: its rounding moves the lowest levels.
    torch.testing.assert_close(nearest, levels, rtol=5e-4, atol=0)
    assert float(nearest[0]) == float(net.u[8])
    assert float(nearest[-1]) == float(net.u[999])


# What is refused


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown discretization 'karras'; choose vp, ve, iddpm, edm"):
        noise_levels("karras", 5, 0.02, 40)
    for names in (("cosine", "none"), ("vp", "ve")):
        with pytest.raises(
            ValueError,
            match=f"schedule '{names[0]}' with scaling '{names[1]}': choose of vp, ve, linear and vp, none",
        ):
            process(*names)


@pytest.mark.parametrize("disc", DISCRETIZATIONS)
@pytest.mark.parametrize(
    ("num_steps", "sigma_min", "sigma_max", "message"),
    [
        (0, 0.02, 40, "num_steps must be at least 1, got 0"),
        (5, 0, 40, "noise levels need 0 < sigma_min <= sigma_max < inf.* got 0, 40"),
        (5, -1, 40, "got -1, 40"),
        (5, 3, 2, "got 3, 2"),
        (5, 1, math.inf, "got 1, inf"),
        (5, math.nan, 40, "got nan, 40"),
    ],
)
def test_levels_that_cannot_be(disc, num_steps, sigma_min, sigma_max, message):
    with pytest.raises(ValueError, match=message):
        noise_levels(disc, num_steps, sigma_min, sigma_max)


def test_more_steps_than_iddpm_has_levels():
    assert len(noise_levels("iddpm", 992, 0.002, 81)) == 992
    with pytest.raises(ValueError, match=r"iddpm has 992 levels from 0.002 to 81, fewer than 993 steps"):
        noise_levels("iddpm", 993, 0.002, 81)
    with pytest.raises(ValueError, match=r"iddpm has 0 levels from 1e-05 to 0.001, fewer than 1 steps"):
        noise_levels("iddpm", 1, 1e-5, 1e-3)


@pytest.mark.parametrize(("sigma_min", "sigma_max"), [(1, 80), (0.5, 2), (5, 80)])
def test_vp_refuses_ends_between_which_it_would_not_be_monotone(sigma_min, sigma_max):
    """With beta_d + beta_min < 0, sigma(t) rises above sigma_max between its ends, here up to 1e38."""
    with pytest.raises(ValueError, match=f"vp.*{sigma_min}"):
        noise_levels("vp", 5, sigma_min, sigma_max)

"""EDM's time axis against table 1 and appendix C of Karras et al., 2022, written out here once more, and
against differences.
"""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.edm import NoiseProcess, iDDPMPrecond
from guided_diffusion.schedules import (
    DISCRETIZATIONS,
    VPSchedule,
    default_levels,
    iddpm_levels,
    karras_sigmas,
    noise_levels,
)

ENDS = SIGMA_MIN, SIGMA_MAX = 0.01, 60.0
TIMES = {
    "vp": [0.001, 0.01, 0.2, 0.5, 0.9, 1.0],
    "ve": [1e-4, 0.3, 1.0, 50.0, 3600.0],
    "linear": [0.002, 0.3, 1.0, 20.0, 80.0],
}
each_schedule = pytest.mark.parametrize("schedule", TIMES)
each_disc = pytest.mark.parametrize("disc", DISCRETIZATIONS)


def process(schedule, scaling="none", ends=ENDS):
    return NoiseProcess(schedule, scaling, *ends)


def slope(function, t):
    """The central difference, right to some 1e-9."""
    h = 1e-5 * t
    return (function(t + h) - function(t - h)) / (2 * h)


def published_vp(t):
    return np.sqrt(np.exp(19.9 / 2 * t**2 + 0.1 * t) - 1)


def cosine_levels(M=1000, C_1=0.001, C_2=0.008):
    """u_j = sqrt(alpha_bar_M / alpha_bar_j - 1): the ratios telescope, but for the last, at j = 0, which
    would be infinite.
    """
    alpha_bar = np.sin(math.pi / 2 * np.arange(M + 1) / (M * (C_2 + 1))) ** 2
    u = np.sqrt(alpha_bar[M] / alpha_bar[1:] - 1)
    return np.array([math.sqrt((u[0] ** 2 + 1) / C_1 - 1), *u])


# sigma(t) and s(t)


@each_schedule
def test_sigma_and_its_inverse(schedule):
    # The two conditions of appendix C.1 for beta_d and beta_min, solved as a linear system.
    rows = [[t**2 / 2, t] for t in (1e-3, 1.0)]
    beta_d, beta_min = np.linalg.solve(rows, [math.log(1 + level**2) for level in ENDS])
    formula = {
        "vp": lambda t: math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1),
        "ve": math.sqrt,
        "linear": float,
    }[schedule]
    p = process(schedule)
    for t in TIMES[schedule]:
        assert p.sigma(t) == pytest.approx(formula(t), rel=1e-9)
        assert p.sigma_inv(p.sigma(t)) == pytest.approx(t, rel=1e-9)
    assert p.sigma(0.0) == 0
    for sigma in np.geomspace(*ENDS, 20):
        assert p.sigma(p.sigma_inv(sigma)) == pytest.approx(sigma, rel=1e-9)


@each_schedule
@pytest.mark.parametrize("scaling", ["vp", "none"])
def test_scale_and_derivatives(schedule, scaling):
    p = process(schedule, scaling)
    for t in TIMES[schedule]:
        assert p.sigma_deriv(t) == pytest.approx(slope(p.sigma, t), rel=1e-7)
        assert p.s_deriv(t) == pytest.approx(slope(p.s, t), rel=1e-7, abs=1e-9 * p.s(t) / t)
        # Unit data keep their variance.
        assert p.s(t) == pytest.approx(1 if scaling == "none" else (1 + p.sigma(t) ** 2) ** -0.5, rel=1e-13)
    assert p.s(0.0) == 1


@pytest.mark.parametrize("ends", [default_levels("vp"), (0.002, 80), (0.02, 100), (1e-4, 1), (0.05, 20)])
def test_vp_begins_and_ends_at_the_levels_that_are_asked_for(ends):
    p = process("vp", "none", ends)
    assert p.sigma(1e-3) == pytest.approx(ends[0], rel=1e-8)
    assert p.sigma(1.0) == pytest.approx(ends[1], rel=1e-12)


def test_vp_with_its_own_levels_has_the_published_betas():
    p = process("vp", "none", default_levels("vp"))
    for t in TIMES["vp"]:
        assert p.sigma(t) == pytest.approx(published_vp(t), rel=1e-9)
        assert VPSchedule().sigma(t) == pytest.approx(p.sigma(t), rel=1e-9)


# Which levels


def test_karras_sigmas():
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(karras_sigmas(18, 0.002, 80, 7), expected, rtol=1e-13)
    np.testing.assert_allclose(karras_sigmas(4, 1, 10, 1), [10, 7, 4, 1], rtol=1e-13)
    np.testing.assert_allclose(karras_sigmas(3, 4, 16, 2), [16, 9, 4], rtol=1e-13)


def test_default_levels():
    vp = [published_vp(t) for t in (1e-3, 1)]
    expected = {"vp": vp, "ve": [0.02, 100], "iddpm": [0.002, 81], "edm": [0.002, 80]}
    for disc in DISCRETIZATIONS:
        assert default_levels(disc) == pytest.approx(tuple(expected[disc]), rel=1e-12)


def closed_form(disc, n):
    """Table 1's row of time steps, as levels."""
    (low, high), i = default_levels(disc), np.arange(n) / (n - 1)
    if disc == "vp":
        return published_vp(1 + i * (1e-3 - 1))
    if disc == "ve":
        return np.sqrt(high**2 * (low**2 / high**2) ** i)
    if disc == "iddpm":  # j_0 = 8
        return cosine_levels()[np.floor(8 + (1000 - 1 - 8) * i + 0.5).astype(int)]
    return (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7


@each_disc
@pytest.mark.parametrize("num_steps", [1, 2, 3, 18, 511])
def test_levels(disc, num_steps):
    levels = noise_levels(disc, num_steps, *default_levels(disc))
    assert (levels.shape, levels.dtype) == ((num_steps,), np.float64)
    assert (np.diff(levels) < 0).all()
    np.testing.assert_allclose(levels, closed_form(disc, max(num_steps, 2))[:num_steps], rtol=1e-9)


@each_disc
@pytest.mark.parametrize("ends", [(0.02, 40), (0.05, 20)])
def test_levels_between_ends_that_are_given(disc, ends):
    levels, u, (low, high) = noise_levels(disc, 7, *ends), cosine_levels(), ends
    first_and_last = (u[u <= high].max(), u[u >= low].min()) if disc == "iddpm" else (high, low)
    assert (levels[0], levels[-1]) == pytest.approx(first_and_last, rel=1e-8)
    assert (np.diff(levels) < 0).all()
    # rho counts for "edm" alone.
    assert np.array_equal(noise_levels(disc, 7, *ends, 3), levels) == (disc != "edm")


def test_iddpm_levels_are_those_that_its_network_knows():
    np.testing.assert_allclose(iddpm_levels(1000, 0.001, 0.008), cosine_levels(), rtol=1e-7, atol=1e-12)
    other = cosine_levels(20, 0.01, 0.1)
    np.testing.assert_allclose(iddpm_levels(20, 0.01, 0.1), other, rtol=1e-7, atol=1e-12)
    net = iDDPMPrecond(8, 3, model_channels=4, channel_mult=(1,), num_blocks=1)
    levels = torch.from_numpy(noise_levels("iddpm", 50, *default_levels("iddpm")))
    nearest = net.round_sigma(levels)
    assert set(nearest.tolist()) <= set(net.u.tolist())
    # The network's are a recursion in float32, as published: its rounding moves the lowest levels.
    torch.testing.assert_close(nearest, levels, rtol=5e-4, atol=0)
    assert (float(nearest[0]), float(nearest[-1])) == (float(net.u[8]), float(net.u[999]))


# What is refused


@each_disc
@pytest.mark.parametrize(
    ("num_steps", "low", "high", "message"),
    [
        (0, 0.02, 40, "num_steps must be at least 1, got 0"),
        (5, 0, 40, "noise levels need 0 < sigma_min <= sigma_max < inf.* got 0, 40"),
        (5, -1, 40, "got -1, 40"),
        (5, 3, 2, "got 3, 2"),
        (5, 1, math.inf, "got 1, inf"),
        (5, math.nan, 40, "got nan, 40"),
    ],
)
def test_levels_that_cannot_be(disc, num_steps, low, high, message):
    with pytest.raises(ValueError, match=message):
        noise_levels(disc, num_steps, low, high)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("karras", 5, 0.02, 40), "unknown discretization 'karras'; choose vp, ve, iddpm, edm"),
        (("edm", 5, 0.02, 40, 0), "0 < rho < inf, got 0.02, 40, rho 0"),
        (("iddpm", 993, 0.002, 81), "iddpm has 992 levels from 0.002 to 81, fewer than 993 steps"),
        (("iddpm", 1, 1e-5, 1e-3), "iddpm has 0 levels from 1e-05 to 0.001, fewer than 1 steps"),
        # With beta_d + beta_min < 0, sigma(t) rises above sigma_max between its ends, here up to 1e38.
        *((("vp", 5, low, high), f"vp.*{low}") for low, high in [(1, 80), (0.5, 2), (5, 80)]),
    ],
)
def test_levels_that_a_discretization_does_not_have(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise_levels(*arguments)
    assert len(noise_levels("iddpm", 992, 0.002, 81)) == 992


@pytest.mark.parametrize("names", [("cosine", "none"), ("vp", "ve")])
def test_unknown_schedule_or_scaling(names):
    message = f"schedule '{names[0]}' with scaling '{names[1]}': choose of vp, ve, linear and vp, none"
    with pytest.raises(ValueError, match=message):
        process(*names)

"""Beta schedules and timestep respacing."""

import math

import numpy as np
import pytest

from guided_diffusion.schedules import betas_for_alpha_bar, get_named_beta_schedule, space_timesteps


def test_linear_schedule():
    betas = get_named_beta_schedule("linear", 1000)
    np.testing.assert_allclose(betas, 1e-4 + np.arange(1000) / 999 * (0.02 - 1e-4), rtol=1e-12)
    assert betas.dtype == np.float64
    for steps in (100, 250, 4000):  # the same total noise
        assert get_named_beta_schedule("linear", steps).sum() == pytest.approx(betas.sum(), rel=1e-12)


def test_cosine_schedule():
    def alpha_bar(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = get_named_beta_schedule("cosine", 50)
    expected = [alpha_bar((i + 1) / 50) / alpha_bar(0) for i in range(49)]
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], expected, rtol=1e-12)
    assert betas[-1] == 0.999


def test_betas_follow_alpha_bar_and_are_capped():
    got = betas_for_alpha_bar(4, lambda u: 1 - 0.5 * u)
    np.testing.assert_allclose(got, [1 / 8, 1 / 7, 1 / 6, 1 / 5], rtol=1e-12)
    assert betas_for_alpha_bar(2, lambda u: 1 - u, max_beta=0.7).tolist() == [0.5, 0.7]


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("sigmoid", 10, "'sigmoid'.*linear.*cosine"),
        ("linear", 0, "diffusion_steps must be at least 1, got 0"),
    ],
)
def test_schedules_that_cannot_be(name, steps, message):
    with pytest.raises(ValueError, match=message):
        get_named_beta_schedule(name, steps)


@pytest.mark.parametrize(
    ("steps", "spacing", "kept"),
    [
        (10, [10], range(10)),
        (10, "10", range(10)),
        (10, "1", [0]),
        (9, "3", [0, 4, 8]),
        (10, "2", [0, 9]),
        (9, "2,1,3", [0, 2, 3, 6, 7, 8]),
        (9, [2, 1, 3], [0, 2, 3, 6, 7, 8]),
        (10, "1,1,1", [0, 4, 7]),
        (10, "ddim5", range(0, 10, 2)),
        (10, "ddim4", range(0, 10, 3)),
        (1000, "ddim25", range(0, 1000, 40)),
    ],
)
def test_kept_timesteps(steps, spacing, kept):
    assert space_timesteps(steps, spacing) == set(kept)


@pytest.mark.parametrize("count", [1, 25, 100, 250, 999, 1000])
def test_even_spacing_keeps_both_ends_and_the_count(count):
    kept = sorted(space_timesteps(1000, str(count)))
    assert len(kept) == count
    assert kept[0] == 0
    assert count == 1 or kept[-1] == 999
    assert set(np.diff(kept)) <= {math.floor(999 / max(count - 1, 1)), math.ceil(999 / max(count - 1, 1))}


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        ("11", "10.*11"), ("6,4", "5.*6"), ("ddim7", "7.*integer"), ([20], "10.*20"),
        *((text, f"timestep_respacing '{text}'")
          for text in ("abc", "5,", "0", "-3", "ddim", "ddimx", "2.5", "ddim0")),
    ],
)  # fmt: skip
def test_spacing_that_cannot_be(spacing, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(10, spacing)

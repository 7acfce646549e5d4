"""Strengths that differ between frequencies: the cosine transform, the posterior of a Gaussian that is
diagonal there, spectra.
"""

import numpy as np
import pytest
import torch
from exact_posteriors import (
    MEAN,
    ORDERS,
    SHAPE,
    SIGMA_MAX,
    SIGMA_MIN,
    SPECTRUM,
    InFrequencies,
    W,
    draws,
    guided,
    levels,
    per_frequency,
)
from scipy.fft import dctn

from guided_diffusion.guidance import (
    GuidanceStep,
    PerFrequency,
    natural_spectrum,
    posterior_variance,
    read_spectrum,
)
from guided_diffusion.guidance.frequency import dct


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ipndm 4", "unipc 3 bh2"])
def test_the_frequency_form_reaches_a_gaussian_that_is_diagonal_in_the_cosine_transform(name):
    target = MEAN + dct(dct(W[None]) * SPECTRUM, inverse=True)
    exact_rule = guided(1, net=InFrequencies(), strength=per_frequency())
    torch.testing.assert_close(
        ORDERS[name][0](exact_rule, target, levels(10)), target, rtol=1e-10, atol=1e-10
    )
    # From another start, what each frequency keeps of it, by the exact flow.
    gain, found = SPECTRUM / ((SPECTRUM + SIGMA_MIN**2) * (SPECTRUM + SIGMA_MAX**2)).sqrt(), []
    exact = target - dct(dct(target) * gain, inverse=True)
    for n in (60, 120):
        image = ORDERS[name][0](exact_rule, torch.zeros_like(target), levels(n))
        found.append(float((image - exact).abs().max()))
    assert found[1] < found[0] / 1.8 and found[1] < 5e-3
    scalar = guided(1, net=InFrequencies())
    assert (ORDERS[name][0](scalar, target, levels(60)) - target).abs().max() > 0.1


def test_the_transform_is_orthonormal_and_scipys():
    x = draws(2, 3, 5, 8, seed=5)
    np.testing.assert_allclose(dct(x)[0], dctn(x[0].numpy(), norm="ortho"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dct(dct(x), inverse=True), x, rtol=1e-12, atol=1e-12)


def test_a_flat_spectrum_is_the_scalar_rule():
    step, g = GuidanceStep(1, 2, 3.0, 4.0, 1.7, 0.5), draws(2, *SHAPE, seed=6)
    flat = per_frequency(torch.full(SHAPE, 0.25).double())(step) * g
    torch.testing.assert_close(flat, posterior_variance(1.7) * g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(3.0 * (per_frequency()(step) * 2.0) * g, 6 * (per_frequency()(step) * g))
    with pytest.raises(ValueError, match=r"of images \(3, 4, 4\), and these are \(3, 4, 8\)"):
        PerFrequency(lambda *shape: SPECTRUM) * torch.zeros(1, 3, 4, 8)


def test_natural_images_have_an_inverse_square_law():
    spectrum = natural_spectrum(3, 32, 64, sigma_data=0.4)
    assert spectrum.shape == (3, 32, 64) and spectrum.mean() == pytest.approx(0.16)
    assert spectrum[0, 0, 20] / spectrum[0, 0, 10] == pytest.approx(0.25)
    assert spectrum[0, 5, 0] == spectrum[1, 0, 10]  # as many cycles per pixel


def test_a_file_that_is_no_spectrum_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such spectrum"):
        read_spectrum(tmp_path / "none.npz")
    for content in ({"other": np.ones(3)}, {"spectrum": np.ones(3)}, {"spectrum": -np.ones((3, 4, 4))}):
        np.savez(tmp_path / "wrong.npz", **content)
        with pytest.raises(ValueError, match=r"wrong\.npz"):
            read_spectrum(tmp_path / "wrong.npz")

"""The preconditioning of improved DDPM's networks, against Nichol and Dhariwal's schedule and closed
forms.
"""

import math

import numpy as np
import pytest
import torch
from edm_pickles import TINY, random_net

from guided_diffusion.edm import EDMPrecond, edm_sampler, iDDPMPrecond
from guided_diffusion.schedules import get_named_beta_schedule

ARGUMENTS = {**TINY, "M": 50}


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spy(net):
    """Replace the raw network by one that answers 1, 2, 3, ... channel by channel, and remembers what it was
    asked.
    """
    calls = []

    class Raw(torch.nn.Module):
        def forward(self, x, c_noise, class_labels, augment_labels):
            calls.append((x, c_noise, class_labels, augment_labels))
            return torch.arange(1.0, 2 * x.shape[1] + 1).view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])

    net.model = Raw()
    return calls


def test_levels_are_those_of_the_cosine_schedule():
    net = iDDPMPrecond(**TINY)
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("cosine", 1000))
    sigmas = np.sqrt(1 / alpha_bar - 1)  # of the timesteps 0 .. 999
    assert (net.M, net.u.shape, net.u.dtype) == (1000, (1001,), torch.float32)
    np.testing.assert_allclose(net.u[:-1].numpy()[::-1], sigmas, rtol=1e-6)
    assert net.u[-1] == 0
    assert (net.u.diff() < 0).all()


def test_limits_are_those_of_the_levels():
    net = iDDPMPrecond(**ARGUMENTS)
    assert (net.sigma_min, net.sigma_max) == (net.u[49].item(), net.u[0].item())
    net.u *= 2
    assert (net.sigma_min, net.sigma_max) == (net.u[49].item(), net.u[0].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_sigma(dtype):
    net = iDDPMPrecond(**ARGUMENTS)
    index = torch.tensor([[0, 3, 49], [50, 10, 25]])
    levels = net.u[index].to(dtype)
    for sigma in (levels, levels * (1 + 1e-3), levels * (1 - 1e-3)):
        rounded = net.round_sigma(sigma)
        assert rounded.dtype == dtype and torch.equal(rounded, levels)
        assert torch.equal(net.round_sigma(sigma, return_index=True), index)
    middle = (net.u[7] + net.u[8]).item() / 2
    assert net.round_sigma(middle * 1.001, return_index=True) == 7
    assert net.round_sigma(middle * 0.999, return_index=True) == 8
    assert net.round_sigma(torch.tensor(1e9, dtype=dtype)) == net.u[0]
    assert net.round_sigma(3).dtype == torch.float32


def test_denoised_by_hand():
    net = iDDPMPrecond(**ARGUMENTS)
    calls, x, labels = spy(net), draws(2, 3, 8, 8), torch.eye(2)
    sigma = net.u[[5, 40]]
    denoised = net(x, sigma, labels)
    ((asked, c_noise, class_labels, augment_labels),) = calls
    torch.testing.assert_close(asked, x / (sigma.view(2, 1, 1, 1) ** 2 + 1).sqrt())
    assert c_noise.tolist() == [49 - 5, 49 - 40]
    assert class_labels is labels and augment_labels is None
    # Of 6 channels the first 3, which predict the noise, not the variance.
    torch.testing.assert_close(
        denoised, x - sigma.view(2, 1, 1, 1) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1)
    )
    assert denoised.dtype == torch.float32


def test_one_level_for_all_images():
    net, x, labels = random_net(iDDPMPrecond, ARGUMENTS), draws(2, 3, 8, 8), torch.eye(2)
    one = net(x, net.u[7], labels)
    torch.testing.assert_close(net(x.double(), net.u[[7, 7]].double(), labels), one, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        torch.cat([net(x[i : i + 1], net.u[7], labels[i : i + 1]) for i in range(2)]), one, rtol=0, atol=1e-5
    )
    assert (net(x, net.u[7], labels.flip(0)) - one).abs().max() > 1e-3


def test_the_network_is_that_of_edm_but_for_its_output_and_levels():
    with torch.device("meta"):
        ours = {name: tuple(t.shape) for name, t in iDDPMPrecond(64, 3, 1000).state_dict().items()}
        edm = {name: tuple(t.shape) for name, t in EDMPrecond(64, 3, 1000).state_dict().items()}
    assert {name for name in ours.keys() | edm.keys() if ours.get(name) != edm.get(name)} == {
        "model.out_conv.weight",
        "model.out_conv.bias",
        "u",
    }
    assert (ours["model.out_conv.weight"], ours["u"]) == ((6, 192, 3, 3), (1001,))


def test_sampler_asks_for_known_levels_only():
    net = random_net(iDDPMPrecond, ARGUMENTS)
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    final = edm_sampler(
        net, draws(2, 3, 8, 8), torch.eye(2), num_steps=6, sigma_min=0, sigma_max=math.inf, S_churn=3
    )
    assert final.isfinite().all()
    assert set(calls) <= set(net.u.double().tolist())
    assert net.sigma_max in calls and net.sigma_min in calls


def test_sampler_finds_the_mean_that_the_network_knows():
    net = iDDPMPrecond(**TINY)
    # A network that predicts the noise exactly, for data that are one constant image.
    net._F = lambda x, c_noise, *labels: (
        (x * (level(net, c_noise) ** 2 + 1).sqrt() - 0.25) / level(net, c_noise) * torch.ones(1, 3, 1, 1)
    )
    final = edm_sampler(net, draws(2, 3, 8, 8), num_steps=18)
    torch.testing.assert_close(final, torch.full_like(final, 0.25), rtol=0, atol=1e-4)


def level(net, c_noise):
    return net.u[(net.M - 1 - c_noise).long()].view(-1, 1, 1, 1)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_gradients_and_precision(use_fp16):
    net, x, labels = random_net(iDDPMPrecond, ARGUMENTS), draws(2, 3, 8, 8).requires_grad_(), torch.eye(2)
    full = net(x, 1.0, labels)
    net.use_fp16 = use_fp16
    denoised = net(x, 1.0, labels)
    denoised.square().sum().backward()
    assert denoised.dtype == torch.float32 and x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert torch.equal(denoised, full) != use_fp16
    assert (denoised - full).norm() < 0.02 * full.norm()


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"class_labels has shape \(2, 3\), but the network takes \(2, 2\)"):
        iDDPMPrecond(**ARGUMENTS)(draws(2, 3, 8, 8), 1.0, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"model_type 'SongUNet'.*DhariwalUNet"):
        iDDPMPrecond(8, 3, model_type="SongUNet")
    assert math.isfinite(iDDPMPrecond(**{**ARGUMENTS, "M": 1}).sigma_max)

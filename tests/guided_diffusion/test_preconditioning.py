"""The four preconditionings around both raw networks: formulas, levels, labels, precision, sampling."""

import math

import numpy as np
import pytest
import torch
from edm_pickles import TINY
from goldens_util import set_golden_weights

from guided_diffusion.edm import (
    EDMPrecond,
    VEPrecond,
    VPPrecond,
    create_edm_network,
    edm_sampler,
    iDDPMPrecond,
)
from guided_diffusion.guidance import released_edm_guidance
from guided_diffusion.schedules import VPSchedule, get_named_beta_schedule

CLASSES = (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)
each_class = pytest.mark.parametrize("network", CLASSES)
each_model = pytest.mark.parametrize("model_type", ["DhariwalUNet", "SongUNet"])
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}


def tiny(network, model_type="SongUNet", **options):
    return set_golden_weights(network(**{**TINY, "model_type": model_type, **options}))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Spy(torch.nn.Module):
    """A raw network that answers 1, 2, 3, ... channel by channel, and remembers what it was asked."""

    def __init__(self, out_channels):
        super().__init__()
        self.out_channels, self.calls = out_channels, []

    def forward(self, x, c_noise, class_labels, augment_labels):
        self.calls.append((x, c_noise, class_labels, augment_labels))
        answer = torch.arange(1.0, self.out_channels + 1).view(1, -1, 1, 1)
        return answer.expand(len(x), -1, *x.shape[2:])


def table_1(name, s):
    """(c_skip, c_out, c_in, c_noise) at sigma = s, of Karras et al., 2022, table 1."""
    total = math.hypot(s, 0.5 if name == "EDMPrecond" else 1)
    return {
        "EDMPrecond": (0.25 / total**2, s * 0.5 / total, 1 / total, math.log(s) / 4),
        "VPPrecond": (1, -s, 1 / total, 999 * VPSchedule().sigma_inv(s)),
        "VEPrecond": (1, s, 1, math.log(s / 2)),
    }[name]


@pytest.mark.parametrize("network", [EDMPrecond, VPPrecond, VEPrecond])
def test_table_1(network):
    net, x, sigma = network(**TINY), draws(3, 3, 8, 8), torch.tensor([0.03, 1.0, 70.0])
    net.model, labels = Spy(3), torch.eye(2)[[0, 1, 0]]
    denoised = net(x, sigma, labels)
    ((asked, c_noise, class_labels, augment_labels),) = net.model.calls
    assert class_labels is labels and augment_labels is None
    for i, s in enumerate(sigma.tolist()):
        c_skip, c_out, c_in, noise = table_1(network.__name__, s)
        torch.testing.assert_close(asked[i], c_in * x[i], rtol=1e-5, atol=1e-6)
        assert float(c_noise[i]) == pytest.approx(noise, rel=1e-5)
        expected = c_skip * x[i] + c_out * torch.tensor([1.0, 2, 3]).view(3, 1, 1)
        torch.testing.assert_close(denoised[i], expected, rtol=1e-5, atol=1e-5)


def test_sigma_data():
    net, x = EDMPrecond(**TINY, sigma_data=2.0).eval(), draws(2, 3, 8, 8)
    torch.testing.assert_close(net(x, 1.0), 0.8 * x)  # 4 / (1 + 4): a new network answers the skip term alone


def test_iddpm_uses_the_timestep_of_the_level_and_drops_the_variance():
    net, x = iDDPMPrecond(**TINY, M=50), draws(2, 3, 8, 8)
    net.model = Spy(6)
    sigma = net.u[[5, 40]]
    denoised = net(x, sigma)
    ((asked, c_noise, *_),) = net.model.calls
    assert c_noise.tolist() == [49 - 5, 49 - 40]
    s = sigma.view(2, 1, 1, 1)
    torch.testing.assert_close(asked, x / (s**2 + 1).sqrt())
    torch.testing.assert_close(denoised, x - s * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1))


# Noise levels


def test_limits_by_default():
    with torch.device("meta"):
        nets = {network.__name__: network(64, 3, 10) for network in CLASSES[:3]}
    assert (nets["EDMPrecond"].sigma_min, nets["EDMPrecond"].sigma_max) == (0, math.inf)
    assert (nets["VPPrecond"].sigma_min, nets["VPPrecond"].sigma_max) == (2**-10, 152.16697692871094)
    assert (nets["VEPrecond"].sigma_min, nets["VEPrecond"].sigma_max) == (0.02, 100)
    for net in nets.values():
        assert torch.equal(net.round_sigma(torch.tensor([0.3, 7.0])), torch.tensor([0.3, 7.0]))
        assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
        assert (net.img_resolution, net.img_channels, net.label_dim) == (64, 3, 10)


def test_levels_of_iddpm_are_those_of_the_cosine_schedule():
    net = iDDPMPrecond(**TINY)
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("cosine", 1000))
    sigmas = np.sqrt(1 / alpha_bar - 1)  # of the timesteps 0 .. 999
    assert (net.M, net.u.shape, net.u.dtype) == (1000, (1001,), torch.float32)
    np.testing.assert_allclose(net.u[:-1].numpy()[::-1], sigmas, rtol=5e-4)  # a recursion in float32
    assert net.u[-1] == 0 and (net.u.diff() < 0).all()
    assert (net.sigma_min, net.sigma_max) == (net.u[999].item(), net.u[0].item())
    net.u *= 2  # the levels of a file count, not those of the constructor
    assert (net.sigma_min, net.sigma_max) == (net.u[999].item(), net.u[0].item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_sigma_of_iddpm(dtype):
    net = iDDPMPrecond(**TINY, M=50)
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


# Input and labels


@each_class
@each_model
def test_one_level_may_be_given_in_any_form_and_images_do_not_matter_to_each_other(network, model_type):
    net, x, labels = tiny(network, model_type), draws(2, 3, 8, 8), torch.eye(2)
    expected = net(x, torch.full((2,), 2.0), labels)
    assert expected.dtype == torch.float32
    for sigma in (2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.full((2,), 2.0, dtype=torch.float64)):
        torch.testing.assert_close(net(x.double(), sigma, labels), expected, rtol=0, atol=1e-5)
    alone = torch.cat([net(x[i : i + 1], 2.0, labels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-5)
    assert (net(x, 2.0, labels.flip(0)) - expected).abs().max() > 1e-3
    assert (net(x, 2.5, labels) - expected).abs().max() > 1e-3


@each_class
@each_model
def test_no_labels_are_labels_of_zero(network, model_type):
    net, x = tiny(network, model_type, augment_dim=4), draws(2, 3, 8, 8)
    none = net(x, 1.0)
    zeros = net(x, 1.0, torch.zeros(2, 2), augment_labels=torch.zeros(2, 4))
    torch.testing.assert_close(none, zeros, rtol=0, atol=1e-5)
    assert (none - net(x, 1.0, torch.eye(2))).abs().max() > 1e-3
    assert (none - net(x, 1.0, augment_labels=torch.ones(2, 4))).abs().max() > 1e-3
    unconditional = tiny(network, model_type, label_dim=0)
    assert torch.equal(unconditional(x, 1.0, torch.zeros(2, 0)), unconditional(x, 1.0))


@each_model
def test_label_dropout_acts_in_training_only(model_type):
    net = tiny(EDMPrecond, model_type, label_dropout=1.0, dropout=0.0)
    x, labels = draws(2, 3, 8, 8), torch.eye(2)
    with_labels, without = net(x, 1.0, labels), net(x, 1.0)
    assert (with_labels - without).abs().max() > 1e-3
    torch.testing.assert_close(net.train()(x, 1.0, labels), without, rtol=0, atol=1e-5)


@each_class
@pytest.mark.parametrize(("label_dim", "shape"), [(5, (2,)), (5, (1, 5)), (5, (2, 4)), (0, (2, 5))])
def test_labels_of_another_shape(network, label_dim, shape):
    net = network(**{**TINY, "label_dim": label_dim})
    with pytest.raises(ValueError, match=r"class_labels has shape .* but the network takes \(2, \d\)"):
        net(draws(2, 3, 8, 8), 1.0, torch.zeros(shape))


# Precision


@each_class
@pytest.mark.parametrize(
    "options", [{"model_type": "DhariwalUNet"}, {}, NCSNPP], ids=["adm", "ddpmpp", "ncsnpp"]
)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 50.0])
def test_half_precision_and_gradients(network, options, sigma):
    net, labels = tiny(network, **options), torch.eye(2)
    net.requires_grad_()
    x = (draws(2, 3, 8, 8) * math.hypot(sigma, 0.5)).requires_grad_()
    full, dtypes = net(x, sigma, labels), []
    net.model.enc["8x8_block0"].register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    net.use_fp16 = True
    half = net(x, sigma, labels)
    assert (dtypes, half.dtype) == ([torch.bfloat16], torch.float32)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    # bfloat16 has 8 significant bits: each of the few dozen operations is off by up to 2**-9 of its result.
    assert 0 < (half - full).norm() < 0.02 * full.norm()
    half.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


# Sampling


def linear_classifier(x):
    return x.float().flatten(1) @ draws(3 * 8 * 8, 2, seed=5)


@each_class
@pytest.mark.parametrize("options", [{}, NCSNPP], ids=["ddpmpp", "ncsnpp"])
@pytest.mark.parametrize("guided", [False, True])
def test_sampling_is_finite_and_each_image_stands_alone(network, options, guided):
    net, latents, labels = tiny(network, **options), draws(3, 3, 8, 8), torch.eye(2)[[0, 1, 1]]
    rule = released_edm_guidance(
        linear_classifier, joint_temperature=1.0, marginal_temperature=0.5, max_guidance=0.05, add_factor=0.3
    )
    rule = rule if guided else None

    def sample(images):
        return edm_sampler(net, latents[images], labels[images], guidance=rule, num_steps=5)

    together = sample([0, 1, 2])
    assert together.isfinite().all() and together.dtype == torch.float64
    alone = torch.cat([sample([i]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4 * float(together.std()))
    unguided = edm_sampler(net, latents, labels, num_steps=5)
    assert (not torch.equal(together, unguided)) == guided


@pytest.mark.parametrize("network", CLASSES[1:])
def test_sampler_asks_for_known_levels_only(network):
    net, asked, churn = tiny(network), [], 3 if network is iDDPMPrecond else 0
    net.register_forward_pre_hook(lambda module, args: asked.append(float(args[1])))
    limits = {"sigma_min": 0, "sigma_max": math.inf}
    edm_sampler(net, draws(2, 3, 8, 8), torch.eye(2), num_steps=6, S_churn=churn, **limits)
    assert (min(asked), max(asked)) == pytest.approx((net.sigma_min, net.sigma_max), rel=1e-12)
    if network is iDDPMPrecond:
        assert set(asked) <= set(net.u.double().tolist())


# What cannot be


@pytest.mark.parametrize(
    ("class_name", "changes", "words"),
    [
        ("EDM2Precond", {}, "'EDM2Precond' is not supported; choose EDMPrecond, VPPrecond, VEPrec"),
        ("EDMPrecond", {"model_type": "DiT"}, "model_type 'DiT' is not supported; choose DhariwalUNet or So"),
        ("EDMPrecond", {"embedding_type": "fourier"}, "cannot be built with .*embedding_type"),
        ("EDMPrecond", {"model_channels": 224}, "224 channels cannot be cut into 3 heads"),
        ("EDMPrecond", {"img_resolution": 9}, "img_resolution 9 cannot be halved 1 times"),
        ("EDMPrecond", {"channel_mult": []}, r"channel_mult \[\] at img_resolution 8 has no levels"),
        ("VEPrecond", {"img_resolution": 0}, "img_resolution 0 has no levels"),
        ("VPPrecond", {"embedding_type": "sine"}, "unknown embedding_type 'sine'; choose positional, fou"),
        ("VPPrecond", {"encoder_type": "u"}, "unknown encoder_type 'u'; choose standard, skip, residual"),
        ("VPPrecond", {"decoder_type": "residual"}, "unknown decoder_type 'residual'; choose standard, skip"),
        ("VPPrecond", {"resample_filter": [1, 2, 1]}, r"an even number of taps .* got \[1, 2, 1\]"),
        ("VPPrecond", {"resample_filter": [1, -1]}, "whose sum is not 0"),
        ("VPPrecond", {"resample_filter": "ab"}, "VPPrecond cannot be built"),
        ("VPPrecond", {"beta_d": "19.9"}, "VPPrecond cannot be built"),
        ("VPPrecond", {"num_blocks": 10**12}, "num_blocks between 1 and 100, got 1000000000000"),
        ("iDDPMPrecond", {"C_1": 0}, "iDDPMPrecond cannot be built"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be(class_name, changes, words):
    with pytest.raises(ValueError, match=words):
        create_edm_network(class_name, {**TINY, **changes})

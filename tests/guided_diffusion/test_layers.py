"""What the networks share: hooks and the reuse of activations, attention, resampling."""

import copy
from functools import cache

import pytest
import torch
from edm_pickles import TINY, random_net
from goldens_util import golden_network, load_golden, random_input

from guided_diffusion import edm, layers
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import create_from_flags

ADM = load_golden("B_adm_unet")[0] | load_golden("C_adm_classifier")[0]
EDM = load_golden("J_edm_networks")[0]
each_network = pytest.mark.parametrize("name", [*ADM, *EDM])


@cache
def built(name):
    """(network, the arguments of one call of it)."""
    case = EDM[name] if name in EDM else ADM[name]
    net, x = golden_network(case), random_input(0, case["x_shape"])
    if name in EDM:
        labels = torch.eye(net.label_dim)[case["labels"]] if case["labels"] else None
        augment = torch.ones(len(case["sigma"]), 9) if "augment_dim" in case["config"] else None
        return net, (x, torch.tensor(case["sigma"]), labels, augment)
    y = [torch.tensor(case["input"]["y"])] if getattr(net, "num_classes", None) else []
    return net, (x, torch.tensor(case["input"]["t"]), *y)


def watched(net, inputs):
    """{module: [(output, its copy at the time)]} of one call without a graph."""
    seen = {}

    def keep(module, args, output):
        seen.setdefault(module, []).append((output, output.clone()))

    handles = [module.register_forward_hook(keep) for module in net.modules()]
    with torch.no_grad():
        net(*inputs)
    for handle in handles:
        handle.remove()
    return seen


@each_network
def test_hooks_see_what_each_layer_computed(name):
    net, inputs = built(name)
    seen = watched(net, inputs)
    for module, outputs in seen.items():
        for output, copied in outputs:
            assert torch.equal(output, copied), f"the output of a {type(module).__name__} was overwritten"
    unseen = [n for n, m in net.named_modules() if not list(m.children()) and m not in seen]
    assert not unseen, f"never called: {unseen}"


@each_network
def test_reuse_changes_no_bit_and_can_be_undone(name):
    net, inputs = copy.deepcopy(built(name)[0]), built(name)[1]
    with torch.no_grad():
        plain = net(*inputs)
        assert net.reuse_activations() is net
        assert torch.equal(net(*inputs), plain)
    seen = watched(net, inputs)
    assert any(not torch.equal(*pair) for outputs in seen.values() for pair in outputs)  # it is in use
    net.reuse_activations(False)
    assert all(torch.equal(*pair) for outputs in watched(net, inputs).values() for pair in outputs)
    assert not any(getattr(module, "reuse", False) for module in built(name)[0].modules())


@pytest.mark.parametrize("model_type", ["DhariwalUNet", "SongUNet"])
def test_gradients_do_not_know_of_reuse(model_type):
    net = random_net(edm.EDMPrecond, {**TINY, "model_type": model_type}).requires_grad_()
    gradients = []
    for on in (False, True):
        x = random_input(1, (2, 3, 8, 8)).requires_grad_()
        net.reuse_activations(on)(x, 1.0).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("new_order", [False, True])
def test_bfloat16_attention_is_that_of_float32_up_to_rounding(new_order):
    qkv = torch.randn(2, 64, 3 * 32, generator=torch.Generator().manual_seed(0))
    exact = layers.attention(qkv, 4, new_order)
    atol = 0.02 * exact.abs().max().item()
    torch.testing.assert_close(
        layers.attention(qkv.bfloat16(), 4, new_order).float(), exact, rtol=0, atol=atol
    )


@pytest.mark.parametrize("mode", ["up", "down"])
def test_the_short_form_of_the_box_is_the_filter_of_the_box(mode):
    x = random_input(0, (2, 3, 8, 6))
    torch.testing.assert_close(
        layers.resample(x, mode), layers.resample(x, mode, layers.filter_kernel((1, 1)))
    )


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1)])
def test_resampling_keeps_a_flat_image_and_its_centre(taps):
    x, kernel = torch.ones(1, 2, 16, 16), layers.filter_kernel(taps)
    for mode, size in (("up", 32), ("down", 8)):
        y = layers.resample(x, mode, kernel)
        assert y.shape == (1, 2, size, size)
        inside = slice(len(taps), -len(taps)) if mode == "up" else slice(2, -2)
        torch.testing.assert_close(y[..., inside, inside], torch.ones_like(y[..., inside, inside]))
        ramp = layers.resample(torch.arange(16.0).expand(1, 1, 16, 16), mode, kernel)[0, 0, size // 2]
        middle = (ramp[inside] + ramp.flip(0)[inside]) / 2  # a ramp from 0 to 15 stays centred at 7.5
        torch.testing.assert_close(middle, torch.full_like(middle, 7.5))


def test_sampling_records_no_graph():
    model, diffusion = create_from_flags(PRESETS["digits"] | {"timestep_respacing": "2"})
    seen = []

    def watched_model(x, t, y):
        output = model(x, t, y)
        seen.append(output.requires_grad)
        return output

    y = torch.tensor([1])
    diffusion.p_sample_loop(watched_model, (1, 3, 16, 16), model_kwargs={"y": y})
    assert seen == [False, False]
    assert model(torch.zeros(1, 3, 16, 16), torch.tensor([0]), y).requires_grad  # the watch can go off

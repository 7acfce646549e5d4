"""ADM U-Net forwards (golden set B), ADM classifier forwards and gradients (golden set C), forwards of EDM's
other networks (golden set J).
"""

import pytest
import torch
from goldens_util import (
    from_numpy,
    golden_network,
    load_golden,
    max_abs,
    random_input,
    rms,
    rms_relative,
    thin,
)

UNETS, UNET_ARRAYS = load_golden("B_adm_unet")
CLASSIFIERS, CLASSIFIER_ARRAYS = load_golden("C_adm_classifier")
EDM_NETWORKS, EDM_ARRAYS = load_golden("J_edm_networks")


def inputs(case):
    spec = case["input"]
    x = random_input(spec["seed"], case["x_shape"])
    return x, torch.tensor(spec["t"]), torch.tensor(spec["y"]) if "y" in spec else None


@pytest.mark.parametrize("name", UNETS)
def test_unet(name):
    x, t, y = inputs(UNETS[name])
    with torch.no_grad():
        out = golden_network(UNETS[name])(x, t, y)
    # set B: atol 2e-4. The rms of the whole output cannot differ by more than its worst entry does.
    assert max_abs(thin(out), UNET_ARRAYS[f"{name}/out"]) <= 2e-4
    assert abs(rms(out) - UNETS[name]["out_rms"]) <= 2e-4


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_noisy_classifier(name):
    case = CLASSIFIERS[name]
    x, t, y = inputs(case)
    x.requires_grad_()
    logits = golden_network(case)(x, t)
    selected = logits.log_softmax(dim=-1)[range(len(y)), y]
    (grad,) = torch.autograd.grad(selected.sum(), x)
    # set C: logits and selected atol 1e-4, gradient 1e-3 of its rms
    assert max_abs(thin(logits), CLASSIFIER_ARRAYS[f"{name}/logits"]) <= 1e-4
    assert max_abs(selected, CLASSIFIER_ARRAYS[f"{name}/selected"]) <= 1e-4
    assert rms_relative(thin(grad), CLASSIFIER_ARRAYS[f"{name}/grad"], case["grad_rms"]) <= 1e-3
    assert abs(rms(grad) / case["grad_rms"] - 1) <= 1e-3


@pytest.mark.parametrize("name", EDM_NETWORKS)
def test_edm_network(name):
    case, sigma = EDM_NETWORKS[name], from_numpy(EDM_ARRAYS[f"{name}/sigma"])
    net = golden_network(case)
    x = random_input(case["seed"], case["x_shape"]) * (1 + torch.tensor(case["sigma"])).view(-1, 1, 1, 1)
    labels = None if case["labels"] is None else torch.eye(net.label_dim)[case["labels"]]
    with torch.no_grad():
        out = net(x, sigma, labels)
    # set J: 1e-4 * max(1, rms of out)
    tolerance = 1e-4 * max(1, case["out_rms"])
    assert max_abs(thin(out), EDM_ARRAYS[f"{name}/out"]) <= tolerance
    assert abs(rms(out) - case["out_rms"]) <= tolerance
    assert sum(parameter.numel() for parameter in net.parameters()) == case["n_params"]
    assert net.sigma_min == pytest.approx(case["sigma_min"], rel=1e-6)
    assert net.sigma_max == pytest.approx(case["sigma_max"], rel=1e-6)
    torch.testing.assert_close(net.round_sigma(torch.tensor(case["sigma"])), sigma, rtol=1e-6, atol=0)

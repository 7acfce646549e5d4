"""Inception features under both protocols (golden set I), and the parameter names of the published
weights.
"""

from functools import cache

import numpy as np
import pytest
import torch
from goldens_util import l2_per_image, load_golden, load_manifest, max_abs, set_golden_weights, thin

from evaluation.networks.inception import InceptionFeatures, inception_network

GOLDEN, ARRAYS = load_golden("I_inception")
PREFIXES = {"adm": "torch_fidelity", "pytorch-fid": "pytorch_fid"}


@cache
def golden_weights():
    return set_golden_weights(inception_network(), gain=GOLDEN["gain"]).state_dict()


def golden_images(seed, n, h, w):
    """(n, h, w, 3) uint8; image k is k + 1 times darker than noise."""
    images = np.random.RandomState(seed).randint(0, 256, (n, h, w, 3))
    return (images // np.arange(1, n + 1).reshape(-1, 1, 1, 1)).astype(np.uint8)


def test_names_and_shapes_are_those_of_the_published_weights():
    manifest = load_manifest("fid_inception_v3")
    with torch.device("meta"):
        network = inception_network()
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == manifest["shapes"]
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameters"]


@pytest.mark.parametrize("case", GOLDEN["cases"])
@pytest.mark.parametrize("protocol", PREFIXES)
def test_features(case, protocol):
    prefix, spec = PREFIXES[protocol], GOLDEN["cases"][case]
    features = InceptionFeatures(golden_weights(), protocol=protocol)
    means = {}
    for name, layer in {"mean64": "maxpool1", "mean192": "maxpool2", "mean768": "Mixed_6e"}.items():

        def hook(module, inputs, output, name=name):
            means[name] = output.mean(dim=(2, 3))

        getattr(features.network, layer).register_forward_hook(hook)

    actual = features(golden_images(**spec["spec"]))

    assert {key: value.dtype for key, value in actual.items()} == dict.fromkeys(
        ("pool3", "spatial", "logits"), np.float32
    )
    # set I: pool2048 and logits atol 5e-4, means 2e-4; the spatial features are no deeper than mean768
    assert max_abs(thin(actual["pool3"]), ARRAYS[f"{case}/{prefix}_pool2048"]) <= 5e-4
    assert max_abs(thin(actual["logits"]), ARRAYS[f"{case}/{prefix}_logits_unbiased"]) <= 5e-4
    key = "pool2048_l2_per_image" if protocol == "pytorch-fid" else "torch_fidelity_pool2048_l2_per_image"
    assert np.abs(l2_per_image(actual["pool3"]) - spec[key]).max() <= 5e-4 * 2048**0.5
    if protocol == "adm":
        assert max_abs(thin(actual["spatial"]), ARRAYS[f"{case}/torch_fidelity_spatial7"]) <= 2e-4
    else:
        for name, mean in means.items():
            assert max_abs(thin(mean), ARRAYS[f"{case}/pytorch_fid_{name}"]) <= 2e-4, name

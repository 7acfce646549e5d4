"""The parameter names and shapes of the published checkpoints (golden set A)."""

import pytest
import torch
from goldens_util import load_manifest

from classifiers import load_classifier
from guided_diffusion.edm import create_edm_network
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def check(network, manifest):
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == manifest["shapes"]
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameters"]


@pytest.mark.parametrize("name", ["adm_64_cond", "adm_128_cond", "adm_256_cond"])
def test_unet(name):
    manifest = load_manifest(name)
    with torch.device("meta"):  # names and shapes only: no memory is filled
        network, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **manifest["flags"]})
    check(network, manifest)


@pytest.mark.parametrize("name", ["adm_classifier_64", "adm_classifier_128"])
def test_noisy_classifier(name):
    manifest = load_manifest(name)
    with torch.device("meta"):
        network = create_classifier(**{**classifier_defaults(), **manifest["flags"]})
    check(network, manifest)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("edm_imagenet64_cond_adm", "EDMPrecond"),
        ("edm_cifar10_32_cond_vp", "EDMPrecond"),
        ("edm_ffhq_64_uncond_ve", "EDMPrecond"),
        ("baseline_cifar10_32_cond_vp", "VPPrecond"),
    ],
)
def test_edm_network(name, class_name):
    manifest = load_manifest(name)
    with torch.device("meta"):
        network = create_edm_network(class_name, manifest["flags"])
    check(network, manifest)
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_resnet_takes_torchvision_names(name):
    manifest = load_manifest(f"torchvision_{name}")
    classifier = load_classifier(
        name, weights={key: torch.zeros(shape) for key, shape in manifest["shapes"].items()}
    )
    parameters = list(classifier.parameters())
    assert sum(parameter.numel() for parameter in parameters) == manifest["parameters"]
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not any(parameter.any() for parameter in parameters)  # every one came from the state dict

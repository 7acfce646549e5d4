"""Feature networks: which there are, what a user may say about them, and the one that a name stands for."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from evaluation.features import FeatureNetwork
from evaluation.networks.cifar import CIFAR_WEIGHTS, CIFARFeatures
from evaluation.networks.digits import DIGITS_WEIGHTS, DigitsFeatures
from evaluation.networks.inception import PROTOCOLS, InceptionFeatures, find_inception_weights
from evaluation.networks.mixer import (
    CIFAR_MIXER_WEIGHTS,
    DIGITS_MIXER_WEIGHTS,
    CIFARMixerFeatures,
    DigitsMixerFeatures,
)
from evaluation.networks.own import OwnFeatures
from evaluation.networks.vision_transformers import CLIPFeatures, DINOv2Features
from evaluation.networks.weights import read_weights

SHIPPED = {
    "digits": (DigitsFeatures, DIGITS_WEIGHTS),
    "digits_mixer": (DigitsMixerFeatures, DIGITS_MIXER_WEIGHTS),
    "cifar10": (CIFARFeatures, CIFAR_WEIGHTS),
    "cifar10_mixer": (CIFARMixerFeatures, CIFAR_MIXER_WEIGHTS),
}
TRANSFORMERS = {network.name: network for network in (DINOv2Features, CLIPFeatures)}
WRITE = f"inception, {', '.join(SHIPPED)}, dinov2, clip, FILE.safetensors or FILE.py:builder"


@dataclass(frozen=True)
class NetworkOptions:
    """What everything that extracts features lets its user choose, with the defaults. `metadata` holds the
    help, and `choices` and `metavar` where there are some.
    """

    features: str = field(
        default="inception",
        metadata={
            "help": "inception; digits or cifar10, or FILE.safetensors with weights of one of these two; "
            "digits_mixer or cifar10_mixer, a second opinion on these; "
            "dinov2 or clip, or dinov2:FOLDER, clip:FOLDER; FILE.py:builder, your own"
        },
    )
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "how images become Inception's input; adm by default",
            "choices": tuple(PROTOCOLS),
        },
    )
    weights: str | None = field(
        default=None,
        metadata={"help": "Inception weights, by default those in pretrained_models/", "metavar": "FILE"},
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "images per call of the network; a default that fits the device"},
    )
    device: str = field(
        default="", metadata={"help": "cpu, cuda, cuda:1; by default the accelerator if there is one"}
    )
    cache: str | None = field(
        default=None,
        metadata={
            "help": "keep the features there: a killed run resumes, the next one extracts nothing",
            "metavar": "DIR",
        },
    )


def feature_network(
    features: str = "inception",
    protocol: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> FeatureNetwork:
    """The network that --features names; `protocol` (adm by default) and `weights` are Inception's. Those of
    dinov2 and clip, a file or a folder, may stand behind a colon.

    Raises ValueError where they are given with another network, for other names, and what the networks raise;
    FileNotFoundError that says which weights to put where.
    """
    if features == "inception":
        return InceptionFeatures(find_inception_weights(weights), protocol or "adm", device)
    if protocol or weights:
        raise ValueError(
            f"--protocol and --weights are Inception's; with --features {features} leave them out"
        )
    if features in SHIPPED:
        network, shipped = SHIPPED[features]
        return network(shipped, device)
    name, _, path = features.partition(":")
    if name in TRANSFORMERS:
        return TRANSFORMERS[name](path or None, device)
    if features.endswith(".safetensors"):
        return _of_file(features, device)
    if ".py:" in features:
        return OwnFeatures(features, device)
    raise ValueError(f"unknown --features {features}; write {WRITE}")


def _of_file(path, device):
    """The network whose weights these are, by its width; the digits' says what is wrong with others."""
    width = read_weights(path)[0].get("fc.weight", torch.empty(0, 0)).shape[-1]
    return (CIFARFeatures if width == 256 else DigitsFeatures)(path, device)

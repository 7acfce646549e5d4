"""Which feature network: the flags that name one, and the network that they name."""

import argparse
from pathlib import Path

import torch

from evaluation.digits_features import DigitsFeatures
from evaluation.features import FeatureNetwork
from evaluation.inception import PROTOCOLS, InceptionFeatures, find_inception_weights
from guided_diffusion.files.checkpoints import PRETRAINED_DIR


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of everything that extracts features."""
    parser.add_argument(
        "--features",
        default="inception",
        help="inception, digits, or FILE.safetensors with weights of the digits network",
    )
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, help="how images become Inception's input; adm by default"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="Inception weights, by default those in pretrained_models/"
    )
    parser.add_argument(
        "--batch_size", type=int, help="images per call of the network; a default that fits the device"
    )
    parser.add_argument(
        "--device", default="", help="cpu, cuda, cuda:1; by default the accelerator if there is one"
    )
    parser.add_argument(
        "--cache",
        metavar="DIR",
        help="keep the features there: a killed run goes on, the next one extracts nothing",
    )


def feature_network(
    features: str = "inception",
    protocol: str | None = None,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> FeatureNetwork:
    """The network that --features names; `protocol` (adm by default) and `weights` are Inception's.

    Raises ValueError where they are given with another network, for other names, and what the networks raise;
    FileNotFoundError that says which weights to put where.
    """
    if features == "inception":
        return InceptionFeatures(find_inception_weights(weights), protocol or "adm", device)
    if protocol or weights:
        raise ValueError(
            f"--protocol and --weights are Inception's; with --features {features} leave them out"
        )
    if features != "digits" and not features.endswith(".safetensors"):
        raise ValueError(
            f"unknown --features {features}; write inception, digits, or FILE.safetensors with weights of the digits network"
        )
    return DigitsFeatures(
        PRETRAINED_DIR / "digits" / "features.safetensors" if features == "digits" else features, device
    )

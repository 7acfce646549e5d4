"""The flags of scripts that extract features: one for each field of NetworkOptions, and the network that they
name.
"""

import dataclasses
from typing import get_args

from evaluation.networks import NetworkOptions, feature_network
from guided_diffusion.dist_util import choose_device


def add_network_flags(parser):
    """Add a flag for every field, with its default and what its metadata says."""
    for field in dataclasses.fields(NetworkOptions):
        kind = int if int in (field.type, *get_args(field.type)) else str
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, **field.metadata)


def network_of(args, features=None):
    """The network that the flags name, or `features` in their place, on their device. Raises what
    `feature_network` does.
    """
    features, inceptions = features or args.features, (args.protocol, args.weights)
    if features != args.features and features != "inception":
        inceptions = None, None  # they are those of the other one
    return feature_network(features, *inceptions, choose_device(args.device))


def networks_of(args):
    """The networks whose names stand in --features, with commas between them. Raises ValueError for a name
    that is empty or stands there twice.
    """
    names = args.features.split(",")
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"--features {args.features!r} must name networks, each once, with commas between")
    if len(names) > 1 and "inception" not in names and (args.protocol or args.weights):
        raise ValueError("--protocol and --weights are Inception's, which --features does not name")
    return [network_of(args, name) for name in names]

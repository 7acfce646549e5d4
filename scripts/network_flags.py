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


def network_of(args):
    """The network that the flags name, on their device. Raises what `feature_network` does."""
    return feature_network(args.features, args.protocol, args.weights, choose_device(args.device))

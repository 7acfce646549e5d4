"""What is known of a classifier before it is built."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from classifiers.input_transform import InputTransform
from guided_diffusion.files.state_dicts import load_into, renamed

Fill = Callable[[nn.Module, Mapping[str, Tensor], str | Path], nn.Module]


def modern_name(name: str) -> str:
    """The name that torchvision gives a tensor today: its DenseNet files still say norm.1 for norm1."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2.", name)


def filled(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """The network with the weights of a state dict. Raises ValueError for what does not fit."""
    load_into(network, renamed(state, modern_name), source)
    return network


def as_it_is(network: nn.Module) -> nn.Module:
    """The network itself."""
    return network


@dataclass(frozen=True)
class ClassifierSpec:
    """One entry: builder(num_classes) -> network, and its weights as name -> url or file in
    pretrained_models/, the default first; url#file where the file there has another name than in the url.

    image_size: pixels of the images that the weights were trained on, None where it is not known. trained_on:
    how those were normalised, None where they were raw. takes_raw: whether classifier_input "paper" feeds it
    the raw image, as the paper does torchvision's networks; False where that means nothing, and `trained_on`
    is fed. fill: as `filled`. finish: makes the classifier of the network, once that has its weights.
    """

    name: str
    build: Callable[[int], nn.Module]
    weights_files: Mapping[str, str]
    image_size: int | None
    trained_on: InputTransform | None
    licence: str
    takes_raw: bool = True
    fill: Fill = filled
    finish: Callable[[nn.Module], nn.Module] = as_it_is

"""Classifiers by name: how to build one, where its weights lie, what input they were trained on, and under
which licence.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from classifiers.input_transform import INPUTS, InputTransform, raw_image
from classifiers.smoothing import SmoothFunctionalRelus, smooth_relus
from guided_diffusion.files.checkpoints import existing_file, find_pretrained, load_into, load_state_dict


@dataclass(frozen=True)
class ClassifierSpec:
    """One entry: builder(num_classes) -> network, and its weights as name -> url or file in
    pretrained_models/, the default first.

    image_size: pixels of the images that the weights were trained on, None where it is not known. trained_on:
    how those were normalised, None where they were raw.
    """

    name: str
    build: Callable[[int], nn.Module]
    weights_files: Mapping[str, str]
    image_size: int | None
    trained_on: InputTransform | None
    licence: str


class Classifier(nn.Module):
    """forward(x): (N, 3, H, W) in [-1, 1] -> logits (N, classes), in the dtype of the network's parameters.

    `softplus_beta` also smooths relus that the network calls as functions; None leaves those alone.
    """

    def __init__(
        self, network: nn.Module, transform: Callable[[Tensor], Tensor], softplus_beta: float | None = None
    ):
        super().__init__()
        self.network, self.transform, self.softplus_beta = network, transform, softplus_beta

    def forward(self, x: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        x = self.transform(x).to(dtype, memory_format=torch.channels_last)
        with nullcontext() if self.softplus_beta is None else SmoothFunctionalRelus(self.softplus_beta):
            return self.network(x)


def load_classifier(
    name: str,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    *,
    num_classes: int = 1000,
    softplus_beta: float = math.inf,
    classifier_input: str = "paper",
    image_size: int | None = None,
) -> Classifier:
    """Return a classifier of [-1, 1] NCHW images: in eval mode, frozen, float32, on the CPU.

    name: a torchvision classification network, "digits_guide", "digits_judge", or "FILE.py:builder", one's
    own builder(num_classes).
    weights: None for the default file in pretrained_models/, "random", a torchvision weights name such as "IMAGENET1K_V2", a path, or a
    state dict with the network's own names. softplus_beta: replaces every ReLU by Softplus; inf keeps them.
    classifier_input: "paper" feeds the raw image, "imagenet" resizes and normalises it to what the weights were trained on.
    image_size: if given, a forward pass checks that the network takes such images and answers num_classes logits. One's own network
    needs it to be smoothed.
    Raises FileNotFoundError for missing weights and ValueError for everything that does not fit.
    """
    if classifier_input not in INPUTS:
        raise ValueError(f"unknown classifier_input {classifier_input!r}; choose {' or '.join(INPUTS)}")
    if not softplus_beta > 0:
        raise ValueError(f"softplus_beta must be positive or inf, got {softplus_beta}")
    spec = find_classifier(name)
    if classifier_input == "imagenet" and spec.trained_on is None:
        raise ValueError(f"{name} takes the raw image: classifier_input must be paper, not imagenet")
    network = spec.build(num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} built {type(network).__name__}, not a torch.nn.Module")
    _fill(network, name, weights)
    network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    transform = spec.trained_on if classifier_input == "imagenet" else raw_image
    classifier = Classifier(network, transform).eval()
    if not math.isinf(softplus_beta):
        _smooth(classifier, name, softplus_beta, image_size or spec.image_size)
    if image_size is not None:
        _check_answer(classifier, name, image_size, num_classes)
    return classifier


def find_classifier(name: str) -> ClassifierSpec:
    """Look a name up; raises ValueError that lists the choices."""
    if ".py:" in name:
        return _from_file(name)
    if name in DIGITS:
        return DIGITS[name]
    choices = torchvision.models.list_models(module=torchvision.models)
    if name not in choices:
        raise ValueError(
            f"unknown classifier {name!r}; choose FILE.py:builder or one of {', '.join([*DIGITS, *choices])}"
        )
    return _from_torchvision(name)


def _smooth(classifier, name, beta, size):
    if size is None:
        raise ValueError(
            f"to smooth {name}, pass image_size: a forward pass shows which relus it calls as functions"
        )
    count = smooth_relus(classifier.network, beta)
    with SmoothFunctionalRelus(beta) as functional:
        _probe(classifier, name, size)
    if functional.kinked:
        raise ValueError(
            f"{name} calls {', '.join(sorted(functional.kinked))}, which cannot be smoothed; use softplus_beta inf"
        )
    if functional.count:
        classifier.softplus_beta = beta
    if count + functional.count == 0:
        raise ValueError(f"{name} has no ReLU to smooth; use softplus_beta inf")


def _probe(classifier, name, size):
    """Logits of one grey image; ValueError if the network cannot take that size."""
    try:
        with torch.no_grad():
            return classifier(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        hint = "; classifier_input imagenet resizes the image" if classifier.transform is raw_image else ""
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name} cannot take {size}x{size} images ({first_line}){hint}") from error


def _check_answer(classifier, name, size, num_classes):
    logits = _probe(classifier, name, size)
    if logits.shape != (1, num_classes):
        raise ValueError(
            f"{name} answers {list(logits.shape)} to one image; with num_classes {num_classes} it must be [1, {num_classes}]"
        )


def weights_path(name: str, weights: str | Path | None) -> Path | None:
    """The file that `load_classifier` would read; None where it would read none. Raises FileNotFoundError if
    it is not there.
    """
    files = {} if ".py:" in name else find_classifier(name).weights_files
    if weights == "random" or (weights is None and not files):
        return None
    # "ResNet50_Weights.IMAGENET1K_V2" and "IMAGENET1K_V2" mean the same.
    wanted = next(iter(files)) if weights is None else str(weights).rpartition(".")[2]
    if wanted not in files:
        return existing_file(weights)
    url = files[wanted]
    return find_pretrained(url.rpartition("/")[2], url=url) if "://" in url else find_pretrained(url)


def classifier_files(name: str, weights: str | Path | None) -> dict[str, Callable[[], Path | None]]:
    """Functions that return the files of a classifier, its weights and, of one's own, its code; they raise
    where one is not there.
    """
    files = {"classifier_path": partial(weights_path, name, weights or None)}
    if code := name.rpartition(":")[0]:
        files["classifier_code"] = partial(existing_file, code)
    return files


def _fill(network, name, weights):
    if isinstance(weights, Mapping):
        load_into(network, weights, f"the given state dict for {name}")
    elif path := weights_path(name, weights):
        state_dict = {_modern_name(key): value for key, value in load_state_dict(path).items()}
        load_into(network, state_dict, path)


def _modern_name(key):
    """Torchvision's DenseNet files still have the names of an early release: norm.1 for norm1."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


# Where classifiers come from


def _from_torchvision(name):
    table = {w.name: w for w in torchvision.models.get_model_weights(name)}
    default = torchvision.models.get_model_weights(name).DEFAULT
    preset = default.transforms()
    # What torchvision itself sets for the published weights of these two.
    options = (
        {"transform_input": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    )
    return ClassifierSpec(
        name=name,
        build=lambda num_classes: torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **options
        ),
        weights_files={key: table[key].url for key in [default.name, *table]},
        image_size=preset.crop_size[0],
        trained_on=InputTransform(preset.crop_size[0], tuple(preset.mean), tuple(preset.std)),
        licence="BSD-3-Clause (torchvision); trained on ImageNet, whose terms allow research only",
    )


def _from_file(name):
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}, named by classifier {name!r}")
    module_spec = importlib.util.spec_from_file_location(f"own_classifier_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses, for one, look their module up there
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(
            f"{file} has no function {function!r}; write FILE.py:builder, where builder(num_classes) returns the network"
        )
    return ClassifierSpec(name, getattr(module, function), {}, None, None, "your own")


def _digits_resnet(num_classes):
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def _digits_judge(num_classes):
    return torchvision.models.DenseNet(
        growth_rate=16, block_config=(4, 4), num_init_features=32, num_classes=num_classes
    )


_DIGITS_LICENCE = "MIT; trained on the digits of scikit-learn (UCI, CC BY 4.0)"
DIGITS = {
    spec.name: spec
    for spec in (
        ClassifierSpec(
            "digits_guide", _digits_resnet, {"digits": "digits/guide.safetensors"}, 16, None, _DIGITS_LICENCE
        ),
        ClassifierSpec(
            "digits_judge", _digits_judge, {"digits": "digits/judge.safetensors"}, 16, None, _DIGITS_LICENCE
        ),
    )
}

"""Classifiers by name: built, filled with weights, smoothed, and given the input that they expect."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from classifiers.input_transform import INPUTS, raw_image
from classifiers.smoothing import SmoothFunctionalRelus, smooth_relus
from classifiers.sources import DIGITS, ClassifierSpec, find_classifier, modern_name
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import existing_file, find_pretrained
from guided_diffusion.files.state_dicts import choose_state_dict, load_into, renamed

__all__ = [
    "DIGITS",
    "Classifier",
    "ClassifierSpec",
    "classifier_files",
    "find_classifier",
    "load_classifier",
    "weights_path",
]


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
    checkpoint_key: str | None = None,
) -> Classifier:
    """Return a classifier of [-1, 1] NCHW images: in eval mode, frozen, float32, on the CPU.

    name: a torchvision classification network, "digits_guide", "digits_judge", "cifar_resnet20",
    "cifar_resnet56", or "FILE.py:builder", one's own builder(num_classes). weights: None for the default file
    in pretrained_models/, "random", a name such as torchvision's "IMAGENET1K_V2", a path, or a state dict.
    checkpoint_key: which state dict in the file, where it holds several. softplus_beta: replaces every ReLU
    by Softplus; inf keeps them. classifier_input: "paper" feeds the raw image, and to the CIFAR networks what
    they were trained on; "imagenet" resizes and normalises it to what the weights were trained on.
    image_size: if given, a forward pass checks that the network takes such images and answers num_classes
    logits. One's own network needs it to be smoothed. Raises FileNotFoundError for missing weights and
    ValueError for everything that does not fit.
    """
    if classifier_input not in INPUTS:
        raise ValueError(f"unknown classifier_input {classifier_input!r}; choose {' or '.join(INPUTS)}")
    if not softplus_beta > 0:
        raise ValueError(f"softplus_beta must be positive or inf, got {softplus_beta}")
    spec = find_classifier(name)
    transform = _input_of(spec, classifier_input)
    network = spec.build(num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} built {type(network).__name__}, not a torch.nn.Module")
    _fill(network, name, weights, checkpoint_key)
    network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    classifier = Classifier(network, transform).eval()
    if not math.isinf(softplus_beta):
        _smooth(classifier, name, softplus_beta, image_size or spec.image_size)
    if image_size is not None:
        _check_answer(classifier, name, image_size, num_classes)
    return classifier


def _input_of(spec, classifier_input):
    if classifier_input == "paper" and spec.takes_raw:
        return raw_image
    if spec.trained_on is None:
        raise ValueError(f"{spec.name} takes the raw image: classifier_input must be paper, not imagenet")
    return spec.trained_on


def _fill(network, name, weights, checkpoint_key):
    if isinstance(weights, Mapping):
        source = f"the given state dict for {name}"
        state_dict = choose_state_dict(weights, source, checkpoint_key)
    elif source := weights_path(name, weights):
        state_dict = load_state_dict(source, checkpoint_key)
    else:
        return
    load_into(network, renamed(state_dict, modern_name), source)


def _smooth(classifier, name, beta, size):
    if size is None:
        raise ValueError(
            f"to smooth {name}, pass image_size: a forward pass shows which relus it calls as functions"
        )
    count = smooth_relus(classifier.network, beta)
    with SmoothFunctionalRelus(beta) as functional:
        _probe(classifier, name, size)
    if functional.kinked:
        kinked = ", ".join(sorted(functional.kinked))
        raise ValueError(f"{name} calls {kinked}, which cannot be smoothed; use softplus_beta inf")
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
            f"{name} answers {list(logits.shape)} to one image; "
            f"with num_classes {num_classes} it must be [1, {num_classes}]"
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
    if weights is not None and wanted not in files:
        return existing_file(weights)
    url = files[wanted]
    return find_pretrained(url.rpartition("/")[2], url=url) if "://" in url else find_pretrained(url)


def classifier_files(name: str, weights: str | Path | None) -> dict[str, Callable[[], Path | None]]:
    """Functions that return the files of a classifier, its weights and, of one's own, its code; they raise
    where one is not there.
    """
    files: dict[str, Callable[[], Path | None]] = {
        "classifier_path": partial(weights_path, name, weights or None)
    }
    if code := name.rpartition(":")[0]:
        files["classifier_code"] = partial(_existing_code, code, name)
    return files


def _existing_code(file, name):
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}, named by classifier {name!r}")
    return Path(file)

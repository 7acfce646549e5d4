"""Classifiers by name: built, filled with weights, smoothed, and given the input that they expect."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classifiers.ensemble import Ensemble
from classifiers.input_transform import INPUTS, raw_image
from classifiers.smoothing import SmoothFunctions, smooth_activations, told
from classifiers.sources import DIGITS, ClassifierSpec, find_classifier
from classifiers.zoo import PACKAGES, saved_settings
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import existing_file, find_pretrained
from guided_diffusion.files.prompts import prompts_file, read_prompts
from guided_diffusion.files.state_dicts import choose_state_dict

__all__ = [
    "DIGITS",
    "Classifier",
    "ClassifierSpec",
    "classifier_files",
    "classifier_packages",
    "find_classifier",
    "load_classifier",
    "weights_path",
]

Weights = str | Path | Mapping[str, Any] | None


class Classifier(nn.Module):
    """forward(x): (N, 3, H, W) in [-1, 1] -> logits (N, classes), in the dtype of the network's parameters.

    `softplus_beta` also smooths activations that the network calls as functions; None leaves those alone.
    replaced: the activations that were smoothed, how many by name; smoothing: that in words. notes: what the
    log should say of the classifier.
    """

    def __init__(
        self, network: nn.Module, transform: Callable[[Tensor], Tensor], softplus_beta: float | None = None
    ):
        super().__init__()
        self.network, self.transform, self.softplus_beta = network, transform, softplus_beta
        self.replaced, self.smoothing = Counter[str](), "activations as they are"
        self.notes: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)
        x = self.transform(x).to(dtype, memory_format=torch.channels_last)
        with nullcontext() if self.softplus_beta is None else SmoothFunctions(self.softplus_beta):
            answer = self.network(x)
        return getattr(answer, "logits", answer)  # transformers' networks answer with more than their logits


def load_classifier(
    name: str,
    weights: Weights = None,
    *,
    num_classes: int = 1000,
    softplus_beta: float = math.inf,
    classifier_input: str = "paper",
    image_size: int | None = None,
    checkpoint_key: str | None = None,
    prompts: str = "",
) -> Classifier | Ensemble:
    """Return a classifier of [-1, 1] NCHW images: in eval mode, frozen, float32, on the CPU.

    name: a torchvision classification network, "digits_guide", "digits_judge", "cifar_resnet20",
    "cifar_resnet56", "timm:NAME", "hf:FOLDER", "clip:FOLDER", or "FILE.py:builder", one's own
    builder(num_classes). weights: None for the default file in pretrained_models/ or in the folder, "random",
    a name such as torchvision's "IMAGENET1K_V2", a path, or a state dict. "a+b" are several, whose
    log-probabilities are averaged; weights are then "x+y", with nothing for a default.
    checkpoint_key: which state dict in the file, where it holds several. softplus_beta: replaces every kinked
    activation by a smooth one; inf keeps them. classifier_input: "paper" feeds the raw image, and to networks
    that raw images mean nothing to what they were trained on; "imagenet" resizes and normalises it to what
    the weights were trained on. image_size: if given, a forward pass checks that the network takes such
    images and answers num_classes logits. One's own network needs it to be smoothed. prompts: what a CLIP
    compares images with, a file with one for each class, or the text of a single one; with that the classes
    are two, the text and the empty prompt. Raises FileNotFoundError for missing weights and ValueError for
    everything that does not fit.
    """
    if classifier_input not in INPUTS:
        raise ValueError(f"unknown classifier_input {classifier_input!r}; choose {' or '.join(INPUTS)}")
    if not softplus_beta > 0:
        raise ValueError(f"softplus_beta must be positive or inf, got {softplus_beta}")
    named = members(name, weights)
    options = {"num_classes": _answers(named, prompts, num_classes), "image_size": image_size}
    options |= {"softplus_beta": softplus_beta, "classifier_input": classifier_input}
    loaded = [_load(*one, checkpoint_key=checkpoint_key, prompts=prompts, **options) for one in named]
    if not math.isinf(softplus_beta) and not any(one.replaced for one in loaded):
        found = "; ".join(one.smoothing for one in loaded)
        raise ValueError(f"{name} has no ReLU to smooth ({found}); use softplus_beta inf")
    return loaded[0] if len(loaded) == 1 else Ensemble(loaded).eval()


def members(name: str, weights: Weights) -> list[tuple[str, Any]]:
    """[(name, weights)] of the classifiers in "a+b" and "x+y". Raises ValueError for other numbers."""
    names = name.split("+")
    if len(names) == 1:
        return [(name, weights)]
    if isinstance(weights, Mapping) or not all(names):
        raise ValueError(f"{name}: a name is empty, or a state dict given for several classifiers")
    parts = str(weights).split("+") if weights else [""] * len(names)
    if len(parts) != len(names):
        raise ValueError(
            f"{name} are {len(names)} classifiers, but {weights} the weights of {len(parts)}: write as many, "
            "with + between them and nothing for a default"
        )
    return [(one, part or None) for one, part in zip(names, parts, strict=True)]


def _answers(named, prompts, num_classes):
    """How many logits the classifiers are to answer. Raises ValueError for prompts that nobody reads."""
    others = [name for name, _ in named if not name.startswith("clip:")]
    if prompts and len(others) == len(named):
        raise ValueError(f"prompts {prompts!r} are for clip:FOLDER, not for {others[0]}")
    if not prompts or prompts_file(prompts):
        return num_classes
    if others:
        raise ValueError(
            f"{others[0]} knows classes and not the prompt {prompts!r}: give a file of prompts, one for each"
        )
    return len(read_prompts(prompts))


def _load(
    name, weights, *, num_classes, softplus_beta, classifier_input, image_size, checkpoint_key, prompts
):
    """One classifier, as `load_classifier`."""
    spec = find_classifier(name, prompts)
    transform = _input_of(spec, classifier_input)
    network = spec.build(num_classes)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} built {type(network).__name__}, not a torch.nn.Module")
    network = spec.finish(_filled(spec, network, weights, checkpoint_key).eval())
    network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    classifier = Classifier(network, transform).eval()
    seen = "the raw image" if transform is raw_image else str(transform)
    if not math.isinf(softplus_beta):
        _smooth(classifier, name, softplus_beta, image_size or spec.image_size)
    licence = f"licence of its published weights: {spec.licence}"
    classifier.notes = [f"classifier {name}: sees {seen}; {classifier.smoothing}; {licence}"]
    if image_size is not None:
        _check_answer(classifier, name, image_size, num_classes)
    return classifier


def _input_of(spec, classifier_input):
    if classifier_input == "paper" and spec.takes_raw:
        return raw_image
    if spec.trained_on is None:
        raise ValueError(f"{spec.name} takes the raw image: classifier_input must be paper, not imagenet")
    return spec.trained_on


def _filled(spec, network, weights, checkpoint_key):
    if isinstance(weights, Mapping):
        source = f"the given state dict for {spec.name}"
        return spec.fill(network, choose_state_dict(weights, source, checkpoint_key), source)
    if source := _file_of(spec.weights_files, weights):
        return spec.fill(network, load_state_dict(source, checkpoint_key), source)
    return network


def _smooth(classifier, name, beta, size):
    if size is None:
        raise ValueError(
            f"to smooth {name}, pass image_size: a forward pass shows which relus it calls as functions"
        )
    modules = smooth_activations(classifier.network, beta)
    with SmoothFunctions(beta) as functional:
        _probe(classifier, name, size)
    if functional.kinked:
        kinked = ", ".join(sorted(functional.kinked))
        raise ValueError(f"{name} calls {kinked}, which cannot be smoothed; use softplus_beta inf")
    if functional.replaced:
        classifier.softplus_beta = beta
    classifier.replaced = modules + functional.replaced
    classifier.smoothing = told(classifier.replaced, functional.smooth, beta)


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
    answer = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    if answer != [1, num_classes]:
        raise ValueError(
            f"{name} answers {answer} to one image; "
            f"with num_classes {num_classes} it must be [1, {num_classes}]"
        )


def weights_path(name: str, weights: str | Path | None) -> Path | None:
    """The file that `load_classifier` would read for one name; None where it would read none. Raises
    FileNotFoundError if it is not there.
    """
    return _file_of({} if ".py:" in name else find_classifier(name).weights_files, weights)


def _file_of(files, weights):
    """The file that `weights` means, of those that a ClassifierSpec names."""
    if weights == "random" or (weights is None and not files):
        return None
    # "ResNet50_Weights.IMAGENET1K_V2" and "IMAGENET1K_V2" mean the same.
    wanted = next(iter(files)) if weights is None else str(weights).rpartition(".")[2]
    if weights is not None and wanted not in files:
        return existing_file(weights)
    url, _, file = files[wanted].partition("#")
    return find_pretrained(file or url.rpartition("/")[2], url=url) if "://" in url else find_pretrained(url)


def classifier_files(name: str, weights: str | Path | None) -> dict[str, Callable[[], Path | None]]:
    """Functions that return the files of the classifiers in a name: their weights and, of one's own, its
    code, of a folder its settings. They raise where one is not there. Raises ValueError as `members`.
    """
    files: dict[str, Callable[[], Path | None]] = {}
    for i, (one, path) in enumerate(members(name, weights or None)):
        number = f"_{i + 1}" if i else ""
        files[f"classifier_path{number}"] = partial(weights_path, one, path)
        source, _, _ = one.rpartition(":")
        if source in ("hf", "clip"):
            for file, setting in saved_settings(one).items():
                files[f"classifier_{file}{number}"] = partial(existing_file, setting)
        elif source and source != "timm":
            files[f"classifier_code{number}"] = partial(_existing_code, source, one)
    return files


def classifier_packages(name: str) -> list[str]:
    """The packages beside torchvision whose versions decide what the classifiers in a name answer."""
    sources = [one.partition(":")[0] for one in name.split("+")]
    return sorted({PACKAGES[source] for source in sources if source in PACKAGES})


def _existing_code(file, name):
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}, named by classifier {name!r}")
    return Path(file)

"""The problems that ship, and ImageNet: by which network their images are judged, by which features and
against which images they are measured. Not a script of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import _beside
import numpy as np

from classifiers import load_classifier
from classifiers.registry import Classifier, find_classifier
from evaluation.evaluator import evaluate
from evaluation.features import FeatureNetwork
from evaluation.metrics import metric_key, metric_label
from evaluation.networks import feature_network
from evaluation.networks.cifar import CIFAR_NETWORK, CIFAR_WEIGHTS
from evaluation.reference import Reference
from evaluation.resampling import Options
from evaluation.sets import DENSITY_NEIGHBOURS, MeasuredSet, measure, open_set
from guided_diffusion import dist_util
from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.pretrained import PRETRAINED_DIR

METRICS = ("fid", "precision", "recall", "density", "coverage")
RESAMPLES = 200
SMALLEST = DENSITY_NEIGHBOURS + 1  # images, for all of METRICS


@dataclass(frozen=True)
class Problem:
    """Images of some classes, and who says how good samples of them are.

    name: of its presets' beginning and of its folder in pretrained_models/. judge: a classifier of another
    architecture than the guides; judge_weights: its file, None for its default; judge_input: see
    `load_classifier`. features: the feature network. images: of the reference, a file in pretrained_models/;
    by default in the problem's folder. second: another feature network; second_images: its reference, by
    default the same file. resamples: for `Quality`.
    """

    name: str
    judge: str
    judge_weights: Path | None = None
    judge_input: str = "paper"
    features: str = ""
    images: str = ""
    second: str = ""
    second_images: str = ""
    num_classes: int = 10
    resamples: int = RESAMPLES

    @property
    def network(self) -> str:
        """The name of the feature network: the problem's own, or that of `features`."""
        return self.features or self.name

    @property
    def reference(self) -> Path:
        """Of the images that its networks were trained on: an npz that `open_set` reads."""
        return PRETRAINED_DIR / (self.images or f"{self.name}/reference.npz")

    def reference_for(self, network: str) -> Path:
        """The reference for `network`, or for `second`."""
        other = network == self.second and self.second_images
        return PRETRAINED_DIR / self.second_images if other else self.reference

    @property
    def held_out(self) -> Path:
        """An npz of images that no network has seen; where they may not be passed on, it does not ship."""
        return PRETRAINED_DIR / self.name / "held_out.npz"

    @property
    def distance(self) -> str:
        """The key of its Frechet distance."""
        return metric_key("fid", self.network)

    @property
    def distance_label(self) -> str:
        """That distance's name."""
        return metric_label("fid", self.network)

    def load_judge(self, name: str) -> Classifier:
        """The classifier of that name, `judge` or another."""
        own = (self.judge_weights, self.judge_input) if name == self.judge else (None, "paper")
        judge = load_classifier(name, own[0], num_classes=self.num_classes, classifier_input=own[1])
        return judge.to(dist_util.dev())


PROBLEMS = {
    "digits": Problem("digits", "digits_judge", second="digits_mixer"),
    "cifar10": Problem(
        "cifar10",
        str(_beside.ROOT / CIFAR_NETWORK),
        CIFAR_WEIGHTS,
        second="cifar10_mixer",
        second_images="cifar10/reference_mixer.npz",
    ),
    # Without resamples: of 10,000 images in 2,048 dimensions each takes seconds.
    "imagenet128": Problem(
        "imagenet128",
        "densenet121",
        judge_input="imagenet",
        features="inception",
        images="VIRTUAL_imagenet128_labeled.npz",
        second="dinov2",
        num_classes=1000,
        resamples=0,
    ),
}


def problem_of(preset: str) -> Problem:
    """The problem that a preset samples. Raises ValueError for one without."""
    problem = PROBLEMS.get(preset.partition("-")[0])
    if problem is None:
        raise ValueError(
            f"judge and metrics are those of {', '.join(PROBLEMS)}, and {preset} is none of their presets"
        )
    return problem


def require_other_judge(judge: str, given: Mapping[str, Any], preset: Mapping[str, Any]) -> None:
    """Raise ValueError for a judge that is the guide, or no classifier."""
    if judge == given.get("classifier_type", preset.get("classifier_type")):
        raise ValueError(
            f"--judge {judge} is the guide itself; choose another classifier, of another architecture"
        )
    find_classifier(judge)


@dataclass
class Quality:
    """Called on a set of images, it returns the metrics by its problem's features, against the images that
    the problem's networks were trained on, and the standard deviation of the distance over resamples, None
    where the problem has none. features: another network than the problem's first, such as its second.
    """

    problem: Problem
    features: str = ""

    @cached_property
    def network(self) -> FeatureNetwork:
        """The feature network."""
        return feature_network(self.features or self.problem.network, device=dist_util.dev())

    @cached_property
    def reference(self) -> Reference:
        """The training images."""
        return Reference(self.measured(self.problem.reference_for(self.features)))

    def measured(self, images: Path) -> MeasuredSet:
        """The features of a set of images."""
        return measure(open_set(images, self.network), self.network, progress=False)

    def distance(self, images: Path) -> float:
        """The Frechet distance alone."""
        return self.reference.pool.distance(self.measured(images).pool())

    def __call__(self, images: Path) -> dict[str, Any]:
        options = Options(bootstrap=self.problem.resamples)
        result = evaluate(self.reference, self.measured(images), options)
        numbers = {metric_key(metric, self.problem.network): result.metrics[metric] for metric in METRICS}
        std = result.fid_error.std if result.fid_error else None
        return {**numbers, "resampled_std": std, "images": result.count}


def hold_out(problem: Problem, folder: Path, count: int, seed: int) -> Path:
    """Write `count` of a problem's held-out images, or all of them if they are fewer, to a file in `folder`;
    return its path.
    """
    with np.load(problem.held_out, allow_pickle=False) as held_out:
        unseen = held_out["arr_0"]
    path = folder / "held_out.npz"
    with renamed_when_complete(path) as file:
        np.savez(file, arr_0=unseen[np.random.RandomState(seed).permutation(len(unseen))[:count]])
    return path

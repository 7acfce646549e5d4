"""The metrics of a set of images, as a table: to add one is to add a row.

Each row says what the two sets must give, and how the number comes from them. Where a set does not give it,
the metric is left out, and a note says why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from evaluation.features import Features
from evaluation.memorisation import Nearest, copies_share, nearer_share, nearest_training
from evaluation.networks.inception import InceptionFeatures
from evaluation.precision_recall import ManifoldScores, manifold_scores
from evaluation.reference import Reference
from evaluation.scores import clip_mmd, inception_score, kernel_distance
from evaluation.sets import DENSITY_NEIGHBOURS, NEIGHBOURS, MeasuredSet
from evaluation.sliced import monge_distance
from guided_diffusion.files.console import print_result


class Pair:
    """A set and the reference, as the metrics see them.

    `dtype` is that of the distances behind precision, recall, density and coverage, "float16" or "float32".
    """

    def __init__(self, reference: Reference, samples: MeasuredSet, dtype: str, progress: bool = False):
        self.reference, self.samples, self.dtype, self.progress = reference, samples, dtype, progress

    def missing(self, need: str) -> str | None:
        """None where the sets give what is needed; else why not, "" where that is said elsewhere or is plain.

        need: "pool" and "spatial", a Gaussian of each set; "logits" of the samples; "features" of the images
        of both; "clip", those of CLIP; "train", those of training images besides.
        """
        images = self.samples.features
        if need == "spatial" and (self.reference.spatial is None or self.samples.spatial() is None):
            plain = not _gives(need, self.samples.provenance, self.reference.measured.provenance)
            return "" if plain else "one side has no spatial statistics"
        if need == "logits" and (images is None or images.logits is None):
            return ""
        if need == "train":
            return "" if images is None or self.reference.against is None else None
        if need == "clip" and self.samples.provenance["features"] != need:
            return ""
        if need in ("features", "clip") and (images is None or self.reference.features is None):
            return "" if images is None else "the reference has no images"
        return None

    @property
    def images(self) -> Features:
        """The features of the samples, for the metrics that need them."""
        assert self.samples.features
        return self.samples.features

    @cached_property
    def manifold(self) -> ManifoldScores:
        """Six metrics in one pass over the distances."""
        real, fake = self.reference.features, self.images.pool3
        assert real is not None
        if self.progress:
            counts = f"{len(real)} against {len(fake)} images"
            print_result(f"{labels_of_need('features')}: {counts}", to_stderr=True)
        dtype = getattr(torch, self.dtype)
        return manifold_scores(real=real, fake=fake, k=NEIGHBOURS, density_k=DENSITY_NEIGHBOURS, dtype=dtype)

    @cached_property
    def nearest(self) -> Nearest:
        """The training image that each sample is nearest to."""
        assert self.reference.against and self.reference.against.features
        return nearest_training(train=self.reference.against.features.pool3, points=self.images.pool3)


@dataclass(frozen=True)
class Metric:
    """key, label: its names in JSON and in tables. decimals: in tables. needs: see `Pair.missing`.

    function: from a pair that gives what is needed to the number. other_label: the label with another
    network's features than Inception's, the network's name behind it; "" where the label is the same. share:
    whether the number lies between 0 and 1.
    """

    key: str
    label: str
    decimals: int
    needs: str
    function: Callable[[Pair], Any]
    other_label: str = ""
    share: bool = False


def _frechet(pair):
    if pair.samples.statistics:
        return pair.reference.pool.distance(pair.samples.statistics.pool)
    return pair.reference.pool.distance_to_features(pair.images.pool3)


def _spatial_frechet(pair):
    return pair.reference.spatial.distance(pair.samples.spatial())


def _inception_score(pair):
    return inception_score(logits=pair.images.logits)


def _kernel_distance(pair):
    return kernel_distance(real=pair.reference.features, fake=pair.images.pool3)


def _monge_distance(pair):
    return monge_distance(real=pair.reference.features, fake=pair.images.pool3)


def _clip_mmd(pair):
    return clip_mmd(real=pair.reference.features, fake=pair.images.pool3)


def _nearer(pair):
    return nearer_share(pair.nearest.distances, pair.reference.held_out)


def _copies(pair):
    return copies_share(pair.nearest.distances, pair.reference.held_out)


METRICS = (
    Metric("fid", "FID", 3, "pool", _frechet, "FD"),
    Metric("sfid", "sFID", 3, "spatial", _spatial_frechet, "sFD"),
    Metric("inception_score", "IS", 3, "logits", _inception_score, "IS"),
    Metric("precision", "precision", 4, "features", lambda pair: pair.manifold.precision, share=True),
    Metric("recall", "recall", 4, "features", lambda pair: pair.manifold.recall, share=True),
    Metric("density", "density", 4, "features", lambda pair: pair.manifold.density),
    Metric("coverage", "coverage", 4, "features", lambda pair: pair.manifold.coverage, share=True),
    Metric("kid", "KID", 5, "features", _kernel_distance, "KD"),
    Metric("mind", "MIND", 3, "features", _monge_distance, "MIND"),
    Metric("cmmd", "CMMD", 4, "clip", _clip_mmd),
    Metric(
        "clipped_density",
        "clipped density",
        4,
        "features",
        lambda pair: pair.manifold.clipped_density,
        share=True,
    ),
    Metric(
        "clipped_coverage",
        "clipped coverage",
        4,
        "features",
        lambda pair: pair.manifold.clipped_coverage,
        share=True,
    ),
    Metric("nearer", "nearer to train", 4, "train", _nearer, share=True),
    Metric("copies", "copies", 4, "train", _copies, share=True),
)
BY_KEY = {metric.key: metric for metric in METRICS}


def compute(pair: Pair) -> tuple[dict[str, float | None], dict[str, str]]:
    """({key: number, None for what could not be had}, {need: a note that says why not})."""
    reasons = {need: pair.missing(need) for need in dict.fromkeys(metric.needs for metric in METRICS)}
    numbers = {
        metric.key: metric.function(pair) if reasons[metric.needs] is None else None for metric in METRICS
    }
    notes = {need: f"no {labels_of_need(need)}: {reason}" for need, reason in reasons.items() if reason}
    return numbers, notes


def labels_of_need(need: str) -> str:
    """ "precision, recall and KID": the metrics that need it."""
    labels = [metric.label for metric in METRICS if metric.needs == need]
    return " and ".join([", ".join(labels[:-1]), labels[-1]] if len(labels) > 1 else labels)


def is_possible(metric: Metric, *provenances: Mapping[str, Any]) -> bool:
    """Whether the network behind these sets gives what the metric needs; where no image was seen, it may."""
    return _gives(metric.needs, *provenances)


def _gives(need, *provenances):
    if need == "train":
        return any(about.get("against") for about in provenances)
    if need == "clip":
        return provenances[0]["features"] == need
    outputs = next((about["outputs"] for about in provenances if about.get("outputs")), None)
    return need not in ("spatial", "logits") or outputs is None or need in outputs


def metric_key(key: str, features: str) -> str:
    """The name in JSON: fid is Inception's alone, another feature network's distance is fd_NAME."""
    other = BY_KEY[key].other_label
    return key if not other or _is_inception(features) else f"{other.lower()}_{features}"


def metric_label(key: str, features: str) -> str:
    """The name in tables and pictures: FID, or FD(NAME) with another feature network than Inception."""
    metric = BY_KEY[key]
    plain = not metric.other_label or _is_inception(features)
    return metric.label if plain else f"{metric.other_label}({features})"


def rounded(key: str, value: float) -> str:
    """The number with its decimals; nothing rounds to a zero with a minus."""
    decimals = BY_KEY[key].decimals
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _is_inception(features):
    return features == InceptionFeatures.name

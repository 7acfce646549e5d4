"""FID, sFID, Inception Score, precision, recall, density, coverage and KID of sets of images against a
reference.

    python evaluation/evaluator.py REFERENCE SAMPLES

prints the five lines of guided-diffusion's evaluator under its protocol; scripts/evaluate.py is the same with
every option. FID and sFID of a reference in the published layout are those of the statistics in it, the other
numbers those of its images.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from evaluation.features import Features
from evaluation.frechet import (
    ErrorBar,
    Extrapolation,
    FrechetReference,
    bootstrap_difference,
    bootstrap_frechet,
    error_bar,
    frechet_infinity,
)
from evaluation.inception import InceptionFeatures
from evaluation.networks import feature_network
from evaluation.precision_recall import manifold_scores
from evaluation.scores import inception_score, kernel_distance
from evaluation.sets import (
    DENSITY_NEIGHBOURS,
    NEIGHBOURS,
    MeasuredSet,
    measure,
    open_set,
    require_comparable,
    require_images_only,
    require_same_resolution,
)

MAX_REFERENCE_IMAGES = 10_000  # as in guided-diffusion's evaluation
ENOUGH_IMAGES = (
    10_000  # from here on what is left of the bias of precision, recall and Inception Score is small
)
INFINITY_IMAGES = 20
DISTANCES = {
    "fid": ("FID", "fd", "FD"),
    "sfid": ("sFID", "sfd", "sFD"),
    "inception_score": ("IS", "is", "IS"),
    "kid": ("KID", "kd", "KD"),
}
METRICS = ("fid", "sfid", "inception_score", "precision", "recall", "density", "coverage", "kid")


@dataclass(frozen=True)
class Options:
    """bootstrap: resamples for the error bar of FID, 0 for none; precision_recall_dtype: float16 or
    float32.
    """

    bootstrap: int = 0
    fid_infinity: bool = False
    precision_recall_dtype: str = "float32"
    allow_resolution: bool = False
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True)
class Result:
    """The numbers of one set. `metrics` has all of METRICS; what could not be had is None, and `notes` say
    why.

    The names in `metrics` are those of Inception; `metric_key` and `metric_label` give the names to show.
    """

    name: str
    count: int | None
    metrics: dict[str, float | None]
    notes: list[str]
    samples: dict[str, Any]
    reference: dict[str, Any]
    precision_recall_dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    fid_error: ErrorBar | None = None
    fid_infinity: Extrapolation | None = None

    @property
    def protocol(self) -> str:
        """All that two results must share to be compared, but the reference."""
        network = (
            f"{self.samples['protocol']}, {self.samples['features']} {self.samples['weights_sha256'][:8]}"
        )
        return f"{network}, precision/recall in {self.precision_recall_dtype}"


@dataclass
class Reference:
    """A measured set to which others are compared: its covariances are factored once.

    `features` are those of at most 10,000 of its images, drawn with `seed`; None where it has no images.
    `notes` are about the reference.
    """

    measured: MeasuredSet
    seed: int = 0
    pool: FrechetReference = field(init=False)
    spatial: FrechetReference | None = field(init=False)
    features: NDArray[np.float32] | None = field(init=False)
    notes: list[str] = field(init=False)

    def __post_init__(self) -> None:
        spatial = self.measured.spatial()
        self.pool, self.spatial = (
            FrechetReference(self.measured.pool()),
            FrechetReference(spatial) if spatial else None,
        )
        self.notes = self.measured.notes + _notes_on_covariances(self.measured)
        self.features = self.measured.features.pool3 if self.measured.features else None
        if self.features is not None and len(self.features) < ENOUGH_IMAGES:
            self.notes.append(
                f"{len(self.features)} images, fewer than {ENOUGH_IMAGES:,}: precision and recall depend on their number"
            )
        elif self.features is not None and len(self.features) > MAX_REFERENCE_IMAGES:
            self.notes.append(
                f"all but FID, sFID and IS take {MAX_REFERENCE_IMAGES:,} of {len(self.features):,} images"
            )
            self.features = _some(self.features, MAX_REFERENCE_IMAGES, self.seed)


def metric_key(metric: str, features: str) -> str:
    """The name in JSON: fid is Inception's alone, another feature network's distance is fd_NAME."""
    return (
        metric if _is_inception(features) or metric not in DISTANCES else f"{DISTANCES[metric][1]}_{features}"
    )


def metric_label(metric: str, features: str) -> str:
    """The name in tables and pictures: FID, or FD(NAME) with another feature network than Inception."""
    if metric not in DISTANCES:
        return metric
    published, _, other = DISTANCES[metric]
    return published if _is_inception(features) else f"{other}({features})"


def _is_inception(features):
    return features == InceptionFeatures.name


def evaluate(reference: Reference, samples: MeasuredSet, options: Options | None = None) -> Result:
    """Every number of one set against a reference that was measured with the same network.

    Raises ValueError for sets of two networks or protocols, two resolutions (unless allowed), and too few
    images.
    """
    options = options or Options()
    ours, theirs = samples.provenance, reference.measured.provenance
    for key in ("features", "protocol", "weights_sha256"):
        if ours[key] != theirs[key]:
            raise ValueError(
                f"{samples.name} was measured with {key} {ours[key]}, the reference with {theirs[key]}: measure both alike"
            )
    notes = samples.notes + _notes_on_covariances(samples)
    if not options.allow_resolution:
        require_same_resolution(reference.measured, samples)
    elif samples.resolution and reference.measured.resolution not in (None, samples.resolution):
        notes.append(
            f"resolution {samples.resolution} against {reference.measured.resolution} of the reference"
        )
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    metrics |= {"fid": _frechet(reference, samples), "sfid": _spatial_frechet(reference, samples, notes)}
    if samples.features is None:
        notes.append("statistics without images: only the Frechet distances can be had")
    else:
        if samples.features.count < ENOUGH_IMAGES:
            notes.append(
                f"fewer than {ENOUGH_IMAGES:,} images: compare IS, precision and recall only with those of as many images"
            )
        metrics["inception_score"] = inception_score(logits=samples.features.logits)
        metrics |= _manifold_metrics(reference, samples.features, options, notes)
    return Result(
        samples.name,
        samples.count,
        metrics,
        notes,
        ours,
        theirs,
        options.precision_recall_dtype,
        _on_record(reference, options),
        **_frechet_extras(reference, samples, metrics["fid"], options, notes),
    )


def _on_record(reference, options):
    """What the numbers depend on besides the two sets."""
    used = None if reference.features is None else len(reference.features)
    neighbours = {"neighbours": NEIGHBOURS, "density_neighbours": DENSITY_NEIGHBOURS}
    record = {
        **asdict(options),
        **neighbours,
        "reference_images_used": used,
        "reference_seed": reference.seed,
        "scipy": scipy.__version__,
    }
    return {key: value for key, value in record.items() if key != "progress"}


def _frechet(reference, samples):
    if samples.statistics:
        return reference.pool.distance(samples.statistics.pool)
    return reference.pool.distance_to_features(samples.features.pool3)


def _spatial_frechet(reference, samples, notes):
    spatial = samples.spatial()
    if reference.spatial is None or spatial is None:
        notes.append("no sFID: one side has no spatial statistics")
        return None
    return reference.spatial.distance(spatial)


def _manifold_metrics(reference, features: Features, options, notes):
    if reference.features is None:
        notes.append("no precision, recall, density, coverage and KID: the reference has no images")
        return {}
    real, fake = reference.features, features.pool3
    if options.progress:
        print(
            f"precision, recall, density, coverage and KID: {len(real)} against {len(fake)} images",
            file=sys.stderr,
        )
    dtype = getattr(torch, options.precision_recall_dtype)
    scores = manifold_scores(real=real, fake=fake, k=NEIGHBOURS, density_k=DENSITY_NEIGHBOURS, dtype=dtype)
    return {**vars(scores), "kid": kernel_distance(real=real, fake=fake)}


def _notes_on_covariances(measured):
    count, notes = measured.statistics.count if measured.statistics else measured.features.count, []
    if measured.statistics:
        dimensions = {"pooled": measured.statistics.pool.mu.size}
    else:
        dimensions = {
            "pooled": measured.features.pool3.shape[1],
            "spatial": measured.features.spatial.mean.size,
        }
    for kind, dimension in dimensions.items():
        if count is not None and count <= dimension:
            notes.append(
                f"{count} images are not more than the {dimension} {kind} features: singular covariance"
            )
    return notes


def _frechet_extras(reference, samples, fid, options, notes):
    """The error bar and the extrapolation that were asked for, as far as they can be had."""
    if not (options.bootstrap or options.fid_infinity):
        return {}
    if samples.statistics or samples.features is None:
        notes.append(
            "no error bar and no extrapolation: the distance is that of statistics, which cannot be resampled"
        )
        return {}
    extras, pool3 = {}, samples.features.pool3
    if options.bootstrap:
        with tqdm(
            total=options.bootstrap, desc=f"resamples of {samples.name}", disable=not options.progress
        ) as watch:
            resampled = bootstrap_frechet(
                _Watched(reference.pool, watch), pool3, options.bootstrap, options.seed
            )
        bar = error_bar(fid, resampled)
        extras["fid_error"] = replace(bar, low=max(bar.low, 0.0))
    if options.fid_infinity and len(pool3) < INFINITY_IMAGES:
        notes.append(f"no extrapolation: {len(pool3)} images, it takes {INFINITY_IMAGES}")
    elif options.fid_infinity:
        extras["fid_infinity"] = frechet_infinity(reference.pool, pool3, seed=options.seed)
    return extras


class _Watched(FrechetReference):
    """The same reference, moving a progress bar with every distance that is taken to it."""

    def __init__(self, reference, bar):
        vars(self).update(vars(reference))
        self._bar = bar

    def distance_to_features(self, features):
        distance = super().distance_to_features(features)
        self._bar.update()
        return distance


def compare(
    reference: Reference, a: MeasuredSet, b: MeasuredSet, repeats: int, seed: int = 0, progress: bool = False
) -> ErrorBar:
    """The Frechet distance of a minus that of b, with a 95% interval from `repeats` resamples that both
    share.

    Of the larger set as many images as the smaller has are drawn with `seed`.

    Raises ValueError where the distance of a set is that of statistics, and for fewer than 2 repeats.
    """
    for measured in (a, b):
        require_images_only(measured)
    assert a.features and b.features
    # As many of each: the distance falls with the number of images, whoever made them.
    count = min(a.features.count, b.features.count)
    x, y = (_some(features.pool3, count, seed) for features in (a.features, b.features))
    with tqdm(total=2 * repeats, desc=f"resamples of {a.name} and {b.name}", disable=not progress) as bar:
        resampled = bootstrap_difference(_Watched(reference.pool, bar), x, y, repeats, seed)
    return error_bar(
        reference.pool.distance_to_features(x) - reference.pool.distance_to_features(y), resampled
    )


def _some(features, count, seed):
    """`count` random rows in their order; all of them where there are no more."""
    if len(features) == count:
        return features
    return features[np.sort(np.random.RandomState(seed).choice(len(features), count, replace=False))]


def five_lines(result: Result) -> str:
    """What guided-diffusion's evaluator prints; nan for what could not be had."""
    names = {
        "Inception Score": "inception_score",
        "FID": "fid",
        "sFID": "sfid",
        "Precision": "precision",
        "Recall": "recall",
    }
    values = {label: result.metrics[metric] for label, metric in names.items()}
    return "\n".join(
        f"{label}: {float('nan') if value is None else value}" for label, value in values.items()
    )


def main() -> None:
    """The command line of guided-diffusion's evaluator; --weights and --device are this project's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("ref_batch", help="reference npz, or images")
    parser.add_argument("sample_batch", help="npz, folder or zip of samples")
    parser.add_argument("--weights", help="Inception weights, by default those in pretrained_models/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}); write cpu or cuda"
        ) from error
    network = feature_network(weights=args.weights, device=args.device)
    opened = [open_set(path, network) for path in (args.ref_batch, args.sample_batch)]
    require_comparable(opened[0], opened[1], network)
    reference = Reference(measure(opened[0], network))
    result = evaluate(reference, measure(opened[1], network))
    for note in [f"reference: {note}" for note in reference.notes] + result.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        "note: precision and recall in float32; in guided-diffusion's float16 both come out 0.001 to 0.004 larger",
        file=sys.stderr,
    )
    print(five_lines(result))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit(130)

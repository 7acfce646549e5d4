"""How far the Frechet distance of a set would move with other images of the same generator."""

from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from evaluation.frechet import (
    ErrorBar,
    FrechetReference,
    bootstrap_difference,
    bootstrap_frechet,
    error_bar,
    frechet_infinity,
)
from evaluation.reference import Reference, some_rows
from evaluation.sets import MeasuredSet, require_images_only

INFINITY_IMAGES = 20


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


def frechet_extras(
    reference: Reference, samples: MeasuredSet, fid: float | None, options: Options, notes: list[str]
) -> dict[str, Any]:
    """The error bar and the extrapolation that were asked for, `fid_error` and `fid_infinity`, as far as they
    can be had; `notes` gets a line for what cannot.
    """
    if not (options.bootstrap or options.fid_infinity):
        return {}
    if samples.statistics or samples.features is None:
        why = "the distance is that of statistics, which cannot be resampled"
        notes.append(f"no error bar and no extrapolation: {why}")
        return {}
    assert fid is not None  # every set has a Gaussian
    extras: dict[str, Any] = {}
    pool3 = samples.features.pool3
    if options.bootstrap:
        title = f"resamples of {samples.name}"
        with tqdm(total=options.bootstrap, desc=title, disable=not options.progress) as bar:
            watched = _Watched(reference.pool, bar)
            resampled = bootstrap_frechet(watched, pool3, options.bootstrap, options.seed)
        measured = error_bar(fid, resampled)
        extras["fid_error"] = replace(measured, low=max(measured.low, 0.0))
    if options.fid_infinity and len(pool3) < INFINITY_IMAGES:
        notes.append(f"no extrapolation: {len(pool3)} images, it takes {INFINITY_IMAGES}")
    elif options.fid_infinity:
        extras["fid_infinity"] = frechet_infinity(reference.pool, pool3, seed=options.seed)
    return extras


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
    x, y = (some_rows(features.pool3, count, seed) for features in (a.features, b.features))
    with tqdm(total=2 * repeats, desc=f"resamples of {a.name} and {b.name}", disable=not progress) as bar:
        resampled = bootstrap_difference(_Watched(reference.pool, bar), x, y, repeats, seed)
    difference = reference.pool.distance_to_features(x) - reference.pool.distance_to_features(y)
    return error_bar(difference, resampled)


class _Watched(FrechetReference):
    """The same reference, moving a progress bar with every distance that is taken to it."""

    def __init__(self, reference, bar):
        vars(self).update(vars(reference))
        self._bar = bar

    def distance_to_features(self, features):
        distance = super().distance_to_features(features)
        self._bar.update()
        return distance

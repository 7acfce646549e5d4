"""scripts/evaluate.py --selfcheck: guided-diffusion's own reference and samples, measured and compared with
the published figures. It is no script of its own.
"""

import contextlib
import math

import _beside  # noqa: F401
import download

from evaluation.evaluator import evaluate
from evaluation.networks import feature_network
from evaluation.networks.inception import WEIGHTS, find_inception_weights
from evaluation.reference import Reference
from evaluation.sets import measure, open_set
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.console import print_result
from guided_diffusion.files.pretrained import PRETRAINED_DIR

# guided-diffusion's own pair of reference and samples.
PUBLISHED_REFERENCE = "VIRTUAL_imagenet128_labeled.npz"
PUBLISHED_SAMPLES = "admnet_guided_imagenet128.npz"
# Metric -> (what TensorFlow gave, tolerance). A PyTorch port differed by 0.0014, 0.000006, 0.0011, 0.001 and
# 0.0023; the tolerance is at least twice that, and more for FID, as convolutions round differently from one
# machine to the next. TensorFlow's precision and recall are in float16, where ties raise both; this check
# computes them in float32, as the port did.
PUBLISHED_FIGURES = {
    "inception_score": (141.4767, 0.01),
    "fid": (2.973289, 0.001),
    "sfid": (5.094564, 0.003),
    "precision": (0.78138, 0.002),
    "recall": (0.5929, 0.005),
}


def selfcheck(args):
    """Evaluate the published pair as guided-diffusion does, fetched if need be.

    Raises ValueError where a figure differs by more than its tolerance.
    """
    if args.weights:
        find_inception_weights(args.weights)  # before gigabytes are fetched
    if missing := [path.name for path in published_paths(args.weights) if not path.is_file()]:
        with contextlib.suppress(SystemExit):  # it has said why, and what is still missing is named below
            download.main(missing)
    paths = find_published(args.weights)
    network = feature_network(weights=paths[2], device=choose_device(args.device))
    options = {"batch_size": args.batch_size, "cache": args.cache}
    reference, samples = (measure(open_set(path, network), network, **options) for path in paths[:2])
    result = evaluate(Reference(reference), samples)
    lines = compare_with_published(result.metrics)
    print_result("\n".join(lines))
    if any("DIFFERS" in line for line in lines):
        raise ValueError("the self-check failed: see the figures that differ")


def published_paths(weights):
    """Where reference, samples and, unless they are given, weights should be."""
    return [
        PRETRAINED_DIR / name
        for name in (PUBLISHED_REFERENCE, PUBLISHED_SAMPLES, *([] if weights else [WEIGHTS]))
    ]


def find_published(weights):
    """The paths of reference, samples and weights. Raises FileNotFoundError with all that are missing, and
    how to get them.
    """
    paths = published_paths(weights)
    if missing := [path.name for path in paths if not path.is_file()]:
        names = " ".join(missing)
        raise FileNotFoundError(
            f"--selfcheck needs files that are not in {PRETRAINED_DIR}: `python scripts/download.py {names}`"
        )
    return [*paths[:2], find_inception_weights(weights or paths[2])]


def compare_with_published(metrics):
    """A line for each published figure: ours, theirs, the tolerance, and whether they agree."""
    lines = []
    for metric, (published, tolerance) in PUBLISHED_FIGURES.items():
        value = math.nan if metrics[metric] is None else metrics[metric]
        agrees = abs(value - published) <= tolerance  # false for NaN
        lines.append(
            f"{metric}: {value:.6f}, published {published}, tolerance {tolerance}: "
            f"{'agrees' if agrees else 'DIFFERS'}"
        )
    return lines

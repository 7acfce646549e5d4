"""Evaluate sets of images against a reference: FID, sFID, Inception Score, precision, recall, density,
coverage, KID.

    python scripts/evaluate.py pretrained_models/VIRTUAL_imagenet128_labeled.npz results/resnet101 \\
        results/resnet50 --report results/report
    python scripts/evaluate.py real.npz a.npz b.npz --features digits --bootstrap 200 --compare a.npz b.npz

A set is an npz, a folder or a zip of images, an output folder of this project, or an npz with statistics. The
table goes to stdout, the rest to stderr. Numbers of another --protocol or --features must not be compared;
distances by another network than Inception's are called FD(NAME), never FID.
"""

import contextlib
import json
import math
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import _beside  # noqa: F401
import download
from network_flags import add_network_flags, network_of

from evaluation.evaluator import evaluate
from evaluation.metrics import metric_label
from evaluation.networks import NetworkOptions, feature_network
from evaluation.networks.inception import WEIGHTS, find_inception_weights
from evaluation.reference import Reference
from evaluation.report import require_matplotlib, to_json, write_report
from evaluation.resampling import Options, compare
from evaluation.sets import measure, open_set, require_comparable, require_images_only
from evaluation.tables import table
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import pick_images
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.parser import Parser, run_main

COMPARE_RESAMPLES = 200
GRID_IMAGES = 64
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


def main():
    parser = make_parser()
    args = parser.parse_intermixed_args()
    if args.selfcheck:
        # The pair is measured by Inception under adm; how is the user's choice.
        about_network = {field.name for field in fields(NetworkOptions)} - {"features", "protocol"}
        others = [
            key
            for key, value in vars(args).items()
            if value and value != parser.get_default(key) and key not in about_network | {"selfcheck"}
        ]
        if others:
            parser.error(
                f"--selfcheck evaluates the published pair under adm; it does not go with {', '.join(others)}"
            )
        return selfcheck(args)
    if not args.reference or not (args.samples or args.compare):
        parser.error("give a REFERENCE and at least one set of SAMPLES")
    check_flags(args)
    network = network_of(args)
    opened = open_all(args, network)
    reference = Reference(measure_with(args, network, opened[None]), args.seed)
    results, compared = evaluate_all(args, network, reference, opened)
    comparison = compare_two(args, reference, *compared) if compared else None
    write_outputs(args, opened, reference, results, comparison)


def make_parser():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "reference",
        nargs="?",
        metavar="REFERENCE",
        help="a published reference npz, statistics, or real images",
    )
    parser.add_argument("samples", nargs="*", metavar="SAMPLES", help="sets of generated images")
    add_network_flags(parser)
    parser.add_argument(
        "--precision_recall_dtype",
        choices=["float16", "float32"],
        default="float32",
        help="float16 is guided-diffusion's",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="an error bar of FID from N resamples"
    )
    parser.add_switch("--fid_infinity", help="extrapolate FID to infinitely many images")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="say whether two sets differ beyond the noise; 200 resamples",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="numbers and where they come from; - is stdout, and the table then goes to stderr",
    )
    parser.add_argument("--report", metavar="DIR", help="write a Markdown page with pictures there")
    parser.add_switch("--skip_unreadable", help="skip and count damaged pictures")
    parser.add_switch("--allow_resolution", help="allow a reference of another resolution")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the reference's subset, the resamples and the grids"
    )
    parser.add_switch(
        "--selfcheck", help="evaluate the published pair and compare with the published figures"
    )
    return parser


def check_flags(args):
    """Raise ValueError for what would only fail after the extraction."""
    if args.bootstrap < 0 or args.bootstrap == 1:
        raise ValueError(f"--bootstrap {args.bootstrap}: an error bar needs at least 2 resamples, 0 is none")
    if not 0 <= args.seed < 2**32 - 1:
        raise ValueError(f"--seed {args.seed} must be between 0 and {2**32 - 2}")
    if args.compare and len({Path(path).resolve() for path in args.compare}) == 1:
        raise ValueError(f"--compare {args.compare[0]} with itself; give two sets")
    if args.json and args.json != "-" and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder; create it first")
    if args.report:
        require_matplotlib()
    for flag in ("report", "cache"):
        if getattr(args, flag) and Path(getattr(args, flag)).is_file():
            raise ValueError(f"--{flag} {getattr(args, flag)} is a file; give a folder")
    if args.json and Path(args.json).is_dir():
        raise ValueError(f"--json {args.json} is a folder; give a file")


def open_all(args, network):
    """{path: OpenedSet}, the reference's under None; what can be known to be wrong without a feature is
    refused here.
    """
    paths = {Path(path).resolve(): Path(path) for path in [*args.samples, *(args.compare or ())]}
    if len({Path(path).resolve() for path in args.samples}) < len(args.samples):
        raise ValueError("a set of samples is given twice; give each once")
    opened = {None: open_set(args.reference, network, skip_unreadable=args.skip_unreadable)}
    for path, name in names_of(list(paths)).items():
        opened[path] = open_set(paths[path], network, skip_unreadable=args.skip_unreadable, name=name)
        require_comparable(opened[None], opened[path], network, args.allow_resolution)
    for path in args.compare or ():
        require_images_only(opened[Path(path).resolve()])
    return opened


def names_of(paths):
    """{path: the shortest end of it that tells it from the others}."""
    names = {}
    for path in paths:
        ends = ["/".join(path.parts[-depth:]) for depth in range(1, len(path.parts) + 1)]
        others = Counter(
            "/".join(other.parts[-depth:]) for other in paths for depth in range(1, len(other.parts) + 1)
        )
        names[path] = next(end for end in ends if others[end] == 1)
    return names


def measure_with(args, network, opened):
    return measure(opened, network, batch_size=args.batch_size, cache=args.cache)


def evaluate_all(args, network, reference, opened):
    """The results of all sets, and the two measured sets to compare; the features of the others are not
    kept.
    """
    dtype, resolution = args.precision_recall_dtype, args.allow_resolution
    options = Options(args.bootstrap, args.fid_infinity, dtype, resolution, args.seed, progress=True)
    wanted = [Path(path).resolve() for path in args.compare or ()]
    results, kept = [], {}
    for path, samples in opened.items():
        if path is not None:
            measured = measure_with(args, network, samples)
            results.append(evaluate(reference, measured, options))
            if path in wanted:
                kept[path] = measured
    return results, [kept[path] for path in wanted]


def compare_two(args, reference, a, b):
    """What is said and written about the difference of two sets."""
    repeats = args.bootstrap or COMPARE_RESAMPLES
    difference = compare(reference, a, b, repeats, args.seed, progress=True)
    label = metric_label("fid", a.provenance["features"])
    if difference.excludes_zero:
        nearer, farther = (a, b) if difference.value < 0 else (b, a)
        verdict = f"{nearer.name} is nearer to the reference than {farther.name} beyond the noise"
    else:
        verdict = f"{a.name} and {b.name} do not differ beyond the noise"
    count = min(a.count, b.count)
    interval = f"{difference.low:.4g} to {difference.high:.4g}, {repeats} resamples, {count} images of each"
    verdict += (
        f": {label} of {a.name} minus that of {b.name} is {difference.value:.4g} (95% interval {interval})"
    )
    return {
        "metric": label,
        "a": a.name,
        "b": b.name,
        "resamples": repeats,
        "difference": asdict(difference),
        "verdict": verdict,
    }


def write_outputs(args, opened, reference, results, comparison):
    """The files first: whatever is wrong with the terminal or the pipe behind stdout, they are there."""
    content = to_json(results, reference.notes, comparison)
    if args.json and args.json != "-":
        write_json(args.json, content)
    if args.report:
        sets = [samples for path, samples in opened.items() if path is not None and samples.images]
        grids = {samples.name: pick_images(samples.images, GRID_IMAGES, args.seed) for samples in sets}
        page = write_report(args.report, results, grids, reference.notes, comparison)
    verdict = ["", comparison["verdict"]] if comparison else []
    text = [table(results), *(f"note: reference: {note}" for note in reference.notes), *verdict]
    print_result("\n".join(text), to_stderr=args.json == "-")
    if args.json == "-":
        print_result(json.dumps(content, indent=2))
    if args.report:
        print_result(f"report: {page}", to_stderr=True)


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
    reference, samples = (measure_with(args, network, open_set(path, network)) for path in paths[:2])
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


if __name__ == "__main__":
    run_main(main)

"""Evaluate sets of images against a reference: FID, sFID, Inception Score, precision, recall, density,
coverage, KID, MIND, clipped density and coverage; CMMD by CLIP; memorisation; accuracy by a judge.

    python scripts/evaluate.py pretrained_models/VIRTUAL_imagenet128_labeled.npz results/resnet101 \\
        results/resnet50 --report results/report
    python scripts/evaluate.py real.npz a.npz b.npz --features digits --bootstrap 200 --compare a.npz b.npz
    python scripts/evaluate.py held_out.npz a.npz --features inception,dinov2 --against train.npz

A set is an npz, a folder or a zip of images, an output folder of this project, or an npz with statistics. The
table goes to stdout, the rest to stderr. --features takes several networks, with commas between them. Numbers
of another --protocol or --features must not be compared; distances by another network than Inception's are
called FD(NAME), never FID.
"""

import json
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
from judging import Judge
from network_flags import add_network_flags, networks_of
from published_pair import selfcheck

from evaluation.accuracy import summary
from evaluation.evaluator import evaluate
from evaluation.metrics import metric_label
from evaluation.networks import NetworkOptions
from evaluation.reference import Reference, require_images
from evaluation.report import require_matplotlib, to_json, write_report
from evaluation.resampling import Options, compare
from evaluation.sets import measure, open_set, require_comparable, require_images_only
from evaluation.tables import by_network, table
from guided_diffusion.dist_util import choose_device
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.files.image_sets import pick_images
from guided_diffusion.flags.parser import Parser, run_main

COMPARE_RESAMPLES = 200
GRID_IMAGES = 64
NUM_CLASSES = 1000


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
    networks = networks_of(args)
    if len(networks) > 1 and args.compare:
        raise ValueError(f"--compare takes one network, not --features {args.features}; give one of them")
    # Whatever is wrong with a set is said before the first network sees an image.
    opened = [open_all(args, network) for network in networks]
    judged = judge_all(args, opened[0])
    results, notes, comparison = [], [], None
    for network, sets in zip(networks, opened, strict=True):
        measured = [measure_with(args, network, each) for each in (sets[None], *against_of(sets))]
        reference = Reference(measured[0], args.seed, *measured[1:])
        rows, compared = evaluate_all(args, network, reference, sets)
        results += [replace(row, judgement=judged.get(row.name)) for row in rows]
        notes += [note for note in reference.notes if note not in notes]
        comparison = compare_two(args, reference, *compared) if compared else None
    write_outputs(args, opened[0], results, notes, comparison)


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
        "--against",
        metavar="TRAIN",
        help="training images: are samples nearer to them than the reference's, held-out ones?",
    )
    parser.add_argument("--judge", metavar="NAME", help="a classifier that is asked for the samples' classes")
    parser.add_argument("--judge_weights", metavar="FILE", help="by default those in pretrained_models/")
    parser.add_argument("--num_classes", type=int, default=NUM_CLASSES, help="of the judge")
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
    if not args.judge and (args.judge_weights or args.num_classes != NUM_CLASSES):
        raise ValueError("--judge_weights and --num_classes are of the judge: name it by --judge")
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
    if args.against:
        opened["against"] = open_set(args.against, network, skip_unreadable=args.skip_unreadable)
        require_images(opened[None], opened["against"])
        require_comparable(opened[None], opened["against"], network, args.allow_resolution)
    return opened


def against_of(opened):
    """The training images, if they are given: at most one set."""
    return [opened["against"]] if "against" in opened else []


def samples_of(opened):
    """The sets of samples, by their paths."""
    return {path: samples for path, samples in opened.items() if path not in (None, "against")}


def judge_all(args, opened):
    """What the judge, if there is one, says of each set of samples, by the set's name."""
    if not args.judge:
        return {}
    sets = list(samples_of(opened).values())
    if without := [samples.name for samples in sets if samples.images is None]:
        raise ValueError(f"--judge looks at images; {without[0]} holds statistics, give its images instead")
    size, device = sets[0].resolution[0], choose_device(args.device)
    judge = Judge(args.judge, args.judge_weights, args.num_classes, size, device)
    labels = [judge.labels(samples.images) for samples in sets]
    return {each.name: judge(each.images, wanted) for each, wanted in zip(sets, labels, strict=True)}


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
    for path, samples in samples_of(opened).items():
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


def write_outputs(args, opened, results, notes, comparison):
    """The files first: whatever is wrong with the terminal or the pipe behind stdout, they are there."""
    content = to_json(results, notes, comparison)
    if args.json and args.json != "-":
        write_json(args.json, content)
    if args.report:
        sets = [samples for samples in samples_of(opened).values() if samples.images]
        grids = {samples.name: pick_images(samples.images, GRID_IMAGES, args.seed) for samples in sets}
        nearest = nearest_pictures(opened, results)
        page = write_report(args.report, results, grids, notes, comparison, nearest)
    groups = by_network(results)
    text = "\n\n".join(map(table, groups)).splitlines() + [f"note: reference: {note}" for note in notes]
    text += [summary(row.name, row.judgement) for row in groups[0] if row.judgement]
    text += ["", comparison["verdict"]] if comparison else []
    print_result("\n".join(text), to_stderr=args.json == "-")
    if args.json == "-":
        print_result(json.dumps(content, indent=2))
    if args.report:
        print_result(f"report: {page}", to_stderr=True)


def nearest_pictures(opened, results):
    """{title: [samples, the training images nearest to them]}, where the two can be shown together."""
    sets = {samples.name: samples.images for samples in samples_of(opened).values()}
    train = next((each.images for each in against_of(opened)), None)
    pictures = {}
    for row in results:
        if not row.nearest_pairs:
            continue
        images, counts = sets[row.name], (row.count, row.reference["against"]["count"])
        # Where pictures were skipped, a feature's place is not its picture's.
        if counts == (images.entries, train.entries) and images.resolution == train.resolution:
            samples, which, _ = zip(*row.nearest_pairs, strict=True)
            title = f"{row.name} ({row.samples['features']})"
            pictures[title] = [pick_each(images, samples), pick_each(train, which)]
    return pictures


def pick_each(images, indices):
    """(n, H, W, 3): the images at these places, in any order, repeated ones repeated."""
    places, inverse = np.unique(indices, return_inverse=True)
    return images.pick(places)[inverse]


if __name__ == "__main__":
    run_main(main)

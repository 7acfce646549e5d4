"""Sample a preset with and without guidance, on the class-conditional and on the unconditional network, and
compare what comes out.

    python scripts/compare_guidance.py --preset digits --seeds 0-2 --out results/digits

Every flag that is not listed here is one of scripts/classifier_sample.py; each row of the tables is a run.
The first table is by a judge, a classifier of another architecture and seed than the guide. The second is by
the features of a third network, against the digits that the networks learned from; its last row, digits that
no network has seen, is what a perfect generator would get. Writes comparison.json and comparison.png beside
the runs.
"""

import sys
from pathlib import Path

import _beside  # noqa: F401
import comparison
from comparison import (
    cells,
    distinct_numbers,
    draw_rows,
    require_one_process,
    summaries,
    with_error,
)
from problems import METRICS, PROBLEMS, SMALLEST, Quality, hold_out, require_other_judge

import classifiers
from classifiers import load_classifier
from evaluation.metrics import metric_key, metric_label
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.files.run_folder import read_run, read_samples
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import given_flags
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import adm
from guided_diffusion.runs.job import run

DIGITS = PROBLEMS["digits"]
NETWORKS = {"class-conditional": False, "unconditional": True}
GUIDANCE = {"unguided": {"classifier_scale": 0.0}, "guided": {}}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", default="digits", help="a preset whose network has a null class")
    parser.add_argument(
        "--judge", default="digits_judge", help="the classifier that counts hits; it must not be the guide"
    )
    parser.add_argument("--seeds", default="0", help="one comparison per seed, for example 0-2")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    args, rest = parser.parse_known_args()
    require_one_process()
    seeds = distinct_numbers(args.seeds, "--seeds")
    given = given_flags(ADMFlags, None, PRESETS, ["--preset", args.preset, *rest])
    require_null_class(args.preset)
    require_other_judge(args.judge, given, PRESETS[args.preset])
    folder = args.out or Path("results", args.preset)
    keys = [(seed, network, mode) for seed in seeds for network in NETWORKS for mode in GUIDANCE]
    runs = {}
    for (seed, *key), config in cells(
        ADMFlags, PRESETS, given, {key: fixed(folder, *key) for key in keys}
    ).items():
        print(f"{', '.join(key)}, seed {seed}", file=sys.stderr)
        run(adm.make_job(config, classifiers))
        runs.setdefault(tuple(key), []).append(config.folder)
    judged = summaries(runs, ("network", "guidance"), lambda out: judge(out, args.judge))
    measured = measure_all(runs, seeds)
    write_json(folder / "comparison.json", {"judge": judged, "features": measured})
    pictured = {"\n".join(key): outs[0] for key, outs in runs.items()}
    draw_rows(folder / "comparison.png", pictured)
    lines = ["", *judgement(judged), *(["", *quality(measured)] if measured else [])]
    print_result("\n".join([*lines, f"pictures from the same noise: {folder / 'comparison.png'}"]))


def fixed(folder, seed, network, mode):
    """What one run is told, whatever the user writes."""
    out = str(folder / f"seed{seed}" / f"{network}-{mode}")
    own = {"unconditional": NETWORKS[network], "seed": seed, "out": out, "dry_run": False}
    return {**GUIDANCE[mode], **own}


def require_null_class(preset):
    """Raise ValueError for a preset whose network cannot sample unconditionally."""
    usable = [name for name, values in PRESETS.items() if values.get("null_class")]
    if preset not in usable:
        raise ValueError(
            f"--preset {preset} has no network with a null class, to sample unconditionally; "
            f"choose {', '.join(usable)}"
        )


def judge(folder, name):
    """What the judge and the clock say of one run."""
    run = read_run(folder)
    images, _ = read_samples(folder)
    classifier = load_classifier(name, num_classes=run["settings"]["num_classes"], image_size=images.shape[1])
    totals = run["totals"]
    return {
        **comparison.judge(folder, classifier),
        "seconds_per_image": totals["seconds"] / len(images),
        "guidance_share": totals["guidance_seconds"] / totals["seconds"],
    }


def measure_all(runs, seeds):
    """The rows of the second table, the held-out digits last; none where the runs are too small for its
    metrics.
    """
    outs = runs["unconditional", "unguided"]
    count = len(read_samples(outs[0])[1])
    if count < SMALLEST:
        print(
            f"no table of {DIGITS.distance_label}: {count} images, it takes {SMALLEST}",
            file=sys.stderr,
        )
        return []
    real = [hold_out(DIGITS, out.parent, count, seed) for out, seed in zip(outs, seeds, strict=True)]
    return summaries({**runs, ("real", ""): real}, ("network", "guidance"), Quality(DIGITS))


def judgement(rows):
    """The lines of the first table."""
    lines = [
        f"{'network':<18} {'guidance':<9} {'wanted class':>15} {'log-probability':>16} "
        f"{'s per image':>12} {'guidance time':>14}"
    ]
    for row in rows:
        seconds, share = row["seconds_per_image"]["mean"], row["guidance_share"]["mean"]
        judged = f"{with_error(row['hit'], '.1%'):>15} {with_error(row['log_prob'], '.2f'):>16}"
        lines.append(f"{row['network']:<18} {row['guidance']:<9} {judged} {seconds:>12.4f} {share:>14.0%}")
    return lines


def quality(rows):
    """The lines of the second table."""
    labels = [metric_label(metric, DIGITS.name) for metric in METRICS]
    head = " ".join(f"{label:>15}" for label in labels)
    lines = [f"{'network':<18} {'guidance':<9} {'images':>6} {head}"]
    for row in rows:
        distance, *others = (row[metric_key(metric, DIGITS.name)] for metric in METRICS)
        # Of one run, the spread of its resamples stands in for that of the seeds.
        std = row["resampled_std"]["mean"] if distance["std"] is None else distance["std"]
        cells = [with_error({**distance, "std": std}, ".2f"), *(with_error(cell, ".3f") for cell in others)]
        numbers = " ".join(f"{cell:>15}" for cell in cells)
        lines.append(f"{row['network']:<18} {row['guidance']:<9} {row['images']['mean']:>6.0f} {numbers}")
    one = len(rows[0]["images"]["runs"]) == 1
    lines.append(f"± is the standard deviation over {'resamples of the images' if one else 'the seeds'}")
    return lines


if __name__ == "__main__":
    run_main(main, resumable=True)

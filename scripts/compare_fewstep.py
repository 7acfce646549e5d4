"""Sample the digits by the paper's recipe and by few steps of ours, from the same noise, and compare what
comes out and what it costs.

    python scripts/compare_fewstep.py --preset digits-fewstep --seeds 0-2 --out results/digits-fewstep

Every flag that is not listed here is one of scripts/classifier_sample.py, and goes to the rows in which it
means something; sampler, steps and scale are the rows' own. Each row is a run of its own. Evaluations of the
network, passes of the classifier and seconds are per image. The judge is a classifier of another architecture
and seed than the guide; the distance is by the features of a third network. Writes comparison.json and
comparison.png beside the runs.
"""

import sys
from pathlib import Path

import _beside  # noqa: F401
import comparison
from comparison import (
    FEATURES,
    DigitsQuality,
    cells,
    cost,
    distinct_numbers,
    require_one_process,
    require_other_judge,
    summaries,
    with_error,
)

import classifiers
from classifiers import load_classifier
from evaluation.metrics import metric_key, metric_label
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import given_flags
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import adm
from guided_diffusion.runs.job import run

# Of the class-conditional network; the recipe at its best scale there (docs/few-steps.md).
_RECIPE = {"preset": "digits", "sampler": "ddpm", "classifier_scale": 1.0}
_FEW = {"preset": "digits-fewstep", "sampler": "dpmpp_2m_sde", "classifier_scale": 2.0}
ROWS = {
    "unguided, 25 steps": {**_RECIPE, "steps": 25, "classifier_scale": 0.0},
    "the paper's recipe, 250 steps": {**_RECIPE, "steps": 250},
    "the paper's recipe, 25 steps": {**_RECIPE, "steps": 25},
    "few steps, 10": {**_FEW, "steps": 10},
    "few steps, 5": {**_FEW, "steps": 5},
}
DISTANCE = metric_key("fid", FEATURES)
COLUMNS = {
    "evaluations": ("evaluations", ".0f"),
    "classifier_passes": ("classifier passes", ".0f"),
    "seconds_per_image": ("s per image", ".3f"),
    "hit": ("wanted class", ".1%"),
    DISTANCE: (metric_label("fid", FEATURES), ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--preset", choices=["digits-fewstep"], default="digits-fewstep", help="of our rows")
    parser.add_argument("--judge", default="digits_judge", help="the classifier that counts hits")
    parser.add_argument("--seeds", default="0", help="one comparison per seed, for example 0-2")
    parser.add_argument("--num_samples", type=int, default=100, help="images of each row and seed")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    args, rest = parser.parse_known_args()
    require_one_process()
    seeds = distinct_numbers(args.seeds, "--seeds")
    if args.num_samples < comparison.SMALLEST:
        raise ValueError(f"--num_samples must be at least {comparison.SMALLEST}, got {args.num_samples}")
    given = given_flags(ADMFlags, None, PRESETS, rest)
    require_other_judge(args.judge, given, PRESETS[args.preset])
    classifier = load_classifier(args.judge, num_classes=10)
    folder = args.out or Path("results", args.preset)
    wanted = {(seed, name): fixed(folder, seed, name, args.num_samples) for seed in seeds for name in ROWS}
    runs = {}
    for (seed, name), config in cells(ADMFlags, PRESETS, given, wanted).items():
        print(f"{name}, seed {seed}", file=sys.stderr)
        run(adm.make_job(config, classifiers))
        runs.setdefault((name,), []).append(config.folder)
    quality = DigitsQuality()
    rows = summaries(
        runs, ("name",), lambda out: cost(out) | comparison.judge(out, classifier) | quality(out)
    )
    write_json(folder / "comparison.json", rows)
    pictured = {name.replace(", ", "\n"): outs[0] for (name,), outs in runs.items()}
    comparison.draw_rows(folder / "comparison.png", pictured)
    lines = [*table(rows), f"pictures from the same noise: {folder / 'comparison.png'}"]
    print_result("\n".join(lines))


def fixed(folder, seed, name, count):
    """What one run is told, whatever the user writes."""
    out = str(folder / f"seed{seed}" / name.replace(" ", "-").replace(",", "").replace("'", ""))
    return {**ROWS[name], "seed": seed, "num_samples": count, "out": out, "dry_run": False}


def table(rows):
    """The lines of the table."""
    head = " ".join(f"{title:>17}" for title, _ in COLUMNS.values())
    lines = [f"{'':<30} {head}"]
    for row in rows:
        numbers = " ".join(f"{with_error(row[key], form):>17}" for key, (_, form) in COLUMNS.items())
        lines.append(f"{row['name']:<30} {numbers}")
    count = rows[0]["images"]["mean"]
    return [*lines, f"{count:.0f} images in each run: distances of so few are biased, alike in all rows"]


if __name__ == "__main__":
    run_main(main, resumable=True)

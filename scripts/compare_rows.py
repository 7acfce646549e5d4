"""Runs of a small problem in fixed rows, from the same noise: a table of what comes out and what it costs,
and a picture. compare_fewstep.py and others use it; it is no script of its own.
"""

import sys
from pathlib import Path

import _beside  # noqa: F401
from comparison import (
    cells,
    cost,
    distinct_numbers,
    draw_rows,
    judge,
    require_one_process,
    summaries,
    with_error,
)
from problems import SMALLEST, Quality, problem_of, require_other_judge

import classifiers
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.flags.fields import given_flags
from guided_diffusion.flags.parser import Parser
from guided_diffusion.runs.job import run


def compare(description, preset, rows, system):
    """The main of a script. rows: {name: the flags that it fixes}, a comma of the name begins a new line in
    the picture. system: see runs/systems.py; preset: one of its own, for the judge and the folder.
    """
    parser, problem = Parser(description=description), problem_of(preset)
    parser.add_argument("--preset", choices=[preset], default=preset, help="of the rows")
    parser.add_argument("--judge", default=problem.judge, help="the classifier that counts hits")
    parser.add_argument("--seeds", default="0", help="one comparison per seed, for example 0-2")
    parser.add_argument("--num_samples", type=int, default=100, help="images of each row and seed")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    args, rest = parser.parse_known_args()
    require_one_process()
    seeds = distinct_numbers(args.seeds, "--seeds")
    if args.num_samples < SMALLEST:
        raise ValueError(f"--num_samples must be at least {SMALLEST}, got {args.num_samples}")
    given = given_flags(system.config, None, system.presets, rest)
    require_other_judge(args.judge, given, system.presets[preset])
    classifier, folder = problem.load_judge(args.judge), args.out or Path("results", preset)
    fixed = {
        (seed, name): {**values, **own_flags(folder, seed, name, args.num_samples)}
        for seed in seeds
        for name, values in rows.items()
    }
    runs = {}
    for (seed, name), config in cells(system.config, system.presets, given, fixed).items():
        print(f"{name}, seed {seed}", file=sys.stderr)
        run(system.make_job(config, classifiers))
        runs.setdefault((name,), []).append(config.folder)
    quality = Quality(problem)
    table = summaries(runs, ("name",), lambda out: cost(out) | judge(out, classifier) | quality(out))
    write_json(folder / "comparison.json", table)
    picture = folder / "comparison.png"
    draw_rows(picture, {name.replace(", ", "\n"): outs[0] for (name,), outs in runs.items()})
    print_result("\n".join([*lines_of(table, problem), f"pictures from the same noise: {picture}"]))


def own_flags(folder, seed, name, count):
    """What one run is told, whatever the user writes."""
    out = str(folder / f"seed{seed}" / name.replace(" ", "-").replace(",", "").replace("'", ""))
    return {"seed": seed, "num_samples": count, "out": out, "dry_run": False}


def lines_of(table, problem):
    """The lines of the table."""
    columns = {
        "evaluations": ("evaluations", ".0f"),
        "classifier_passes": ("classifier passes", ".0f"),
        "seconds_per_image": ("s per image", ".3f"),
        "hit": ("wanted class", ".1%"),
        problem.distance: (problem.distance_label, ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
    }
    head = " ".join(f"{title:>17}" for title, _ in columns.values())
    lines = [f"{'':<30} {head}"]
    for row in table:
        numbers = " ".join(f"{with_error(row[key], form):>17}" for key, (_, form) in columns.items())
        lines.append(f"{row['name']:<30} {numbers}")
    count = table[0]["images"]["mean"]
    return [*lines, f"{count:.0f} images in each run: distances of so few are biased, alike in all rows"]

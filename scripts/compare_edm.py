"""Sample an EDM preset unguided and under both forms of guidance, over numbers of steps, and compare what
comes out.

    python scripts/compare_edm.py --preset digits-edm --seeds 0-2 --out results/digits-edm

Every flag that is not listed here is one of scripts/edm_sample.py, and goes to the rows in which it means
something; each row is a run of its own. All rows of a seed start from the same noise and want the same
classes. The accuracy is by a judge, a classifier of another architecture and seed than the guide, the other
metrics are by the features of a third network, against the digits that the networks learned from. Writes
comparison.json beside the runs, and, where matplotlib is installed, comparison.png: the metrics over the
number of network evaluations.
"""

import sys
from itertools import product
from pathlib import Path

import _beside  # noqa: F401
from comparison import (
    cells,
    distinct_numbers,
    judge,
    require_one_process,
    summaries,
    with_error,
)
from problems import PROBLEMS, SMALLEST, Quality, hold_out, require_other_judge

import classifiers
from guided_diffusion.files.atomic import write_json
from guided_diffusion.files.console import print_result
from guided_diffusion.files.figures import plain_style, save_figure
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import given_flags
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.flags.presets import EDM_PRESETS
from guided_diffusion.runs import edm
from guided_diffusion.runs.job import run
from guided_diffusion.solvers import STEPS

NETWORKS = {"class-conditional": False, "unconditional": True}
FORMS = {
    "unguided": {"use_classifier": False},
    "released": {"use_classifier": True, "guidance_form": "released"},
    "score": {"use_classifier": True, "guidance_form": "score"},
}
KEY = ("network", "guidance", "steps")
DIGITS = PROBLEMS["digits"]
DISTANCE = DIGITS.distance
CURVES = {
    "hit": "wanted class",
    DISTANCE: DIGITS.distance_label,
    "precision": "precision",
    "recall": "recall",
}


def main():
    parser = create_argparser()
    args, rest = parser.parse_known_args()
    require_one_process()
    steps, seeds = distinct_numbers(args.steps, "--steps"), distinct_numbers(args.seeds, "--seeds")
    given = given_flags(EDMFlags, None, EDM_PRESETS, ["--preset", args.preset, *rest])
    if min(seeds) < 0:
        raise ValueError(f"--seeds must be from 0 on, got {args.seeds}")
    if args.num_samples < SMALLEST:
        raise ValueError(f"--num_samples must be at least {SMALLEST}, got {args.num_samples}")
    require_other_judge(args.judge, given, EDM_PRESETS[args.preset])
    classifier = DIGITS.load_judge(args.judge)
    folder = args.out or Path("results", args.preset)
    keys = [(seed, *key) for seed in seeds for key in product(NETWORKS, FORMS, steps)]
    runs = {}
    configs = cells(EDMFlags, EDM_PRESETS, given, {key: fixed(args, folder, *key) for key in keys})
    for (seed, *key), config in configs.items():
        print(f"{key[0]}, {key[1]}, {key[2]} steps, seed {seed}", file=sys.stderr)
        run(edm.make_job(config, classifiers))
        runs.setdefault(tuple(key), []).append(config.folder)
    rows = measured(runs, folder, seeds, args, classifier)
    write_json(folder / "comparison.json", rows)
    try:
        with plain_style():
            draw(folder / "comparison.png", rows)
    except ValueError as error:
        print(f"no curves: {error}", file=sys.stderr)
    curves = folder / "comparison.png"
    print_result("\n".join([*table(rows, len(seeds)), *([f"curves: {curves}"] if curves.exists() else [])]))


def create_argparser():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--preset",
        choices=["digits-edm"],
        default="digits-edm",
        help="judge and metrics are those of the digits",
    )
    parser.add_argument(
        "--judge", default="digits_judge", help="the classifier that counts hits; it must not be the guide"
    )
    parser.add_argument("--steps", default="5,10,18,36", help="one row for each")
    parser.add_argument("--solver", choices=tuple(STEPS), default="heun", help="of all rows")
    parser.add_argument(
        "--seeds",
        default="0",
        help="the table's: each is a set of images of its own, so 0-2 makes three runs of each row",
    )
    parser.add_argument("--num_samples", type=int, default=200, help="images of each run")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    return parser


def fixed(args, folder, seed, network, form, steps):
    """What one run is told, whatever the user writes."""
    first = seed * args.num_samples
    return {
        **FORMS[form],
        "unconditional": NETWORKS[network],
        "steps": steps,
        "solver": args.solver,
        "format": "npz",
        "seeds": f"{first}-{first + args.num_samples - 1}",
        "out": str(folder / f"seed{seed}" / f"{network}-{form}-{steps}"),
        "dry_run": False,
    }


def measured(runs, folder, seeds, args, classifier):
    """The rows of the table, the held-out digits last."""
    quality = Quality(DIGITS)
    rows = summaries(runs, KEY, lambda out: judge(out, classifier) | quality(out))
    for row in rows:
        row["evaluations"] = row["steps"] if args.solver == "euler" else 2 * row["steps"] - 1
    real = [hold_out(DIGITS, folder / f"seed{seed}", args.num_samples, seed) for seed in seeds]
    return [*rows, *summaries({("real", "", None): real}, KEY, quality)]


def table(rows, seeds):
    """The lines of the table."""
    head = " ".join(f"{label:>15}" for label in CURVES.values())
    lines = [f"{'network':<18} {'guidance':<9} {'steps':>5} {'evaluations':>11} {head}"]
    for row in rows:
        steps = f"{row['steps'] or '':>5} {row.get('evaluations', ''):>11}"
        cells = [with_error(row[key], form_of(key)) if key in row else "" for key in CURVES]
        numbers = " ".join(f"{cell:>15}" for cell in cells)
        lines.append(f"{row['network']:<18} {row['guidance']:<9} {steps} {numbers}")
    spread = f", {seeds} runs each; ± is their standard deviation" if seeds > 1 else ""
    return [*lines, f"{rows[0]['images']['mean']:.0f} images in each run{spread}"]


def form_of(key):
    return {"hit": ".1%", DISTANCE: ".2f"}.get(key, ".3f")


def draw(path, rows):
    """One panel per metric, one curve per network and form, over the number of network evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    *rows, real = rows
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        for network, line in zip(NETWORKS, ("-", "--"), strict=True):
            for form, colour in zip(FORMS, ("tab:gray", "tab:blue", "tab:orange"), strict=True):
                own = [row for row in rows if (row["network"], row["guidance"]) == (network, form)]
                x, y = [row["evaluations"] for row in own], [row[key]["mean"] for row in own]
                error = [row[key]["std"] or 0 for row in own]
                axes.errorbar(
                    x,
                    y,
                    error,
                    fmt=line,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    color=colour,
                    label=f"{network}, {form}",
                )
        if key in real:
            axes.axhline(
                real[key]["mean"], color="black", linewidth=0.8, linestyle=":", label="real digits, unseen"
            )
        axes.set(
            title=label,
            xlabel="network evaluations",
            xscale="log",
            yscale="log" if key == DISTANCE else "linear",
        )
        axes.set_xticks(x, x)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    run_main(main, resumable=True)

"""Sample an EDM preset unguided and under both forms of guidance, over numbers of steps, and compare what
comes out.

    python scripts/compare_edm.py --preset digits-edm --seeds 0-2 --out results/digits-edm

Every flag that is not listed here goes on to scripts/edm_sample.py, which does the sampling, one run per row
of the table. All rows of a seed start from the same noise and want the same classes. The accuracy is by a
judge, a classifier of another architecture and seed than the guide, the other metrics are by the features of
a third network, against the digits that the networks learned from. Writes comparison.json beside the runs,
and, where matplotlib is installed, comparison.png: the metrics over the number of network evaluations.
"""

import importlib.util
import sys
from pathlib import Path

from comparison import FEATURES, SMALLEST, DigitsQuality, hold_out, judge, summaries, with_error

from classifiers.registry import load_classifier
from evaluation.metrics import metric_key, metric_label
from guided_diffusion.edm import SOLVERS
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.flags.parser import Parser, call_script, parse_numbers, run_main
from guided_diffusion.flags.presets import EDM_FORM_FLAGS, EDM_PRESETS

SAMPLE = Path(__file__).with_name("edm_sample.py")
NETWORKS = {"class-conditional": "False", "unconditional": "True"}
# What each form of guidance is told; the flags that this script takes for one form alone go to its rows.
FORMS = {
    "unguided": ["--use_classifier", "False"],
    "released": ["--use_classifier", "True", "--guidance_form", "released"],
    "score": ["--use_classifier", "True", "--guidance_form", "score"],
}
FORM_FLAGS = {"unguided": (), **EDM_FORM_FLAGS}
BOTH_FORMS = (
    *(
        "classifier_type",
        "classifier_path",
        "classifier_input",
        "softplus_beta",
        "joint_temperature",
        "uncond_temperature",
    ),
    *("guidance_interval", "on_nonfinite", "log_guidance"),
)
# What tells the rows apart, or is the same for all of them: --steps, --seeds, --out and these are not for the
# user to pass on.
OWN_FLAGS = ("unconditional", "use_classifier", "guidance_form", "outdir", "format", "subdirs", "dry_run")
KEY = ("network", "guidance", "steps")
DISTANCE = metric_key("fid", FEATURES)
CURVES = {
    "hit": "wanted class",
    DISTANCE: metric_label("fid", FEATURES),
    "precision": "precision",
    "recall": "recall",
}


def main():
    parser = create_argparser()
    args, flags = parser.parse_known_args()
    steps = parse_numbers(args.steps, "--steps")
    seeds = parse_numbers(args.seeds, "--seeds")
    refuse(args, flags, steps, seeds)
    classifier = load_classifier(args.judge, num_classes=10)
    folder = args.out or Path("results", args.preset)
    runs = {(network, form, n): [] for network in NETWORKS for form in FORMS for n in steps}
    for seed in seeds:
        for (network, form, n), outs in runs.items():
            out = folder / f"seed{seed}" / f"{network}-{form}-{n}"
            print(f"{network}, {form}, {n} steps, seed {seed}", file=sys.stderr)
            own = [
                "--preset",
                args.preset,
                "--unconditional",
                NETWORKS[network],
                "--steps",
                str(n),
                "--solver",
                args.solver,
            ]
            images = [
                "--format",
                "npz",
                "--seeds",
                f"{seed * args.num_samples}-{(seed + 1) * args.num_samples - 1}",
            ]
            call_script(
                SAMPLE, [*own, *FORMS[form], *form_flags(args, form), *images, *flags, "--out", str(out)]
            )
            outs.append(out)
    rows = measured(runs, folder, seeds, args, classifier)
    print_table(rows, len(seeds))
    write_json(folder / "comparison.json", rows)
    draw(folder / "comparison.png", rows)


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
    parser.add_argument("--solver", choices=SOLVERS, default="heun", help="of all rows")
    parser.add_argument(
        "--seeds",
        default="0",
        help="the table's: each is a set of images of its own, so 0-2 makes three runs of each row",
    )
    parser.add_argument("--num_samples", type=int, default=200, help="images of each run")
    parser.add_argument("--out", type=Path, help="output folder, by default results/PRESET")
    for form, names in FORM_FLAGS.items():
        for name in names:
            parser.add_argument(f"--{name}", help=f"goes to the rows of the {form} form")
    for name in BOTH_FORMS:
        parser.add_argument(f"--{name}", help="goes to the rows of both forms")
    return parser


def refuse(args, flags, steps, seeds):
    """Raise ValueError for flags that would make two rows the same, and for a judge that cannot be one."""
    for name in OWN_FLAGS:
        if any(flag == f"--{name}" or flag.startswith(f"--{name}=") for flag in flags):
            raise ValueError(f"--{name} is this script's own to give to each row: drop it")
    for name, numbers in (("steps", steps), ("seeds", seeds)):
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"--{name} {getattr(args, name)} names a number twice; each gives one run")
    if min(seeds) < 0:
        raise ValueError(f"--seeds must be from 0 on, got {args.seeds}")
    if args.num_samples < SMALLEST:
        raise ValueError(f"--num_samples must be at least {SMALLEST}, got {args.num_samples}")
    if args.judge == (args.classifier_type or EDM_PRESETS[args.preset]["classifier_type"]):
        raise ValueError(
            f"--judge {args.judge} is the guide itself; choose another classifier, of another architecture"
        )


def form_flags(args, form):
    names = () if form == "unguided" else (*FORM_FLAGS[form], *BOTH_FORMS)
    return [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]


def measured(runs, folder, seeds, args, classifier):
    """The rows of the table, the held-out digits last."""
    quality = DigitsQuality()
    rows = summaries(runs, KEY, lambda out: judge(out, classifier) | quality(out))
    for row in rows:
        row["evaluations"] = row["steps"] if args.solver == "euler" else 2 * row["steps"] - 1
    real = [hold_out(folder / f"seed{seed}", args.num_samples, seed) for seed in seeds]
    return [*rows, *summaries({("real", "", None): real}, KEY, quality)]


def print_table(rows, seeds):
    header = f"{'network':<18} {'guidance':<9} {'steps':>5} {'evaluations':>11} "
    print(header + " ".join(f"{label:>15}" for label in CURVES.values()))
    for row in rows:
        steps = f"{row['steps'] or '':>5} {row.get('evaluations', ''):>11}"
        cells = [with_error(row[key], form_of(key)) if key in row else "" for key in CURVES]
        print(
            f"{row['network']:<18} {row['guidance']:<9} {steps} " + " ".join(f"{cell:>15}" for cell in cells)
        )
    count = f"{rows[0]['images']['mean']:.0f} images"
    print(
        f"{count} in each run" + (f", {seeds} runs each; ± is their standard deviation" if seeds > 1 else "")
    )


def form_of(key):
    return {"hit": ".1%", DISTANCE: ".2f"}.get(key, ".3f")


def draw(path, rows):
    """One panel per metric, one curve per network and form, over the number of network evaluations."""
    if importlib.util.find_spec("matplotlib") is None:
        print('no curves: they are drawn with matplotlib, pip install -e ".[plot]"', file=sys.stderr)
        return
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
    with renamed_when_complete(path) as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"curves: {path}")


if __name__ == "__main__":
    run_main(main, resumable=True)

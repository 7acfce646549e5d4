"""Draw what guidance did over the steps of a run, or of several to be compared.

    python scripts/classifier_sample.py --preset digits --log_guidance True --out results/logged
    python scripts/plot_guidance.py results/logged

Four panels, from noise on the left to the image on the right: the norm of the gradient, the classifier's
confidence in the wanted class, the share of pixels at the end of their range, and that of images whose
gradient was not finite. A line is the mean over the images, the band around it reaches from the lowest batch
to the highest. A run that is not finished is drawn as far as it is.
"""

from collections import defaultdict
from pathlib import Path

import _beside  # noqa: F401
import numpy as np

from guided_diffusion.files.console import print_result
from guided_diffusion.files.figures import plain_style, plain_text, require_matplotlib, save_figure
from guided_diffusion.files.run_folder import finished_files, read_metrics
from guided_diffusion.flags.parser import Parser, run_main

PANELS = {
    "gradient_norm": "gradient norm",
    "confidence": "confidence in the wanted class",
    "clipped": "share of clipped pixels",
    "non_finite": "share of non-finite gradients",
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        type=Path,
        help="output folders of runs with --log_guidance True",
    )
    parser.add_argument("--out", type=Path, help="the picture; by default guidance.png in the first folder")
    args = parser.parse_args()
    require_matplotlib("the plot needs")
    out = args.out or default_out(args.folders[0])
    runs = [read_lines(folder) for folder in args.folders]
    axis = common_axis(args.folders, runs)
    drawn = {name: curves(lines, axis) for name, lines in zip(names(args.folders), runs, strict=True)}
    with plain_style():
        save_figure(draw(drawn, axis), out)
    print_result(str(out))


def default_out(folder):
    if any(path.suffix == ".json" for path in finished_files(folder)):
        raise ValueError(
            f"{folder} holds a PNG for every sample, and guidance.png would count as one: give --out"
        )
    return folder / "guidance.png"


def read_lines(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the output folder of a run")
    lines = list(read_metrics(folder))
    if not lines:
        raise ValueError(
            f"{folder} has no record of its guidance: run with --log_guidance True, into another --out or "
            "with --overwrite True"
        )
    return lines


def common_axis(folders, runs):
    """ "sigma", or "step" under a noisy classifier, which is not told the noise level. Raises ValueError
    where the runs differ in that.
    """
    without = [folder for folder, lines in zip(folders, runs, strict=True) if lines[0]["sigma"] is None]
    if without and len(without) < len(runs):
        raise ValueError(
            f"{without[0]} was guided by a noisy classifier, whose record has no noise levels: "
            "plot it without the others"
        )
    return "step" if without else "sigma"


def names(folders):
    """The folders' own names, or their paths where two have the same."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def curves(lines, axis):
    """The places on the axis, (P,), and for each panel the mean over images, the lowest and the highest batch
    there, (3, P).
    """
    places = defaultdict(list)
    for line in lines:
        places[line[axis]].append(line)
    columns = [[summary(places[place], key) for place in sorted(places)] for key in PANELS]
    return sorted(places), {key: np.array(column).T for key, column in zip(PANELS, columns, strict=True)}


def summary(lines, key):
    """(mean over images, lowest batch, highest batch), NaN where all images were skipped; skipped ones count
    in their own share alone.
    """
    sizes = np.array([stop - start for start, stop in (line["samples"] for line in lines)])
    skipped = np.array([line["non_finite"] for line in lines])
    values, weights = (
        (skipped / sizes, sizes) if key == "non_finite" else ([line[key] for line in lines], sizes - skipped)
    )
    values = np.array(values, dtype=np.float64)  # None, which stands for a mean over no image, becomes NaN
    finite = np.isfinite(values) & (weights > 0)
    if not finite.any():
        return np.nan, np.nan, np.nan
    return np.average(values[finite], weights=weights[finite]), values[finite].min(), values[finite].max()


def draw(runs, axis):
    """A figure with a panel for each of PANELS and a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, (key, title) in zip(panels.flat, PANELS.items(), strict=True):
        for name, (places, values) in runs.items():
            mean, lowest, highest = values[key]
            (line,) = axes.plot(places, mean, marker=".", markersize=4, linewidth=1.2, label=plain_text(name))
            axes.fill_between(places, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=10)
        highest = max(np.nanmax(values[key], initial=0) for _, values in runs.values())
        # Whole ranges for shares, but for those that are hardly seen there, if they are not all zero.
        top = 1 if key in ("confidence", "clipped") or highest == 0 else highest
        axes.set_ylim(-0.03 * top, 1.05 * top)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_xscale("log" if axis == "sigma" else "linear")
    panels[0, 0].invert_xaxis()
    for axes in panels[1]:
        axes.set_xlabel("noise level sigma" if axis == "sigma" else "timestep")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False, fontsize=9
    )
    return figure


if __name__ == "__main__":
    run_main(main)

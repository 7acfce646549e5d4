"""Draw the numbers of sweeps against each other, one curve for each line of their files.

    python scripts/plot_sweep.py results/solvers --x evaluations --y fd_digits,precision,recall
    python scripts/plot_sweep.py results/scales --x recall --y precision

A name such as "EDM, labels / dpmpp_2m" is the curve dpmpp_2m in the row of panels "EDM, labels"; there is a
panel in that row for each number of --y. A curve goes through its cells in the order of the file. A point is
the mean over the seeds, its bars are their standard deviation. Where recall is drawn against the distance or
precision, rings mark the Pareto front of each row of panels.
"""

import json
from pathlib import Path

import _beside  # noqa: F401
from problems import PROBLEMS
from sweep import numbers_of
from sweep_statistics import HIGHER_IS_BETTER, is_distance, on_front, panel_of

from guided_diffusion.files.console import print_result
from guided_diffusion.files.figures import plain_style, plain_text, require_matplotlib, save_figure
from guided_diffusion.flags.parser import Parser, run_main

NUMBERS = {key: number for problem in PROBLEMS.values() for key, number in numbers_of(problem).items()}
LOGARITHMIC = {"evaluations", *(problem.distance for problem in PROBLEMS.values())}
MARKERS = "os^Dv<>P"  # one for every ten curves: there are ten colours


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of scripts/sweep.py")
    parser.add_argument("--x", choices=tuple(NUMBERS), default="evaluations", help="the horizontal axis")
    parser.add_argument(
        "--y", help="the vertical axes, a panel each; by default the distance, precision and recall"
    )
    parser.add_argument("--out", type=Path, help="the picture; by default sweep.png in the first folder")
    args = parser.parse_args()
    require_matplotlib("the plot needs")
    rows = [row for folder in args.folders for row in finished(folder)]
    columns = columns_of(args.y, rows)
    out = args.out or args.folders[0] / "sweep.png"
    with plain_style():
        save_figure(draw(curves(rows), args.x, columns), out, dpi=110)
    print_result(str(out))


def finished(folder):
    """The table of a sweep, its rows in the order of the file of cells."""
    if not (folder / "table.json").is_file():
        raise FileNotFoundError(f"{folder} has no table.json: give the --out of a finished scripts/sweep.py")
    return json.loads((folder / "table.json").read_text())


def columns_of(text, rows):
    """The keys of the panels. Raises ValueError for one that the rows do not have."""
    known = [key for key in NUMBERS if all(key in row for row in rows)]
    if text is None:
        return [key for key in known if is_distance(key)] + ["precision", "recall"]
    for key in (keys := text.split(",")):
        if key not in known:
            raise ValueError(f"--y {text}: {key!r} is not a number of this sweep; choose {', '.join(known)}")
    return keys


def curves(rows):
    """{row of panels: {curve: its cells}}."""
    panels = {}
    for row in rows:
        panel, curve = panel_of(row["name"])
        panels.setdefault(panel, {}).setdefault(curve, []).append(row)
    return panels


def draw(panels, x, columns):
    """A figure: a row of panels for each of `panels`, a column for each of `columns`."""
    from matplotlib.figure import Figure

    height = max(2.9, *(0.25 * len(lines) + 0.5 for lines in panels.values()))  # a legend's place too
    figure = Figure(figsize=(3.8 * len(columns) + 2.4, height * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), len(columns), squeeze=False)
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    styles = {
        name: {"color": f"C{i % 10}", "marker": MARKERS[i // 10 % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    for axes_of_row, (panel, lines) in zip(grid, panels.items(), strict=True):
        for axes, y in zip(axes_of_row, columns, strict=True):
            handles = [curve(axes, cells, x, y, styles[name]) for name, cells in lines.items()]
            ring_front(axes, [cell for cells in lines.values() for cell in cells], x, y)
            axes.set(title=plain_text(panel), xlabel=NUMBERS[x][0], ylabel=NUMBERS[y][0])
            axes.grid(alpha=0.3)
            for side, key in (("x", x), ("y", y)):
                if key in LOGARITHMIC:
                    logarithmic(axes, side, [cell[key]["mean"] for cells in lines.values() for cell in cells])
        labels = [plain_text(name) for name in lines]
        axes_of_row[-1].legend(handles, labels, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    return figure


def logarithmic(axes, side, places):
    """A logarithmic axis whose ticks are plain numbers: those of the points, where they are few and whole."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axes, f"set_{side}scale")("log")
    axis = getattr(axes, f"{side}axis")
    if all(place == round(place) for place in places):
        axes.set_xticks(spaced(sorted(set(places))))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
    axis.set_minor_locator(NullLocator())


def curve(axes, cells, x, y, style):
    """One curve with its error bars; cells of one place are a point."""
    places, heights = ([cell[key]["mean"] for cell in cells] for key in (x, y))
    bars = [[cell[key]["std"] or 0 for cell in cells] for key in (x, y)]
    return axes.errorbar(places, heights, bars[1], bars[0], markersize=4, linewidth=1.2, capsize=2, **style)


def ring_front(axes, cells, x, y):
    """Rings around the cells on the Pareto front, where the axes are those of one."""
    if "recall" not in (x, y) or not all(is_distance(key) or key in HIGHER_IS_BETTER for key in (x, y)):
        return
    best = [cell for cell, best in zip(cells, on_front(cells, x, y), strict=True) if best]
    places, heights = ([cell[key]["mean"] for cell in best] for key in (x, y))
    axes.plot(places, heights, "o", markersize=11, markerfacecolor="none", markeredgecolor="0.3")


def spaced(ticks):
    """Those of the ticks that have room for their numbers on a logarithmic axis."""
    kept, room = ticks[:1], max(1.15, (ticks[-1] / ticks[0]) ** (1 / 18))
    for tick in ticks[1:]:
        if tick >= room * kept[-1]:
            kept.append(tick)
    return kept


if __name__ == "__main__":
    run_main(main)

"""The figure of scripts/calibrate.py. It is no script of its own.

Above: accuracy, ECE with its noise floor, and negative log-likelihood over the noise levels, a colour for
each beta, at the recommended temperature. Below: reliability diagrams of the recommended setting at three
levels, the number of images in each bin at its foot, a row for each input.
"""

import numpy as np
from calibration_choice import SHOWN, name_of

from guided_diffusion.files.figures import plain_text

PANELS = {"accuracy": "accuracy", "ece": "ECE", "nll": "negative log-likelihood"}
STYLES = {"x0": "-", "x_t": "--"}


def draw(cells, choice, levels):
    """The figure; needs matplotlib."""
    from matplotlib.figure import Figure

    inputs = list(dict.fromkeys(cell.shown for cell in cells))
    figure = Figure(figsize=(12, 3.8 + 2.6 * len(inputs)), layout="constrained")
    grid = figure.subplots(1 + len(inputs), 3, squeeze=False)
    for axes, (number, title) in zip(grid[0], PANELS.items(), strict=True):
        curves(axes, [cell for cell in cells if cell.tau == choice.cell.tau], choice, number)
        axes.set(title=f"{title}, tau1 {choice.cell.tau:g}", xlabel="timestep")
        if number == "nll":
            axes.set_yscale("log")
    figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    like_chosen = [c for c in cells if (c.beta, c.tau) == (choice.cell.beta, choice.cell.tau)]
    for row, cell in zip(grid[1:], like_chosen, strict=True):
        for axes, place in zip(row, at_quarters(len(levels)), strict=True):
            diagram(axes, cell.levels[place]["reliability"])
            title = f"{SHOWN[cell.shown]}, sigma {levels[place][1]:.3g} (t {levels[place][0]})"
            axes.set(title=title, xlabel="confidence", ylabel="accuracy")
        row[0].annotate(name_of(cell), (0.03, 0.93), xycoords="axes fraction", fontsize=8)
    return figure


def at_quarters(count):
    """Three levels: a quarter, a half and three quarters of the way."""
    return [round(share * (count - 1)) for share in (0.25, 0.5, 0.75)]


def curves(axes, cells, choice, number):
    """A number over t, noise on the left; the noise floor is that of the recommended setting."""
    betas = list(dict.fromkeys(cell.beta for cell in cells))
    for cell in cells:
        places, heights = ([level[key] for level in cell.levels] for key in ("t", number))
        smoothed = "" if cell.beta is None else f", beta {cell.beta:g}"
        style = {"linestyle": STYLES[cell.shown], "color": f"C{betas.index(cell.beta)}", "linewidth": 1.4}
        axes.plot(places, heights, label=plain_text(SHOWN[cell.shown] + smoothed), **style)
    if number == "ece":
        floor = [level["noise_floor"] for level in choice.cell.levels]
        axes.plot(places, floor, color="0.4", linestyle=":", label="noise floor")
    axes.invert_xaxis()
    axes.grid(color="0.9")


def diagram(axes, reliability):
    """Accuracy over confidence in bins, beside the diagonal of a calibrated classifier."""
    accuracy, counts = (np.array(reliability[name], dtype=float) for name in ("accuracy", "counts"))
    width = 1 / len(counts)
    middles = (np.arange(len(counts)) + 0.5) * width
    axes.bar(middles, accuracy, width, color="C0", alpha=0.5, edgecolor="white")
    axes.plot([0, 1], [0, 1], color="0.3", linewidth=1)
    confidence = np.array(reliability["confidence"], dtype=float)
    axes.plot(confidence, accuracy, color="C0", marker="o", markersize=3, linestyle="none")
    for middle, count in zip(middles, counts, strict=True):
        if count:
            axes.text(middle, 0.01, f"{count:.0f}", rotation=90, ha="center", va="bottom", fontsize=6)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))

"""Pictures of what was measured: a bar for every number, and precision against recall."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluation.evaluator import Result
from evaluation.metrics import BY_KEY, METRICS, metric_label, rounded
from evaluation.tables import differ
from guided_diffusion.files.figures import plain_style, plain_text, save_figure

WARNING = "DIFFERENT PROTOCOLS OR REFERENCES: not comparable"
LONGEST_NAME = 40
MARKERS = "osD^vPX*<>"


def draw_plane(path: str | Path, results: Sequence[Result]) -> None:
    """Precision against recall, a point per set that has them."""
    with plain_style():
        save_figure(_plane(results), path, bbox_inches="tight")


def draw_bars(path: str | Path, results: Sequence[Result]) -> None:
    """A panel per number, a bar per set; the sets are named on the left."""
    with plain_style():
        save_figure(_bars(results), path, bbox_inches="tight")


def _plane(results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, result in enumerate(results):
        if result.metrics["precision"] is None:
            continue
        # Hollow, so that sets at the same place all show.
        look = {"color": f"C{index % 10}", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2}
        place = result.metrics["recall"], result.metrics["precision"]
        marker, name = MARKERS[index % len(MARKERS)], _legend(result, results)
        axes.plot(*place, marker, label=name, clip_on=False, zorder=3, **look)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    if differ(results):
        axes.set_title(WARNING, color="C3", fontsize=9)
    return figure


def _bars(results):
    from matplotlib.figure import Figure

    labels = {}
    for metric in METRICS:
        for result in results:
            if result.metrics[metric.key] is not None:
                label = metric_label(metric.key, result.samples["features"])
                labels.setdefault((metric.key, label), []).append(result)
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(2.5 + 2.4 * columns, rows * (0.9 + 0.34 * len(results))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    for axes, ((key, label), measured) in zip(panels, labels.items(), strict=False):
        _draw_panel(axes, key, label, measured, results)
    if differ(results):
        figure.suptitle(WARNING, color="C3", fontsize=11)
    return figure


def _draw_panel(axes, key, label, measured, results):
    values = [result.metrics[key] for result in measured]
    places = [results.index(result) for result in measured]
    errors = [_half_interval(result) if key == "fid" else math.nan for result in measured]
    if np.isfinite(errors).any():
        label += " (95% interval)"
    colours = [f"C{place % 10}" for place in places]
    axes.barh(places, values, xerr=errors, color=colours, capsize=3, height=0.7)
    # From where to where bars and whiskers go: fmin and fmax pass over the whiskers that are not there, NaN.
    starts = np.fmin(np.fmin(0, values), np.subtract(values, errors))
    ends = np.fmax(np.fmax(0, values), np.add(values, errors))
    beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(rounded(key, value), (end, place), **beside)
    start, end = starts.min(), 1 if BY_KEY[key].share else max(ends.max(), 1e-9)
    axes.set_xlim(start - 0.1 * (end - start) * (start < 0), end + 0.5 * (end - start))
    axes.set_xticks([0, 0.5, 1]) if BY_KEY[key].share else axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(range(len(results)), [_legend(result, results) for result in results], fontsize=9)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_title(label, fontsize=10)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _half_interval(result):
    """NaN, for which no whisker is drawn, where there is no interval."""
    return result.fid_error.high - result.fid_error.value if result.fid_error else math.nan


def _legend(result, results):
    """The set's name, long ones shortened in the middle, with its protocol where not all have the same."""
    name = result.name
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"
    about = f"\n{result.samples['protocol']} on {result.reference['images']}" if differ(results) else ""
    return plain_text(name + about)

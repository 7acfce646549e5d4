"""What was measured, for people and for programs: a text table, JSON, and a Markdown page with pictures.

Results of different protocols or references are not comparable. Where they meet, a warning stands above them,
and each row says its own.
"""

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.evaluator import METRICS, Result, metric_key, metric_label
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.grid import save_grid

WARNING = "WARNING: DIFFERENT PROTOCOLS OR REFERENCES: NUMBERS OF TWO ROWS MUST NOT BE COMPARED UNLESS THEIR LAST COLUMNS AGREE"
PICTURE_WARNING = "DIFFERENT PROTOCOLS OR REFERENCES: not comparable"
DECIMALS = {"kid": 5, "precision": 4, "recall": 4, "density": 4, "coverage": 4}
UNIT_METRICS = ("precision", "recall", "coverage")
LONGEST_NAME = 40
MARKERS = "osD^vPX*<>"


def require_matplotlib() -> None:
    """Raise ValueError where matplotlib, which only the report needs, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--report draws with matplotlib, which is not installed: pip install -e ".[plot]"')


def to_json(
    results: Sequence[Result],
    reference_notes: Sequence[str] = (),
    comparison: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every number with all that it depends on, made of dicts, lists, strings, numbers and None."""
    content: dict[str, Any] = {
        "results": [_row_to_json(result) for result in results],
        "reference_notes": list(reference_notes),
    }
    if _differ(results):
        content["warning"] = WARNING
    return content | ({"comparison": dict(comparison)} if comparison else {})


def _row_to_json(result):
    features = result.samples["features"]
    row = {"name": result.name, "num_images": result.count}
    row |= {metric_key(metric, features): value for metric, value in result.metrics.items()}
    distance = metric_key("fid", features)
    if result.fid_error:
        row[f"{distance}_bootstrap"] = asdict(result.fid_error)
    if result.fid_infinity:
        row[f"{distance}_infinity"] = asdict(result.fid_infinity)
    provenance = {"samples": result.samples, "reference": result.reference, "options": result.options}
    provenance["precision_recall_dtype"] = result.precision_recall_dtype
    return row | {"protocol": result.protocol, "notes": result.notes, "provenance": provenance}


def table(results: Sequence[Result]) -> str:
    """One row per set, with the number of images; the protocol, the feature network and the reference above
    it, the notes below it.
    """
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    ]
    return "\n".join([*_heading(results), "", *lines, *_footnotes(results)])


def markdown_table(results: Sequence[Result]) -> str:
    """The same in Markdown."""
    head, *rows = _cells(results)
    align = ["---"] + ["---:"] * (len(head) - 1)
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, align, *rows)
    ]
    return "\n\n".join(
        [*_heading(results), "\n".join(lines), "\n".join(f"- {note}" for note in _notes(results))]
    )


def _heading(results):
    if _differ(results):
        return [WARNING]
    reference = results[0].reference
    statistics = f"statistics {reference['statistics']} ({reference['statistics_count'] or 'unknown number'})"
    digest = (
        f"sha256 {reference['file_sha256'][:8]}"
        if reference["file_sha256"]
        else f"fingerprint {reference['fingerprint'][:8]}"
    )
    return [
        f"protocol {results[0].protocol}",
        f"reference {reference['images']}: {reference['count'] or 'no'} images, {statistics}, {digest}",
    ]


def _differ(results):
    return len({_comparable(result) for result in results}) > 1


def _comparable(result):
    """What two rows must share."""
    return result.protocol, result.reference["fingerprint"], result.reference["file_sha256"]


def _cells(results):
    """Rows of strings, the titles first; a column for every number that some row has or might have had."""
    labels = list(dict.fromkeys(_label(result, metric) for metric in METRICS for result in results))
    extrapolated = list(
        dict.fromkeys(f"{_label(result, 'fid')}-inf" for result in results if result.fid_infinity)
    )
    told = _differ(results)
    rows = [["set", "images", *labels, *extrapolated, *(["protocol", "reference"] if told else [])]]
    for result in results:
        values = {_label(result, metric): _number(result, metric) for metric in METRICS}
        if result.fid_infinity:
            values[f"{_label(result, 'fid')}-inf"] = (
                f"{result.fid_infinity.value:.3f} ± {result.fid_infinity.standard_error:.3f}"
            )
        numbers = [values.get(label, "n/a") for label in labels + extrapolated]
        rows.append(
            [
                result.name,
                str(result.count or "n/a"),
                *numbers,
                *([result.protocol, result.reference["images"]] if told else []),
            ]
        )
    return rows


def _label(result, metric):
    return metric_label(metric, result.samples["features"])


def _number(result, metric):
    value = result.metrics[metric]
    if value is None:
        return "n/a"
    text = _rounded(metric, value)
    return f"{text} ± {result.fid_error.std:.3f}" if metric == "fid" and result.fid_error else text


def _rounded(metric, value):
    decimals = DECIMALS.get(metric, 3)
    return f"{round(value, decimals) + 0.0:.{decimals}f}"  # + 0.0: no minus before a zero


def _footnotes(results):
    notes = _notes(results)
    return ["", *(f"note: {note}" for note in notes)] if notes else []


def _notes(results):
    """Each note once, with the sets that it is about unless it names one itself; then what the ± are."""
    sets: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            sets.setdefault(note, []).append(result.name)
    notes = []
    for note, names in sets.items():
        about = "all sets" if len(names) == len(results) > 1 else ", ".join(names)
        notes.append(note if note.startswith((f"{names[0]} ", f"{names[0]}:")) else f"{about}: {note}")
    if len({result.count for result in results}) > 1:
        notes.append(
            "the sets differ in their number of images, by which Frechet distances and Inception Scores are biased: compare equal ones"
        )
    if any(result.fid_error for result in results):
        notes.append(
            "± is the standard deviation over bootstrap resamples; of a distance that is mostly bias it is too large"
        )
    if any(result.fid_infinity for result in results):
        notes.append(
            "-inf is extrapolated to infinitely many images; its ± is that of the line alone, too small to compare two sets by"
        )
    return notes


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    grids: Mapping[str, NDArray[np.uint8]],
    reference_notes: Sequence[str] = (),
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.md with its pictures, and report.json, into `folder`; `grids` has images (n, H, W, 3) by
    the name of the set.

    Returns the page's path. Raises ValueError where matplotlib is missing (see `require_matplotlib`).
    """
    require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = ["# Evaluation", markdown_table(results), *(f"- reference: {note}" for note in reference_notes)]
    if comparison:
        page.append(f"**{comparison['verdict']}**")
    page += ["## Numbers", "![The numbers of every set as bars](bars.png)"]
    _draw_bars(folder / "bars.png", results)
    if any(_has_plane(result) for result in results):
        _draw_plane(folder / "precision_recall.png", results)
        page += ["## Precision and recall", "![Precision against recall](precision_recall.png)"]
    page.append("## Random images")
    for number, (name, images) in enumerate(grids.items(), start=1):
        picture = f"grid{number}-{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.png"
        save_grid(folder / picture, [images], scale=max(1, 64 // images.shape[1]))
        page += [f"### {name}", f"![{len(images)} random images of {name}]({picture})"]
    write_json(folder / "report.json", to_json(results, reference_notes, comparison))
    with renamed_when_complete(folder / "report.md") as file:
        file.write(("\n\n".join(page) + "\n").encode())
    return folder / "report.md"


def _has_plane(result):
    return result.metrics["precision"] is not None


def _draw_plane(path, results):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, result in enumerate(results):
        if _has_plane(result):
            # Hollow, so that sets at the same place all show.
            look = {
                "color": f"C{index % 10}",
                "markersize": 9,
                "markerfacecolor": "none",
                "markeredgewidth": 2,
            }
            place = result.metrics["recall"], result.metrics["precision"]
            axes.plot(
                *place,
                MARKERS[index % len(MARKERS)],
                label=_legend(result, results),
                clip_on=False,
                zorder=3,
                **look,
            )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
    axes.grid(color="0.9")
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    if _differ(results):
        axes.set_title(PICTURE_WARNING, color="C3", fontsize=9)
    _save(figure, path)


def _draw_bars(path, results):
    """A panel per number, a bar per set; the sets are named on the left."""
    from matplotlib.figure import Figure

    labels = {}
    for metric in METRICS:
        for result in results:
            if result.metrics[metric] is not None:
                labels.setdefault((metric, _label(result, metric)), []).append(result)
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(2.5 + 2.4 * columns, rows * (0.9 + 0.34 * len(results))), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in panels[len(labels) :]:
        axes.set_visible(False)
    for axes, ((metric, label), measured) in zip(panels, labels.items(), strict=False):
        _draw_panel(axes, metric, label, measured, results)
    if _differ(results):
        figure.suptitle(PICTURE_WARNING, color="C3", fontsize=11)
    _save(figure, path)


def _draw_panel(axes, metric, label, measured, results):
    values = [result.metrics[metric] for result in measured]
    places = [results.index(result) for result in measured]
    errors = [_half_interval(result) if metric == "fid" else math.nan for result in measured]
    if np.isfinite(errors).any():
        label += " (95% interval)"
    axes.barh(
        places, values, xerr=errors, color=[f"C{place % 10}" for place in places], capsize=3, height=0.7
    )
    starts, ends = (
        np.fmin(np.fmin(0, values), np.subtract(values, errors)),
        np.fmax(np.fmax(0, values), np.add(values, errors)),
    )
    for place, value, end in zip(places, values, ends, strict=True):
        axes.annotate(
            _rounded(metric, value),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    start, end = starts.min(), 1 if metric in UNIT_METRICS else max(ends.max(), 1e-9)
    axes.set_xlim(start - 0.1 * (end - start) * (start < 0), end + 0.5 * (end - start))
    axes.set_xticks([0, 0.5, 1]) if metric in UNIT_METRICS else axes.locator_params(axis="x", nbins=4)
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
    return (
        f"{name}\n{result.samples['protocol']} on {result.reference['images']}" if _differ(results) else name
    )


def _save(figure, path):
    with renamed_when_complete(path) as file:
        figure.savefig(file, format="png", dpi=130, bbox_inches="tight")

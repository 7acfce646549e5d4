"""What was measured, as files: JSON for programs, and a Markdown page with pictures for people."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.accuracy import class_table
from evaluation.evaluator import Result
from evaluation.metrics import metric_key
from evaluation.pictures import draw_bars, draw_plane
from evaluation.tables import WARNING, by_network, differ, markdown_table, side_by_side
from guided_diffusion.files import figures
from guided_diffusion.files.atomic import renamed_when_complete, write_json
from guided_diffusion.files.grid import save_grid


def require_matplotlib() -> None:
    """Raise ValueError where matplotlib, which only the report needs, is not installed or does not load."""
    figures.require_matplotlib("--report draws with")


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
    if any(map(differ, by_network(results))):
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
    if result.nearest_pairs:
        row["nearest_pairs"] = [list(pair) for pair in result.nearest_pairs]
    if result.judgement:
        row["judgement"] = asdict(result.judgement)
    provenance = {"samples": result.samples, "reference": result.reference, "options": result.options}
    provenance["precision_recall_dtype"] = result.precision_recall_dtype
    return row | {"protocol": result.protocol, "notes": result.notes, "provenance": provenance}


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    grids: Mapping[str, NDArray[np.uint8]],
    reference_notes: Sequence[str] = (),
    comparison: Mapping[str, Any] | None = None,
    nearest: Mapping[str, list[NDArray[np.uint8]]] | None = None,
) -> Path:
    """Write report.json, and report.md with its pictures, into `folder`; `grids` has images (n, H, W, 3) by
    the name of the set. Results of the same sets under several networks stand side by side.

    nearest: by a title, the samples (n, H, W, 3) that are nearest to training images, and these.

    Returns the page's path. Raises ValueError where matplotlib is missing (see `require_matplotlib`).
    """
    require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers first: a picture that cannot be drawn must not lose them.
    write_json(folder / "report.json", to_json(results, reference_notes, comparison))
    groups = by_network(results)
    page = ["# Evaluation", *map(markdown_table, groups), *(f"- reference: {n}" for n in reference_notes)]
    if len(groups) > 1:
        page += ["## Networks side by side", side_by_side(groups)]
    if comparison:
        page.append(f"**{comparison['verdict']}**")
    page += ["## Numbers", _draw(folder, "bars", "The numbers of every set as bars", draw_bars, groups)]
    planes = [group for group in groups if any(each.metrics["precision"] is not None for each in group)]
    if planes:
        title = "Precision against recall"
        page += ["## Precision and recall", _draw(folder, "precision_recall", title, draw_plane, planes)]
    if judged := {each.name: each.judgement for each in results if each.judgement}:
        page += ["## Accuracy by class", *(class_table(*item) for item in judged.items())]
    if nearest:
        page += ["## Nearest training images", *_draw_nearest(folder, nearest)]
    page += ["## Random images", *_draw_grids(folder, grids)]
    # A file name may hold bytes that are no text.
    text = ("\n\n".join(page) + "\n").encode(errors="backslashreplace")
    with renamed_when_complete(folder / "report.md") as file:
        file.write(text)
    return folder / "report.md"


def _draw(folder, stem, title, draw, groups):
    """The link to one picture, or a table of those of several networks."""
    networks = [group[0].samples["features"] for group in groups]
    files = [f"{stem}-{_file_name(name)}.png" for name in networks] if len(groups) > 1 else [f"{stem}.png"]
    for file, group in zip(files, groups, strict=True):
        draw(folder / file, group)
    links = [f"![{title}]({file})" for file in files]
    if len(links) == 1:
        return links[0]
    return "\n".join(f"| {' | '.join(row)} |" for row in (networks, ["---"] * len(links), links))


def _draw_nearest(folder, nearest):
    """Samples above the training images, a column for each pair."""
    lines = []
    for number, (title, pair) in enumerate(nearest.items(), start=1):
        picture = f"nearest{number}-{_file_name(title)}.png"
        scale = max(1, 64 // pair[0].shape[1])
        save_grid(folder / picture, pair, scale, len(pair[0]), ["samples", "training images"])
        lines += [
            f"### {title}",
            f"![Samples of {title} above the training images nearest to them]({picture})",
        ]
    return lines


def _file_name(text):
    return re.sub("[^A-Za-z0-9_.-]+", "-", text)


def _draw_grids(folder, grids):
    lines = []
    for number, (name, images) in enumerate(grids.items(), start=1):
        picture = f"grid{number}-{_file_name(name)}.png"
        save_grid(folder / picture, [images], scale=max(1, 64 // images.shape[1]))
        lines += [f"### {name}", f"![{len(images)} random images of {name}]({picture})"]
    return lines

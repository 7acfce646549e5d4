"""What was measured, as files: JSON for programs, and a Markdown page with pictures for people."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.evaluator import Result
from evaluation.metrics import metric_key
from evaluation.pictures import draw_bars, draw_plane
from evaluation.tables import WARNING, differ, markdown_table
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
    if differ(results):
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


def write_report(
    folder: str | Path,
    results: Sequence[Result],
    grids: Mapping[str, NDArray[np.uint8]],
    reference_notes: Sequence[str] = (),
    comparison: Mapping[str, Any] | None = None,
) -> Path:
    """Write report.json, and report.md with its pictures, into `folder`; `grids` has images (n, H, W, 3) by
    the name of the set.

    Returns the page's path. Raises ValueError where matplotlib is missing (see `require_matplotlib`).
    """
    require_matplotlib()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The numbers first: a picture that cannot be drawn must not lose them.
    write_json(folder / "report.json", to_json(results, reference_notes, comparison))
    page = ["# Evaluation", markdown_table(results), *(f"- reference: {note}" for note in reference_notes)]
    if comparison:
        page.append(f"**{comparison['verdict']}**")
    page += ["## Numbers", "![The numbers of every set as bars](bars.png)"]
    draw_bars(folder / "bars.png", results)
    if any(result.metrics["precision"] is not None for result in results):
        draw_plane(folder / "precision_recall.png", results)
        page += ["## Precision and recall", "![Precision against recall](precision_recall.png)"]
    page += ["## Random images", *_draw_grids(folder, grids)]
    # A file name may hold bytes that are no text.
    text = ("\n\n".join(page) + "\n").encode(errors="backslashreplace")
    with renamed_when_complete(folder / "report.md") as file:
        file.write(text)
    return folder / "report.md"


def _draw_grids(folder, grids):
    lines = []
    for number, (name, images) in enumerate(grids.items(), start=1):
        picture = f"grid{number}-{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.png"
        save_grid(folder / picture, [images], scale=max(1, 64 // images.shape[1]))
        lines += [f"### {name}", f"![{len(images)} random images of {name}]({picture})"]
    return lines

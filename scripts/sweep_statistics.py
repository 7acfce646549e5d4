"""What the rows of a sweep say beyond their means: differences between cells that share seeds, and the Pareto
front. It is no script of its own.

A seed gives every cell the same labels and noise, so cells are compared seed by seed. The interval is
Student's t over the seeds, at 95 %; of twenty differences that are none, one is still called real.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import _beside  # noqa: F401
import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
EQUAL, REAL, UNKNOWN = "equal", "real", "cannot be told"
HIGHER_IS_BETTER = ("precision", "recall")


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the interval of a mean, over independent values; None of a single one."""
    if len(values) < 2:
        return None
    quantile = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * standard_error(values))


def standard_error(values: Sequence[float]) -> float:
    """Of a mean; at least two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def verdict(differences: Sequence[float]) -> str:
    """Whether the mean of differences is told apart from zero."""
    half = interval(differences)
    if not any(differences):
        return EQUAL
    return REAL if half is not None and abs(np.mean(differences)) > half else UNKNOWN


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """The difference between two cells, each a number by seed, over the seeds that both have; None where
    there is no such seed.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    return {
        "mean": float(np.mean(differences)),
        "interval": interval(differences),
        "verdict": verdict(differences),
        "runs": differences,
    }


def is_distance(key: str) -> bool:
    """Whether a number is a Frechet distance."""
    return key.startswith(("fd_", "fid"))


def by_seed(rows: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """One number of the rows of a cell."""
    return {row["seed"]: row[key] for row in rows}


def with_interval(difference: Mapping[str, Any] | None, form: str) -> str:
    """A difference as text; "" of none."""
    if difference is None:
        return ""
    if difference["verdict"] == EQUAL:
        return EQUAL
    error = "" if difference["interval"] is None else f" ± {difference['interval']:{form}}"
    return f"{difference['mean']:+{form}}{error}, {difference['verdict']}"


def panel_of(name: str) -> tuple[str, str]:
    """("A", "b") of the name "A / b"; ("", name) of one without."""
    panel, slash, curve = name.partition(" / ")
    return (panel, curve) if slash else ("", name)


def on_front(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[bool]:
    """Which cells no other of the same panel beats: as good in one mean and better in the other."""
    sign = [1 if key in HIGHER_IS_BETTER else -1 for key in (x, y)]
    points = np.array([[sign[0] * row[x]["mean"], sign[1] * row[y]["mean"]] for row in rows]).reshape(-1, 2)
    panels = np.array([panel_of(row["name"])[0] for row in rows])
    beaten = [
        (panels == panel) & (points >= point).all(1) & (points > point).any(1)
        for point, panel in zip(points, panels, strict=True)
    ]
    return [not others.any() for others in beaten]

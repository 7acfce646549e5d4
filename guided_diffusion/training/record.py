"""What a training says of itself: progress.csv, a line now and then with the time that is left, a curve."""

import csv
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.figures import plain_style, save_figure


class Record:
    """A table such as progress.csv: a row for each look at the losses, the columns those of the first row.

    Nothing in it depends on the time that things took, so that a resumed training leaves the same file as
    an undisturbed one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []

    def resume_at(self, step: int) -> None:
        """Keep the rows up to this step, drop later ones and one that was cut short."""
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [row for row in csv.DictReader(lines) if None not in row.values() and None not in row]
        self.rows = [values for row in kept if (values := _numbers(row)) and values["step"] <= step]
        with renamed_when_complete(self.path) as file:
            file.write(self._text(self.rows, header=bool(self.rows)).encode())

    def add(self, row: Mapping[str, float]) -> None:
        """Append a row."""
        text = self._text([row], header=not self.rows)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text)
        self.rows.append(dict(row))

    def _text(self, rows, header):
        out = io.StringIO()
        writer = csv.DictWriter(out, list((self.rows or rows or [{}])[0]), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        return out.getvalue()

    def draw(self, path: Path) -> None:
        """The losses against the step, as a PNG, once there are some."""
        if not self.rows:
            return
        with plain_style():
            from matplotlib.figure import Figure

            figure = Figure(figsize=(6, 4), layout="constrained")
            axes = figure.subplots()
            for name in [name for name in self.rows[0] if name.startswith("loss")]:
                wide = 1.8 if name == "loss" else 0.9
                axes.plot(*zip(*((r["step"], r[name]) for r in self.rows), strict=True), label=name, lw=wide)
            axes.set(xlabel="step", ylabel="loss", yscale="log")
            axes.legend()
            save_figure(figure, path)


def _cell(value):
    return str(int(value)) if value == value // 1 else f"{value:.6g}"


def _numbers(row):
    try:
        return {name: float(value) for name, value in row.items()}
    except ValueError:
        return None


def means_of(totals: Mapping[str, Tensor]) -> dict[str, float]:
    """name -> mean, of (sum, count) pairs, the names in order; NaN where nothing was counted, as of a quarter
    that no image fell into. Waits for the device.
    """
    values = {name: pair.tolist() for name, pair in sorted(totals.items())}
    return {name: total / count if count else math.nan for name, (total, count) in values.items()}


class Pace:
    """Steps per second and the time that is left."""

    def __init__(self, step: int):
        self._step, self._time = step, time.monotonic()

    def since_last(self, step: int) -> float:
        """Steps per second since the last call."""
        now = time.monotonic()
        pace = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return pace


def duration(seconds: float) -> str:
    """A time such as 45 s, 12 min or 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"

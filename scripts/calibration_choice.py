"""The table of scripts/calibrate.py, and which beta and temperature it recommends. It is no script of its
own.

The rule: of the settings shown the predicted x0 (of a noisy classifier: x_t) those count whose mean ECE over
t is not told apart from the least; the least negative log-likelihood, which needs no bins, decides among
them. Two are told apart where their ECE differ by more than 1.96 standard errors of the difference, over
resamples of the images that both share, and by more than the noise floor of the lower one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

SHOWN = {"x0": "predicted x0", "x_t": "x_t"}
COLUMNS = {
    "accuracy": ("accuracy", ".1%"),
    "ece": ("ECE", ".4f"),
    "noise_floor": ("noise floor", ".4f"),
    "nll": ("NLL", ".4f"),
    "brier": ("Brier", ".4f"),
}


@dataclass(frozen=True)
class Choice:
    """cell: what is recommended. reasons: sentences."""

    cell: Any
    reasons: list[str]


def difference(cell, other):
    """(mean ECE over t of a cell minus that of another, half the width of its 95 % interval)."""
    return cell.mean("ece") - other.mean("ece"), 1.96 * float(
        np.std(cell.resampled - other.resampled, ddof=1)
    )


def told_apart(cell, other):
    """Whether a difference is more than the noise of so few images."""
    value, error = difference(cell, other)
    lower = other if value > 0 else cell
    return abs(value) > max(error, lower.mean("noise_floor"))


def recommendation(cells):
    """The Choice among cells, those of the input that guidance looks at first."""
    candidates = [cell for cell in cells if cell.shown == cells[0].shown]
    least = min(candidates, key=lambda cell: cell.mean("ece"))
    equal = [cell for cell in candidates if not told_apart(cell, least)]
    chosen = min(equal, key=lambda cell: cell.mean("nll"))
    reasons = [_by_error(least, equal, candidates), _by_likelihood(chosen, candidates)]
    reasons += _by_input(chosen, cells)
    reasons += _at_an_end(chosen, candidates)
    return Choice(chosen, reasons)


def _by_error(least, equal, candidates):
    ece = f"{least.mean('ece'):.4f} ({name_of(least)})"
    if len(candidates) == 1:
        return f"it is the only setting; its ECE is {ece}."
    if len(equal) == 1:
        return f"the least ECE, {ece}, is below every other by more than the noise."
    if len(equal) == len(candidates):
        return f"all ECE are within the noise of the least, {ece}: the NLL alone decides."
    return f"{len(equal)} of {len(candidates)} ECE are within the noise of the least, {ece}: the NLL decides."


def _by_likelihood(chosen, candidates):
    best = min(candidates, key=lambda cell: cell.mean("nll"))
    highest = max(cell.mean("accuracy") for cell in candidates)
    text = f"accuracy {chosen.mean('accuracy'):.1%}, the highest is {highest:.1%}."
    nll = f"NLL {chosen.mean('nll'):.4f}"
    if best is chosen:
        return f"{nll} is the least of all; {text}"
    return f"{nll} is the least of these, but {name_of(best)} has {best.mean('nll'):.4f}; {text}"


def _by_input(chosen, cells):
    """What the other input has at the same setting, if there is one."""
    others = [cell for cell in cells if (cell.beta, cell.tau) == (chosen.beta, chosen.tau)]
    for other in others[1:]:
        verdict = "within the noise of its own"
        if told_apart(other, chosen):
            verdict = "higher" if other.mean("ece") > chosen.mean("ece") else "lower"
        yield (
            f"shown {SHOWN[other.shown]}, the same setting has ECE {other.mean('ece'):.4f}, {verdict}, "
            f"and accuracy {other.mean('accuracy'):.1%}."
        )


def _at_an_end(chosen, candidates):
    """Whether further values may be better; of beta, which ends with ReLU, lower ones."""
    for name, value, places in (("tau1", "tau", (0, -1)), ("beta", "beta", (0,))):
        tried = sorted({getattr(cell, value) for cell in candidates})
        if len(tried) > 1 and getattr(chosen, value) in [tried[place] for place in places]:
            at = f"{name} {getattr(chosen, value):g}"
            yield f"{at} is at the end of those that were tried: try further ones."


def name_of(cell):
    """A setting in words."""
    return f"tau1 {cell.tau:g}" if cell.beta is None else f"beta {cell.beta:g}, tau1 {cell.tau:g}"


def lines_of(cells, choice):
    """The table, and the recommendation below it."""
    rows = [["shown", "beta", "tau1", *(title for title, _ in COLUMNS.values()), "ECE - recommended's"]]
    for cell in cells:
        beta = "" if cell.beta is None else f"{cell.beta:g}"
        numbers = [f"{cell.mean(name):{form}}" for name, (_, form) in COLUMNS.items()]
        value, error = difference(cell, choice.cell)
        apart = "recommended" if cell is choice.cell else f"{value:+.4f} ± {error:.4f}"
        rows.append([SHOWN[cell.shown], beta, f"{cell.tau:g}", *numbers, apart])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    reasons = [f"- {reason}" for reason in choice.reasons]
    flags = f"--joint_temperature {choice.cell.tau:g}"
    if choice.cell.beta is not None:
        flags = f"--softplus_beta {choice.cell.beta:g} {flags}"
    return [*table, "", f"recommended, shown the {SHOWN[choice.cell.shown]}: {flags}", *reasons]

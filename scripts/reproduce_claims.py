"""What the paper says, held against measured numbers, one seed beside the other. It is no script of its own.

A claim is of two cells by their names, and of the sign of a difference. It agrees, or disagrees, where the
95 % interval of that difference leaves zero out; else it cannot be told. That of a ranking asks besides how
often such a rank correlation comes about by chance, over the settings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import _beside  # noqa: F401
import numpy as np
from scipy.stats import rankdata, spearmanr
from sweep_statistics import REAL, paired

AGREES, DISAGREES, UNTOLD = "agrees", "disagrees", "cannot be told here"
UNMEASURED = "not measured here"
CHANCE, EXACT = 0.05, 8  # the most settings of which all orders are counted
# By cell and key the number of each seed.
Numbers = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Claim:
    """`number` of cell `ours` is lower (sign -1) or higher (1) than that of cell `theirs`."""

    text: str
    ours: str
    theirs: str
    number: str = "distance"
    sign: int = -1


SHELF = "table / off the shelf"
CLAIMS = (
    Claim("an off-the-shelf classifier lowers the distance", SHELF, "table / unguided"),
    Claim("an off-the-shelf classifier raises precision", SHELF, "table / unguided", "precision", 1),
    Claim("an off-the-shelf classifier lowers recall", SHELF, "table / unguided", "recall"),
    Claim("it guides better than a noisy classifier", SHELF, "table / noisy classifier"),
    Claim("it guides better than classifier-free guidance", SHELF, "table / classifier-free"),
    Claim("a deeper classifier guides better", f"{SHELF}, deeper", SHELF),
    Claim("the predicted x0 guides better than x_t", "ablation / predicted x0", "ablation / x_t"),
    Claim("Softplus lowers the distance", "ablation / Softplus", "ablation / predicted x0"),
    Claim("a lower tau2 lowers the distance", "ablation / lower tau2", "ablation / Softplus"),
    Claim("the sine term lowers the distance", "ablation / sine term", "ablation / lower tau2"),
    Claim("the predicted x0 lowers the ECE of x_t", "calibration / predicted x0", "calibration / x_t", "ece"),
    Claim("Softplus lowers the ECE", "calibration / Softplus", "calibration / predicted x0", "ece"),
)


def by_second(claim: Claim) -> Claim:
    """The same of the distance by the problem's second network."""
    return replace(claim, text=f"{claim.text}, second network", number="second")


OF_TABLE = tuple(claim for claim in CLAIMS if claim.number == "distance" and claim.ours.startswith(SHELF))
ALL_CLAIMS = (*CLAIMS, *map(by_second, OF_TABLE))


def answer(claim: Claim, numbers: Numbers) -> dict[str, Any]:
    """{"claim", "answer", "difference": see `paired`, None where a cell is missing}."""
    ours, theirs = (numbers.get(name, {}).get(claim.number, {}) for name in (claim.ours, claim.theirs))
    difference = paired(ours, theirs)
    return {
        "claim": claim.text,
        "of": [claim.ours, claim.theirs, claim.number],
        "answer": judged(difference, claim.sign),
        "difference": difference,
    }


def judged(difference: Mapping[str, Any] | None, sign: int) -> str:
    """Whether a difference has that sign, as far as can be told."""
    if difference is None:
        return UNMEASURED
    if difference["verdict"] != REAL:
        return UNTOLD
    return AGREES if difference["mean"] * sign > 0 else DISAGREES


def rank_correlation(
    one: Sequence[Mapping[int, float]], other: Sequence[Mapping[int, float]]
) -> dict[str, Any] | None:
    """Spearman's rank correlation between two numbers of some settings, each by seed: its mean over the
    seeds, with the interval over them. None of fewer than three settings, or where all of them are equal.
    """
    seeds = [seed for seed in one[0] if all(seed in each for each in (*one, *other))] if one else []
    rows = [([each[seed] for each in one], [each[seed] for each in other]) for seed in seeds]
    if len(one) < 3 or not rows or any(len(set(values)) == 1 for row in rows for values in row):
        return None
    return paired(
        {seed: float(spearmanr(*row).statistic) for seed, row in zip(seeds, rows, strict=True)},
        dict.fromkeys(seeds, 0.0),
    )


def by_chance(one: Sequence[Mapping[int, float]], other: Sequence[Mapping[int, float]]) -> float:
    """The share of all orders of the settings whose rank correlation, of the means over the seeds, is as far
    from 0 as this one or farther; by Student's t of more than `EXACT` settings.
    """
    x, y = (rankdata([np.mean(list(each.values())) for each in values]) for values in (one, other))
    if len(x) > EXACT:
        return float(spearmanr(x, y).pvalue)
    orders = np.array(list(permutations(y - y.mean())))
    products = np.abs(orders @ (x - x.mean()))
    return float((products >= products[0] - 1e-9).mean())


def rank_answer(label: str, ece: Sequence[Any], distance: Sequence[Any]) -> dict[str, Any]:
    """As `answer`, for "the better calibrated setting guides better": the difference is the correlation, and
    "by_chance" how often it comes about by chance, None of fewer than three settings.
    """
    correlation = rank_correlation(ece, distance)
    chance = None if correlation is None else by_chance(ece, distance)
    told = chance is not None and chance < CHANCE
    return {
        "claim": f"what is better calibrated guides better ({label})",
        "of": [f"ranking / {label}", "ece", "distance"],
        "answer": judged(correlation, 1) if told else UNTOLD,
        "difference": correlation,
        "by_chance": chance,
    }

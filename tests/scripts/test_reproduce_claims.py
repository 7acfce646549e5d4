"""What scripts/reproduce.py says of the paper's claims, and where it writes it."""

import sys

import numpy as np
import pytest
from helpers import load_script

load_script("reproduce")
CLAIMS, PAGE = (sys.modules[f"reproduce_{name}"] for name in ("claims", "page"))


def paired(*differences):
    return (
        dict(enumerate(differences)),
        dict.fromkeys(range(len(differences)), 0.0),
    )


@pytest.mark.parametrize(
    ("values", "sign", "answer"),
    [
        (paired(-1.0, -1.1, -0.9), -1, "agrees"),
        (paired(-1.0, -1.1, -0.9), 1, "disagrees"),
        (paired(-1.0, 1.1, -0.9), -1, "cannot be told here"),
        (paired(0.0, 0.0, 0.0), -1, "cannot be told here"),
        (paired(-1.0), -1, "cannot be told here"),  # of one seed
        (({0: 1.0, 1: 1.1}, {}), -1, "not measured here"),  # of no cell
    ],
)
def test_a_claim_agrees_where_the_interval_leaves_zero_out(values, sign, answer):
    claim = CLAIMS.Claim("text", "a", "b", sign=sign)
    numbers = {name: {"distance": by_seed} for name, by_seed in zip("ab", values, strict=True)}
    assert CLAIMS.answer(claim, numbers)["answer"] == answer
    assert CLAIMS.answer(claim, {})["difference"] is None


@pytest.mark.parametrize(
    ("distances", "mean", "answer", "chance"),
    [
        ([[1, 2, 3, 4, 5], [2, 3, 5, 7, 9]], 1.0, "agrees", 2 / 120),
        ([[5, 4, 3, 2, 1], [9, 5, 3, 2, 1]], -1.0, "disagrees", 2 / 120),
        ([[1, 2, 3, 4], [2, 3, 5, 9]], 1.0, "cannot be told here", 2 / 24),  # so few are soon in order
        ([[1, 2, 3, 4, 5], [6, 4, 3, 2, 1]], 0.0, "cannot be told here", 2 / 5),
        ([[1, 1, 1, 1], [1, 2, 3, 4]], None, "cannot be told here", None),
        ([[1, 2], [1, 2]], None, "cannot be told here", None),  # two settings have no order to speak of
        ([[*range(10)], [*range(10)]], 1.0, "agrees", 0.0),
    ],
)
def test_rankings_are_compared_within_each_seed(distances, mean, answer, chance):
    distance = [dict(enumerate(by_seed)) for by_seed in zip(*distances, strict=True)]
    ece = [{0: value, 1: 10 * value} for value in np.arange(1, len(distance) + 1)]
    found = CLAIMS.rank_answer("ADM", ece, distance)
    assert found["answer"] == answer
    assert (found["difference"] and found["difference"]["mean"]) == (mean and pytest.approx(mean))
    assert found["by_chance"] == (chance if chance is None else pytest.approx(chance))


def test_what_is_written_by_hand_stays():
    text = f"above\n{PAGE.BEGIN}\nold\n{PAGE.END}\nbelow\n"
    assert PAGE.with_part(text, ["a \\1", "b"]) == f"above\n{PAGE.BEGIN}\na \\1\nb\n{PAGE.END}\nbelow\n"
    added = PAGE.with_part("alone\n", ["a"])
    assert added.startswith("alone\n") and PAGE.with_part(added, ["a"]) == added
    for broken in (PAGE.BEGIN, PAGE.END + PAGE.BEGIN, text + PAGE.END):
        with pytest.raises(ValueError, match="mend it by hand"):
            PAGE.with_part(broken, ["a"])

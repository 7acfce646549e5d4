"""scripts/sweep_statistics.py: which differences are real, and the Pareto front."""

import numpy as np
import pytest
from helpers import load_script

STATISTICS = load_script("sweep_statistics")


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 1.2}, {0: 2.0, 1: 2.1, 2: 2.3}, "real"),  # though seeds differ by more
        ({0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0}, "cannot be told"),
        ({0: 1.0}, {0: 2.0}, "cannot be told"),  # of one seed nothing
        ({0: 1.0, 1: 2.0, 3: 9.0}, {0: 1.0, 1: 2.0, 2: 5.0}, "equal"),  # in the seeds of both
    ],
)
def test_what_is_real_is_outside_the_interval(ours, theirs, verdict):
    assert STATISTICS.paired(ours, theirs)["verdict"] == verdict
    assert STATISTICS.paired(ours, {7: 1.0}) is None


def test_the_interval_covers_the_mean_in_95_of_100_draws():
    draws = np.random.default_rng(0).normal(1.0, 2.0, size=(2000, 4))
    covered = [abs(each.mean() - 1) <= STATISTICS.interval(each) for each in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_the_front_is_of_cells_that_none_of_their_panel_beats():
    points = {"A / a": (1, 0.5), "A / b": (2, 0.6), "A / c": (2, 0.5), "A / d": (1, 0.5), "B / e": (9, 0.1)}
    rows = [{"name": name, "fd": {"mean": x}, "recall": {"mean": y}} for name, (x, y) in points.items()]
    assert STATISTICS.on_front(rows, "fd", "recall") == [True, True, False, True, True]

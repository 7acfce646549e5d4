"""Accuracy by class, and how it is told."""

import numpy as np
import pytest

from evaluation.accuracy import class_table, judgement, summary

LABELS = np.array([0, 0, 0, 0, 3, 3, 7])
PREDICTED = np.array([0, 0, 0, 1, 7, 7, 7])


def test_accuracy_of_all_images_and_of_each_class_that_is_there():
    judged = judgement("judge", PREDICTED, LABELS)
    assert judged.accuracy == pytest.approx(4 / 7)
    assert judged.by_class == {0: (0.75, 4), 3: (0.0, 2), 7: (1.0, 1)}
    assert judged.worst(2) == [(3, 0.0, 2), (0, 0.75, 4)]
    line = "judge on set: accuracy 57.1%; lowest by class: 3 0.0%, 0 75.0%, 7 100.0%"
    assert summary("set", judged) == line
    assert class_table("set", judged).splitlines()[4:] == [
        "| 3 | 2 | 0.0% |",
        "| 0 | 4 | 75.0% |",
        "| 7 | 1 | 100.0% |",
    ]


def test_a_collapsed_generator_has_one_good_class():
    judged = judgement("judge", np.zeros(100, int), np.arange(100) % 10)
    assert judged.accuracy == 0.1 and judged.by_class[0] == (1, 10) and judged.by_class[9] == (0, 10)


@pytest.mark.parametrize(("predicted", "labels"), [([0], [0, 1]), ([], []), ([[0]], [[0]])])
def test_what_has_no_accuracy(predicted, labels):
    with pytest.raises(ValueError, match="predictions for"):
        judgement("judge", predicted, labels)

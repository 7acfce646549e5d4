"""How often a judge, a classifier, finds the class that a sample was made as."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SHOWN_CLASSES = 20


@dataclass(frozen=True)
class Judgement:
    """What a judge says of a set: accuracy, in [0, 1], over all of its images; of each class that it has, by
    its number, (accuracy, images).
    """

    judge: str
    accuracy: float
    by_class: dict[int, tuple[float, int]]

    def worst(self, count: int) -> list[tuple[int, float, int]]:
        """(class, accuracy, images) of the classes with the lowest accuracy, ascending."""
        rows = [(label, accuracy, images) for label, (accuracy, images) in self.by_class.items()]
        return sorted(rows, key=lambda row: row[1])[:count]


def judgement(judge: str, predicted: ArrayLike, labels: ArrayLike) -> Judgement:
    """Of predicted classes and wanted ones, (N,) whole numbers each. Raises ValueError for two lengths and
    for none.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1 or not len(labels):
        raise ValueError(f"{predicted.shape} predictions for {labels.shape} labels; needed are (N,) of each")
    hits = predicted == labels
    classes, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.bincount(which, weights=hits) / counts
    by_class = {
        int(label): (float(share), int(count))
        for label, share, count in zip(classes, shares, counts, strict=True)
    }
    return Judgement(judge, float(hits.mean()), by_class)


def summary(name: str, judged: Judgement) -> str:
    """One line about a set of this name."""
    worst = ", ".join(f"{label} {accuracy:.1%}" for label, accuracy, _ in judged.worst(3))
    return f"{judged.judge} on {name}: accuracy {judged.accuracy:.1%}; lowest by class: {worst}"


def class_table(name: str, judged: Judgement) -> str:
    """A Markdown table of the classes, of many those with the lowest accuracy."""
    shown = judged.worst(SHOWN_CLASSES)
    rows = [f"| {label} | {images} | {accuracy:.1%} |" for label, accuracy, images in shown]
    return "\n".join([summary(name, judged), "", "| class | images | accuracy |", "| ---: " * 3 + "|", *rows])

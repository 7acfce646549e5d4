"""Batches with labels."""

from collections.abc import Iterator

import torch
from torch import Tensor


def random_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, drawn with replacement by torch's generator: (B, ...) of the images and (B,) of
    their labels.

    images: (N, ...). labels: (N,). Raises ValueError where there is nothing to draw, or the lengths differ.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"training needs images with one label each, got {len(images)} and {len(labels)}")

    def draw():
        while True:
            pick = torch.randint(len(images), (batch_size,))
            yield images[pick], labels[pick]

    return draw()


def drop_labels(labels: Tensor, null_class: int, probability: float) -> Tensor:
    """Replace each of the (N,) int64 labels by `null_class` with this probability, by torch's generator.

    The network so learns to answer without a label too (Ho and Salimans, 2022, algorithm 1).
    """
    return torch.where(torch.rand(len(labels), device=labels.device) < probability, null_class, labels)

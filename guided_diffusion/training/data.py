"""Batches with labels."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_diffusion.training.randomness import seed_of


def random_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, drawn with replacement by torch's generator: (B, ...) of the images and (B,) of
    their labels.

    images: (N, ...). labels: (N,). Raises ValueError where there is nothing to draw, or the lengths differ.
    """
    _check(images, labels, batch_size)

    def draw():
        while True:
            pick = torch.randint(len(images), (batch_size,))
            yield images[pick], labels[pick]

    return draw()


class EpochBatches:
    """Batches that are a function of the step alone, so that a resumed training sees the same ones: each
    epoch is a permutation of all images, drawn from the seed and the number of the epoch; batches run on over
    the end of an epoch.

    images: (N, H, W, 3) uint8. labels: (N,) int64. Both stay on the device that they are on; a step there
    waits for nothing. batch_size: of all processes together.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int):
        _check(images, labels, batch_size)
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self._orders: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64: the images of this step."""
        start, missing, parts = step * self.batch_size, self.batch_size, []
        while missing:
            epoch, offset = divmod(start, len(self.images))
            part = self._order(epoch)[offset : offset + missing]
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        return torch.cat(parts)

    def batch(self, step: int, part: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The images, (B, H, W, 3) uint8, and labels, (B,), of a part of this step's batch."""
        pick = self.indices(step)[part]
        return self.images[pick], self.labels[pick]

    def _order(self, epoch):
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, stream="epoch"))
            order = torch.randperm(len(self.images), generator=generator).to(self.images.device)
            self._orders = {**{e: o for e, o in self._orders.items() if e == epoch - 1}, epoch: order}
        return self._orders[epoch]


def to_floats(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def flip_some(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those of the (N, C, H, W) images, left and right, for which (N,) bool `mirrored` says so."""
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor, shifts: Tensor, margin: int) -> Tensor:
    """Cut each of the (N, C, H, W) images out of a frame of `margin` mid-grey pixels around it, at the row
    and column of (N, 2) int64 `shifts`, from 0 to 2 * margin (He et al., 2016, section 4.2).
    """
    n, _, height, width = images.shape
    padded = F.pad(images, (margin,) * 4)
    rows = shifts[:, :1, None] + torch.arange(height, device=images.device)[:, None]  # (N, H, 1)
    columns = shifts[:, 1:, None] + torch.arange(width, device=images.device)  # (N, 1, W)
    which = torch.arange(n, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)


def drop_labels(labels: Tensor, null_class: int, probability: float, drawn: Tensor | None = None) -> Tensor:
    """Replace each of the (N,) int64 labels by `null_class` with this probability. drawn: (N,) uniform
    numbers in [0, 1) that decide; torch's where not given.

    The network so learns to answer without a label too (Ho and Salimans, 2022, algorithm 1).
    """
    drawn = torch.rand(len(labels), device=labels.device) if drawn is None else drawn
    return torch.where(drawn < probability, null_class, labels)


def _check(images, labels, batch_size):
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"training needs images with one label each, got {len(images)} and {len(labels)}")

"""Noise and labels as functions of (seed, sample index): whatever the batch, the rank or the interruption,
image i is image i.

A counter-based generator, Philox (Salmon et al., 2011), takes seed and index as its 128-bit key, so that no
two samples share a stream. It runs on the CPU, so that an accelerator changes nothing.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What a stream is for. It goes to the top of Philox's counter, 2**192 draws away from the next.
_NOISE, _LABELS = 0, 1
DRAWN_BY_INDEX = {
    "noise": "NumPy's Philox, key (seed, index)",
    "labels": "NumPy's Philox, key (seed, index or round)",
}
DRAWN_BY_SEED = dict.fromkeys(
    ("noise", "labels"), "torch's CPU generator, seed % 2**32: latents, label, steps"
)


class SampleNoise:
    """The noise of the samples `indices`, in the order in which the loops ask for it: x_T by `randn`, then
    one draw per step.

    Each sample has a stream of its own, so draws for one never move those of another.
    """

    def __init__(self, seed: int, indices: Sequence[int]):
        self._generators = [_generator(seed, index, _NOISE) for index in indices]

    def randn(self, shape: Sequence[int]) -> Tensor:
        """(len(indices), ...) standard normal float32 on the CPU. Raises ValueError where the first size is
        another.
        """
        if shape[0] != len(self._generators):
            raise ValueError(
                f"shape {tuple(shape)} does not start with the number of samples, {len(self._generators)}"
            )
        draws = np.empty(shape, dtype=np.float32)
        for generator, out in zip(self._generators, draws, strict=True):
            generator.standard_normal(out=out, dtype=np.float32)
        return torch.from_numpy(draws)

    def __call__(self, x: Tensor) -> Tensor:
        """The next draw, like x."""
        return self.randn(x.shape).to(x)


class SeedNoise:
    """The published generator of EDM: one of torch's per seed, on the CPU, for latents, label and the noise
    of each step, in this order.

    Image by image it draws what EDM's generate.py does there; the seed is taken modulo 2**32.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator("cpu").manual_seed(seed % 2**32) for seed in seeds]

    def randn(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """(len(seeds), ...) standard normal on the CPU. Raises ValueError where the first size is another."""
        if shape[0] != len(self._generators):
            raise ValueError(
                f"shape {tuple(shape)} does not start with the number of seeds, {len(self._generators)}"
            )
        return torch.stack(
            [
                torch.randn(shape[1:], dtype=dtype, generator=generator, device="cpu")
                for generator in self._generators
            ]
        )

    def randint(self, high: int) -> Tensor:
        """(len(seeds),) int64 from [0, high)."""
        return torch.stack(
            [torch.randint(high, (), generator=generator, device="cpu") for generator in self._generators]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """The next draw, like x."""
        return self.randn(x.shape, x.dtype).to(x)


class DrawnAhead:
    """The draws of a `SampleNoise` or `SeedNoise`, each made by a thread while the step before it runs; all
    of one shape and dtype.
    """

    def __init__(self, noise: SampleNoise | SeedNoise, shape: Sequence[int], **options: Any):
        """options: further arguments of the noise's randn."""
        self._shape = tuple(shape)
        self._draw = partial(noise.randn, self._shape, **options)
        self._thread = ThreadPoolExecutor(1)
        self._next = self._thread.submit(self._draw)

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next draw, on the CPU. Raises ValueError for another shape."""
        if tuple(shape) != self._shape:
            raise ValueError(f"noise of shape {self._shape} is drawn ahead, but {tuple(shape)} was asked for")
        draw = self._next.result()
        self._next = self._thread.submit(self._draw)
        return draw

    def __call__(self, x: Tensor) -> Tensor:
        """The next draw, like x."""
        return self.randn(x.shape).to(x)

    def close(self) -> None:
        """End the thread, after the draw that it may be at and nobody waits for."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def random_labels(seed: int, indices: Sequence[int], num_classes: int) -> np.ndarray:
    """(len(indices),) int64 labels, each drawn uniformly from [0, num_classes)."""
    return np.array([_generator(seed, i, _LABELS).integers(num_classes) for i in indices], dtype=np.int64)


def shuffled_labels(seed: int, indices: Sequence[int], pool: Sequence[int]) -> np.ndarray:
    """(len(indices),) int64 labels that go through `pool` again and again, in a new order each time.

    With pool = range(num_classes) the classes are balanced over any number of samples; shuffled, since an
    Inception Score is taken over splits in file order.
    """
    rounds = {i // len(pool) for i in indices}
    order = {r: _generator(seed, r, _LABELS).permutation(np.asarray(pool, dtype=np.int64)) for r in rounds}
    return np.array([order[i // len(pool)][i % len(pool)] for i in indices], dtype=np.int64)


def _generator(seed: int, index: int, purpose: int) -> np.random.Generator:
    key = np.array([seed % 2**64, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))

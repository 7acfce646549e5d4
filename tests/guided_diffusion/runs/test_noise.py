"""Noise and labels by seed and sample index."""

import math
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

from guided_diffusion.runs.noise import DrawnAhead, SampleNoise, SeedNoise, random_labels, shuffled_labels

SHAPE = (3, 4, 4)
SEEDS = [0, 1, -1, -(2**62), 2**31, 2**63, 2**63 + 1, 2**64 - 2]


def stream(seed, index, steps=3):
    """All draws for one sample, (steps + 1, *SHAPE)."""
    noise = SampleNoise(seed, [index])
    later = [noise(torch.empty(1, *SHAPE))[0] for _ in range(steps + 1)]
    return torch.stack(later)


def within(mean, n, deviation=1.0):
    """Whether a mean of n draws is zero within five of its standard errors."""
    return abs(float(mean)) < 5 * deviation / math.sqrt(n)


# Noise by index


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 7])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_same_noise_per_index_whatever_the_batch_and_its_order(seed, size):
    order = [9, 2, 14, 0, *(i for i in range(16) if i not in (9, 2, 14, 0))]
    for start in range(0, 16, size):
        indices = order[start : start + size]
        noise, like = SampleNoise(seed, indices), torch.empty(len(indices), *SHAPE)
        batch = torch.stack([noise.randn(like.shape), *(noise(like) for _ in range(3))])
        for position, index in enumerate(indices):
            assert torch.equal(batch[:, position], stream(seed, index))


def test_seeds_and_indices_give_different_streams():
    firsts = {
        tuple(stream(seed, index).flatten()[:4].tolist()) for seed in SEEDS for index in (0, 1, 2, 10**9)
    }
    assert len(firsts) == 4 * len(SEEDS)


@pytest.mark.parametrize(
    ("first", "second"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0)), ((2**63, 5), (2**63 + 1, 5))]
)
def test_streams_are_uncorrelated_shifted_by_one_as_well(first, second):
    a, b = (SampleNoise(seed, [index]).randn((1, 100_000))[0].double() for seed, index in (first, second))
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:]), (a[1:], a[:-1])):
        assert within((x * y).mean(), len(x))


@pytest.mark.parametrize("shape", [(100, 3000), (20_000, 1)])
def test_draws_are_standard_normal_over_values_and_over_indices(shape):
    x = SampleNoise(7, range(shape[0])).randn(shape).double().flatten()
    n = len(x)
    assert within(x.mean(), n) and within(x.var() - 1, n, math.sqrt(2))
    assert within((x**4).mean() - 3, n, math.sqrt(96))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_draws_are_float32_made_like_x(dtype):
    x = torch.empty(2, *SHAPE, dtype=dtype)
    got, drawn = SampleNoise(0, [4, 5])(x), SampleNoise(0, [4, 5]).randn(x.shape)
    assert (got.shape, got.dtype, drawn.dtype) == (x.shape, dtype, torch.float32)
    assert torch.equal(got, drawn.to(dtype))


def test_the_noise_drawn_ahead_is_the_same_noise():
    noise, x = SampleNoise(3, range(4, 6)), torch.empty(2, 3, 8, 8, dtype=torch.float64)
    with closing(DrawnAhead(SampleNoise(3, range(4, 6)), x.shape)) as ahead:
        assert torch.equal(ahead.randn(x.shape), noise.randn(x.shape))
        for _ in range(3):
            assert torch.equal(ahead(x), noise(x))


# Labels by index


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_is_taken_and_reproduced(seed):
    for draw in (
        lambda: stream(seed, 3).numpy(),
        lambda: random_labels(seed, range(50), 10),
        lambda: shuffled_labels(seed, range(50), range(10)),
    ):
        assert np.array_equal(draw(), draw())


def test_random_labels_are_uniform():
    # Each count is binomial, with variance n p (1 - p).
    counts = np.bincount(random_labels(0, range(10_000), 10), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 1000).max() < 5 * math.sqrt(1000 * 0.9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_labels_are_shuffled_anew_each_time_round(seed):
    rounds = shuffled_labels(seed, range(300), range(100)).reshape(3, 100)
    assert all(sorted(r) == list(range(100)) for r in rounds)
    assert len({tuple(r) for r in [*rounds, range(100)]}) == 4


def test_labels_and_noise_are_uncorrelated():
    # The size of the noise, less its mean, is looked at as well: that is where the leading bits of a draw go.
    n = 20_000
    labels = 2 * random_labels(0, range(n), 2) - 1
    noise = SampleNoise(0, range(n)).randn((n, 1)).double().numpy()[:, 0]
    for z in (noise, np.abs(noise) - math.sqrt(2 / math.pi)):
        assert within(np.mean(labels * z), n, np.sqrt(np.mean(z**2)))


# EDM's generators, one for each seed


def published(seed, steps=3):
    """What EDM draws for one image: latents, label of 1000, noise of each step."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    latents, label = torch.randn(SHAPE, generator=generator), torch.randint(1000, (), generator=generator)
    return (
        latents,
        label,
        [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(steps)],
    )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    "seeds", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [49_999, 2**31, 2**32 - 1, 2**32 + 7, 7 - 2**32]]
)
def test_a_seed_has_its_latents_label_and_noise_whatever_the_batch_and_the_order(seeds, size, ahead):
    for start in range(0, len(seeds), size):
        batch = seeds[start : start + size]
        noise, shape = SeedNoise(batch), (len(batch), *SHAPE)
        latents, labels = noise.randn(shape), noise.randint(1000)
        drawn = closing(DrawnAhead(noise, shape, dtype=torch.float64)) if ahead else nullcontext(noise)
        with drawn as randn_like:
            steps = [randn_like(torch.empty(shape, dtype=torch.float64)) for _ in range(3)]
        assert (latents.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (len(batch),))
        for i, seed in enumerate(batch):
            expected = published(seed)
            assert torch.equal(latents[i], expected[0]) and torch.equal(labels[i], expected[1])
            assert all(torch.equal(step[i], draw) for step, draw in zip(steps, expected[2], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_for_a_seed_are_like_x_and_not_rounded_from_another_type(dtype):
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    expected = [torch.randn(SHAPE, dtype=dtype, generator=generator) for generator in generators]
    got = SeedNoise([4, 5])(torch.empty(2, *SHAPE, dtype=dtype))
    assert got.dtype == dtype and torch.equal(got, torch.stack(expected))


# All of them


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: SampleNoise(0, range(3)).randn((2, *SHAPE)), r"\(2, 3, 4, 4\) .*number of samples, 3"),
        (lambda: SeedNoise(range(3)).randn((2, *SHAPE)), r"\(2, 3, 4, 4\) .*number of seeds, 3"),
        (
            lambda: DrawnAhead(SampleNoise(0, [1]), (1, *SHAPE)).randn((2, *SHAPE)),
            r"\(1, 3, 4, 4\) is drawn ahead",
        ),
        # An error of the thread is raised where the draw is asked for.
        (lambda: DrawnAhead(SeedNoise([0]), (2, *SHAPE)).randn((2, *SHAPE)), "number of seeds, 1"),
    ],
)
def test_a_shape_for_another_number_of_samples_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_global_generators_are_neither_read_nor_moved():
    def draws():
        seeds = SeedNoise([0, 1])
        return [
            stream(0, 0),
            seeds.randn((2, *SHAPE)),
            seeds.randint(10),
            torch.tensor(random_labels(0, [0], 10)),
        ]

    torch.manual_seed(0)
    state, numpy_state, before = torch.get_rng_state(), np.random.get_state()[1].copy(), draws()
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(1)
    assert all(torch.equal(one, other) for one, other in zip(before, draws(), strict=True))

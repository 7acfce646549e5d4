"""Noise and labels by seed and sample index."""

import math
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch

from guided_diffusion.runs.noise import (
    DrawnAhead,
    SampleNoise,
    SeedNoise,
    label_source,
    random_labels,
    shuffled_labels,
)

SHAPE = (3, 4, 4)
SEEDS = [0, 1, -1, -(2**62), 2**31, 2**63, 2**63 + 1, 2**64 - 2]


def stream(seed, index, steps=3):
    """All draws for one sample, (steps + 1, *SHAPE)."""
    noise = SampleNoise(seed, [index])
    return torch.stack(
        [noise.randn((1, *SHAPE))[0], *[noise(torch.empty(1, *SHAPE))[0] for _ in range(steps)]]
    )


# Noise


@pytest.mark.parametrize("seed", [0, -5, 2**63 + 7])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_same_noise_per_index_whatever_the_batch(seed, size):
    for start in range(0, 16, size):
        indices = list(range(start, min(start + size, 16)))
        noise = SampleNoise(seed, indices)
        batch = torch.stack(
            [
                noise.randn((len(indices), *SHAPE)),
                *[noise(torch.empty(len(indices), *SHAPE)) for _ in range(3)],
            ]
        )
        for position, index in enumerate(indices):
            assert torch.equal(batch[:, position], stream(seed, index))


def test_order_within_the_batch_does_not_matter():
    indices = [9, 2, 14, 0]
    batch = SampleNoise(3, indices).randn((4, *SHAPE))
    assert all(torch.equal(batch[i], stream(3, index)[0]) for i, index in enumerate(indices))


def test_seeds_and_indices_give_different_streams():
    streams = [stream(seed, index).flatten() for seed in SEEDS for index in (0, 1, 2, 10**9)]
    firsts = {tuple(s[:4].tolist()) for s in streams}
    assert len(firsts) == len(streams)
    # Seed and index are not added up: (seed, index + 1) is not (seed + 1, index).
    assert not torch.equal(stream(0, 1), stream(1, 0))


@pytest.mark.parametrize(
    ("first", "second"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 0)), ((2**63, 5), (2**63 + 1, 5))]
)
def test_streams_are_uncorrelated(first, second):
    # The mean of n products of independent standard normals has standard error 1 / sqrt(n): five of them.
    # Shifted by one as well.
    a, b = (SampleNoise(seed, [index]).randn((1, 100_000))[0].double() for seed, index in (first, second))
    for x, y in ((a, b), (a[1:], b[:-1]), (a[:-1], b[1:]), (a[1:], a[:-1])):
        assert abs(float((x * y).mean())) < 5 / math.sqrt(len(x))


def test_draws_are_standard_normal():
    # Standard errors of n draws: mean 1 / sqrt(n), variance sqrt(2 / n), fourth moment sqrt(96 / n). Five of
    # each.
    x = SampleNoise(7, range(100)).randn((100, 3000)).double().flatten()
    n = len(x)
    assert abs(float(x.mean())) < 5 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / n)


def test_draws_are_normal_over_the_indices_too():
    x = SampleNoise(7, range(20_000)).randn((20_000, 1)).double().flatten()
    assert abs(float(x.mean())) < 5 / math.sqrt(len(x))
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / len(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_draws_are_like_x(dtype):
    x = torch.empty(2, *SHAPE, dtype=dtype)
    got = SampleNoise(0, [4, 5])(x)
    assert (got.shape, got.dtype, got.device) == (x.shape, dtype, x.device)
    assert torch.equal(got, SampleNoise(0, [4, 5]).randn(x.shape).to(dtype))


def test_initial_noise_is_float32_on_the_cpu_and_not_repeated():
    noise = SampleNoise(0, [0])
    first, second = noise.randn((1, *SHAPE)), noise.randn((1, *SHAPE))
    assert (first.dtype, first.device.type) == (torch.float32, "cpu")
    assert not torch.equal(first, second)


def test_batch_of_another_size():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).* 3"):
        SampleNoise(0, range(3)).randn((2, *SHAPE))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seed_is_taken_and_reproduced(seed):
    assert torch.equal(stream(seed, 3), stream(seed, 3))
    assert np.array_equal(random_labels(seed, range(50), 10), random_labels(seed, range(50), 10))
    assert np.array_equal(
        shuffled_labels(seed, range(50), range(10)), shuffled_labels(seed, range(50), range(10))
    )


# Labels


@pytest.mark.parametrize("labels", ["random", "balanced", "1,2,5-9"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_same_label_per_index_whatever_the_batch(labels, size):
    labels_of = label_source(labels, 3, 10)
    whole = labels_of(range(48))
    parts = np.concatenate([labels_of(range(start, start + size)) for start in range(0, 48, size)])
    assert whole.dtype == np.int64
    assert np.array_equal(parts, whole)
    assert np.array_equal(labels_of(range(47, -1, -1)), whole[::-1])
    assert not np.array_equal(label_source(labels, 4, 10)(range(48)), whole)


@pytest.mark.parametrize("num_samples", [1, 9, 10, 11, 25, 333])
def test_balanced_labels_are_balanced_within_one_for_any_number(num_samples):
    counts = np.bincount(label_source("balanced", 0, 10)(range(num_samples)), minlength=10)
    assert counts.max() - counts.min() <= 1
    assert len(counts) == 10


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_balanced_labels_are_shuffled_anew_each_time_round(seed):
    rounds = label_source("balanced", seed, 100)(range(300)).reshape(3, 100)
    assert all(sorted(r) == list(range(100)) for r in rounds)
    assert len({tuple(r) for r in [*rounds, range(100)]}) == 4


def test_random_labels_are_uniform():
    # Each count is binomial, with variance n p (1 - p); five standard deviations.
    n, classes = 10_000, 10
    counts = np.bincount(label_source("random", 0, classes)(range(n)), minlength=classes)
    assert np.abs(counts - n / classes).max() < 5 * math.sqrt(n / classes * (1 - 1 / classes))
    assert len(counts) == classes


@pytest.mark.parametrize(
    ("labels", "pool"),
    [("7", [7]), ("1,2,5-9", [1, 2, 5, 6, 7, 8, 9]), ("3, 4", [3, 4]), ("0-0", [0]), ("2,2,3", [2, 2, 3])],
)
def test_lists_and_ranges_are_gone_through_again_and_again(labels, pool):
    got = label_source(labels, 0, 10)(range(3 * len(pool)))
    assert all(sorted(r) == pool for r in got.reshape(3, -1))


def test_list_as_long_as_imagenet_has_classes():
    labels = ",".join(map(str, range(1000)))
    assert sorted(label_source(labels, 0, 1000)(range(1000))) == list(range(1000))


@pytest.mark.parametrize("name", ["labels.npy", "labels.txt", "labels", "7.txt"])
def test_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".npy"):
        np.save(name, np.array([[4, 4], [9, 0]]))
    else:
        (tmp_path / name).write_text("4 4\n9\n0\n")
    for path in (name, str(tmp_path / name)):
        assert sorted(label_source(path, 0, 10)(range(4))) == [0, 4, 4, 9]


@pytest.mark.parametrize(
    ("labels", "culprit"), [("12", "12"), ("1,10", "10"), ("0-11", "10"), ("file", "-1")]
)
def test_class_out_of_range(tmp_path, monkeypatch, labels, culprit):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("3 -1")
    with pytest.raises(ValueError, match=rf"class {culprit} is out of range, the classes are 0 to 9"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize("labels", ["5-3", "1,,2", "1-2-3"])
def test_list_that_is_not_understood(labels):
    with pytest.raises(ValueError, match=f"labels '{labels}'"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize(
    "labels", ["nowhere.txt", "folder/labels.npy", "2024/labels.npy", "10classes.txt", "1;2", "1,x", ""]
)
def test_missing_file(tmp_path, monkeypatch, labels):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"labels '{labels}'.*balanced"):
        label_source(labels, 0, 10)


@pytest.mark.parametrize("content", ["one two", "1.5 2", "\x00\x01", "1,2"])
def test_text_file_without_whole_numbers(tmp_path, content):
    path = tmp_path / "labels.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"labels\.txt.*whole numbers"):
        label_source(str(path), 0, 10)


def test_empty_file(tmp_path):
    (tmp_path / "labels.txt").write_text("")
    with pytest.raises(ValueError, match=r"labels\.txt"):
        label_source(str(tmp_path / "labels.txt"), 0, 10)


@pytest.mark.parametrize(
    "content", [np.array([1.5, 2.0]), np.array([math.nan]), np.array(["a"]), b"", b"not an array"]
)
def test_npy_file_without_whole_numbers(tmp_path, content):
    path = tmp_path / "labels.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=r"labels\.npy.*whole numbers"):
        label_source(str(path), 0, 10)


# Streams do not meet


def test_labels_and_noise_are_uncorrelated():
    # A random sign times an independent z: standard error of the mean, the root mean square of z over
    # sqrt(n). Five of them. The size of the noise, less its mean sqrt(2 / pi), is looked at as well: that is
    # where the leading bits of a draw go.
    n = 20_000
    labels = 2 * random_labels(0, range(n), 2) - 1
    noise = SampleNoise(0, range(n)).randn((n, 1)).double().numpy()[:, 0]
    for z in (noise, np.abs(noise) - math.sqrt(2 / math.pi)):
        assert abs(np.mean(labels * z)) < 5 * np.sqrt(np.mean(z**2) / n)


def test_drawing_labels_does_not_move_noise():
    noise = SampleNoise(0, [0])
    first = noise.randn((1, *SHAPE))
    random_labels(0, [0], 10), shuffled_labels(0, [0], range(10))
    assert torch.equal(torch.stack([first, noise.randn((1, *SHAPE))])[:, 0], stream(0, 0)[:2])


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    state, before = torch.get_rng_state(), stream(0, 0)
    np.random.seed(1)
    numpy_state = np.random.get_state()[1].copy()
    torch.manual_seed(1)
    after = stream(0, 0)
    torch.manual_seed(0)
    assert torch.equal(before, after)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_noise_that_is_drawn_ahead_is_the_same_noise():
    noise, x = SampleNoise(3, range(4, 6)), torch.empty(2, 3, 8, 8, dtype=torch.float64)
    with closing(DrawnAhead(SampleNoise(3, range(4, 6)), x.shape)) as ahead:
        assert torch.equal(ahead.randn(x.shape), noise.randn(x.shape))
        for _ in range(3):
            assert torch.equal(ahead(x), noise(x))
        with pytest.raises(
            ValueError, match=r"noise of shape \(2, 3, 8, 8\) is drawn ahead, but \(1, 3, 8, 8\)"
        ):
            ahead.randn((1, 3, 8, 8))


# EDM's generators, one for each seed


def published(seed, steps=3):
    """What EDM draws for one image: latents, label of 1000, noise of each step."""
    generator = torch.Generator().manual_seed(seed % 2**32)
    latents = torch.randn(SHAPE, generator=generator)
    label = torch.randint(1000, (), generator=generator)
    return (
        latents,
        label,
        [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(steps)],
    )


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    "seeds", [[0, 1, 2, 3, 4], [3, 0, 4, 2, 1], [49_999, 2**31, 2**32 - 1, 2**32 + 7, 0]]
)
def test_a_seed_has_its_latents_label_and_noise_whatever_the_batch_and_the_order(seeds, size, ahead):
    for start in range(0, len(seeds), size):
        batch = seeds[start : start + size]
        noise, shape = SeedNoise(batch), (len(batch), *SHAPE)
        latents, labels = noise.randn(shape), noise.randint(1000)
        with (
            closing(DrawnAhead(noise, shape, dtype=torch.float64))
            if ahead
            else nullcontext(noise) as randn_like
        ):
            steps = [randn_like(torch.empty(shape, dtype=torch.float64)) for _ in range(3)]
        assert (latents.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (len(batch),))
        for i, seed in enumerate(batch):
            expected = published(seed)
            assert torch.equal(latents[i], expected[0])
            assert torch.equal(labels[i], expected[1])
            assert all(torch.equal(step[i], draw) for step, draw in zip(steps, expected[2], strict=True))


def test_seeds_count_modulo_2_to_the_32():
    draw = SeedNoise([7, 2**32 + 7, 7 - 2**32, 8]).randn((4, *SHAPE))
    assert torch.equal(draw[1], draw[0])
    assert torch.equal(draw[2], draw[0])
    assert not torch.equal(draw[3], draw[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_for_a_seed_are_like_x_and_not_rounded_from_another_type(dtype):
    x = torch.empty(2, *SHAPE, dtype=dtype)
    got = SeedNoise([4, 5])(x)
    assert (got.shape, got.dtype, got.device) == (x.shape, dtype, x.device)
    expected = [
        torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(seed)) for seed in (4, 5)
    ]
    assert torch.equal(got, torch.stack(expected))


def test_labels_of_seeds_are_in_range_and_uniform():
    # Each count is binomial, with variance n p (1 - p); five standard deviations.
    n, classes = 5000, 10
    counts = np.bincount(SeedNoise(range(n)).randint(classes), minlength=classes)
    assert len(counts) == classes
    assert np.abs(counts - n / classes).max() < 5 * math.sqrt(n / classes * (1 - 1 / classes))


def test_another_number_of_seeds():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) .*number of seeds, 3"):
        SeedNoise(range(3)).randn((2, *SHAPE))


def test_seeds_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    noise = SeedNoise([0, 1])
    noise.randn((2, *SHAPE)), noise.randint(10), noise(torch.empty(2, *SHAPE))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_the_thread_that_draws_ahead_is_raised_where_the_draw_is_asked_for():
    with (
        closing(DrawnAhead(SeedNoise([0]), (2, *SHAPE))) as ahead,
        pytest.raises(ValueError, match="number of seeds, 1"),
    ):
        ahead(torch.empty(2, *SHAPE))

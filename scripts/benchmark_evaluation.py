"""Measure what the evaluation of 50,000 images needs on a CPU: Frechet distance, precision and recall,
feature extraction, memory.

    python scripts/benchmark_evaluation.py

Every rate is set against that of plain library code in the same run. Nothing is downloaded: features and
Inception's weights are random, which changes no time. It takes some minutes. Run it with nothing else on the
machine; its lines are meant for docs/benchmarks.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _beside  # noqa: F401
import numpy as np
import scipy.linalg
import torch
from PIL import Image

from evaluation.features import PART_SIZE, extract
from evaluation.frechet import frechet_distance
from evaluation.moments import moments_of
from evaluation.networks.inception import INPUT_SIZE, InceptionFeatures, inception_network
from evaluation.precision_recall import precision_recall
from guided_diffusion.files.image_sets import open_images
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine

DIMENSION = 2048  # of Inception's pool3
FEW = 500  # images of a singular covariance
REFERENCE, SAMPLES = 10_000, 50_000
PICTURES = 160
FURTHER = (
    20 * PART_SIZE
)  # images less than SAMPLES, in whole parts: as many wait for their part to be complete then
# One batch in so many is Inception's where memory is measured; it divides a part, at whose end memory is
# highest.
REAL_BATCHES = 64
REPEATS = 5  # the median counts


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--call", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        name, *arguments = json.loads(args.call)
        print(json.dumps(OWN_PROCESS[name](*arguments)))
        return
    measure()


def measure():
    """Print one line for each figure."""
    print(f"machine: {machine.describe(torch.device('cpu'))}, scipy {scipy.__version__}")
    report_frechet()
    report_precision_recall()
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        report_extraction(Path(folder))
        report_memory(Path(folder))


def report_frechet():
    first, second = random_features(REFERENCE, 1), random_features(REFERENCE, 2)
    distance, seconds = frechet(first, second)
    few, few_seconds = frechet(first[:FEW], second[:FEW])
    one, other = moments_of(first).gaussian(), moments_of(second).gaussian()
    product = one.sigma @ other.sigma
    start = time.perf_counter()
    root = scipy.linalg.sqrtm(product)
    plain_seconds = time.perf_counter() - start
    plain = np.square(one.mu - other.mu).sum() + np.trace(one.sigma + other.sigma - 2 * root.real)
    print(
        f"Frechet distance, {DIMENSION} dimensions, {REFERENCE} images each: {seconds:.2f} s, "
        f"{seconds / plain_seconds:.1%} of the {plain_seconds:.2f} s of scipy.linalg.sqrtm on the product; "
        f"{distance:.6f} against {plain:.6f}, relative difference {abs(distance / plain - 1):.1e}; "
        f"{FEW} images each, singular covariances: {few:.6f} in {few_seconds:.2f} s"
    )


def frechet(first, second):
    """The distance of two sets of features, and the median of its seconds, moments not counted."""
    one, other = moments_of(first).gaussian(), moments_of(second).gaussian()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        distance = frechet_distance(one.mu, one.sigma, other.mu, other.sigma)
        times.append(time.perf_counter() - start)
    return distance, statistics.median(times)


def report_precision_recall():
    seconds, plain_seconds, memory = in_own_process(
        "time_precision_recall", DIMENSION, REFERENCE, SAMPLES, REPEATS
    )
    # An inner product for each pair of images, counted once. The tiles on the diagonal hold their pairs
    # twice: that is not counted.
    pairs = REFERENCE * (REFERENCE - 1) / 2 + SAMPLES * (SAMPLES - 1) / 2 + REFERENCE * SAMPLES
    rate, plain_rate = (
        2e-9 * DIMENSION * n / t for n, t in ((pairs, seconds), (REFERENCE * SAMPLES, plain_seconds))
    )
    print(
        f"precision and recall, {REFERENCE} reference and {SAMPLES} sample features of {DIMENSION} "
        f"dimensions, float32: {seconds:.2f} s; with one product per pair of images {rate:.1f} GFLOP/s, "
        f"{rate / plain_rate:.0%} of the {plain_rate:.1f} GFLOP/s of a plain "
        f"matrix product of the two; peak resident memory of the process {memory / 1e9:.2f} GB"
    )


def time_precision_recall(dimension, reference, samples, repeats):
    """Seconds of precision and recall, median seconds of a plain matrix product, and the peak memory in bytes
    before the latter.
    """
    real, fake = random_features(reference, 1, dimension), random_features(samples, 2, dimension)
    start = time.perf_counter()
    precision_recall(real=real, fake=fake, dtype=torch.float32)
    seconds, memory = time.perf_counter() - start, machine.peak_memory()
    product, times = torch.empty(reference, samples), []
    for _ in range(repeats + 1):  # one more, which fills the caches and touches the memory of the product
        start = time.perf_counter()
        torch.mm(real, fake.T, out=product)
        times.append(time.perf_counter() - start)
    return seconds, statistics.median(times[1:]), memory


def report_extraction(folder):
    network = InceptionFeatures(inception_network().state_dict())
    pixels = torch.rand(PICTURES, 3, INPUT_SIZE, INPUT_SIZE).to(memory_format=torch.channels_last)
    times = []
    for _ in range(
        REPEATS + 1
    ):  # the two in turn, so that both meet the same noise; the first round is not counted
        forget(folder)
        start = time.perf_counter()
        extract(open_images(folder), network, progress=False)
        middle = time.perf_counter()
        with torch.inference_mode():
            for batch in pixels.split(network.batch_size):
                network.network(batch)
        times.append((middle - start, time.perf_counter() - middle))
    rate, plain_rate = (PICTURES / statistics.median(column) for column in zip(*times[1:], strict=True))
    print(
        f"feature extraction from {PICTURES} cold PNG files of 128x128, {network.protocol} protocol: "
        f"{rate:.1f} images/s, {rate / plain_rate:.0%} of the bare Inception network's {plain_rate:.1f} "
        f"images/s, both at batch {network.batch_size}"
    )


def report_memory(folder):
    fewer, peak = (
        in_own_process("extraction_memory", str(folder), count, REAL_BATCHES)
        for count in (SAMPLES - FURTHER, SAMPLES)
    )
    print(
        f"extraction of {SAMPLES} images: peak resident memory of the process {peak / 1e9:.2f} GB, "
        f"{(peak - fewer) / FURTHER / 1e3:.1f} KB for each of the last {FURTHER} images "
        f"(Inception on one batch in {REAL_BATCHES}, for the others random features of its sizes)"
    )


def extraction_memory(pictures, count, real_batches):
    """The peak memory in bytes of the extraction from a folder of `count` links to these pictures."""
    files = sorted(Path(pictures).iterdir())
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            Path(folder, f"{i:06d}.png").symlink_to(files[i % len(files)])
        extract(open_images(folder), HastyInception(real_batches), progress=False)
    return machine.peak_memory()


class HastyInception:
    """Inception on one batch in `real_batches`, and random features of its sizes for the others: its memory
    in a fraction of its time.
    """

    def __init__(self, real_batches):
        self.inception, self.real_batches = InceptionFeatures(inception_network().state_dict()), real_batches
        self.name, self.protocol, self.sha256 = (
            self.inception.name,
            self.inception.protocol,
            self.inception.sha256,
        )
        self.batch_size, self.calls, self.random = self.inception.batch_size, 0, np.random.default_rng(0)
        self.sizes = {
            key: array.shape[1] for key, array in self.inception(np.zeros((1, 128, 128, 3), np.uint8)).items()
        }

    def __call__(self, images):
        self.calls += 1
        if self.calls % self.real_batches == 0:
            return self.inception(images)
        return {key: self.random.random((len(images), size), np.float32) for key, size in self.sizes.items()}


def random_features(count, seed, dimension=None):
    """(count, D) float32 shaped like Inception's pool3: not negative, a sixth of them 0, correlated, of a
    covariance whose eigenvalues fall by six orders of magnitude, none to 0. Every seed draws another set of
    the same distribution.
    """
    dimension = dimension or DIMENSION
    generator = torch.Generator().manual_seed(0)
    directions = (
        torch.randn(dimension, dimension, generator=generator) / torch.arange(1, dimension + 1)[:, None]
    )
    directions /= directions.square().sum(dim=0).sqrt()
    generator.manual_seed(seed)
    features = torch.empty(count, dimension)
    for rows in features.split(4096):
        rows.copy_(torch.randn(len(rows), dimension, generator=generator) @ directions).add_(1).relu_()
    return features


def write_pictures(folder):
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        Image.fromarray(random.integers(0, 256, (128, 128, 3), np.uint8)).save(folder / f"{i:06d}.png")


def forget(folder):
    """Drop the files in a folder from the system's memory, so that they are read from the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_own_process(name, *arguments):
    """Call a function of OWN_PROCESS in a new process, so that its peak memory is that of this call alone."""
    command = [sys.executable, __file__, "--call", json.dumps([name, *arguments])]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


OWN_PROCESS = {"time_precision_recall": time_precision_recall, "extraction_memory": extraction_memory}

if __name__ == "__main__":
    run_main(main)

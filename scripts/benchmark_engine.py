"""Measure what the engine costs: the store, the noise by sample index, a whole run around a step of 50 ms,
and the memory of a rank.

    python scripts/benchmark_engine.py

On one thread of a CPU, and on the disk of the folder for temporary files: set TMPDIR to measure another. It
takes some minutes. Run it with nothing else on the machine; its lines are meant for docs/benchmarks.md.
"""

import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing, redirect_stderr
from pathlib import Path

import _beside  # noqa: F401
import torch
import torch.distributed as dist

from guided_diffusion import dist_util
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine
from guided_diffusion.runs.loop import sample_missing
from guided_diffusion.runs.noise import DrawnAhead, SampleNoise
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.runs.tally import Tally
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

CPU = torch.device("cpu")
SIZE = 128  # of an image
SHARD, IMAGES = 50, 5_000  # what the store is given
BATCH, STEPS, BATCHES = 16, 20, 6  # of the run around a step
STEP_SECONDS = 0.05
REPEATS = 5  # the median counts
FEWER, MORE, MEMORY_BATCH = 1_000, 20_000, 100
# The median counts: the C library lays out the memory of threads now so and now so, by tens of MB.
MEMORY_RUNS = 3
# As small as a U-Net gets, and images so large that MORE of them would show in the memory of whoever held
# them.
TINY = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 0,
    "channel_mult": "1,1,1",
    "attention_resolutions": "8",
}
TELL_PEAK_MEMORY = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
from guided_diffusion.runs.machine import peak_memory
print(peak_memory())
"""


def main():
    Parser(description=__doc__).parse_args()
    measure()


def measure():
    """Print one line for each figure."""
    torch.set_num_threads(1)
    print(f"machine: {machine.describe(CPU)}")
    step = FixedWork(STEP_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        report_store(Path(folder, "store"))
        report_noise(step)
        report_overhead(Path(folder, "run"), step)
        report_memory(Path(folder))


def report_store(folder):
    store = SampleStore(folder, {}, IMAGES, SHARD)
    writing, finishing = Stopwatch(CPU), Stopwatch(CPU)
    write, finish = writing.wrap(store.write), finishing.wrap(store.finish)
    for indices in store.missing():
        images = torch.randint(256, (len(indices), SIZE, SIZE, 3), dtype=torch.uint8)
        write(indices, images, torch.zeros(len(indices), dtype=torch.int64), {})
    finish()
    seconds = (writing.seconds + finishing.seconds, writing.seconds, finishing.seconds)
    both, shards, npz = (IMAGES / each for each in seconds)
    print(
        f"store, {IMAGES} images of {SIZE}x{SIZE} in shards of {SHARD}: {both:.0f} images/s, "
        f"{shards:.0f} into shards and {npz:.0f} from there into the npz, fsync included"
    )


def report_noise(step):
    shape, draws, waits = (BATCH, 3, SIZE, SIZE), [], []
    noise = SampleNoise(0, range(BATCH))
    for _ in range(STEPS):
        start = time.perf_counter()
        noise.randn(shape)
        draws.append(time.perf_counter() - start)
    with closing(DrawnAhead(noise, shape)) as ahead:
        ahead.randn(shape)  # x_T, before the first step
        for _ in range(STEPS):
            step()
            start = time.perf_counter()
            ahead.randn(shape)
            waits.append(time.perf_counter() - start)
    each = statistics.median(draws) / BATCH
    print(
        f"noise by sample index, batch {BATCH} of {SIZE}x{SIZE}: {1e3 * each:.3f} ms per image and step; "
        f"drawn ahead of steps of {1e3 * STEP_SECONDS:.0f} ms, a step waits for it "
        f"{1e3 * statistics.mean(waits):.3f} ms on average, {1e3 * max(waits):.3f} ms at most"
    )


class FixedWork:
    """Work for one thread that took `seconds` when it was set up. Its amount is fixed, so that it takes
    longer where another thread is in its way; a loop until the time is over would hide that.
    """

    def __init__(self, seconds):
        self.matrix = torch.randn(256, 256)
        self.times = 100
        for _ in range(3):
            start = time.perf_counter()
            self()
            self.times = max(1, round(self.times * seconds / (time.perf_counter() - start)))

    def __call__(self):
        for _ in range(self.times):
            torch.mm(self.matrix, self.matrix)


def report_overhead(folder, step):
    dist_util.setup_dist()
    rows = []
    # The two in turn, so that both meet the same disturbances; the first round is not counted.
    for repeat in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(BATCHES * STEPS):
            step()
        rows.append((time.perf_counter() - start, *run_around(step, folder / str(repeat))))
    dist.destroy_process_group()
    alone, sampling, finishing = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    added = statistics.median(sampling / alone - 1 for alone, sampling, _ in rows[1:])
    print(
        f"engine around {BATCHES} batches of {BATCH} images of {SIZE}x{SIZE} in {STEPS} steps: "
        f"the steps alone {alone:.3f} s ({1e3 * alone / (BATCHES * STEPS):.1f} ms each), "
        f"with the engine {sampling:.3f} s, it adds {added:.2%}; "
        f"then the npz and grid.png {finishing:.3f} s, once in a run"
    )


def run_around(step, folder):
    """Seconds of sampling and of finishing, of a run with this step and no network, its noise drawn ahead as
    by the sampling scripts.
    """

    def sample(indices, tick):
        shape = (len(indices), 3, SIZE, SIZE)
        with closing(DrawnAhead(SampleNoise(0, indices), shape)) as noise:
            images = noise.randn(shape)
            for _ in range(STEPS):
                step()
                noise(images)
                tick()
        return to_uint8(images), torch.zeros(len(indices), dtype=torch.int64)

    start = time.perf_counter()
    store = SampleStore(folder, {}, BATCHES * BATCH, BATCH)
    with redirect_stderr(io.StringIO()):  # the progress bar, written as into a file
        sample_missing(store, sample, STEPS, Tally(CPU))
    middle = time.perf_counter()
    store.finish()
    return middle - start, time.perf_counter() - middle


def report_memory(folder):
    model, _ = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY})
    torch.save(model.state_dict(), folder / "tiny.pt")
    fewer, more = (
        statistics.median(sampling_memory(folder, count) for _ in range(MEMORY_RUNS))
        for count in (FEWER, MORE)
    )
    images = (MORE - FEWER) * 3 * TINY["image_size"] ** 2
    print(
        f"peak resident memory of a rank, tiny network, batch {MEMORY_BATCH}, median of {MEMORY_RUNS} runs: "
        f"{fewer / 1e6:.1f} MB for {FEWER} samples, {more / 1e6:.1f} MB for {MORE}: "
        f"{(more - fewer) / 1e6:+.1f} MB, "
        f"where the further images are {images / 1e6:.1f} MB"
    )


def sampling_memory(folder, count):
    """The peak memory in bytes of scripts/classifier_sample.py for `count` samples, in a process of its
    own.
    """
    size = {"timestep_respacing": 2, "batch_size": MEMORY_BATCH, "num_samples": count}
    run = {"device": "cpu", "overwrite": True, "model_path": folder / "tiny.pt", "out": folder / str(count)}
    words = [str(word) for item in {**TINY, **size, **run}.items() for word in (f"--{item[0]}", item[1])]
    command = [
        sys.executable,
        "-c",
        TELL_PEAK_MEMORY,
        Path(__file__).with_name("classifier_sample.py"),
        *words,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    run_main(main)

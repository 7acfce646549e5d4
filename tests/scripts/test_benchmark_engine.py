"""The benchmark of the engine prints its figures, and they agree with each other."""

import re
import subprocess

import pytest
import torch.distributed as dist
from forked import Forked
from helpers import call, environment, load_script

SMALL = {"SIZE": 8, "SHARD": 3, "IMAGES": 10, "BATCH": 2, "STEPS": 3, "BATCHES": 2, "STEP_SECONDS": 0.02}
SMALL |= {"REPEATS": 1, "FEWER": 2, "MORE": 5, "MEMORY_BATCH": 2, "MEMORY_RUNS": 1}


@pytest.fixture
def engine_benchmark(monkeypatch):
    """The script with sizes that take seconds; its child processes find this checkout."""
    script = load_script("benchmark_engine")
    for name, size in SMALL.items():
        monkeypatch.setattr(script, name, size)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", Forked)
    return script


def figures(line, pattern):
    match = re.search(pattern.replace("#", r"([+-]?\d+(?:\.\d+)?)"), line)
    assert match, line
    return [float(group) for group in match.groups()]


def test_the_engine_benchmark_prints_its_four_figures(engine_benchmark):
    result = call(engine_benchmark.main, [])
    assert result.code == 0, result.err
    machine, store, noise, overhead, memory = result.out.splitlines()
    assert machine.startswith("machine: ") and "1 threads" in machine
    both, shards, npz = figures(
        store, "10 images of 8x8 in shards of 3: # images/s, # into shards and # from there into the npz"
    )
    assert 1 / both == pytest.approx(1 / shards + 1 / npz, rel=0.1)
    each, mean, highest = figures(
        noise, "8x8: # ms per image and step; drawn ahead of steps of 20 ms, .* # ms on average, # ms at most"
    )
    assert each > 0 and mean <= highest
    alone, step, whole, added = figures(overhead, r"alone # s \(# ms each\), with the engine # s, it adds #%")
    assert step == pytest.approx(1e3 * alone / 6, rel=0.01)
    assert added == pytest.approx(100 * (whole / alone - 1), abs=3)
    fewer, more, growth, images = figures(
        memory, r"# MB for 2 samples, # MB for 5: # MB, where the further images are # MB"
    )
    assert 100 < fewer < 2000 and growth == pytest.approx(more - fewer, abs=0.11)
    assert images == round(3 * 3 * 32**2 / 1e6, 1)
    assert not dist.is_initialized()

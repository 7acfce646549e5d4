"""The benchmark of the engine prints its figures, and they agree with each other."""

import re

import pytest
import torch.distributed as dist
from helpers import call, environment, load_script

FIGURE = r"([+-]?\d+(?:\.\d+)?)"


@pytest.fixture
def engine_benchmark(monkeypatch):
    """The script with sizes that take seconds; its child processes find this checkout."""
    script = load_script("benchmark_engine")
    sizes = {
        "SIZE": 8,
        "SHARD": 3,
        "IMAGES": 10,
        "BATCH": 2,
        "STEPS": 3,
        "BATCHES": 2,
        "STEP_SECONDS": 0.02,
        "REPEATS": 1,
    }
    for name, size in {**sizes, "FEWER": 2, "MORE": 5, "MEMORY_BATCH": 2, "MEMORY_RUNS": 1}.items():
        monkeypatch.setattr(script, name, size)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return script


def figures(line, pattern):
    match = re.search(pattern.replace("#", FIGURE), line)
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
    assert step == pytest.approx(1e3 * alone / 6, rel=0.01) and added == pytest.approx(
        100 * (whole / alone - 1), abs=3
    )
    fewer, more, growth, images = figures(
        memory, r"# MB for 2 samples, # MB for 5: # MB, where the further images are # MB"
    )
    assert (
        100 < fewer < 2000
        and growth == pytest.approx(more - fewer, abs=0.11)
        and images == round(3 * 3 * 32**2 / 1e6, 1)
    )
    assert not dist.is_initialized()


def test_the_further_images_would_show_in_the_memory_of_a_rank_that_held_them(engine_benchmark):
    fresh = load_script("benchmark_engine")
    assert (fresh.MORE - fresh.FEWER) * 3 * fresh.TINY["image_size"] ** 2 > 50e6


def test_the_work_of_a_step_takes_its_time_and_is_the_same_each_time(engine_benchmark, monkeypatch):
    step, calls = engine_benchmark.FixedWork(0.001), []
    monkeypatch.setattr(engine_benchmark.torch, "mm", lambda a, b: calls.append(None))
    step()
    step()
    assert len(calls) == 2 * step.times > 0


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--engine", "--repeats", "3"], 1, "error: --repeats is about sampling: drop it or --engine"),
        (["--engine", "--evaluation"], 2, "not allowed with argument"),
    ],
)
def test_the_engine_benchmark_takes_no_flags_of_the_others(flags, code, message):
    result = call(load_script("benchmark").main, flags)
    assert result.code == code and message in result.err


def test_the_benchmark_hands_over_to_that_of_the_engine(monkeypatch):
    benchmark, handed = load_script("benchmark"), []
    monkeypatch.setattr(
        benchmark.runpy,
        "run_path",
        lambda path, run_name: handed.append((path, run_name, benchmark.sys.argv[1:])),
    )
    assert call(benchmark.main, ["--engine"]).code == 0
    ((path, run_name, flags),) = handed
    assert path.endswith("scripts/benchmark_engine.py") and (run_name, flags) == ("__main__", [])

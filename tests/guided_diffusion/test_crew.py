"""What processes tell each other. Here several crews share one store in one process, or real processes share
one over TCP.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from guided_diffusion.runs import workers as crew_module
from guided_diffusion.runs.workers import Crew

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(crew_module, "PROGRESS_SECONDS", 0.02)


def test_every_position_is_claimed_once_by_somebody():
    store, claimed = dist.HashStore(), []

    def work(rank):
        with Crew(store, "list", rank, 3) as crew:
            while (position := crew.claim()) < 100:
                claimed.append(position)
            assert crew.wait_for_all() is None

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(100))


def test_lists_of_other_names_are_other_lists():
    store = dist.HashStore()
    with Crew(store, "one", 0, 1) as first:
        assert [first.claim(), first.claim()] == [0, 1]
    with Crew(store, "two", 0, 1) as second:
        assert second.claim() == 0


def test_progress_is_that_of_all_and_complete_at_the_end():
    store, seen = dist.HashStore(), []
    with Crew(store, "list", 1, 2) as other:
        other.progress(5)
    with Crew(store, "list", 0, 2, seen.append) as crew:
        crew.progress(2)
        crew.progress(3)
    assert seen[-1] == 10 and seen == sorted(seen)


def test_one_that_asks_to_stop_stops_those_that_wait_too():
    store = dist.HashStore()
    with Crew(store, "list", 0, 2) as crew:
        assert crew.stop_signal() is None
        threading.Timer(0.1, Crew(store, "list", 1, 2).ask_to_stop, [signal.SIGTERM]).start()
        assert crew.wait_for_all() == signal.SIGTERM
        dist.PrefixStore("list", store).add("left/1", 1)


CHILD = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from guided_diffusion.runs import workers as crew
crew.BEAT_SECONDS, crew.SILENCE_SECONDS, crew.PROGRESS_SECONDS = 0.2, 4.0, 0.05
port, rank, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=timedelta(seconds=60))
with crew.Crew(store, "list", rank, 3) as member:
    print("in", flush=True)
    time.sleep(1)
    if what == "fail":
        raise ValueError("the disk is on fire")
    member.wait_for_all()
"""


@pytest.fixture
def trio():
    """Start three processes of a crew, each of which does what it is told; yields the function that starts
    them.
    """
    started = []

    def start(*what):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for rank in range(3):
            command = [sys.executable, "-c", CHILD, str(port), str(rank), what[rank]]
            started.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        assert [process.stdout.readline() for process in started] == ["in\n"] * 3
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends_of(processes):
    """(exit code, last line of stderr) of each, which must come within seconds."""
    errors = [process.communicate(timeout=30)[1] for process in processes]
    return [
        (process.returncode, error.strip().splitlines()[-1] if error.strip() else "")
        for process, error in zip(processes, errors, strict=True)
    ]


def test_a_crew_of_processes_ends_together(trio):
    assert ends_of(trio("wait", "wait", "wait")) == [(0, "")] * 3


def test_a_failure_of_one_stops_the_others_and_is_told(trio):
    first, failed, last = ends_of(trio("wait", "fail", "wait"))
    assert failed[0] == 1
    for code, line in (first, last):
        assert code == 1
        assert re.search(
            r"rank 1 \(process \d+ on .+\) failed: the disk is on fire; the same command goes on", line
        ), line


@pytest.mark.parametrize(
    ("victim", "cause"),
    [
        (2, r"rank 2 \(process \d+ on .+\) has not been heard of for \d+ s"),
        (0, "the store of rank 0 does not answer, so rank 0 is gone"),
    ],
)
def test_a_killed_process_stops_the_others_and_is_named(trio, victim, cause):
    processes = trio("wait", "wait", "wait")
    processes[victim].kill()
    for rank, (code, line) in enumerate(ends_of(processes)):
        if rank != victim:
            assert code == 1 and re.search(cause, line), line

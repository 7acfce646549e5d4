"""What processes tell each other: several workers share one store in this process, or processes of their own
share one over TCP.
"""

import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from forked import Forked

from guided_diffusion.runs.workers import Workers


def test_every_position_is_claimed_once_by_somebody():
    store, claimed = dist.HashStore(), []

    def work(rank):
        with Workers(store, "list", rank, 3) as workers:
            while (position := workers.claim()) < 100:
                claimed.append(position)
            assert workers.wait_for_all() is None

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))
    assert sorted(claimed) == list(range(100))


def test_lists_of_other_names_are_other_lists():
    store = dist.HashStore()
    with Workers(store, "one", 0, 1) as first, Workers(store, "two", 0, 1) as second:
        assert [first.claim(), first.claim(), second.claim()] == [0, 1, 0]


def test_progress_is_that_of_all_and_complete_at_the_end():
    store, seen = dist.HashStore(), []
    with Workers(store, "list", 1, 2) as other:
        other.progress(5)
    with Workers(store, "list", 0, 2, seen.append) as workers:
        workers.progress(2)
        workers.progress(3)
    assert seen[-1] == 10 and seen == sorted(seen)


def test_one_that_asks_to_stop_stops_those_that_wait_too():
    store = dist.HashStore()

    def stopped():
        with Workers(store, "list", 1, 2) as other:
            other.ask_to_stop(signal.SIGTERM)

    with Workers(store, "list", 0, 2) as workers:
        assert workers.stop_signal() is None
        threading.Timer(0.1, stopped).start()
        assert workers.wait_for_all() == signal.SIGTERM


CHILD = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from guided_diffusion.runs import workers
workers.BEAT_SECONDS, workers.SILENCE_SECONDS, workers.PROGRESS_SECONDS = 0.2, 4.0, 0.05
port, rank, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore("127.0.0.1", port, 3, is_master=rank == 0, timeout=timedelta(seconds=60))
with workers.Workers(store, "list", rank, 3) as member:
    Path(sys.argv[4]).touch()
    time.sleep(1)
    if what == "fail":
        raise ValueError("the disk is on fire")
    member.wait_for_all()
"""


@pytest.fixture
def trio(tmp_path):
    """Three processes, each of which does what it is told; yields the function that starts them."""
    started = []

    def start(*what):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(3):
            here = tmp_path / f"{rank} is in"
            started.append(Forked([sys.executable, "-c", CHILD, port, rank, what[rank], here]))
        while len(list(tmp_path.glob("* is in"))) < 3:
            assert {process.poll() for process in started} == {None}
            time.sleep(0.01)
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def ends_of(processes):
    """(exit code, last line of stderr) of each, which must come within seconds."""
    errors = [process.communicate(timeout=30)[1].strip().splitlines() or [""] for process in processes]
    return [(process.returncode, lines[-1]) for process, lines in zip(processes, errors, strict=True)]


def test_processes_that_are_done_end_together(trio):
    assert ends_of(trio("wait", "wait", "wait")) == [(0, "")] * 3


def test_a_failure_of_one_stops_the_others_and_is_told(trio):
    first, failed, last = ends_of(trio("wait", "fail", "wait"))
    told = r"rank 1 \(process \d+ on .+\) failed: the disk is on fire; the same command resumes"
    assert failed[0] == 1
    for code, line in (first, last):
        assert code == 1 and re.search(told, line), line


@pytest.mark.parametrize(
    ("victim", "cause"),
    [
        (2, r"rank 2 \(process \d+ on .+\) was not heard for \d+ s"),
        (0, "the store of rank 0 does not answer, so rank 0 is gone"),
    ],
)
def test_a_killed_process_stops_the_others_and_is_named(trio, victim, cause):
    processes = trio("wait", "wait", "wait")
    processes[victim].kill()
    for rank, (code, line) in enumerate(ends_of(processes)):
        if rank != victim:
            assert code == 1 and re.search(cause, line), line

"""Ranks from the launchers' variables, and how their processes come together."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from guided_diffusion.runs.launchers import Place, find_place, join, meet

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(NAMES, "5834", strict=True)}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
}
STEP = {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "3"}
SRUN = {**BATCH, **STEP, "SLURM_PROCID": "3"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("", 0, 1, 0, 1)),
        (TORCHRUN, ("torchrun", 1, 2, 1, 2)),
        (OPEN_MPI, ("Open MPI", 5, 8, 3, 4)),
        (HYDRA, ("mpiexec", 5, 8, 3, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, ("mpiexec", 1, 3, 1, 3)),
        (SRUN, ("srun", 3, 4, 3, 4)),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "2"}, ("srun", 3, 4, 3, 1)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1"}, ("srun", 1, 3, 1, 3)),
        # A batch script is no step; nor is a shell in an allocation.
        (BATCH, ("", 0, 1, 0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, ("", 0, 1, 0, 1)),
        # One starts the other: the inner one's ranks count.
        ({**SRUN, **HYDRA}, ("mpiexec", 5, 8, 3, 4)),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, ("srun", 3, 4, 3, 4)),
        ({**SRUN, **OPEN_MPI, **TORCHRUN}, ("torchrun", 1, 2, 1, 2)),
    ],
)
def test_the_place_that_a_launcher_tells(environment, expected):
    place = find_place(environment)
    assert (place.launcher, place.rank, place.size, place.local_rank, place.local_size) == expected


def test_what_cannot_be_known_names_torchrun():
    with pytest.raises(ValueError, match="with PMI_RANK, but without PMI_SIZE: start with torchrun"):
        find_place({"PMI_RANK": "1"})
    with pytest.raises(ValueError, match="8 processes on several nodes: start torchrun there"):
        join(find_place(OPEN_MPI), timedelta(seconds=1))


def test_jobs_are_told_apart_by_their_numbers_else_by_the_process_that_started_them():
    by_number = [{**OPEN_MPI, "PMIX_NAMESPACE": "12"}, {**OPEN_MPI, "PMIX_NAMESPACE": "13"}, SRUN]
    assert len({find_place(environment).job for environment in by_number}) == 3
    code = "from guided_diffusion.runs.launchers import find_place; print(find_place().job)"
    plain, shell = [sys.executable, "-c", code], ["sh", "-c", f'{sys.executable} -c "{code}"; true']
    environment = {**os.environ, **HYDRA, "PYTHONPATH": str(ROOT)}
    jobs = [subprocess.run(words, env=environment, capture_output=True).stdout for words in (plain, shell)]
    assert jobs[0] == jobs[1] and jobs[0].startswith(f"{os.getpid()}".encode())


# Coming together


def on_threads(function, ranks):
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(function, ranks))


def test_processes_meet_under_one_new_name_whatever_an_earlier_attempt_left_in_the_store():
    store, seconds = dist.HashStore(), timedelta(seconds=20)
    names = []
    for _ in range(3):  # the same store again and again, as after torchrun's restarts
        attempt = on_threads(lambda rank: meet(store, rank, 3, seconds), [2, 1, 0])
        assert len(set(attempt)) == 1
        names.append(attempt[0])
    assert len(set(names)) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_come_is_waited_for_so_long(rank):
    store = dist.HashStore()
    store.set("word/1", "of an earlier attempt")
    store.set("meeting", "earlier of an earlier attempt")
    with pytest.raises(ValueError, match=f"rank {rank} waited 1 s for the 2 processes of this run"):
        meet(store, rank, 2, timedelta(seconds=1))


@pytest.fixture
def addresses(tmp_path, monkeypatch):
    """The folder in which processes on this node find each other."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"guided-diffusion-{os.getuid()}"
    folder.mkdir()
    return folder


def joined(place, seconds=60):
    store = join(place, timedelta(seconds=seconds))
    store.add("in", 1)
    while store.add("in", 0) < place.size:
        pass
    return store


@pytest.mark.parametrize("left", [None, "dead port", "another's store", "nonsense"])
def test_processes_on_a_node_find_each_other_whatever_a_killed_run_left(addresses, left):
    foreign = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    content = {"dead port": "1 abc", "another's store": f"{foreign.port} abc", "nonsense": "?"}.get(left)
    if content:
        (addresses / "address-a_job").write_text(content)
    places = [Place("Open MPI", rank, 3, rank, 3, "a/job") for rank in (2, 1, 0)]
    stores = on_threads(joined, places)
    stores[0].set("word", "from rank 2")
    assert [store.get("word") for store in stores] == [b"from rank 2"] * 3
    assert list(addresses.iterdir()) == []


def test_runs_of_other_jobs_beside_it_do_not_mix(addresses):
    places = [Place("srun", rank, 2, rank, 2, job) for job in ("7-0", "7-1") for rank in (1, 0)]
    stores = on_threads(joined, places)
    for place, store in zip(places, stores, strict=True):
        store.set(f"job/{place.rank}", place.job)
    assert [store.get("job/0").decode() for store in stores] == [place.job for place in places]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_never_comes_ends_the_others_with_a_line_that_names_torchrun(addresses, rank):
    with pytest.raises(ValueError, match=f"rank {rank} waited 1 s .* under srun: start torchrun instead"):
        joined(Place("srun", rank, 2, rank, 2, "7-0"), seconds=1)
    assert list(addresses.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_trusted(addresses, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    (addresses.parent / "guided-diffusion-12345").mkdir()
    with pytest.raises(ValueError, match="belongs to somebody else: set TMPDIR"):
        joined(Place("srun", 0, 2, 0, 2, "7-0"), seconds=1)

"""How the processes of one run find each other: by torchrun's variables, or by those of mpiexec and srun.

torchrun gives an address at which all meet. mpiexec and srun give ranks only. On one node that is enough:
rank 0 opens a store on a free port and writes the port into a file that all find by what they share, the
launcher's job or process. No MPI library is needed.
"""

import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from guided_diffusion.files.atomic import renamed_when_complete

ANSWER_TIMEOUT = timedelta(seconds=10)  # within which rank 0 answers at an address that is not stale
HERE = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run. local_*: among those on its node. job: what all of them
    have in common, and no other run on this node.
    """

    launcher: str = ""  # none: plain python
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    job: str = ""


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher's variables tell; torchrun's come first. Raises ValueError where they tell
    a rank, but not of how many.
    """
    for find in (_by_torchrun, _by_open_mpi, _by_hydra, _by_srun):
        if place := find(environment):
            return place
    return Place()


def join(place: Place, timeout: timedelta) -> dist.Store:
    """A key-value store that the processes of this attempt share and nobody else, once all have come.

    Raises ValueError where mpiexec or srun spread them over nodes, and where some do not come in time.
    """
    if place.size == 1 and place.launcher != "torchrun":
        return dist.HashStore()
    if place.launcher == "torchrun":
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        return dist.PrefixStore(meet(store, place.rank, place.size, timeout), store)
    if place.local_size < place.size:
        raise ValueError(
            f"{place.launcher} started {place.size} processes on several nodes: start torchrun there instead,"
            " as scripts/sample.sbatch does"
        )
    try:
        return _open_on_this_node(place, timeout) if place.rank == 0 else _find_on_this_node(place, timeout)
    except ValueError as error:
        raise ValueError(f"{error} under {place.launcher}: start torchrun instead") from None


def meet(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """A new name that the processes of this attempt share, once all have come; ValueError where some have not
    within `timeout`.

    After an elastic restart torchrun's store still holds what the processes of the attempt before wrote into
    it, their addresses among that. So nothing found there is believed unless it answers a word that was made
    up now.
    """
    word, others = uuid.uuid4().hex, [str(r) for r in range(size) if r]
    deadline = time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"word/{rank}", word)
    while time.monotonic() < deadline:
        if rank == 0:
            words = [store.get(f"word/{r}").decode() for r in others if store.check([f"word/{r}"])]
            store.set("meeting", " ".join([word, *words]))
            if all(store.check([f"{word}/{r}"]) for r in others):
                return word
        elif store.check(["meeting"]):
            name, *words = store.get("meeting").decode().split()
            if word in words:
                store.set(f"{name}/{rank}", "here")
                return name
        time.sleep(0.05)
    raise _late(rank, size, timeout)


def _late(rank, size, timeout):
    seconds = f"{timeout.total_seconds():.0f} s"
    return ValueError(f"rank {rank} waited {seconds} for the {size} processes of this run to come together")


def _open_on_this_node(place, timeout):
    """Rank 0: open a store, tell its address until all have come."""
    store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False, timeout=timeout)
    path, address = _address_file(place), f"{store.port} {uuid.uuid4().hex}"
    own = dist.PrefixStore(address, store)
    own.set("open", "")
    with renamed_when_complete(path) as file:
        file.write(address.encode())
    try:
        return dist.PrefixStore(meet(own, place.rank, place.size, timeout), own)
    finally:
        # A later run of the same job may have written its own there.
        if path.exists() and path.read_text() == address:
            path.unlink()


def _find_on_this_node(place, timeout):
    """Other ranks: try the address that is written, until somebody answers there. A file that a killed run
    left names a port at which nobody listens, or one whose store knows nothing of this address.
    """
    path, deadline = _address_file(place), time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError, dist.DistError):
            address = path.read_text()
            port = int(address.split()[0])
            socket.create_connection((HERE, port), 1).close()  # a store would try a dead port again and again
            store = dist.TCPStore(HERE, port, is_master=False, timeout=ANSWER_TIMEOUT)
            own = dist.PrefixStore(address, store)
            if own.check(["open"]):
                name = meet(own, place.rank, place.size, ANSWER_TIMEOUT)
                store.set_timeout(timeout)
                return dist.PrefixStore(name, own)
        time.sleep(0.05)
    raise _late(place.rank, place.size, timeout)


def _address_file(place):
    folder = Path(tempfile.gettempdir(), f"guided-diffusion-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder} belongs to somebody else: set TMPDIR to a folder of your own")
    return folder / re.sub(r"[^\w.@-]", "_", f"address-{place.job}")


def _by_torchrun(environment):
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Place("torchrun", *(int(environment.get(name, name == "LOCAL_WORLD_SIZE")) for name in names))
    return None


def _by_open_mpi(environment):
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid")
    names = (f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    return _by_names("Open MPI", environment, *names, job=job)


def _by_hydra(environment):
    """MPICH, Intel MPI and others that start processes by Hydra; srun may set such ranks beside its own."""
    if "MPI_LOCALNRANKS" not in environment and _by_srun(environment):
        return None
    return _by_names("mpiexec", environment, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _by_srun(environment):
    """None in a batch script, which has SLURM_PROCID 0 too, but is no step of its job."""
    steps = any(name.startswith(("SLURM_STEP", "SLURM_SRUN_COMM")) for name in environment)
    if "SLURM_JOB_ID" in environment and not steps:
        return None
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    job = "-".join(environment.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")).strip("-")
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or "1"
    place = _by_names("srun", environment, "SLURM_PROCID", size, "SLURM_LOCALID", size, job=job)
    return replace(place, local_size=1) if place and int(nodes) > 1 else place


def _by_names(launcher, environment, rank, size, local_rank, local_size, job=None):
    """The place that these variables tell, None without the first. What is on the node is taken to be all
    where that is not told.
    """
    if rank not in environment:
        return None
    if size not in environment:
        raise ValueError(
            f"{launcher} started this process with {rank}, but without {size}: start with torchrun"
        )
    rank_here, size_here = int(environment[rank]), int(environment[size])
    local = int(environment.get(local_rank, rank_here)), int(environment.get(local_size, size_here))
    return Place(launcher, rank_here, size_here, *local, job=job or _launcher_process(rank))


def _launcher_process(rank):
    """The nearest process above this one that has no rank: it started all of them. With its start time, since
    numbers of processes are used again.
    """
    pid = os.getppid()
    try:
        while f"\0{rank}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(_stat(pid)[1])
    except OSError:
        pass  # another user's, such as Slurm's, or a system without /proc
    with suppress(OSError):
        return f"{pid}-{_stat(pid)[19]}"
    return str(pid)


def _stat(pid):
    """The fields of /proc/PID/stat after the name, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()

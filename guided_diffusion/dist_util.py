"""Ranks under torchrun; plain python is rank 0 of 1. No MPI."""

import ctypes
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

from guided_diffusion.files import checkpoints

# Scripts written for guided-diffusion gather when a batch or all is done, which may take hours; torchrun ends
# all ranks when one fails.
_TIMEOUT = timedelta(days=30)
_START_TIMEOUT = timedelta(minutes=5)
_store = None  # the processes' key-value store, once setup_dist was called


def setup_dist():
    """Join the process group that torchrun's environment describes, or make one of a single process; once per
    process.

    CPU tensors go through gloo, CUDA tensors through NCCL, which needs a GPU of its own for every process.
    """
    if dist.is_initialized():
        return
    gpu_each = (
        torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    )
    backend = "cpu:gloo,cuda:nccl" if gpu_each and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    global _store
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    _store = dist.PrefixStore(meet(store, rank, world_size, _START_TIMEOUT), store)
    group = dist.PrefixStore("process group", _store)
    dist.init_process_group(backend, timeout=_TIMEOUT, store=group, rank=rank, world_size=world_size)


def meet(store, rank, world_size, timeout):
    """A new name that the processes of this attempt share, once all have come; ValueError where some have not
    within `timeout`.

    After an elastic restart torchrun's store still holds what the processes of the attempt before wrote into
    it, their addresses among that. So nothing found there is believed unless it answers a word that was made
    up now.
    """
    word, others, deadline = (
        uuid.uuid4().hex,
        [str(r) for r in range(world_size) if r],
        time.monotonic() + timeout.total_seconds(),
    )
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
    raise ValueError(
        f"rank {rank} waited {timeout.total_seconds():.0f} s for the {world_size} processes of this run to come together"
    )


def shared_store():
    """The key-value store that the processes share, once `setup_dist` was called."""
    if _store is None:
        raise RuntimeError("call setup_dist first")
    return _store


def is_restart():
    """Whether torchrun or Slurm started this process again after an earlier attempt of the same job."""
    return any(
        int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    )


def dev():
    """This rank's device: its CUDA device by local rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def choose_device(name):
    """The device that a flag names, or this rank's if it is empty. Raises ValueError for one that is not
    there.
    """
    if not name:
        return dev()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name} cannot be used here ({str(error).splitlines()[0]}); write cpu, cuda or cuda:1"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name} cannot sample; write cpu, cuda or cuda:1")
    return device


def keep_freed_memory():
    """Let the C library keep the buffers that a step frees for the next step, instead of handing them back to
    the system.

    On a CPU the pages of every large activation are otherwise mapped and zeroed anew, which took a tenth of
    the 128x128 U-Net's time. To be called once the networks are built, so that the temporaries of building do
    not stay. Does nothing where the library is not glibc.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(m_trim_threshold, -1)
    mallopt(m_mmap_max, 0)


def load_state_dict(path, map_location="cpu"):
    """Read a checkpoint as `checkpoints.load_state_dict` does, and move it to `map_location`."""
    return {name: tensor.to(map_location) for name, tensor in checkpoints.load_state_dict(path).items()}

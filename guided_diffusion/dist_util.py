"""Ranks under torchrun, mpiexec and srun; plain python is rank 0 of 1. No MPI library."""

import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from guided_diffusion.files import checkpoints
from guided_diffusion.files.formats import TORCH, kind_of
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.files.state_dicts import is_optimiser
from guided_diffusion.runs.launchers import find_place, join

# Scripts written for guided-diffusion gather when a batch or all is done, which may take hours; torchrun ends
# all ranks when one fails.
_TIMEOUT = timedelta(days=30)
_START_TIMEOUT = timedelta(minutes=5)
_store = None  # the processes' key-value store, once setup_dist was called


def setup_dist():
    """Join the process group of the launcher that started this process, or make one of a single process; once
    per process.

    CPU tensors go through gloo, CUDA tensors through NCCL, which needs a GPU of its own for every process.
    Raises ValueError where the processes do not come together.
    """
    if dist.is_initialized():
        return
    place = find_place()
    gpu_each = torch.cuda.is_available() and place.local_size <= torch.cuda.device_count()
    backend = "cpu:gloo,cuda:nccl" if gpu_each and dist.is_nccl_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    global _store
    _store = join(place, _START_TIMEOUT)
    group = dist.PrefixStore("process group", _store)
    dist.init_process_group(backend, timeout=_TIMEOUT, store=group, rank=place.rank, world_size=place.size)


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
        return torch.device("cuda", find_place().local_rank % torch.cuda.device_count())
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
    """Read a checkpoint as `checkpoints.load_state_dict` does, and move it to `map_location`; the state of an
    optimizer too, which stays on the CPU: the optimizer that takes it moves it.
    """
    if kind_of(existing_file(path)) == TORCH and is_optimiser(content := checkpoints.load_torch(path)):
        return content
    state_dict = checkpoints.load_state_dict(path)
    for name, tensor in state_dict.items():  # in place: the mapping carries the versions that modules read
        state_dict[name] = tensor.to(map_location)
    return state_dict


def sync_params(params):
    """Give all processes the values that rank 0 has for these tensors, in place."""
    with torch.no_grad():
        for tensor in params:
            dist.broadcast(tensor, 0)

"""What a measurement says about the machine that it was taken on."""

import platform
import resource
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from guided_diffusion import __version__


def describe(device: torch.device) -> str:
    """The name of the processor or GPU, the threads on a CPU, and the version of PyTorch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """What can change the numbers, by name, and those of `more` that are installed."""
    found = {"elucd": __version__, "torch": str(torch.__version__)}
    for name in ("torchvision", "numpy", *more):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    # On Linux getrusage's figure begins with the peak of the process that started this one. On macOS it is in
    # bytes.
    return _kilobytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_memory() -> int:
    """The resident memory of this process now, in bytes; where the system does not tell, its peak."""
    return _kilobytes("/proc/self/status", "VmRSS") or peak_memory()


def available_memory(device: torch.device) -> int | None:
    """The bytes that this process may still take on `device`, None where that cannot be told. A container's
    limit counts.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    amounts = [_kilobytes("/proc/meminfo", "MemAvailable"), _left_in_container()]
    return min((amount for amount in amounts if amount is not None), default=None)


def _left_in_container(folder=Path("/sys/fs/cgroup")):
    limit, used, statistics = (folder / name for name in ("memory.max", "memory.current", "memory.stat"))
    if not (limit.exists() and used.exists() and statistics.exists()) or limit.read_text().strip() == "max":
        return None
    # Pages of files that were read are given up when memory is wanted.
    entries = dict(line.split() for line in statistics.read_text().splitlines())
    return int(limit.read_text()) - int(used.read_text()) + int(entries.get("inactive_file", 0))


def _kilobytes(path, key):
    """The entry `key` of a file of lines such as "VmRSS:  123 kB", in bytes; None where there is none."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)

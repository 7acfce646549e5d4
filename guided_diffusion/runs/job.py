"""One sampling run, from its flags to its files: the same for every sampler."""

import math
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from guided_diffusion import dist_util, logger
from guided_diffusion.files.pixels import ROUNDING, to_uint8
from guided_diffusion.files.pretrained import sha256
from guided_diffusion.runs import machine
from guided_diffusion.runs.lock import locked
from guided_diffusion.runs.loop import sample_missing
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.runs.tally import Tally


@dataclass(frozen=True)
class Sampler:
    """What draws a batch: sample(indices, tick) -> ((n, 3, H, W) float images, (n,) int64 labels); it calls
    tick() after each step.

    image_size: H and W. notes: what the log should say at the start. finish: makes images of so many samples,
    after their last step, and drops them: for a dry run to time; None where a sample is an image.
    """

    sample: Callable[[range, Callable[[], None]], tuple[Tensor, Tensor]]
    num_steps: int
    image_size: int
    notes: list[str] = field(default_factory=list)
    finish: Callable[[int], Any] | None = None

    @property
    def image_bytes(self) -> int:
        """Of one image in a shard."""
        return 3 * self.image_size**2


@dataclass(frozen=True)
class Job:
    """A run as its flags describe it, with nothing loaded yet.

    flags: all of them after defaults, by name. not_compared: those that do not decide about the samples:
    a run with another value of them may resume in the same folder. files: by flag, a function that returns
    the file, or None for none, and raises FileNotFoundError; the flag's value is then not compared, but the
    file's hash.
    build: loads the networks. rounding: a key of ROUNDING. drawn_by: who draws noise and labels, for the
    record. overwrite: start anew, unless this is another attempt of a job that did so. png_name: as
    `SampleStore`'s, as npz_too. name_of: what errors call a sample, by its index. remarks: what else the record
    says. defaults: of the flags. packages: whose versions decide too.
    """

    folder: Path
    flags: Mapping[str, Any]
    not_compared: Collection[str]
    files: Mapping[str, Callable[[], Path | None]]
    build: Callable[[torch.device, Tally], Sampler]
    num_samples: int
    batch_size: int
    rounding: str
    drawn_by: Mapping[str, str]
    overwrite: bool = False
    device: str = ""
    log_guidance: bool = False
    png_name: Callable[[int], str] | None = None
    npz_too: bool = False
    name_of: Callable[[int], object] = int
    remarks: Callable[[], Mapping[str, Any]] = dict
    defaults: Mapping[str, Any] = field(default_factory=dict)
    packages: Collection[str] = ()

    @classmethod
    def of(cls, config: Any, **fields: Any) -> "Job":
        """A job of a configuration (see guided_diffusion.flags), and of what it does not say itself."""
        return cls(
            folder=config.folder,
            flags=config.record(),
            defaults=config.defaults(),
            not_compared=config.not_compared(),
            batch_size=config.batch_size,
            overwrite=config.overwrite,
            device=config.device,
            log_guidance=config.log_guidance,
            **fields,
        )

    @property
    def starts_anew(self) -> bool:
        """Whether what the folder holds is to be removed."""
        return self.overwrite and not dist_util.is_restart()

    def found_files(self) -> dict[str, Path]:
        """The files by flag. Raises FileNotFoundError, with the flag, for one that is not there."""
        found = {}
        for flag, find in self.files.items():
            try:
                if path := find():
                    found[flag] = path
            except FileNotFoundError as error:
                named = f"--{flag}: {error}" if flag in self.flags else str(error)
                raise FileNotFoundError(named) from error
        return found

    def settings(self) -> dict[str, Any]:
        """What decides about the samples: flags, hashes of files, versions."""
        hashes = {flag: sha256(path) for flag, path in self.found_files().items()}
        flags = {
            key: value
            for key, value in _plain(self.flags).items()
            if key not in {*self.not_compared, *hashes}
        }
        return {**flags, "sha256": hashes, "versions": machine.versions(self.packages)}

    def open_store(self, settings: dict[str, Any], device: torch.device) -> SampleStore:
        """Open the output folder, and make it a run's where it is not yet."""
        others = {key: value for key, value in _plain(self.flags).items() if key not in settings}
        record = {
            "not_compared": {**others, "device": machine.describe(device)},
            "rounding": ROUNDING[self.rounding],
            "drawn_by": dict(self.drawn_by),
            **self.remarks(),
        }
        return SampleStore(
            self.folder,
            settings,
            self.num_samples,
            self.batch_size,
            record,
            self.png_name,
            _plain(self.defaults),
            self.npz_too,
        )


def _plain(flags):
    """Flags as standard JSON, which has no infinity, can hold them."""
    return {
        key: str(value) if isinstance(value, float) and math.isinf(value) else value
        for key, value in flags.items()
    }


def run(job: Job) -> Path | None:
    """Draw what the folder lacks, together with the run's other processes, and join it.

    Returns the path of the result, the npz or dataset.json, on rank 0, and None on the others.
    """
    dist_util.setup_dist()
    device = dist_util.choose_device(job.device)
    _require_writable(job.folder)
    job.found_files()  # before minutes go into loading
    with locked(job.folder) if dist.get_rank() == 0 else nullcontext() as left_behind:
        tally = Tally(device, job.log_guidance)
        sampler = job.build(device, tally)
        dist_util.keep_freed_memory()
        store = _open_together(job, device)
        store.require_space(sampler.image_bytes)
        if dist.get_rank() == 0:
            logger.configure(job.folder)
            if left_behind:
                logger.log(
                    f"{job.folder}: resumes after {left_behind}, which ended without removing its lock"
                )
            for note in sampler.notes:
                logger.log(note)
            missing = sum(map(len, store.missing()))
            if 0 < missing < job.num_samples:
                there = job.num_samples - missing
                logger.log(f"{job.folder}: resumes, {there} of {job.num_samples} samples are there")
        sample_missing(store, rounded(job, sampler), sampler.num_steps, tally, job.name_of)
        result = store.finish() if dist.get_rank() == 0 else None
    dist.destroy_process_group()
    return result


def rounded(job: Job, sampler: Sampler) -> Callable[[range, Callable[[], None]], tuple[Tensor, Tensor]]:
    """The sampler's function with its images as the (n, H, W, 3) uint8 that are kept."""

    def sample(indices, tick):
        images, labels = sampler.sample(indices, tick)
        return to_uint8(images, job.rounding), labels

    return sample


def _require_writable(folder):
    """Make the output folder, or fail before minutes go into loading."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder} ({error.strerror}); choose another --out"
        ) from error


def _open_together(job, device):
    """Open the output folder on rank 0 first; the others then find the same settings in it."""
    settings = job.settings()
    if dist.get_rank() == 0:
        if job.starts_anew:
            SampleStore.clear(job.folder)
        job.open_store(settings, device)
    dist.barrier()
    return job.open_store(settings, device)

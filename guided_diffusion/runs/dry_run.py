"""The dry run: what can be known of a run before hours are spent on it: files, room, memory and time."""

import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from guided_diffusion import dist_util
from guided_diffusion.files.pretrained import known_hashes, verify
from guided_diffusion.files.run_folder import require_no_leftovers
from guided_diffusion.runs import machine
from guided_diffusion.runs.job import Job, rounded
from guided_diffusion.runs.lock import holder
from guided_diffusion.runs.loop import named_failure
from guided_diffusion.runs.stopwatch import Stopwatch
from guided_diffusion.runs.store import existing_parent, require_room, required_bytes
from guided_diffusion.runs.tally import CLASSIFIER, Tally

TIMED_STEPS = 2  # after one that warms up


class ProblemsFoundError(ValueError):
    """The run would fail; the message says in how many ways, which have been printed."""


class _EnoughSteps(Exception):
    """Ends the batch that was only begun to be timed."""


def dry_run(job: Job) -> None:
    """Print one line per subject to stdout. Raises ProblemsFoundError if the run would fail. Writes nothing
    into the output folder.
    """
    device = dist_util.choose_device(job.device)
    report = _Report()
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions(job.packages).items())
    report.say("machine", f"{machine.describe(device)}; {versions}")
    for flag in job.files:
        report.check(f"--{flag}" if flag in job.flags else flag, _check_file, job, flag)
    missing = report.check("folder", _check_folder, job, device)
    if report.problems:
        report.say("networks", "not loaded before this is mended")
    else:
        _check_networks(job, device, report, *missing)
    if report.problems:
        raise ProblemsFoundError(f"{report.problems} problem{'s' * (report.problems > 1)}: see above")
    print("ready")


def _check_networks(job, device, report, missing, joined):
    """missing: how many samples are to be drawn. joined: whether the final files are there."""
    sampler, tally = report.check("networks", _load, job, device) or (None, None)
    if not sampler:
        return
    files = (job.png_name is not None, job.npz_too)
    needed = 0 if joined else required_bytes(missing, job.num_samples, sampler.image_bytes, *files)
    report.check("disk", _check_disk, job, needed)
    trial = report.check("steps", _try_steps, job, sampler, tally, device)
    if trial:
        report.check("memory", _check_memory, job, trial, device)
        report.say("time", _estimate(job, trial, sampler.num_steps, missing))


class _Report:
    def __init__(self):
        self.problems = 0

    def say(self, subject, text):
        print(f"{subject}: {text}", flush=True)

    def check(self, subject, function, *arguments):
        """Print the text that the check returns; an error of the user's is a problem. Returns what the check
        found beside the text.
        """
        try:
            text, found = function(*arguments)
        except (ValueError, OSError, FloatingPointError) as error:
            self.problems += 1
            text, found = f"PROBLEM: {' '.join(str(error).split())}", None
        self.say(subject, text)
        return found


def _check_file(job, flag):
    path = job.files[flag]()
    if path is None:
        return f"{job.flags.get(flag) or 'none'}, no file", None
    known = known_hashes(path)
    try:
        digest = verify(path, known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch it again") from error
    who = " and ".join(dict.fromkeys(who for _, who in known))
    trust = f"as {who}" if known else "its right hash is not known"
    return f"{path}, {path.stat().st_size:,} bytes, sha256 {digest[:16]}... ({trust})", None


def _check_folder(job, device):
    parent = existing_parent(job.folder)
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"cannot write to {parent}: choose another --out")
    if (owner := holder(job.folder)) is not None:
        raise ValueError(
            f"another run is writing into {job.folder}: {owner}; wait for it, or choose another --out"
        )
    missing, joined = job.num_samples, False
    if not job.starts_anew:
        if (job.folder / "run.json").exists():
            store = job.open_store(job.settings(), device)
            missing, joined = sum(map(len, store.missing())), store.samples_file() is not None
        else:
            require_no_leftovers(job.folder, pictures=job.png_name is not None)
    there = f"{job.num_samples - missing:,} of {job.num_samples:,} samples are there"
    return f"{job.folder}, {there}", (missing, joined)


def _check_disk(job, needed):
    return f"{needed / 1e9:.2f} GB needed, {require_room(job.folder, needed) / 1e9:.2f} GB free", None


def _load(job, device):
    tally = Tally(device, job.log_guidance)
    sampler = job.build(device, tally)
    dist_util.keep_freed_memory()
    return "; ".join(["loaded, they fit the flags", *sampler.notes]), (sampler, tally)


@dataclass(frozen=True)
class _Trial:
    batch: int
    seconds: float  # of one step
    finish: float  # seconds after the last one
    memory: int  # in all, bytes
    memory_per_image: int


def _try_steps(job, sampler, tally, device):
    """One step to warm up and two that count: on a GPU of the run's batch, on a CPU of one image, and then
    one of two for the memory.
    """
    batch = _batch(job) if device.type == "cuda" else 1
    draw = partial(named_failure, rounded(job, sampler), tally=tally, name_of=job.name_of)
    marks = _marks(draw, device, batch, 1 + TIMED_STEPS, tally)
    asked = _seconds_of_guidance(marks)
    marks = marks[1:] if len(marks) > 2 else marks  # a single step has to do, warm or not
    plain = statistics.median(b.clock - a.clock - (b.guidance - a.guidance) for a, b in pairwise(marks))
    # The steps that are timed may not ask the classifier, or more often than those of the run.
    seconds = plain + asked / job.flags.get("guidance_every", 1)
    finish = _seconds_of_finish(sampler, batch, device)
    memory, per_image = _memory(device), 0
    guidance = f"; guidance adds {asked / plain:.0%} to one that asks the classifier" if asked else ""
    if batch < _batch(job):
        _marks(draw, device, batch + 1, 1, tally)
        per_image = _memory(device) - memory
    last = f"; after the last one {finish:.3f} s to decode" if sampler.finish else ""
    text = f"{seconds:.3f} s each at batch {batch}{guidance}{last}"
    return text, _Trial(batch, seconds, finish, memory, per_image)


def _seconds_of_finish(sampler, batch, device):
    """Of making images of a batch of samples, after one that warms up; 0 where samples are images."""
    if not sampler.finish:
        return 0.0
    sampler.finish(1)
    clock = Stopwatch(device)
    clock.wrap(sampler.finish)(batch)
    return clock.seconds


class _Mark(NamedTuple):
    clock: float
    guidance: float  # seconds so far
    passes: int  # of the classifier, so far


def _seconds_of_guidance(marks):
    """Of the last step that asked the classifier; 0 where none did."""
    return next((b.guidance - a.guidance for a, b in reversed([*pairwise(marks)]) if b.passes > a.passes), 0)


def _marks(draw, device, batch, steps, tally):
    """The clocks at the beginning of a batch and after each of at most so many steps."""
    start = tally.seen(CLASSIFIER)

    def mark():
        passes = tally.seen(CLASSIFIER) - start
        return _Mark(time.perf_counter(), tally.stopwatch.seconds, passes)

    marks = [mark()]

    def tick():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(mark())
        if len(marks) > steps:
            raise _EnoughSteps

    with suppress(_EnoughSteps):
        draw(range(batch), tick)
    return marks


def _batch(job):
    return min(job.batch_size, job.num_samples)


def _memory(device):
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else machine.resident_memory()


def _check_memory(job, trial, device):
    whole = trial.memory + (_batch(job) - trial.batch) * trial.memory_per_image
    available = machine.available_memory(device)
    text = f"{trial.memory / 1e9:.2f} GB at batch {trial.batch}"
    text += f", some {whole / 1e9:.2f} GB at batch {_batch(job)}"
    if available is None:
        return text, None
    if whole - trial.memory > available:
        raise ValueError(f"{text}, but {available / 1e9:.2f} GB are left: lower --batch_size")
    return f"{text}; {available / 1e9:.2f} GB are left", None


def _estimate(job, trial, num_steps, missing):
    hours = (trial.seconds * num_steps + trial.finish) / trial.batch * missing / 3600
    amount = f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    text = f"some {amount} for {missing:,} images of {num_steps} steps in one process like this"
    if trial.batch == _batch(job):
        return f"{text}, by its first steps"
    return f"{text}, by its first steps; scaled from batch 1, a larger batch may take less per image"

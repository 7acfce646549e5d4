"""The loop over batches that every sampling script shares: what is missing, who draws it, how far all are,
and what went wrong where.
"""

import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from guided_diffusion import dist_util, logger
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.runs.tally import Tally
from guided_diffusion.runs.workers import Workers

LINE_SECONDS = 30
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}, {rate_fmt}]"


class Stopped(KeyboardInterrupt):
    """The program was asked to stop by the signal `signum`; its exit code is 128 + signum."""

    def __init__(self, signum: int = signal.SIGINT):
        self.signum = signum
        super().__init__(signal.Signals(signum).name)


def sample_missing(
    store: SampleStore,
    sample: Callable[[range, Callable[[], None]], tuple[Tensor, Tensor]],
    num_steps: int,
    tally: Tally,
    name_of: Callable[[int], object] = int,
) -> None:
    """Draw the batches that are not in the store yet, together with the other processes; return when all are
    there.

    sample(indices, tick) -> ((n, H, W, 3) uint8 images, (n,) int64 labels); it calls tick() after each of
    `num_steps` steps. A process takes the next batch when it is done with one. name_of: what errors call a
    sample, by its index. SIGTERM or SIGINT to any of them lets all finish their batch, then raises Stopped;
    the second one raises it at once. Raises FloatingPointError that names step and sample where the network
    or the guidance is not finite, and ValueError with the batch size where memory is not enough.
    """
    rank = dist.get_rank()
    # One look for all: a shared file system may show each rank something else.
    shared = [(store.missing(), uuid.uuid4().hex) if rank == 0 else None]
    dist.broadcast_object_list(shared)
    missing, name = shared[0] or ([], "")
    if not missing:
        if rank == 0:
            done = (
                "complete, nothing to do" if store.samples_file() else "all batches are there, to be joined"
            )
            logger.log(f"{store.folder}: {done}")
        return
    with (
        _progress_bar(store, missing, num_steps, rank) as show,
        Workers(dist_util.shared_store(), name, rank, dist.get_world_size(), show) as workers,
        _stopping(workers),
    ):
        for indices in _claimed(workers, missing):
            start = time.perf_counter()
            tick = partial(workers.progress, len(indices))
            images, labels = named_failure(sample, indices, tick, tally, name_of)
            stats, metrics = tally.take_batch()
            store.write(indices, images, labels, {"seconds": time.perf_counter() - start, **stats}, metrics)
        _raise_if_stopped(workers.wait_for_all())
    if tally.skipped:
        logger.log(f"guidance was dropped {tally.skipped} times for non-finite gradients")


@contextmanager
def _progress_bar(store, missing, num_steps, rank) -> Iterator[Callable[[int], None] | None]:
    """Yield what shows the steps of all images so far, None on other ranks than 0."""
    total = sum(map(len, missing))
    if rank:
        yield None
    elif sys.stderr is not None and sys.stderr.isatty():
        with tqdm(total=total, unit="image", desc=store.folder.name, bar_format=BAR) as bar:
            yield lambda steps: bar.update(steps / num_steps - bar.n)
    else:
        yield _progress_lines(total, num_steps)


def _progress_lines(total, num_steps):
    """What logs a line twice a minute, for where a bar would fill a file."""
    start = last = time.monotonic()

    def show(steps):
        nonlocal last
        now, images = time.monotonic(), steps / num_steps
        if now - last >= LINE_SECONDS and images > 0:
            last, rate = now, images / (now - start)
            left = timedelta(seconds=round((total - images) / rate))
            logger.log(f"{images:.0f}/{total} images, {rate:.2f} images/s, {left} left")

    return show


@contextmanager
def _stopping(workers):
    """Let the first SIGINT or SIGTERM ask all processes to stop after their batch, and the next one stop this
    one at once.
    """
    first = []

    def handle(signum, frame):
        # Within a second it is the same wish: torchrun passes on what its terminal sent to all already.
        if first and time.monotonic() - first[0] > 1:
            raise Stopped(signum)
        if not first:
            first.append(time.monotonic())
            workers.ask_to_stop(signum)
            name = signal.Signals(signum).name
            logger.log(f"{name}: stopping after this batch; once more stops at once, without it")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _claimed(workers, missing):
    """Yield the batches that fall to this process. Raises Stopped once somebody asked to stop."""
    while True:
        _raise_if_stopped(workers.stop_signal())
        position = workers.claim()
        if position >= len(missing):
            return
        yield missing[position]


def _raise_if_stopped(signum):
    if signum is not None:
        raise Stopped(signum)


def named_failure(
    sample: Callable,
    indices: range,
    tick: Callable[[], None],
    tally: Tally,
    name_of: Callable[[int], object] = int,
) -> tuple[Tensor, Tensor]:
    """Call `sample`; batch positions in its errors become the samples' names, and want of memory names the
    batch size.
    """
    try:
        return sample(indices, tick)
    except NonFiniteError as error:
        level = "" if error.sigma is None else f" (sigma {error.sigma:g})"
        step = "" if error.step_index is None else f" at step {error.step_index}{level}"
        names = ", ".join(str(name_of(indices[i])) for i in error.positions)
        fix = _fix(error.what, tally.guided)
        raise FloatingPointError(f"non-finite {error.what}{step} for sample {names}{fix}") from error
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise ValueError(
            f"out of memory with batches of {len(indices)} images: lower --batch_size, with another --out or"
            " --overwrite True"
        ) from error


def _fix(what, guided):
    """What to do about numbers that are not finite, by where they stand. guided: whether guidance has moved
    this batch before, so that its size may be the reason.
    """
    if what == "guidance gradient":
        return "; --on_nonfinite skip drops that guidance"
    if guided:
        flags = "--classifier_scale or --gamma_factor, in EDM's released form --max_guidance or --add_factor"
        return f"; guidance this strong may be the reason: lower {flags}"
    return "; if the network runs in float16, try --use_fp16 False" if what == "network output" else ""


def _is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)

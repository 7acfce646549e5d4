"""What the processes of one run tell each other: who takes which piece of work, how far they are, who wants
to stop, and that all live.

Everything goes through the key-value store of `torch.distributed`, under plain python one of this process
alone. No collective operation is needed, so that nobody waits for a process that is gone.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

BEAT_SECONDS = 5.0
SILENCE_SECONDS = (
    45.0  # after this a process is taken for dead: below the minute within which the others stop
)
PROGRESS_SECONDS = 0.5


class Crew:
    """The processes that work on one list, as a context manager; `name` must be the same on all of them, and
    new for every list.

    While it is open a thread tells the others that this process lives. Where another failed or fell silent,
    it ends this process at once with one line on stderr that says which and why, and exit code 1. An error
    that leaves the block is told to the others.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        on_progress: Callable[[int], None] | None = None,
    ):
        """on_progress: called every half second with the progress that all processes have reported
        together.
        """
        self._store, self._rank, self._size, self._on_progress = (
            dist.PrefixStore(name, store),
            rank,
            size,
            on_progress,
        )
        self._steps, self._told, self._lock, self._closing = 0, 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_in_touch, daemon=True)
        self._who = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"

    def __enter__(self) -> "Crew":
        self._store.set(f"who/{self._rank}", self._who)
        self._thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._closing.set()
        self._thread.join()
        if error is None:
            self._report_progress()
            self._store.add(f"left/{self._rank}", 1)
            if self._rank == 0:
                self._wait_until_the_others_left()
        elif self._size > 1:
            with suppress(dist.DistError):  # nobody is left to be told; the error itself says more
                if self.stop_signal() is None:
                    self._store.set(
                        "failed", f"{self._who} failed: {' '.join(str(error).split()) or kind.__name__}"
                    )

    def claim(self) -> int:
        """The position in the list that this process takes next, beyond its end when nothing is left. Nobody
        else gets the same.
        """
        return self._ask(self._store.add, "claimed", 1) - 1

    def progress(self, steps: int) -> None:
        """Add to the progress of all."""
        with self._lock:
            self._steps += steps

    def ask_to_stop(self, signum: int) -> None:
        """Tell all processes to stop after what they are at, because of this signal."""
        self._ask(self._store.set, "stop", str(signum))

    def stop_signal(self) -> int | None:
        """The signal because of which somebody asked to stop, None if nobody did."""
        return int(self._ask(self._store.get, "stop")) if self._ask(self._store.check, ["stop"]) else None

    def wait_for_all(self) -> int | None:
        """Wait until every process has called this; returns None, or the signal because of which one asked to
        stop instead.
        """
        self._ask(self._store.add, "arrived", 1)
        while self._ask(self._store.add, "arrived", 0) < self._size:
            signum = self.stop_signal()
            if signum is not None:
                return signum
            time.sleep(0.05)
        return None

    def _ask(self, operation, *arguments):
        """Call the store from the main thread. Where it is gone, the other thread meets that too, and ends
        the process with the reason.
        """
        try:
            return operation(*arguments)
        except dist.DistError:
            self._thread.join()
            raise

    def _wait_until_the_others_left(self):
        """Rank 0 may hold the store: it must not go while somebody still reads it."""
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline and not all(
            self._store.add(f"left/{rank}", 0) for rank in range(self._size)
        ):
            time.sleep(0.05)

    def _keep_in_touch(self):
        watch, next_beat, trouble = _Watch(), time.monotonic(), None
        while not self._closing.wait(PROGRESS_SECONDS):
            try:
                self._report_progress()
                if self._size > 1 and time.monotonic() >= next_beat:
                    next_beat += BEAT_SECONDS
                    self._store.add(f"beat/{self._rank}", 1)
                    trouble = self._trouble(watch)
            except dist.DistError as error:
                trouble = (
                    f"the store of rank 0 does not answer, so rank 0 is gone ({str(error).splitlines()[0]})"
                )
            if trouble and not self._closing.is_set():
                if self._rank == 0:
                    time.sleep(
                        2 * BEAT_SECONDS
                    )  # the store may end with this process: let the others read it first
                _end(f"{self._who} stops: {trouble}; the same command goes on from what is finished")

    def _report_progress(self):
        with self._lock:
            new, self._told = self._steps - self._told, self._steps
        total = self._store.add("steps", new)
        if self._on_progress:
            self._on_progress(total)

    def _trouble(self, watch):
        """What happened to another process, None if all is well."""
        if self._store.check(["failed"]):
            return self._store.get("failed").decode()
        for rank in range(self._size):
            if rank == self._rank or self._store.add(f"left/{rank}", 0):
                continue
            silence = watch.silence(rank, self._store.add(f"beat/{rank}", 0))
            if silence > SILENCE_SECONDS:
                who = (
                    self._store.get(f"who/{rank}").decode()
                    if self._store.check([f"who/{rank}"])
                    else f"rank {rank}"
                )
                return (
                    f"{who} has not been heard of for {silence:.0f} s, it was killed or its machine is gone"
                )
        return None


class _Watch:
    """For how long the heartbeat of each rank has stood still, by this process's clock."""

    def __init__(self):
        self._seen: dict[int, tuple[int, float]] = {}

    def silence(self, rank: int, beats: int) -> float:
        now = time.monotonic()
        if rank not in self._seen or self._seen[rank][0] != beats:
            self._seen[rank] = beats, now
        return now - self._seen[rank][1]


def _end(message):
    """End the process from a thread: the main one may be in the middle of a batch, or wait for somebody who
    is gone.
    """
    sys.stderr.write(f"\nerror: {message}\n")
    sys.stderr.flush()
    os._exit(1)

"""What the processes of one run tell each other: who takes which piece of work, how far they are, who wants
to stop, and that all live.

Why this exists beside the collective operations of `torch.distributed`: a collective makes every process
wait for all others, so that one that was killed stops the rest until a timeout, and a slow one holds the
others up. Here each process takes its next piece of work when it is done with one, by an atomic counter in
the key-value store, and a heartbeat there tells within a minute who is gone. Nobody waits for a dead process.
Under plain python the store is one of this process alone.
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
SILENCE_SECONDS = 45.0  # after this a process is taken for dead
PROGRESS_SECONDS = 0.5


class Workers:
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
        """on_progress: called every half second with the sum of what all processes gave to `progress`."""
        self._store, self._rank, self._size = dist.PrefixStore(name, store), rank, size
        self._on_progress, self._watch = on_progress, _Watch()
        self._steps, self._told, self._lock, self._closing = 0, 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_in_touch, daemon=True)
        self._who = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"

    def __enter__(self) -> "Workers":
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
                    text = " ".join(str(error).split()) or kind.__name__
                    self._store.set("failed", f"{self._who} failed: {text}")

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
        """Wait until every process has called this, and return None; or until one asked to stop, and return
        the signal because of which it did.
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
        """Rank 0 may hold the store: it must not end while another process still reads it."""
        deadline = time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline and not all(map(self._left, range(self._size))):
            time.sleep(0.05)

    def _left(self, rank):
        return self._store.add(f"left/{rank}", 0) > 0

    def _keep_in_touch(self):
        next_beat, trouble = time.monotonic(), None
        while not self._closing.wait(PROGRESS_SECONDS):
            try:
                self._report_progress()
                if self._size > 1 and time.monotonic() >= next_beat:
                    next_beat += BEAT_SECONDS
                    self._store.add(f"beat/{self._rank}", 1)
                    trouble = self._trouble()
            except dist.DistError as error:
                reason = str(error).splitlines()[0]
                trouble = f"the store of rank 0 does not answer, so rank 0 is gone ({reason})"
            if trouble and not self._closing.is_set():
                if self._rank == 0:
                    time.sleep(
                        2 * BEAT_SECONDS
                    )  # the store may end with this process: let the others read it
                _end(f"{self._who} stops: {trouble}; the same command resumes from what is finished")

    def _report_progress(self):
        with self._lock:
            new, self._told = self._steps - self._told, self._steps
        total = self._store.add("steps", new)
        if self._on_progress:
            self._on_progress(total)

    def _trouble(self):
        """What happened to another process, None if all is well."""
        if self._store.check(["failed"]):
            return self._store.get("failed").decode()
        for rank in range(self._size):
            if rank == self._rank or self._left(rank):
                continue
            silence = self._watch.silence(rank, self._store.add(f"beat/{rank}", 0))
            if silence > SILENCE_SECONDS:
                return f"{self._name(rank)} was not heard for {silence:.0f} s: killed, or its machine is gone"
        return None

    def _name(self, rank):
        key = f"who/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else f"rank {rank}"


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
    """End the process from a thread: the main one may be in the middle of a batch, or wait for a process that
    is gone.
    """
    if sys.stderr is not None:
        sys.stderr.write(f"\nerror: {message}\n")
        sys.stderr.flush()
    os._exit(1)

"""One run per output folder, over processes and machines: a `filelock`, and a record of whose it is."""

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

# The lock stands beside the record: some versions of filelock empty the file that they try to lock.
RECORD, LOCK = "run.lock", ".run.lock.held"


@contextmanager
def locked(folder: str | Path) -> Iterator[str | None]:
    """Keep a folder to this process while the block lasts; run.lock says which process on which host that is.

    The system frees the lock of a process that ends, however it ends. Yields what run.lock then still says
    of that process, else None. Raises ValueError where another process holds the lock, with process and host,
    and where the file system has no locks.
    """
    folder = Path(folder)
    record, lock = folder / RECORD, _acquire(folder)
    try:
        left_behind = record.read_text().strip() if record.exists() else None
        record.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield left_behind or None
    finally:
        for path in (record, folder / LOCK):
            path.unlink(missing_ok=True)
        lock.release()


def holder(folder: str | Path) -> str | None:
    """Which process holds the lock of a folder now, None if none does. The run in it is not disturbed."""
    if not Path(folder, LOCK).exists():
        return None
    try:
        _acquire(Path(folder)).release()
    except _HeldError as error:
        return error.owner
    return None


class _HeldError(ValueError):
    def __init__(self, folder, owner):
        self.owner = owner
        super().__init__(
            f"another run is writing into {folder}: {owner}; wait for it, or choose another --out"
        )


def _acquire(folder):
    try:
        with warnings.catch_warnings():
            # Where there are no locks filelock warns, and makes do with a file that outlives a kill.
            warnings.filterwarnings("error", message="flock not supported")
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
            return lock
    except Timeout:
        owner = ""
        with suppress(OSError):
            owner = (folder / RECORD).read_text().strip()
        raise _HeldError(folder, owner or "a process") from None
    except (OSError, NotImplementedError, UserWarning) as error:
        reason = getattr(error, "strerror", None) or "its file system has no locks"
        raise ValueError(f"cannot lock {folder} ({reason}): choose another --out") from error

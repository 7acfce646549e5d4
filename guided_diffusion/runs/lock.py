"""One run per output folder, over processes and machines."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: str | Path) -> Iterator[str | None]:
    """Keep a folder to this process while the block lasts, by a lock on its file run.lock, which says whose
    it is.

    The system takes the lock from a process that ends, however it ends: what is then left behind in the file
    is stale, and yielded. Raises ValueError, with process and host, where another process holds it, and where
    the file system has no locks.
    """
    path = Path(folder) / "run.lock"
    with _lock_file(path) as file:
        left_behind = file.read().strip() or None
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield left_behind
        finally:
            path.unlink()


def holder(folder: str | Path) -> str | None:
    """Which process holds the lock of a folder now, None if none does. Changes nothing."""
    path = Path(folder) / "run.lock"
    if not path.exists():
        return None
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return file.read().strip() or "a process"
    return None


def _lock_file(path):
    """Open the lock file and lock it; what another process removed in between is opened anew."""
    while True:
        file = open(path, "a+")  # noqa: SIM115, returned to be closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                file.seek(0)
                return file
            file.close()
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "a process"
            file.close()
            raise ValueError(
                f"another run is writing into {path.parent}: {owner}; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            file.close()
            raise ValueError(f"cannot lock {path} ({error.strerror}): choose another --out") from error

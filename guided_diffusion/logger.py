"""A thin face on `logging`: lines go to stderr, so that stdout stays free for results, and to log.txt once a
folder is configured.
"""

import csv
import logging
import os
import sys
import tempfile
from pathlib import Path

from guided_diffusion.runs.launchers import find_place

_logger = logging.getLogger("guided_diffusion")
_logger.setLevel(logging.INFO)
_logger.propagate = False
_folder = None
_values, _rows = {}, []  # of the next row of progress.csv; the rows that this process wrote


def configure(dir=None):
    """Log to stderr and to log.txt in `dir`, by default $OPENAI_LOGDIR, else a new folder for temporary
    files. Made if missing.
    """
    global _folder
    _folder = str(dir or os.environ.get("OPENAI_LOGDIR") or tempfile.mkdtemp(prefix="guided-diffusion-"))
    Path(_folder).mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(Path(_folder) / "log.txt", encoding="utf-8", errors="backslashreplace")
    _replace_handlers(_Stderr(), file)


def log(*args):
    """Write the arguments, separated by spaces, as one line."""
    if not _logger.handlers:
        _replace_handlers(_Stderr())
    _logger.info(" ".join(map(str, args)))


def get_dir():
    """The folder that `configure` was given or made, a string; the first call makes one where nobody
    configured any.
    """
    if _folder is None:
        configure()
    return _folder


def logkv(key, val):
    """Note a value for the next row of progress.csv."""
    _values[key] = (float(val), 1)


def logkv_mean(key, val):
    """Note one of several values, whose mean goes into the next row."""
    total, count = _values.get(key, (0.0, 0))
    _values[key] = (total + float(val), count + 1)


def dumpkvs():
    """Write what was noted since the last call as a row of progress.csv in the folder, in the first process,
    and as a line; return it, name -> number.
    """
    row = {key: total / count for key, (total, count) in _values.items()}
    _values.clear()
    if find_place().rank == 0:
        _rows.append(row)
        columns = list(dict.fromkeys(key for each in _rows for key in each))
        with open(Path(get_dir()) / "progress.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(_rows)
    log(", ".join(f"{key} {value:.4g}" for key, value in row.items()))
    return row


class _Stderr(logging.Handler):
    """Lines to stderr, where there is one; what its encoding lacks is escaped."""

    def __init__(self):
        super().__init__()
        self._stream = sys.stderr

    def emit(self, record):
        if self._stream is None:
            return
        try:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            line = self.format(record).encode(encoding, "backslashreplace").decode(encoding)
            self._stream.write(f"{line}\n")
            self._stream.flush()
        except Exception:
            self.handleError(record)


def _replace_handlers(*handlers):
    for old in list(_logger.handlers):
        _logger.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        _logger.addHandler(handler)

"""A thin face on `logging`: lines go to stderr, so that stdout stays free for results, and to log.txt once a
folder is configured.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path

_logger = logging.getLogger("guided_diffusion")
_logger.setLevel(logging.INFO)
_logger.propagate = False
_folder = None


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

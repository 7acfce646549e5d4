"""A thin face on `logging`: lines go to stderr and to log.txt in one folder, so that stdout stays free for results."""

import logging
import os
import sys
import tempfile
from pathlib import Path

_logger = logging.getLogger("guided_diffusion")
_state = {"dir": None}


def configure(dir=None):
    """Log to stderr and to log.txt in `dir`, by default $OPENAI_LOGDIR, else a new folder for temporary files. Made if missing."""
    folder = dir or os.environ.get("OPENAI_LOGDIR") or tempfile.mkdtemp(prefix="guided-diffusion-")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for handler in list(_logger.handlers):
        _logger.removeHandler(handler)
        handler.close()
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(Path(folder) / "log.txt")):
        handler.setFormatter(logging.Formatter("%(message)s"))
        _logger.addHandler(handler)
    _logger.setLevel(logging.INFO)
    _logger.propagate = False
    _state["dir"] = str(folder)


def log(*args):
    """Write the arguments, separated by spaces, as one line. Configures with the defaults if nobody has."""
    if _state["dir"] is None:
        configure()
    _logger.info(" ".join(map(str, args)))


def get_dir():
    """The folder that `configure` was given or made; None before it was called."""
    return _state["dir"]

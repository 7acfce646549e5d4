"""Imported first by every script, before any package of the project: `import _beside  # noqa: F401`.

It lets a script run with the packages beside it, wherever it is called from, installed or not, and whatever
other `guided_diffusion` is on the path: openai's, another clone, a folder in PYTHONPATH. And it opens the
standard streams that the caller closed (`2>&-`): else the next file that is opened becomes standard error,
and what a library says ends up in it.
"""

import fcntl
import importlib.util
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def open_closed_streams():
    """Let those of stdin, stdout and stderr that are closed lead to nowhere, here and in what this starts."""
    closed = [descriptor for descriptor in range(3) if _is_closed(descriptor)]
    for descriptor in closed:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        os.set_inheritable(descriptor, True)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if descriptor in closed or getattr(sys, name) is None:
            nowhere = open(os.devnull, "w" if descriptor else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nowhere)


def _is_closed(descriptor):
    """Also where the shell that reads a script has that open in its place, which nobody can write to."""
    try:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return True
    return descriptor > 0 and mode == os.O_RDONLY


def prefer_packages_beside():
    """Put the packages beside the scripts first. Ends the program where others were loaded before."""
    sys.path.insert(0, str(ROOT))
    for name in ("guided_diffusion", "classifiers", "evaluation"):
        found = importlib.util.find_spec(name)
        place = found and Path(next(iter(found.submodule_search_locations or [found.origin])))
        if not place or place.resolve() != (ROOT / name).resolve():
            sys.exit(f"error: this script needs {ROOT / name}, and Python finds {place or 'none'} instead")


def end_at_ctrl_c():
    """Until `run_main` takes over, Ctrl-C ends a script at once: imports take seconds, nothing has begun."""
    if Path(sys.argv[0]).resolve().parent == ROOT / "scripts":
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))


open_closed_streams()
end_at_ctrl_c()
prefer_packages_beside()

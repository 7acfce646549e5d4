"""Pictures drawn with matplotlib that look alike whatever the user's own settings for it are."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guided_diffusion.files.atomic import renamed_when_complete


def has_matplotlib() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib(wanted: str) -> None:
    """Raise ValueError, before there is anything to lose, where matplotlib is not installed or does not load.

    wanted: what needs it, the beginning of the message.
    """
    if not has_matplotlib():
        raise ValueError(f'{wanted} matplotlib, which is not installed: pip install -e ".[plot]"')
    # Never used here, but a backend that this machine lacks would end the import.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # a matplotlibrc that cannot be read raises whatever its reader raises
        message = f"{wanted} matplotlib, which does not load ({error}): mend or remove your matplotlibrc"
        raise ValueError(message) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's own settings in the place of the user's matplotlibrc, as long as the block lasts."""
    require_matplotlib("this picture needs")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def plain_text(name: str) -> str:
    """A name, of a set or a run, as matplotlib shows it unchanged.

    Two `$` would be the borders of a formula, a leading underscore would hide a line from the legend, and
    bytes of a file name that are no text cannot be drawn.
    """
    shown = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def save_figure(figure: Any, path: str | Path, **options: Any) -> None:
    """Write a figure as a PNG that is complete or absent; `options` are `Figure.savefig`'s."""
    with renamed_when_complete(path) as file:
        figure.savefig(file, format="png", **{"dpi": 130, **options})

"""What every script does with its flags and its errors."""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable
from difflib import get_close_matches
from itertools import pairwise
from typing import NoReturn

import torch
import torch.distributed

MOST_NUMBERS = 10_000_000  # of one range
NOT_GIVEN = object()  # the default of a flag in `fields.parse`
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as written; every flag with its default."""

    def _get_help_string(self, action):
        default = "" if action.default in (None, "", False, NOT_GIVEN, argparse.SUPPRESS) else "%(default)s"
        return f"{action.help} (default: {default})" if default and action.option_strings else action.help


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, and ends a wrong call in one line, exit code 2.

    A boolean, whose type is `parse_bool`, is written `--flag True|False`; a bare `--flag` is True.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)
        # argparse takes -1 and -0.5 for values, but -1e30 for a flag.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|-inf$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        flags = [name for action in self._actions for name in action.option_strings]
        near = [name for word in unknown if word not in flags for name in get_close_matches(word, flags, 1)]
        hint = f" (did you mean {', '.join(near)}?)" if near and "unrecognized" in message else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}; --help lists the flags\n")

    def add_switch(self, name: str, help: str, default: bool = False) -> None:
        """Add a boolean flag."""
        self.add_argument(name, type=parse_bool, default=default, metavar="True|False", help=help)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._with_values(words), namespace)

    def _with_values(self, words):
        """The words, with True after each bare boolean flag."""
        switches = {name for a in self._actions if a.type is parse_bool for name in a.option_strings}
        positional = any(not a.option_strings for a in self._actions)
        complete = []
        for word, following in pairwise([*words, "--"]):
            complete.append(word)
            # Where there are positional words, one of these may follow a bare flag.
            bare = following.startswith("--") or (positional and following.lower() not in _TRUE + _FALSE)
            if word in switches and bare:
                complete.append("True")
        return complete


def parse_bool(text: str | bool) -> bool:
    """True, yes, y, t, 1 and their opposites, in any case; raises argparse's error for another word."""
    if isinstance(text, bool):
        return text
    if text.lower() not in _TRUE + _FALSE:
        raise argparse.ArgumentTypeError(f"boolean value expected, got {text!r}: write True or False")
    return text.lower() in _TRUE


def run_main(main: Callable[[], None], resumable: bool = False) -> None:
    """Call a script's main: what a user can mend ends in one line on stderr and exit code 1, Ctrl-C in 130,
    SIGTERM in 143.

    resumable: whether the same command resumes where this one was stopped; Ctrl-C then says so.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.distributed.DistError as error:
        sys.exit(f"error: another process of this run is gone ({str(error).splitlines()[0]})")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Lower --batch_size, into another --out")
    except KeyboardInterrupt as error:
        hint = "; what is finished is kept, the same command resumes there" if resumable else ""
        sys.stderr.write(f"\ninterrupted{hint}\n")
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))


def parse_numbers(text: str, flag: str) -> list[int]:
    """ "1,2,5-10" as a list of ints, in order. Raises ValueError that names the flag."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(-?\d+)(?:-(\d+))?", part.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(
                f"{flag} {text!r} is not understood at {part!r}; write numbers and ranges such as 1,2,5-10"
            )
        if match[2] and int(match[2]) - int(match[1]) > MOST_NUMBERS:
            raise ValueError(f"{flag} {part.strip()} is more than {MOST_NUMBERS:,} numbers")
        numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return numbers


def parse_floats(text: str) -> list[float]:
    """ "0.3,0.9" as floats; empty for no text. Raises ValueError for another text."""
    return [float(part) for part in text.split(",")] if text else []


def parse_interval(text: str, flag: str) -> tuple[float, float]:
    """ "0.3,5" as two floats. Raises ValueError that names the flag."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"{flag} {text!r} is not understood; write LO,HI, noise levels such as 0.3,5"
        ) from None
    return low, high

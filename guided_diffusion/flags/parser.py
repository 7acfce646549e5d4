"""What every script does with its flags and its errors."""

import argparse
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed

MOST_NUMBERS = 10_000_000  # of one range
_NOT_GIVEN = object()


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, shows its description as written, and ends a wrong call in one
    line, exit code 2.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def parse_flags(parser: Parser, argv: list[str] | None, presets: Mapping[str, Mapping]) -> argparse.Namespace:
    """Parse flags over those of the preset that `--preset` names, over the defaults; `given` holds the names
    that the user wrote.

    The parser must have `--preset` and no positional arguments. Unknown presets end the program as argparse
    does; a NaN is a ValueError.
    """
    defaults = vars(parser.parse_args([]))
    written = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, _NOT_GIVEN))))
    given = {key: value for key, value in written.items() if value is not _NOT_GIVEN}
    preset = given.get("preset", defaults["preset"])
    if preset and preset not in presets:
        parser.error(f"unknown preset {preset!r}; choose {', '.join(presets)}")
    for key, value in given.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"--{key} must be a number, got {value}")
    return argparse.Namespace(**{**defaults, **presets.get(preset, {}), **given}, given=set(given))


def run_main(main: Callable[[], None], resumable: bool = False) -> None:
    """Call a script's main: what a user can mend ends in one line on stderr and exit code 1, Ctrl-C in 130,
    SIGTERM in 143.

    resumable: whether the same command goes on where this one was stopped; Ctrl-C then says so.
    """
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.distributed.DistError as error:
        sys.exit(f"error: another process of this run is gone ({str(error).splitlines()[0]})")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {str(error).splitlines()[0]} Lower --batch_size, into another --out")
    except KeyboardInterrupt as error:
        sys.stderr.write(
            f"\ninterrupted{'; what is finished is kept, the same command goes on from there' if resumable else ''}\n"
        )
        sys.exit(128 + getattr(error, "signum", signal.SIGINT))


def call_script(path: Path, flags: Sequence[str]) -> None:
    """Run another script in a process of its own, without its stdout. Its own message stands, so only its
    exit code is passed on.
    """
    code = subprocess.call([sys.executable, path, *flags], stdout=subprocess.DEVNULL)
    if code < 0:
        raise ValueError(
            f"{path.name} was ended by signal {-code}; the same command goes on from what is finished"
        )
    if code:
        sys.exit(code)


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


def parse_interval(text: str, flag: str) -> tuple[float, float]:
    """ "0.3,5" as two floats. Raises ValueError that names the flag."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(
            f"{flag} {text!r} is not understood; write LO,HI, noise levels such as 0.3,5"
        ) from None
    return low, high

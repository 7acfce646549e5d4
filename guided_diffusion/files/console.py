"""Results on the screen: written so that a terminal, a pipe or a full disk behind stdout can lose nothing
else.
"""

import contextlib
import os
import sys
from typing import TextIO

# What tables are written with, for terminals that have only ASCII or an older code page.
PLAIN = {"±": "+-", "…": "...", "–": "-", "→": "->", "×": "x"}  # noqa: RUF001


def print_result(text: str, *, to_stderr: bool = False) -> None:
    """Write a line, or several, to stdout or stderr, at once.

    Characters that the stream's encoding lacks are written in ASCII. A reader that is gone (`| head`) or a
    closed stream ends the output without an error. Raises OSError, in one line, where the text cannot be
    written for another reason, such as a full disk. Write files before: this may be the end of the program.
    """
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None or stream.closed:
        return
    try:
        stream.write(in_encoding(text, getattr(stream, "encoding", None) or "utf-8") + "\n")
        stream.flush()
    except BrokenPipeError:
        _discard(stream)
    except OSError as error:
        _discard(stream)
        name = "standard error" if to_stderr else "standard output"
        raise OSError(f"{name} took no more text ({error.strerror}); files were written before") from error


def in_encoding(text: str, encoding: str) -> str:
    """The text with ASCII in the place of every character that the encoding lacks."""
    return "".join(char if _can_write(char, encoding) else _in_ascii(char) for char in text)


def _can_write(char, encoding):
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _in_ascii(char):
    return PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode()


def _discard(stream: TextIO) -> None:
    """Let what is left in the stream's buffer go nowhere: Python would write it at its end, and fail
    again.
    """
    with contextlib.suppress(OSError, ValueError):  # a stream in memory has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

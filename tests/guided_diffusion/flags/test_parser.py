"""Flags over presets, and what a script's end looks like to the shell."""

from dataclasses import dataclass

import pytest

from guided_diffusion.flags.fields import Flags, flag, parse
from guided_diffusion.flags.parser import parse_numbers, run_main


@dataclass(frozen=True, kw_only=True)
class Sized(Flags):
    """Sizes."""

    preset: str = flag("", "flags by name")
    size: int = flag(1, "how large")
    scale: float = flag(1.0, "how much")


PRESETS = {"small": {"size": 2, "scale": 0.5}, "large": {"size": 9}}


@pytest.mark.parametrize(
    ("argv", "size", "scale", "given"),
    [
        ("", 1, 1.0, set()),
        ("--preset small", 2, 0.5, {"preset"}),
        ("--preset large", 9, 1.0, {"preset"}),
        ("--preset small --size 7", 7, 0.5, {"preset", "size"}),
        ("--size 1 --preset small", 1, 0.5, {"preset", "size"}),
        ("--scale 1.0", 1, 1.0, {"scale"}),
    ],
)
def test_written_flags_win_over_the_preset_over_the_defaults(argv, size, scale, given):
    args = parse(Sized, None, PRESETS, argv.split())
    assert (args.size, args.scale, args.given) == (size, scale, given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [("--preset tiny", "'tiny'; choose small, large"), ("--siz 3", "--siz"), ("--size x", "--size")],
)
def test_wrong_flags_end_the_program(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(Sized, None, PRESETS, argv.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, FileNotFoundError, FloatingPointError])
def test_users_errors_are_one_line_and_exit_code_1(error):
    def main():
        raise error("what\nwas   wrong")

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    # sys.exit prints a text to stderr and ends with exit code 1.
    assert caught.value.code == "error: what was wrong"


def test_ctrl_c_is_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_defects_keep_their_traceback():
    def main():
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        run_main(main)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1", [1]), ("1,2,5-10", [1, 2, 5, 6, 7, 8, 9, 10]), ("3-3, 0", [3, 0]), ("2,2", [2, 2])],
)
def test_numbers(text, numbers):
    assert parse_numbers(text, "seeds") == numbers


@pytest.mark.parametrize("text", ["", "a", "1,", "--1", "2-1", "1-2-3", "1.5", "1 2"])
def test_numbers_that_are_not_understood(text):
    with pytest.raises(ValueError, match=f"seeds '{text}'"):
        parse_numbers(text, "seeds")

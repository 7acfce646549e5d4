"""Results on the screen: what a terminal cannot show, a reader that is gone, a disk that is full."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = "1.500 ± 0.010, caf\\u00e9…, \\udcff"


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def run(code, stdout=subprocess.PIPE, **environment):
    code = f"from guided_diffusion.files.console import print_result\nimport sys\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, env={**ENVIRONMENT, **environment}
    )


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "1.500 ± 0.010, café…, \\udcff"),
        ("ascii", "1.500 +- 0.010, caf\\xe9..., \\udcff"),
        ("iso-8859-2", "1.500 +- 0.010, café..., \\udcff"),
        ("latin-1", "1.500 ± 0.010, café..., \\udcff"),
    ],
)
def test_what_a_terminal_lacks_is_written_in_ascii(encoding, shown):
    done = run(f'print_result("{TEXT}")', PYTHONIOENCODING=encoding)
    out, err = done.communicate()
    assert (done.returncode, out.decode(encoding), err) == (0, f"{shown}\n", b"")


def test_a_reader_that_is_gone_ends_the_output_and_nothing_else():
    done = run('for i in range(20000): print_result("line " * 20)\nprint("after", file=sys.stderr)')
    done.stdout.readline()
    done.stdout.close()
    err = done.stderr.read()
    assert (done.wait(), err) == (0, b"after\n")


def test_a_full_disk_is_said_in_one_line():
    code = 'try: print_result("x")\nexcept OSError as error: print(error, file=sys.stderr)'
    with open("/dev/full", "w") as full:
        done = run(code, full)
    err = done.stderr.read().decode()
    said = "standard output took no more text (No space left on device); files were written before\n"
    assert (done.wait(), err) == (0, said)


def test_a_closed_stream_is_no_error_and_stderr_never_ends_in_stdout():
    silent = 'sys.stderr = None\nprint_result("x", to_stderr=True)\nprint_result("y")\n'
    done = run(silent + 'sys.stdout = None\nprint_result("z")')
    assert (done.communicate(), done.returncode) == ((b"y\n", b""), 0)

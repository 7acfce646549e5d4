"""Where log lines go, and that none is lost."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion import logger

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_log_is_left_open():
    yield
    ours = logging.getLogger("guided_diffusion")
    for handler in list(ours.handlers):
        ours.removeHandler(handler)
        handler.close()


def python(code, redirect="", **environment):
    """Run code in a process of its own, by a shell that may close its streams."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code]
    return subprocess.run(command, env=environment, capture_output=True, timeout=120)


def test_lines_go_to_the_folder_and_to_stderr_but_not_to_stdout(tmp_path, capsys):
    logger.configure(dir=str(tmp_path / "a" / "b"))
    logger.log("step", 3, 0.5)
    captured = capsys.readouterr()
    assert logger.get_dir() == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "log.txt").read_text() == "step 3 0.5\n"
    assert (captured.out, captured.err) == ("", "step 3 0.5\n")


def test_configured_again_the_old_log_is_left_alone(tmp_path):
    for name in ("a", "b"):
        logger.configure(dir=str(tmp_path / name))
        logger.log(name)
    assert [(tmp_path / name / "log.txt").read_text() for name in ("a", "b")] == ["a\n", "b\n"]


@pytest.mark.parametrize("named", [True, False])
def test_the_folder_is_that_of_the_environment_else_a_new_one(tmp_path, monkeypatch, named):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    if named:
        monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "env"))
    logger.configure()
    assert Path(logger.get_dir()).is_dir() and Path(logger.get_dir()).parent == tmp_path
    assert (logger.get_dir() == str(tmp_path / "env")) == named


def test_a_line_before_configure_goes_to_stderr():
    done = python("from guided_diffusion import logger; logger.log('a', 1); print(logger.get_dir())")
    assert (done.returncode, done.stderr) == (0, b"a 1\n") and os.path.isdir(done.stdout.decode().strip())


LINE = "run \u00b1 \u4e2d \udcff"  # the last is a byte of a file's name that is no text
IN_THE_FILE = "run \u00b1 \u4e2d \\udcff\nend\n".encode()
WRITE = f"from guided_diffusion import logger; logger.configure('.'); logger.log({LINE!a}); logger.log('end')"


@pytest.mark.parametrize(
    ("redirect", "err"),
    [("", b"run \\xb1 \\u4e2d \\udcff\nend\n"), ("2>&-", b""), ("2>&- >&-", b"")],
)
def test_no_line_is_lost_whatever_the_locale_shows_and_the_file_is_utf_8(tmp_path, redirect, err):
    code = f"import os; os.chdir({str(tmp_path)!r}); {WRITE}"
    done = python(
        code, redirect, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict"
    )
    assert (done.returncode, done.stderr) == (0, err)
    assert (tmp_path / "log.txt").read_bytes() == IN_THE_FILE


@pytest.mark.parametrize(
    ("encoding", "err"),
    [
        *((name, b"run \\xb1 \\u4e2d \\udcff\nend\n") for name in ("ascii", "latin2")),
        ("utf-8", IN_THE_FILE),
    ],
)
def test_what_the_stream_does_not_know_is_escaped(tmp_path, monkeypatch, encoding, err):
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown := io.BytesIO(), encoding, errors="strict"))
    logger.configure(tmp_path)
    logger.log(LINE)
    logger.log("end")
    assert (shown.getvalue(), (tmp_path / "log.txt").read_bytes()) == (err, IN_THE_FILE)

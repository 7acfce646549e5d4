"""One run per folder: held, stale and impossible locks."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion.runs.lock import holder, locked

ROOT = Path(__file__).resolve().parents[3]
TAKE = "import sys, os\nfrom guided_diffusion.runs.lock import locked\nwith locked(sys.argv[1]): "


def take(folder, then):
    """Another process that takes the lock."""
    command = [sys.executable, "-c", TAKE + then, folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_held_lock_names_its_process_here_and_elsewhere_and_leaves_nothing(tmp_path):
    me = f"process {os.getpid()} on "
    with locked(tmp_path) as left_behind:
        assert left_behind is None
        assert (tmp_path / "run.lock").read_text().startswith(me) and holder(tmp_path).startswith(me)
        with (
            pytest.raises(ValueError, match=f"another run is writing into {tmp_path}: {me}"),
            locked(tmp_path),
        ):
            pass
        assert f"another run is writing into {tmp_path}: {me}" in take(tmp_path, "pass").stderr
        assert holder(tmp_path).startswith(me)
    assert holder(tmp_path) is None and list(tmp_path.iterdir()) == []


def test_a_lock_that_a_kill_left_is_taken_over_and_said(tmp_path):
    assert take(tmp_path, "os.kill(os.getpid(), 9)").returncode == -9
    assert holder(tmp_path) is None
    dead = (tmp_path / "run.lock").read_text()
    assert dead.startswith("process ")
    with locked(tmp_path) as left_behind:
        assert left_behind == dead
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []


def test_a_record_from_another_host_without_a_lock_is_stale(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on another-host")
    with locked(tmp_path) as left_behind:
        assert left_behind == "process 1 on another-host"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(ValueError, match=f"cannot lock {tmp_path} .*: choose another --out"),
        locked(tmp_path),
    ):
        pass

"""Runs that are shared, stopped, killed and squeezed: what is left, what is said, and that the same command
ends with the same images.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, call, environment, load_script

import guided_diffusion.runs.lock as run_lock
from guided_diffusion.runs.store import SampleStore

script = load_script("classifier_sample")
FLAGS = ["--preset", "digits", "--timestep_respacing", "5", "--num_samples", "20", "--batch_size", "2"]
ONE = [sys.executable]


def several(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def start(launcher, *flags):
    command = [*launcher, str(ROOT / "scripts/classifier_sample.py"), *map(str, flags)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(launcher, *flags):
    process = start(launcher, *flags)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def samples_bytes(folder):
    (path,) = folder.glob("samples_*.npz")
    return path.read_bytes()


def wait_for_a_shard(process, folder):
    deadline = time.monotonic() + 120
    while not list(folder.glob("shards/[0-9]*.npz")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("use_ddim", ["False", "True"])
def test_one_two_and_three_processes_write_the_same_bytes(tmp_path, use_ddim):
    flags = [*FLAGS, "--use_ddim", use_ddim, "--out"]
    finish(ONE, *flags, tmp_path / "1")
    for processes in (2, 3):
        finish(several(processes), *flags, tmp_path / str(processes))
        assert samples_bytes(tmp_path / str(processes)) == samples_bytes(tmp_path / "1")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_batch_and_the_same_command_goes_on(tmp_path, signum, code):
    flags = [
        *FLAGS,
        "--num_samples",
        "300",
        "--batch_size",
        "10",
        "--timestep_respacing",
        "25",
        "--out",
        tmp_path,
    ]
    with start(ONE, *flags) as process:
        wait_for_a_shard(process, tmp_path)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{signal.Signals(signum).name}: stopping after this batch" in err
    assert err.rstrip().endswith("the same command goes on from there")
    # The batch that it was at is kept, so that nothing is half done.
    assert not list(tmp_path.glob("shards/.*"))
    assert len(list(tmp_path.glob("shards/*.npz"))) >= 2
    assert not (tmp_path / "run.lock").exists()


def test_a_run_by_several_processes_stops_as_a_whole(tmp_path):
    flags = [*FLAGS, "--num_samples", "2000", "--timestep_respacing", "25", "--out", tmp_path]
    with start(several(2), *flags) as process:
        wait_for_a_shard(process, tmp_path)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "SIGTERM: stopping after this batch" in err
    assert not list(tmp_path.glob("shards/.*")) and not list(tmp_path.glob("samples_*.npz"))


def test_a_killed_writer_leaves_a_lock_that_the_next_run_takes_over(tmp_path):
    flags = [*FLAGS, "--num_samples", "40", "--timestep_respacing", "10", "--out", tmp_path]
    with start(ONE, *flags) as process:
        wait_for_a_shard(process, tmp_path)
        process.kill()
        process.communicate()
    assert (tmp_path / "run.lock").read_text().startswith(f"process {process.pid} on ")
    # A writer that was killed in the middle of a file leaves it under another name.
    (tmp_path / "shards" / ".000000-000002.npz.1.part").write_bytes(b"half")
    before = len(list(tmp_path.glob("shards/[0-9]*.npz")))
    result = call(script.main, flags)
    assert result.code == 0 and before < 20
    assert f"goes on after process {process.pid} on " in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        "log.txt",
        "run.json",
        "samples_40x16x16x3.npz",
    ]


def test_torchrun_restarts_the_others_after_one_was_killed(tmp_path):
    flags = [*FLAGS, "--num_samples", "60", "--timestep_respacing", "25", "--out", tmp_path]
    with start([*several(2), "--max_restarts", "1"], *flags) as process:
        wait_for_a_shard(process, tmp_path)
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
        os.kill(int(worker), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (tmp_path / "samples_60x16x16x3.npz").exists()


def test_two_processes_on_one_folder(tmp_path):
    flags = [*FLAGS, "--num_samples", "2000", "--out", tmp_path]
    with start(ONE, *flags) as process:
        wait_for_a_shard(process, tmp_path)
        result = call(script.main, flags)
        process.kill()
        process.communicate()
    assert result.code == 1
    owner = f"process {process.pid} on "
    assert (
        result.err.startswith(f"error: another run is writing into {tmp_path}: {owner}")
        and result.err.count("\n") == 1
    )


def test_too_little_space_is_noticed_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    result = call(script.main, [*FLAGS, "--out", tmp_path])
    needed = 2 * 20 * (16 * 16 * 3 + 8)
    assert result.code == 1
    assert f"error: {tmp_path} needs {needed:,} bytes more, and 1,000 are free: make room" in result.err


@contextmanager
def mounted(folder, options):
    """A file system of its own in a folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "size=64k") as folder:
        yield folder


def test_a_read_only_folder_is_refused_before_the_networks_are_loaded(tmp_path):
    with mounted(tmp_path / "disk", "ro") as folder:
        result = call(
            script.main, [*FLAGS, "--classifier_path", tmp_path / "absent.pt", "--out", folder / "out"]
        )
        again = call(script.main, [*FLAGS, "--out", folder])
    assert result.code == again.code == 1
    assert (
        result.err
        == f"error: cannot write to the output folder {folder / 'out'} (Read-only file system); choose another --out\n"
    )
    assert (
        again.err
        == f"error: cannot write to the output folder {folder} (Read-only file system); choose another --out\n"
    )


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_complete(small_disk):
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64)
    store = SampleStore(small_disk / "out", {}, 100, 4)
    written = 0
    with pytest.raises(
        OSError,
        match=r"no space left in .*/out: some 12,288 bytes are to be written, and [\d,]+ are free; make room",
    ):
        for indices in store.missing():
            store.write(indices, torch.from_numpy(images), torch.from_numpy(labels), {})
            written += 1
    assert written >= 1
    assert len(store.missing()) == 25 - written
    assert not list(small_disk.glob("out/shards/.*"))


def test_a_stale_lock_is_told_from_a_held_one(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on another-host")
    with run_lock.locked(tmp_path) as left_behind:
        assert left_behind == "process 1 on another-host"
        assert (tmp_path / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        held = f"another run is writing into {tmp_path}: process {os.getpid()} on "
        with pytest.raises(ValueError, match=held), run_lock.locked(tmp_path):
            pass
    assert not (tmp_path / "run.lock").exists()
    with run_lock.locked(tmp_path) as left_behind:
        assert left_behind is None


def test_chaos_in_short(tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts/chaos.py",
        "--kills",
        "2",
        "--longest",
        "5",
        "--num_samples",
        "80",
        "--out",
        tmp_path,
    ]
    done = subprocess.run(
        [*map(str, command), "--processes", "1-2", "--seed", "3"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"2 kills, 80 samples: the same bytes as those of an undisturbed run\n", done.stdout)


@pytest.fixture
def slurm(tmp_path):
    """Runs the Slurm example with stand-ins for Slurm's commands, which write down how they were called."""
    calls = tmp_path / "calls"
    for name, answer in (
        ("srun", 'sleep "${NAP:-0}" & trap "kill $!; exit 143" TERM; wait $!'),
        ("scontrol", "echo node1; echo node2"),
    ):
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\necho {name} "$@" >> {calls}\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
    }
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def submit(*words, **more):
        return subprocess.Popen(
            ["bash", ROOT / "scripts/sample.sbatch", *words], env={**environment(), **job, **path, **more}
        )

    return submit, lambda: calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("name", ["classifier_sample", "edm_sample"])
def test_the_slurm_example_starts_torchrun_on_every_node_with_the_script_and_its_flags(slurm, name):
    submit, calls = slurm
    assert submit(name, "--preset", "digits", "--out", "with a blank").wait(timeout=30) == 0
    (srun,) = (call for call in calls() if call.startswith("srun"))
    assert (
        srun.startswith("srun torchrun --nnodes 2 --nproc_per_node gpu ")
        and "--rdzv_endpoint node1:29500 --rdzv_id 7" in srun
    )
    assert srun.endswith(f" scripts/{name}.py --preset digits --out with a blank")
    assert (ROOT / f"scripts/{name}.py").exists()


def test_the_slurm_example_passes_the_signal_on_and_queues_itself_again(slurm):
    submit, calls = slurm
    with submit("classifier_sample", NAP="60") as process:
        deadline = time.monotonic() + 30
        while not any(call.startswith("srun") for call in calls()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert calls()[-1] == "scontrol requeue 7"

"""Runs that are shared, stopped, killed and squeezed: what is left, what is said, and that the same command
ends with the same images.
"""

import os
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
from forked import Forked
from helpers import ROOT, call, environment, load_script, samples_bytes

from guided_diffusion.runs.store import SampleStore

script = load_script("classifier_sample")
FLAGS = ["--preset", "digits", "--timestep_respacing", "3", "--num_samples", "12", "--batch_size", "2"]
LONGER = [*FLAGS, "--timestep_respacing", "5", "--num_samples", "20"]  # to be killed on the way
ONE = [sys.executable]


def several(processes, *more):
    return [*ONE, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *more]


def start(launcher, *flags, popen=Forked, **variables):
    """popen: subprocess.Popen where the start of the process is a part of what is tested."""
    command = [*launcher, str(ROOT / "scripts/classifier_sample.py"), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return popen(command, env={**environment(), **variables}, **pipes)


def finish(process):
    with process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_a_shard(process, folder):
    wait_until(lambda: list(folder.glob("shards/[0-9]*.npz")), process)


# Shared


def open_mpi(rank, size):
    values = {"RANK": rank, "SIZE": size, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


def hydra(rank, size):
    values = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size}
    return {name: str(value) for name, value in values.items()}


def srun(rank, size):
    values = {"JOB_ID": 7, "STEP_ID": 0, "STEP_NUM_NODES": 1, "NTASKS": size, "PROCID": rank, "LOCALID": rank}
    return {f"SLURM_{name}": str(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The bytes of the samples of a run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(start(ONE, *FLAGS, "--out", folder))
    return samples_bytes(folder)


def test_three_processes_of_torchrun_write_the_bytes_of_one_process(tmp_path, alone):
    finish(start(several(3), *FLAGS, "--out", tmp_path, popen=subprocess.Popen))
    assert samples_bytes(tmp_path) == alone


@pytest.mark.parametrize(("launcher", "popen"), [(open_mpi, subprocess.Popen), (srun, Forked)])
def test_processes_of_mpiexec_and_srun_are_one_run_and_write_the_bytes_of_one_process(
    tmp_path, alone, launcher, popen
):
    variables = {"TMPDIR": str(tmp_path), "popen": popen}
    group = [start(ONE, *FLAGS, "--out", tmp_path, **launcher(rank, 2), **variables) for rank in (1, 0)]
    assert [bool(finish(process)) for process in group] == [False, True]
    assert samples_bytes(tmp_path) == alone


def test_mpiexec_on_several_nodes_is_one_line_that_names_torchrun(tmp_path):
    with start(ONE, *FLAGS, "--out", tmp_path, **{**hydra(1, 8), "MPI_LOCALNRANKS": "4"}) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.count("\n") == 1
    assert err.startswith("error: ") and "several nodes: start torchrun there instead" in err


# Stopped and killed


@pytest.mark.parametrize(
    ("signum", "code", "popen"), [(signal.SIGTERM, 143, subprocess.Popen), (signal.SIGINT, 130, Forked)]
)
def test_a_signal_finishes_the_batch_and_keeps_it(tmp_path, signum, code, popen):
    size = ["--num_samples", "300", "--batch_size", "4"]
    with start(ONE, *FLAGS, *size, "--out", tmp_path, popen=popen) as process:
        wait_for_a_shard(process, tmp_path)
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"{signal.Signals(signum).name}: stopping after this batch" in err and "the same command" in err
    assert not list(tmp_path.glob("shards/.*")) and len(list(tmp_path.glob("shards/*.npz"))) >= 2
    assert not (tmp_path / "run.lock").exists()


def test_a_run_by_several_processes_stops_as_a_whole(tmp_path):
    with start(several(2), *FLAGS, "--num_samples", "2000", "--out", tmp_path) as process:
        wait_for_a_shard(process, tmp_path)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGTERM: stopping after this batch" in err
    assert not list(tmp_path.glob("shards/.*")) and not list(tmp_path.glob("samples_*.npz"))


def test_a_killed_writer_leaves_a_lock_that_the_next_run_takes_over(tmp_path):
    flags = [*LONGER, "--out", tmp_path]
    with start(ONE, *flags) as process:
        wait_for_a_shard(process, tmp_path)
        process.kill()
        process.communicate()
    assert (tmp_path / "run.lock").read_text().startswith(f"process {process.pid} on ")
    # A writer that was killed in the middle of a file leaves it under another name.
    (tmp_path / "shards" / ".000000-000002.npz.1.part").write_bytes(b"half")
    result = call(script.main, flags)
    assert result.code == 0 and f"after process {process.pid} on " in result.err
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["grid.png", "log.txt", "run.json", "samples_20x16x16x3.npz"]


def test_torchrun_restarts_the_others_after_one_was_killed(tmp_path):
    with start(several(2, "--max_restarts", "1"), *LONGER, "--out", tmp_path) as process:
        wait_for_a_shard(process, tmp_path)
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
        os.kill(int(worker), signal.SIGKILL)
        finish(process)
    assert (tmp_path / "samples_20x16x16x3.npz").exists()


def test_two_runs_on_one_folder(tmp_path):
    flags = [*FLAGS, "--num_samples", "2000", "--out", tmp_path]
    with start(ONE, *flags) as process:
        wait_for_a_shard(process, tmp_path)
        result = call(script.main, flags)
        process.kill()
        process.communicate()
    assert result.code == 1 and result.err.count("\n") == 1
    owner = f"process {process.pid} on "
    assert result.err.startswith(f"error: another run is writing into {tmp_path}: {owner}")


def test_chaos_in_short(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", Forked)
    size = ["--num_samples", "100", "--batch_size", "4", "--timestep_respacing", "5"]
    flags = ["--kills", "2", "--longest", "1", "--processes", "1-2", "--seed", "3"]
    done = call(load_script("chaos").main, [*flags, *size, "--out", tmp_path])
    assert done.code == 0, done.err
    assert done.out == "2 kills, 100 samples: the same bytes as those of an undisturbed run\n"


# Squeezed


def test_too_little_space_is_noticed_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    result = call(script.main, [*FLAGS, "--out", tmp_path])
    needed = 2 * 12 * (16 * 16 * 3 + 8)
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


def test_a_read_only_folder_is_refused_before_the_networks_are_loaded(tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        for folder in (disk / "out", disk):
            result = call(script.main, [*FLAGS, "--classifier_path", tmp_path / "absent.pt", "--out", folder])
            told = f"cannot write to the output folder {folder} (Read-only file system); choose another --out"
            assert (result.code, result.err) == (1, f"error: {told}\n")


def test_a_disk_that_fills_up_stops_the_run_and_keeps_what_is_complete(tmp_path):
    images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.from_numpy(np.zeros(4, np.int64))
    full = (
        r"no space left in .*/out/shards: some 12,288 bytes are to be written, and [\d,]+ are free; make room"
    )
    with mounted(tmp_path / "disk", "size=64k") as disk:
        store = SampleStore(disk / "out", {}, 100, 4)
        with pytest.raises(OSError, match=full):
            for indices in store.missing():
                store.write(indices, images, labels, {})
        assert 1 <= len(list(disk.glob("out/shards/*.npz"))) == 25 - len(store.missing())
        assert not list(disk.glob("out/shards/.*"))


# Slurm's example


@pytest.fixture
def slurm(tmp_path):
    """Runs the Slurm example with stand-ins for Slurm's commands, which write down how they were called."""
    calls = tmp_path / "calls"
    nap = 'sleep "${NAP:-0}" & trap "kill $!; exit 143" TERM; wait $!'
    for name, answer in (("srun", nap), ("scontrol", "echo node1; echo node2")):
        (tmp_path / name).write_text(f'#!/usr/bin/env bash\necho {name} "$@" >> {calls}\n{answer}\n')
        (tmp_path / name).chmod(0o755)
    job = {"SUBMIT_DIR": str(ROOT), "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "JOB_ID": "7"}
    variables = {f"SLURM_{name}": value for name, value in job.items()}
    variables["PATH"] = f"{tmp_path}:{os.environ['PATH']}"

    def submit(*words, **more):
        command = ["bash", ROOT / "scripts/sample.sbatch", *words]
        return subprocess.Popen(command, env={**environment(), **variables, **more})

    return submit, lambda: calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("name", ["classifier_sample", "edm_sample"])
def test_the_slurm_example_starts_torchrun_on_every_node_with_the_script_and_its_flags(slurm, name):
    submit, calls = slurm
    assert submit(name, "--preset", "digits", "--out", "with a blank").wait(timeout=30) == 0
    (line,) = (call for call in calls() if call.startswith("srun"))
    assert line.startswith("srun torchrun --nnodes 2 --nproc_per_node gpu ")
    assert "--rdzv_endpoint node1:29500 --rdzv_id 7" in line
    assert line.endswith(f" scripts/{name}.py --preset digits --out with a blank")
    assert (ROOT / f"scripts/{name}.py").exists()


def test_the_slurm_example_passes_the_signal_on_and_queues_itself_again(slurm):
    submit, calls = slurm
    with submit("classifier_sample", NAP="60") as process:
        wait_until(lambda: any(call.startswith("srun") for call in calls()), process)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
    assert calls()[-1] == "scontrol requeue 7"

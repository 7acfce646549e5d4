"""For every sampler: image i is image i, whatever the batch, the interruption, the kill and the processes."""

import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
from forked import Forked, run
from helpers import ROOT, contents, environment, load_samples, samples_bytes, samples_file
from samplers import DDPM, IMAGES, PLAIN_EDM, RELEASED, SAMPLERS, SCORE, levels_apart

WRITTEN_ONCE = ("run.json", "log.txt")  # they hold times


def test_another_seed_is_another_image(sampler, finished, tmp_path):
    sampler.run(tmp_path, *sampler.images(IMAGES, first=7))
    assert levels_apart(tmp_path, finished(sampler)).min() > 0


CASES = [*((sampler, True) for sampler in SAMPLERS), (DDPM, False), (SCORE, False)]


@pytest.mark.parametrize(("sampler", "guided"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_the_batch_changes_no_label_and_hardly_a_pixel(sampler, guided, tmp_path):
    scale, many = () if guided else sampler.scale_0, sampler.images(16)
    for size in (3, 16):
        sampler.run(tmp_path / str(size), *many, "--batch_size", size, *scale)
    labels = [load_samples(tmp_path / size)[1].tolist() for size in ("3", "16")]
    assert labels[0] == labels[1] and len(set(labels[0])) > 5
    apart = levels_apart(tmp_path / "3", tmp_path / "16")
    # Three steps of Heun magnify rounding. A tie in a max-pooling layer can send one guided image astray.
    assert sorted(apart)[-2 if guided else -1] <= (4 if sampler.name == "heun" else 1)


@pytest.mark.parametrize("sampler", [RELEASED, SCORE], ids=lambda sampler: sampler.name)
def test_the_order_of_the_seeds_is_that_of_the_images(sampler, finished, tmp_path):
    """With new noise at every step, too."""
    for seeds in ("0-4", "3,70000,0"):
        sampler.run(tmp_path / seeds, "--seeds", seeds, "--S_churn", 2, "--batch_size", 3)
    (images, labels), (others, other_labels) = (
        load_samples(tmp_path / seeds) for seeds in ("0-4", "3,70000,0")
    )
    assert labels[[3, 0]].tolist() == other_labels[[0, 2]].tolist()
    assert np.abs(images[[3, 0]].astype(int) - others[[0, 2]]).max() <= 1
    unchurned = load_samples(finished(sampler))[0]
    assert (images[:IMAGES] != unchurned).any(axis=(1, 2, 3)).all()


# Interruptions. What stops the run is put into functions of numpy and os that every run calls.


def stop_at_the_second_shard(patch):
    savez, calls = np.savez, []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        savez(*args, **kwargs)

    patch.setattr(np, "savez", fails)


def stop_at_the_final_name(patch):
    replace = os.replace

    def fails(source, target):
        if str(target).endswith(("3.npz", "000002.png")):
            raise KeyboardInterrupt
        replace(source, target)

    patch.setattr(os, "replace", fails)


def stop_while_clearing_up(patch):
    unlink = os.unlink

    def fails(path, **kwargs):
        if "/shards/0" in str(path):
            raise KeyboardInterrupt
        unlink(path, **kwargs)

    patch.setattr(os, "unlink", fails)


@pytest.fixture(scope="module")
def whole(finished, tmp_path_factory):
    """whole(row, base): a run of these flags that nothing stopped."""
    pngs = tmp_path_factory.mktemp("pngs")
    RELEASED.run(pngs, base=PNGS)
    return lambda sampler, base: pngs if base else finished(sampler)


PNGS = (*PLAIN_EDM, "--subdirs")
FORMS = [(DDPM, None), (RELEASED, None), (RELEASED, PNGS)]


@pytest.mark.parametrize(("sampler", "base"), FORMS, ids=["adm npz", "edm npz", "edm png"])
@pytest.mark.parametrize(
    ("stop", "complete", "drawn_later"),
    [(stop_at_the_second_shard, 0, 1), (stop_at_the_final_name, 0, 0), (stop_while_clearing_up, 1, 0)],
)
def test_an_interrupted_run_resumes_and_ends_with_the_same_bytes(
    tmp_path, whole, sampler, base, stop, complete, drawn_later
):
    folder, log = tmp_path, () if base else ("--log_guidance", True)
    with pytest.MonkeyPatch.context() as patch:
        stop(patch)
        result = sampler.call(folder, *log, base=base)
    assert (result.code, result.out) == (130, "") and "Traceback" not in result.err
    assert "the same command" in result.err
    assert len([*folder.glob("samples_*"), *folder.glob("dataset.json")]) == complete
    drawn, savez = [], np.savez
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "savez", lambda *args, **kwargs: drawn.append(args) or savez(*args, **kwargs))
        sampler.run(folder, *log, base=base)
    assert len(drawn) == drawn_later
    assert_same_files(folder, whole(sampler, base))


def assert_same_files(folder, other):
    files, others = contents(folder), contents(other)
    assert files.keys() == others.keys()
    assert [path for path in files if path.name not in WRITTEN_ONCE and files[path] != others[path]] == []


# Runs a script that is killed in its second shard.
KILLED = """
import io, os, runpy, signal, sys
import numpy as np
savez, calls = np.savez, []

def half(file, **arrays):
    calls.append(file)
    if len(calls) < 2:
        return savez(file, **arrays)
    savez(whole := io.BytesIO(), **arrays)
    file.write(whole.getvalue()[:500])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

np.savez, sys.argv = half, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(sampler, folder, *flags):
    script = ROOT / "scripts" / f"{sampler.script}.py"
    return [script, *sampler.flags, *sampler.images(IMAGES), "--batch_size", 2, *flags, "--out", folder]


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(sampler, finished, tmp_path):
    words = command(sampler, folder := tmp_path / "run", "--log_guidance", True)
    with Forked([sys.executable, "-c", KILLED, *words], environment()) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err
    assert len(list(folder.glob("shards/[0-9]*.npz"))) == 1 and len(list(folder.glob("shards/.*"))) == 1
    result = sampler.run(folder, "--log_guidance", True)
    assert f"resumes after process {process.pid} on " in result.err
    assert_same_files(folder, finished(sampler))


# Each process goes through all the lines within one process group, so that what starts it is paid for once.
TOGETHER = """
import json, runpy, sys
import torch.distributed as dist
leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for words in json.loads(sys.argv[1]):
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""


def test_two_processes_write_the_bytes_and_the_lines_of_one(finished, tmp_path):
    (source := tmp_path / "together.py").write_text(TOGETHER)
    lines = [command(sampler, tmp_path / sampler.name, "--log_guidance", True) for sampler in SAMPLERS]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    said = run([*launcher, source, json.dumps(lines, default=str)])[0].split()
    assert said == [str(samples_file(tmp_path / sampler.name)) for sampler in SAMPLERS]  # rank 0 alone
    for sampler in SAMPLERS:
        assert_same_files(tmp_path / sampler.name, finished(sampler))


# The folder of a finished run


@pytest.mark.parametrize("base", [None, PLAIN_EDM], ids=["npz", "png"])
def test_a_complete_run_says_so_and_is_left_alone(tmp_path, base):
    first = RELEASED.run(tmp_path, base=base)
    before = contents(tmp_path, but="log.txt")
    again = RELEASED.run(tmp_path, base=base)
    assert "complete, nothing to do" in again.err and again.out == first.out
    assert contents(tmp_path, but="log.txt") == before
    refused = RELEASED.call(tmp_path, "--S_churn", 1, base=base)
    assert refused.code == 1 and refused.err.startswith("error: ")
    told = ("another run's output", "S_churn 0.0 -> 1.0", "--overwrite True")
    assert [word for word in told if word not in refused.err] == []
    assert contents(tmp_path, but="log.txt") == before


@pytest.mark.parametrize(
    ("sampler", "base", "files"),
    [
        (DDPM, None, ["grid.png", "samples_2x16x16x3.npz"]),
        (RELEASED, None, ["grid.png", "samples_2x16x16x3.npz"]),
        (RELEASED, PLAIN_EDM, ["000005.png", "000006.png", "dataset.json"]),
    ],
    ids=["adm", "edm npz", "edm png"],
)
def test_overwrite_removes_the_other_run_and_nothing_else(tmp_path, finished, sampler, base, files):
    folder = tmp_path / "run"
    if base is None:
        shutil.copytree(finished(sampler), folder)
    else:
        sampler.run(folder, base=base)
    (folder / "notes.txt").write_text("mine")
    flags = sampler.images(2, first=5)
    sampler.run(folder, *flags, "--overwrite", True, base=base)
    assert {path.name for path in folder.iterdir()} == {*files, "log.txt", "notes.txt", "run.json"}
    if base is None:
        sampler.run(tmp_path / "alone", *flags)
        assert samples_bytes(folder) == samples_bytes(tmp_path / "alone")

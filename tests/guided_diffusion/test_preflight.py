"""What is said before a run, on a job whose sampler takes no time and whose clock and memory are set by
hand.
"""

import json
import os
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from guided_diffusion.files.checkpoints import existing_file, sha256
from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.runs import dry_run as preflight
from guided_diffusion.runs import machine
from guided_diffusion.runs.job import Job, Sampler
from guided_diffusion.runs.store import SampleStore

GB = 10**9
SECONDS = (500.0, 30.0, 42.0)  # the first step warms up; the others take 36 s on average


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(preflight, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Resident memory after the steps of one image and after that of two, and what is left."""
    resident = [1.5 * GB, 2 * GB]
    monkeypatch.setattr(machine, "resident_memory", lambda: resident.pop(0))
    monkeypatch.setattr(machine, "available_memory", lambda device: 64 * GB)


def sampler(clock=None, steps=25, error=None):
    """Nothing but black images and ticks."""

    def sample(indices, tick):
        if error:
            raise error
        for step in range(steps):
            if clock:
                clock.seconds += SECONDS[min(step, 2)]
            tick()
        return torch.zeros(len(indices), 3, 2, 2), torch.zeros(len(indices), dtype=torch.int64)

    return Sampler(sample, steps, image_size=2, notes=["a note"])


def make(tmp_path, built=None, **changes):
    """A job of 300 samples in batches of 50 whose one file is there."""
    weights = tmp_path / "weights.pt"
    if not weights.exists():
        weights.write_bytes(b"weights")
    fields = {
        "folder": tmp_path / "out",
        "flags": {"model_path": str(weights), "seed": 0},
        "not_compared": (),
        "files": {"model_path": partial(existing_file, weights)},
        "build": lambda device, tally: built or sampler(),
        "num_samples": 300,
        "batch_size": 50,
        "rounding": "adm",
        "drawn_by": {},
        "device": "cpu",
    }
    return Job(**{**fields, **changes})


def lines(capsys):
    """subject -> what was printed of it, in order."""
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)


def problems(job, capsys):
    """What examine finds, by subject; the number in its error agrees."""
    with pytest.raises(preflight.ProblemsFoundError) as caught:
        preflight.examine(job)
    said = capsys.readouterr().out
    assert not said.endswith("ready\n")
    found = {
        line.split(": ")[0]: line.partition("PROBLEM: ")[2]
        for line in said.splitlines()
        if "PROBLEM: " in line
    }
    assert str(caught.value).startswith(f"{len(found)} problem")
    return found


def unfinished(job):
    """The job's folder as a run leaves it that was stopped after two batches; and all of its bytes."""
    store = job.open_store(job.settings(), torch.device("cpu"))
    for indices in store.missing()[:2]:
        store.write(
            indices, torch.zeros(len(indices), 2, 2, 3, dtype=torch.uint8), torch.zeros(len(indices)), {}
        )
    return contents(job.folder)


def contents(folder):
    return {
        path: (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


def test_every_subject_in_order_then_ready(tmp_path, capsys):
    preflight.examine(make(tmp_path))
    said = capsys.readouterr().out.splitlines()
    subjects = ["machine", "--model_path", "folder", "networks", "disk", "steps", "memory", "time", "ready"]
    assert [line.partition(": ")[0] for line in said] == subjects
    assert f"torch {torch.__version__}" in said[0] and "a note" in said[3]
    assert sha256(tmp_path / "weights.pt")[:16] in said[1] and "7 bytes" in said[1]
    assert not (tmp_path / "out").exists()


def test_time_is_seconds_per_step_times_steps_times_images(tmp_path, capsys, clock):
    preflight.examine(make(tmp_path, sampler(clock)))
    said = lines(capsys)
    assert said["steps"].startswith("36.000 s each at batch 1")
    assert said["time"].startswith(f"some {36 * 25 * 300 / 3600:,.1f} hours for 300 images of 25 steps")
    assert "scaled from batch 1" in said["time"]
    # Not more than one step to warm up, two that count, and one of two images.
    assert clock.seconds == sum(SECONDS) + SECONDS[0]


def test_two_steps_are_timed_without_a_third(tmp_path, capsys, clock):
    preflight.examine(make(tmp_path, sampler(clock, steps=2), num_samples=1, batch_size=1))
    said = lines(capsys)
    assert (
        said["time"].startswith(f"some {30 * 2 / 60:.1f} minutes for 1 images of 2 steps")
        and "scaled" not in said["time"]
    )


def test_memory_of_the_runs_batch_is_scaled_by_what_a_second_image_takes(tmp_path, capsys):
    preflight.examine(make(tmp_path))
    assert lines(capsys)["memory"].startswith(
        f"1.50 GB at batch 1, some {1.5 + 49 * 0.5:.2f} GB at batch 50; 64.00 GB are left"
    )


@pytest.mark.parametrize(("left", "enough"), [(24.4, False), (24.6, True), (None, True)])
def test_memory_that_is_not_enough(tmp_path, capsys, monkeypatch, left, enough):
    monkeypatch.setattr(machine, "available_memory", lambda device: left and int(left * GB))
    if enough:
        preflight.examine(make(tmp_path))
    else:
        assert re.search(
            r"26\.00 GB at batch 50, but 24\.40 GB are left: lower --batch_size",
            problems(make(tmp_path), capsys)["memory"],
        )


def test_a_missing_file_and_a_bad_folder_are_told_at_once_and_nothing_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    files = {"model_path": partial(existing_file, tmp_path / "128x128_diffusion.pt")}
    found = problems(make(tmp_path, build=None, files=files, folder=tmp_path / "file"), capsys)
    assert list(found) == ["--model_path", "folder"]
    assert "python scripts/download.py 128x128_diffusion.pt" in found["--model_path"]


@pytest.mark.parametrize("free", [11_999, 12_000])
def test_a_disk_that_is_too_small_by_one_byte(tmp_path, capsys, monkeypatch, free):
    # Shards and the final file: 12 bytes of pixels and 8 of the label, twice, 300 times.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if free == 12_000:
        preflight.examine(make(tmp_path))
    else:
        assert (
            "needs 12,000 bytes more, and 11,999 are free: make room"
            in problems(make(tmp_path), capsys)["disk"]
        )


@pytest.mark.parametrize("recorded", ["right", "wrong", "broken"])
def test_a_file_is_held_against_the_hash_that_was_recorded(tmp_path, capsys, recorded):
    job = make(tmp_path)
    digest = {"right": sha256(tmp_path / "weights.pt").upper(), "wrong": "0" * 64}.get(recorded)
    table = json.dumps({"weights.pt": {"sha256": digest, "bytes": 7}}) if digest else "{"
    (tmp_path / "hashes.json").write_text(table)
    if recorded == "right":
        preflight.examine(job)
        assert lines(capsys)["--model_path"].endswith("(as recorded)")
    else:
        found = problems(job, capsys)
        expected = (
            (str(tmp_path / "weights.pt"), "0" * 64, "recorded")
            if recorded == "wrong"
            else (str(tmp_path / "hashes.json"),)
        )
        assert list(found) == ["--model_path"] and all(part in found["--model_path"] for part in expected)


def test_a_file_is_held_against_the_hash_that_is_published(tmp_path, capsys):
    fake = tmp_path / "resnet101-cd907fc2.pth"
    fake.write_bytes(b"something else")
    job = make(tmp_path, files={"model_path": partial(existing_file, fake)})
    assert "cd907fc2" in problems(job, capsys)["--model_path"].replace(fake.name, "")


@pytest.mark.parametrize("below", ["", "below", "below/it"])
def test_a_file_in_the_place_of_the_folder(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    found = problems(make(tmp_path, folder=tmp_path / "file" / below), capsys)
    assert f"cannot write to {tmp_path / 'file'}" in found["folder"] and "--out" in found["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "cannot write" in problems(make(tmp_path, folder=tmp_path / "locked" / "out"), capsys)["folder"]


def test_half_a_run_is_counted_needs_less_room_and_is_left_as_it_is(tmp_path, capsys, monkeypatch):
    job = make(tmp_path)
    before = unfinished(job)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(200 + 300) * 20))
    preflight.examine(job)
    assert "100 of 300 samples are there" in lines(capsys)["folder"]
    assert contents(job.folder) == before


def test_a_finished_run_needs_no_room(tmp_path, capsys, monkeypatch):
    job = make(tmp_path, num_samples=100)
    unfinished(job)
    job.open_store(job.settings(), torch.device("cpu")).finish()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    preflight.examine(job)
    assert "100 of 100 samples are there" in lines(capsys)["folder"]


def test_another_runs_folder_is_a_problem_unless_it_is_to_be_overwritten(tmp_path, capsys):
    before = unfinished(make(tmp_path))
    changes = {"flags": {"model_path": "elsewhere", "seed": 1}}
    found = problems(make(tmp_path, **changes), capsys)
    assert "another run's output (seed 0 -> 1)" in found["folder"]
    preflight.examine(make(tmp_path, **changes, overwrite=True))
    assert "0 of 300 samples are there" in lines(capsys)["folder"]
    assert contents(tmp_path / "out") == before


def test_samples_without_a_manifest_are_the_problem_that_the_run_has(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples_300x2x2x3.npz").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"no run\.json"):
        SampleStore(tmp_path / "out", {}, 300, 50)
    assert "no run.json" in problems(make(tmp_path), capsys)["folder"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("no room"), "lower --batch_size"),
        (NonFiniteError("guidance gradient", [0], 24), "step 24 for sample 0"),
    ],
)
def test_what_ends_the_first_step_is_a_problem_of_the_steps(tmp_path, capsys, error, said):
    found = problems(make(tmp_path, sampler(error=error)), capsys)
    assert list(found) == ["steps"] and said in found["steps"]


def test_networks_that_cannot_be_built_are_a_problem(tmp_path, capsys):
    def build(device, tally):
        raise ValueError("weights.pt does not fit\nthe flags")

    assert problems(make(tmp_path, build=build), capsys) == {"networks": "weights.pt does not fit the flags"}


def test_a_run_of_one_step_is_no_problem(tmp_path):
    """It cannot be timed, but nothing would fail."""
    preflight.examine(make(tmp_path, sampler(steps=1)))

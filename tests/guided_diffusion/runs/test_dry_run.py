"""What the dry run says, on a job whose sampler does nothing and whose memory is set by hand."""

import json
import os
import re
import shutil
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from guided_diffusion.files.nonfinite import NonFiniteError
from guided_diffusion.files.pretrained import existing_file, sha256
from guided_diffusion.runs import machine
from guided_diffusion.runs.dry_run import ProblemsFoundError, dry_run
from guided_diffusion.runs.job import Job, Sampler

GB = 10**9


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Resident memory after the steps of one image and after that of two, and what is left."""
    resident = [1.5 * GB, 2 * GB]
    monkeypatch.setattr(machine, "resident_memory", lambda: resident.pop(0))
    monkeypatch.setattr(machine, "available_memory", lambda device: 64 * GB)


def sampler(steps=25, naps=(), error=None, finish=None):
    """Nothing but black images and ticks; naps: seconds of the first steps."""

    def sample(indices, tick):
        if error:
            raise error
        for step in range(steps):
            time.sleep(naps[min(step, len(naps) - 1)] if naps else 0)
            tick()
        return torch.zeros(len(indices), 3, 2, 2), torch.zeros(len(indices), dtype=torch.int64)

    return Sampler(sample, steps, image_size=2, notes=["a note"], finish=finish)


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


def said(job, capsys):
    """subject -> what a dry run without problems prints of it, in order."""
    dry_run(job)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready"
    return dict(line.split(": ", 1) for line in lines[:-1])


def problems(job, capsys):
    """What a dry run finds, by subject; the number in its error agrees."""
    with pytest.raises(ProblemsFoundError) as caught:
        dry_run(job)
    out = capsys.readouterr().out
    pairs = [line.split(": PROBLEM: ", 1) for line in out.splitlines() if ": PROBLEM: " in line]
    assert not out.endswith("ready\n") and str(caught.value).startswith(f"{len(pairs)} problem")
    return dict(pairs)


def unfinished(job):
    """The job's folder as a run leaves it that was stopped after two batches; and all of its bytes."""
    store = job.open_store(job.settings(), torch.device("cpu"))
    for indices in store.missing()[:2]:
        images = torch.zeros(len(indices), 2, 2, 3, dtype=torch.uint8)
        store.write(indices, images, torch.zeros(len(indices)), {})
    return contents(job.folder)


def contents(folder):
    paths = [folder, *folder.rglob("*")]
    return {path: (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_every_subject_in_order_then_ready(tmp_path, capsys):
    lines = said(make(tmp_path), capsys)
    assert [*lines] == ["machine", "--model_path", "folder", "networks", "disk", "steps", "memory", "time"]
    assert f"torch {torch.__version__}" in lines["machine"] and "a note" in lines["networks"]
    assert (
        sha256(tmp_path / "weights.pt")[:16] in lines["--model_path"] and "7 bytes" in lines["--model_path"]
    )
    assert lines["memory"].startswith(
        f"1.50 GB at batch 1, some {1.5 + 49 * 0.5:.2f} GB at batch 50; 64.00 GB are left"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "changes", "scaled"), [(1000, {}, True), (2, {"num_samples": 1, "batch_size": 1}, False)]
)
def test_time_is_seconds_per_step_times_steps_times_images_without_the_first_step(
    tmp_path, capsys, steps, changes, scaled
):
    start = time.monotonic()
    lines = said(make(tmp_path, sampler(steps, naps=(1.5, 0.1, 0.15)), **changes), capsys)
    # Not more than one step to warm up, two that count, and one of two images.
    assert time.monotonic() - start < 10
    each = float(lines["steps"].split()[0])
    assert (0.125 if steps > 2 else 0.1) <= each < 0.5
    images = changes.get("num_samples", 300)
    number, unit = re.match(r"some ([\d.,]+) (hours|minutes) for", lines["time"]).groups()
    seconds = float(number.replace(",", "")) * {"hours": 3600, "minutes": 60}[unit]
    assert seconds == pytest.approx(each * steps * images, rel=0.02, abs=3)
    assert f"for {images} images of {steps} steps" in lines["time"]
    assert ("scaled from batch 1" in lines["time"]) == scaled


def test_the_time_has_what_follows_the_last_step_in_it(tmp_path, capsys):
    decode = sampler(steps=1, finish=lambda count: time.sleep(0.1 * count))
    lines = said(make(tmp_path, decode), capsys)
    assert re.search(r"; after the last one 0\.1\d\d s to decode$", lines["steps"])
    assert float(re.match(r"some ([\d.]+) minutes", lines["time"])[1]) == pytest.approx(0.5, abs=0.1)


def test_a_run_of_one_step_is_no_problem(tmp_path, capsys):
    assert "time" in said(make(tmp_path, sampler(steps=1)), capsys)


@pytest.mark.parametrize(("left", "enough"), [(24.4, False), (24.6, True), (None, True)])
def test_memory_that_is_not_enough(tmp_path, capsys, monkeypatch, left, enough):
    monkeypatch.setattr(machine, "available_memory", lambda device: left and int(left * GB))
    if enough:
        assert "memory" in said(make(tmp_path), capsys)
    else:
        found = problems(make(tmp_path), capsys)["memory"]
        assert "26.00 GB at batch 50, but 24.40 GB are left: lower --batch_size" in found


@pytest.mark.parametrize("free", [11_999, 12_000])
def test_a_disk_that_is_too_small_by_one_byte(tmp_path, capsys, monkeypatch, free):
    # Shards and the final file: 12 bytes of pixels and 8 of the label, twice, 300 times.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if free == 12_000:
        assert "disk" in said(make(tmp_path), capsys)
    else:
        found = problems(make(tmp_path), capsys)["disk"]
        assert "needs 12,000 bytes more, and 11,999 are free: make room" in found


@pytest.mark.parametrize("recorded", ["right", "wrong", "broken"])
def test_a_file_is_held_against_the_hash_that_was_recorded(tmp_path, capsys, recorded):
    job = make(tmp_path)
    digest = {"right": sha256(tmp_path / "weights.pt").upper(), "wrong": "0" * 64}.get(recorded)
    table = json.dumps({"weights.pt": {"sha256": digest, "bytes": 7}}) if digest else "{"
    (tmp_path / "hashes.json").write_text(table)
    if recorded == "right":
        assert said(job, capsys)["--model_path"].endswith("(as recorded)")
    else:
        (found,) = problems(job, capsys).values()
        expected = ("weights.pt", "0" * 64, "recorded") if recorded == "wrong" else ("hashes.json",)
        assert [part for part in expected if part not in found] == []


def test_a_file_is_held_against_the_hash_that_is_published(tmp_path, capsys):
    fake = tmp_path / "resnet101-cd907fc2.pth"
    fake.write_bytes(b"something else")
    job = make(tmp_path, files={"model_path": partial(existing_file, fake)})
    assert "cd907fc2" in problems(job, capsys)["--model_path"].replace(fake.name, "")


@pytest.mark.parametrize("below", ["", "below", "below/it"])
def test_a_missing_file_and_a_bad_folder_are_told_at_once_and_nothing_is_loaded(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    files = {"model_path": partial(existing_file, tmp_path / "128x128_diffusion.pt")}
    found = problems(make(tmp_path, build=None, files=files, folder=tmp_path / "file" / below), capsys)
    assert list(found) == ["--model_path", "folder"]
    assert "python scripts/download.py 128x128_diffusion.pt" in found["--model_path"]
    assert f"cannot write to {tmp_path / 'file'}" in found["folder"] and "--out" in found["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    assert "cannot write" in problems(make(tmp_path, folder=tmp_path / "locked" / "out"), capsys)["folder"]


def test_half_a_run_is_counted_needs_less_room_and_is_left_as_it_is(tmp_path, capsys, monkeypatch):
    job = make(tmp_path)
    before = unfinished(job)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=(200 + 300) * 20))
    assert "100 of 300 samples are there" in said(job, capsys)["folder"]
    assert contents(job.folder) == before


def test_a_finished_run_needs_no_room(tmp_path, capsys, monkeypatch):
    job = make(tmp_path, num_samples=100)
    unfinished(job)
    job.open_store(job.settings(), torch.device("cpu")).finish()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "100 of 100 samples are there" in said(job, capsys)["folder"]


def test_another_runs_folder_is_a_problem_unless_it_is_to_be_overwritten(tmp_path, capsys):
    before = unfinished(make(tmp_path))
    changes = {"flags": {"model_path": "elsewhere", "seed": 1}}
    assert "another run's output (seed 0 -> 1)" in problems(make(tmp_path, **changes), capsys)["folder"]
    assert "0 of 300 samples" in said(make(tmp_path, **changes, overwrite=True), capsys)["folder"]
    assert contents(tmp_path / "out") == before


def test_samples_without_run_json_are_a_problem(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples_300x2x2x3.npz").write_bytes(b"somebody's")
    assert "no run.json" in problems(make(tmp_path), capsys)["folder"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("no room"), "lower --batch_size"),
        (NonFiniteError("guidance gradient", [0], 24), "step 24 for sample 0"),
    ],
)
def test_what_ends_the_first_step_is_a_problem_of_the_steps(tmp_path, capsys, error, told):
    found = problems(make(tmp_path, sampler(error=error)), capsys)
    assert list(found) == ["steps"] and told in found["steps"]


def test_networks_that_cannot_be_built_are_a_problem(tmp_path, capsys):
    def build(device, tally):
        raise ValueError("weights.pt does not fit\nthe flags")

    assert problems(make(tmp_path, build=build), capsys) == {"networks": "weights.pt does not fit the flags"}

"""The output folder: shards, resuming, the final npz or PNGs, and what is refused."""

import json
import math
import os
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.files.run_folder import read_metrics, read_run, read_samples
from guided_diffusion.runs.store import SampleStore

SETTINGS = {"seed": 3, "softplus_beta": math.inf, "labels": "balanced", "sizes": (1, 2)}
N, SHARD, H, W = 10, 4, 5, 6


def image(index):
    """(H, W, 3) uint8, another one for each index."""
    return np.random.RandomState(index).randint(0, 256, (H, W, 3), dtype=np.uint8)


def batch(indices):
    labels = torch.tensor([7 * i % 10 for i in indices])
    return torch.from_numpy(np.stack([image(i) for i in indices])), labels


def fill(store, ranges=None):
    for indices in store.missing() if ranges is None else ranges:
        store.write(indices, *batch(indices), {"seconds": 0.5, "skipped": len(indices)})
    return store


def flat(index):
    return f"{index:06d}.png"


def nested(index):
    return f"{index - index % 3:06d}/{index:06d}.png"


def in_thousands(index):
    return f"{index - index % 1000:06d}/{index:06d}.png"


def make(folder, num_samples=N, shard_size=SHARD, png_name=None, npz_too=False, **changes):
    settings = {**SETTINGS, **changes}
    return SampleStore(folder, settings, num_samples, shard_size, png_name=png_name, npz_too=npz_too)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def leave(folder, names):
    """Files of somebody else's; returns their names, sorted."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return sorted(names)


class Interrupted(BaseException):
    """What a kill looks like from inside."""


@contextmanager
def killed_after(monkeypatch, count):
    """The block is killed when `count` files beside run.json have got their names; yields these."""
    done, replace = [], os.replace

    def killed(source, target):
        if Path(target).name != "run.json":
            if len(done) == count:
                raise Interrupted
            done.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "replace", killed)
        yield done


# A run


@pytest.mark.parametrize("png_name", [None, flat, nested])
def test_run_from_start_to_end(tmp_path, png_name):
    folder = tmp_path / "new" / "folder"
    store = make(folder, png_name=png_name)
    assert store.missing() == [range(0, 4), range(4, 8), range(8, 10)]
    assert read_run(folder)["settings"]["seed"] == 3 and "totals" not in read_run(folder)
    fill(store)
    assert store.missing() == [] and store.samples_file() is None
    final = store.finish()
    assert store.samples_file() == final and make(folder, png_name=png_name).missing() == []
    run = json.loads((folder / "run.json").read_text())
    assert run["totals"] == {"seconds": 1.5, "skipped": 10} and run["settings"]["num_samples"] == N
    labels = [7 * i % 10 for i in range(N)]
    if png_name is None:
        assert files(folder) == ["grid.png", "run.json", f"samples_{N}x{H}x{W}x3.npz"]
        images, stored = read_samples(folder)
        assert images.dtype == np.uint8 and stored.dtype == np.int64 and stored.tolist() == labels
    else:
        # No grid.png, which a reader of the folder would take for a sample.
        assert files(folder) == sorted([*map(png_name, range(N)), "dataset.json", "run.json"])
        pairs = [[png_name(i), label] for i, label in enumerate(labels)]
        assert json.loads(final.read_text()) == {"labels": pairs}
        images = [np.asarray(Image.open(folder / png_name(i))) for i in range(N)]
        with pytest.raises(FileNotFoundError, match=r"no samples_NxHxWx3\.npz"):
            read_samples(folder)
    assert np.array_equal(images, [image(i) for i in range(N)])


def test_an_npz_beside_pngs_is_not_the_end_of_the_run(tmp_path, monkeypatch):
    fill(make(tmp_path / "npz")).finish()
    form = {"png_name": flat, "npz_too": True}
    with killed_after(monkeypatch, 5):  # three shards, the npz and a picture
        fill(make(tmp_path / "both", **form)).finish()
    again, name = make(tmp_path / "both", **form), f"samples_{N}x{H}x{W}x3.npz"
    assert name in files(tmp_path / "both") and again.missing() == [] and again.samples_file() is None
    assert again.finish().name == "dataset.json"
    assert files(tmp_path / "both") == sorted([*map(flat, range(N)), "dataset.json", "run.json", name])
    assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "npz" / name).read_bytes()


@pytest.mark.parametrize("png_name", [None, flat])
def test_a_resumed_run_ends_with_the_same_bytes_and_a_finished_one_is_left_as_it_is(tmp_path, png_name):
    fill(make(tmp_path / "whole", png_name=png_name)).finish()
    fill(make(tmp_path / "cut", png_name=png_name), [range(4, 8)])
    again = make(tmp_path / "cut", png_name=png_name)
    assert again.missing() == [range(0, 4), range(8, 10)]
    fill(again).finish()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    before = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in files(tmp_path / "cut")}
    assert make(tmp_path / "cut", png_name=png_name).finish().exists()
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("shard_size", [1, 3, 10, 64])
def test_bytes_depend_on_images_and_labels_alone(tmp_path, monkeypatch, shard_size):
    first = fill(make(tmp_path / "a")).finish()
    late = time.localtime(2e9)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: late)
    second = fill(make(tmp_path / "b", shard_size=shard_size, seed=4)).finish()
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(second) as archive:
        assert archive.testzip() is None


def test_the_grid_shows_the_first_64_images_across_shards(tmp_path):
    fill(make(tmp_path, num_samples=70, shard_size=7)).finish()
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (8 * (H + 2), 8 * (W + 2), 3)
    assert np.array_equal(pixels[-H - 1 : -1, -W - 1 : -1], image(63))


def test_many_shards_do_not_run_out_of_open_files(tmp_path):
    # The usual limit is 1,024 open files, and 50,000 samples in batches of 16 are 3,125 shards.
    resource = pytest.importorskip("resource")
    store = fill(make(tmp_path, num_samples=300, shard_size=1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limits[0]), limits[1]))
    try:
        store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(read_samples(tmp_path)[1]) == 300


def test_metrics_of_shards_in_any_order_become_lines_in_the_order_of_the_samples(tmp_path):
    store = make(tmp_path)
    for indices in (range(8, 10), range(0, 4)):
        store.write(indices, *batch(indices), {}, [{"step": 1}, {"step": 0}])
    expected = [{"samples": samples, "step": step} for samples in ([0, 4], [8, 10]) for step in (1, 0)]
    assert list(read_metrics(tmp_path)) == expected
    fill(store).finish()  # a batch in which guidance rested has no line
    assert list(read_metrics(tmp_path)) == expected
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == []


# Complete or not there


def test_finish_with_a_shard_missing_makes_no_npz(tmp_path):
    store = fill(make(tmp_path), [range(0, 4), range(8, 10)])
    with pytest.raises((OSError, ValueError)):
        store.finish()
    assert store.samples_file() is None and make(tmp_path).missing() == [range(4, 8)]


@pytest.mark.parametrize("write", ["shard", "final", "settings"])
def test_names_appear_by_renaming_a_whole_file_beside_it(tmp_path, monkeypatch, write):
    store = fill(make(tmp_path / "run"), [range(0, 4)] if write == "shard" else None)
    before = files(tmp_path)
    actions = {
        "shard": lambda: fill(store),
        "final": store.finish,
        "settings": lambda: make(tmp_path / "new"),
    }

    def fail(source, target):
        assert Path(source).parent == Path(target).parent
        raise Interrupted

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Interrupted):
        actions[write]()
    assert files(tmp_path) == before


@pytest.mark.parametrize(("png_name", "after"), [(None, 0), (None, 1), (flat, 0), (flat, 5), (flat, N)])
def test_an_interrupted_finish_can_be_repeated_and_the_file_that_says_complete_comes_last(
    tmp_path, monkeypatch, png_name, after
):
    fill(make(tmp_path / "whole", png_name=png_name)).finish()
    store = fill(make(tmp_path / "cut", png_name=png_name))
    with killed_after(monkeypatch, after) as done:
        store.finish()
    assert done == (["grid.png"][:after] if png_name is None else [flat(i) for i in range(after)])
    assert not [name for name in files(tmp_path / "cut") if name.endswith(".part")]
    again = make(tmp_path / "cut", png_name=png_name)
    assert again.samples_file() is None and again.missing() == []
    again.finish()
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_what_a_kill_left_half_written_is_no_shard_and_goes_with_the_rest(tmp_path):
    store = fill(make(tmp_path, png_name=in_thousands), [range(0, 4)])
    leave(tmp_path, ["shards/.000004-000008.npz.123.part", "000000/.000003.png.123.part"])
    assert store.missing() == [range(4, 8), range(8, 10)]
    fill(store).finish()
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


# Folders that are not this run's


@pytest.mark.parametrize("finished", [True, False])
def test_another_runs_output_is_refused_with_the_keys_that_differ(tmp_path, finished):
    store = fill(make(tmp_path))
    if finished:
        store.finish()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"another run's output") as caught:
        make(tmp_path, num_samples=11, shard_size=5, seed=4, labels="random", extra="new")
    expected = (
        str(tmp_path),
        "seed 3 -> 4",
        "labels 'balanced' -> 'random'",
        "extra",
        "num_samples",
        "shard_size",
    )
    assert [part for part in expected if part not in str(caught.value)] == []
    assert "softplus_beta" not in str(caught.value) and files(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("samples_10x5x6x3.npz", "", r"no run\.json"),
        ("shards/000000-000004.npz", "", r"no run\.json"),
        (flat(3), "", r"no run\.json"),  # where PNGs are to be written
        ("dataset.json", "{}", r"no run\.json"),
        *(
            ("run.json", content, "was not written by a run")
            for content in ("{}", "[]", "no json", '{"step": 3}')
        ),
    ],
)
def test_a_folder_that_holds_what_nobody_answers_for_is_refused(tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, png_name=flat)
    assert files(tmp_path) == [name] and (tmp_path / name).read_text() == content


@pytest.mark.parametrize("png_name", [None, flat, in_thousands])
@pytest.mark.parametrize("state", ["finished", "killed while it joined", "unfinished"])
def test_clear_removes_what_a_run_wrote_and_nothing_else(tmp_path, monkeypatch, png_name, state):
    store = fill(make(tmp_path, png_name=png_name))
    others = ["notes.txt", "samples.txt", "sub/run.json", "samples_of_mine.npz", "shards/notes.txt", "a.png"]
    mine = leave(tmp_path, [*others, "00001.png", "000001.jpg", "sub/000000.png"])
    if state == "killed while it joined":
        with killed_after(monkeypatch, 1):
            store.finish()
    elif state == "finished":
        store.finish()
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == mine and not (tmp_path / "000000").exists()
    assert make(tmp_path, seed=9).missing() == [range(0, 4), range(4, 8), range(8, 10)]


def test_folders_that_cannot_be_made_and_that_are_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make(tmp_path / "file" / "out")
    SampleStore.clear(tmp_path / "nowhere")
    assert files(tmp_path) == ["file"]

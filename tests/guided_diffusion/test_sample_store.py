"""The output folder: pixels, shards, resuming, the final npz or PNGs, and what is refused."""

import hashlib
import json
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from goldens_util import load_golden
from PIL import Image

from guided_diffusion.files.grid import save_grid
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.files.run_folder import read_metrics, read_run, read_samples
from guided_diffusion.runs.store import SampleStore

SETTINGS = {"seed": 3, "softplus_beta": math.inf, "labels": "balanced", "sizes": (1, 2)}
N, SHARD, H, W = 10, 4, 5, 6


def image(index):
    """(H, W, 3) uint8, another one for each index."""
    return np.random.RandomState(index).randint(0, 256, (H, W, 3), dtype=np.uint8)


def batch(indices):
    return torch.from_numpy(np.stack([image(i) for i in indices])), torch.tensor(
        [7 * i % 10 for i in indices]
    )


def fill(store, ranges=None):
    for indices in store.missing() if ranges is None else ranges:
        store.write(indices, *batch(indices), {"seconds": 0.5, "skipped": len(indices)})
    return store


def make(folder, num_samples=N, shard_size=SHARD, **changes):
    return SampleStore(folder, {**SETTINGS, **changes}, num_samples, shard_size)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


# Pixels


def test_to_uint8_is_adms_rule():
    values = torch.linspace(-1.1, 1.1, 3001, dtype=torch.float64).repeat(3, 1).view(1, 3, 1, -1)
    expected = np.clip((values.numpy() + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    got = to_uint8(values)
    assert got.dtype == torch.uint8
    assert got.is_contiguous()
    assert np.array_equal(got.numpy(), expected)


@pytest.mark.parametrize(
    ("x", "level"),
    [(-1, 0), (1, 255), (0, 127), (-3, 0), (3, 255), (0.0079, 128), (0.0078, 128), (0.003, 127)],
)
def test_to_uint8_clamps_and_truncates(x, level):
    assert (to_uint8(torch.full((2, 3, 2, 2), float(x))) == level).all()


def test_to_uint8_puts_channels_last():
    x = torch.arange(24.0).view(1, 3, 2, 4) / 12 - 1
    assert torch.equal(to_uint8(x)[0, 1, 3], to_uint8(x)[0].permute(2, 0, 1)[:, 1, 3])
    assert to_uint8(x)[0, 1, 3].tolist() == [int((float(v) + 1) * 127.5) for v in x[0, :, 1, 3]]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_to_uint8_refuses_what_is_not_finite(fault):
    x = torch.zeros(4, 3, 2, 2)
    x[1, 0, 0, 0] = x[3, 2, 1, 1] = fault
    with pytest.raises(FloatingPointError, match=r"non-finite.*\[1, 3\]"):
        to_uint8(x)


def test_to_uint8_is_edms_rule_on_the_golden_values():
    x = load_golden("E_tables")[1]["quantise/x"].astype(np.float64)
    expected = [min(max(math.floor(value * 127.5 + 128), 0), 255) for value in x.tolist()]
    assert (
        to_uint8(torch.from_numpy(x).reshape(1, 3, 1, -1), "edm").permute(0, 3, 1, 2).flatten().tolist()
        == expected
    )
    assert {0, 255} <= set(expected) and min(x) * 127.5 + 128 < 0 and max(x) * 127.5 + 128 > 256


@pytest.mark.parametrize(
    ("x", "adm", "edm"), [(-1, 0, 0), (-0.999, 0, 0), (0, 127, 128), (0.003, 127, 128), (1, 255, 255)]
)
def test_the_two_rules_differ_by_half_a_level(x, adm, edm):
    values = torch.full((1, 3, 1, 1), float(x))
    assert (to_uint8(values, "adm") == adm).all() and (to_uint8(values, "edm") == edm).all()


# A run


def test_ranges_cover_the_samples(tmp_path):
    assert make(tmp_path).missing() == [range(0, 4), range(4, 8), range(8, 10)]


def test_run_from_start_to_end(tmp_path):
    store = fill(make(tmp_path / "new" / "folder"))
    assert store.missing() == []
    assert store.samples_file() is None
    final = store.finish()
    assert final == tmp_path / "new" / "folder" / f"samples_{N}x{H}x{W}x3.npz"
    assert store.samples_file() == final
    with np.load(final, allow_pickle=False) as npz:
        assert sorted(npz.files) == ["arr_0", "arr_1"]
        images, labels = npz["arr_0"], npz["arr_1"]
    assert images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.array_equal(images, np.stack([image(i) for i in range(N)]))
    assert labels.tolist() == [7 * i % 10 for i in range(N)]
    assert files(final.parent) == ["grid.png", "run.json", final.name]


def test_settings_and_totals_are_in_run_json(tmp_path):
    store = make(tmp_path)
    assert read_run(tmp_path)["settings"]["seed"] == 3
    assert "totals" not in read_run(tmp_path)
    fill(store).finish()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["totals"] == {"seconds": 1.5, "skipped": 10}
    assert run["settings"]["num_samples"] == N


def test_resumed_run_ends_with_the_same_bytes(tmp_path):
    whole = fill(make(tmp_path / "whole")).finish()
    fill(make(tmp_path / "cut"), [range(4, 8)])
    again = make(tmp_path / "cut")
    assert again.missing() == [range(0, 4), range(8, 10)]
    assert fill(again).finish().read_bytes() == whole.read_bytes()
    assert make(tmp_path / "cut").missing() == []


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


def test_finished_run_is_left_as_it_is(tmp_path):
    final = fill(make(tmp_path)).finish()
    before = {name: hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in files(tmp_path)}
    again = make(tmp_path)
    assert again.missing() == []
    assert again.finish() == final
    assert {
        name: hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in files(tmp_path)
    } == before


def test_finish_with_a_shard_missing_makes_no_npz(tmp_path):
    store = fill(make(tmp_path), [range(0, 4), range(8, 10)])
    with pytest.raises((OSError, ValueError)):
        store.finish()
    assert store.samples_file() is None
    assert make(tmp_path).missing() == [range(4, 8)]


def test_many_shards_do_not_run_out_of_open_files(tmp_path):
    # The usual limit is 1,024 open files, and 50,000 samples in batches of 16 are 3,125 shards.
    resource = pytest.importorskip("resource")
    store = fill(make(tmp_path, num_samples=300, shard_size=1))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, limits[0]), limits[1]))
    try:
        final = store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    with np.load(final) as npz:
        assert len(npz["arr_1"]) == 300


# Complete or not there


class Interrupted(BaseException):
    """What a kill looks like from inside."""


def failing_savez(file, **arrays):
    file.write(b"half of it")
    raise Interrupted


def test_interrupted_shard_leaves_nothing_under_its_name(tmp_path, monkeypatch):
    store = fill(make(tmp_path), [range(0, 4)])
    before = files(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(np, "savez", failing_savez)
        store.write(range(4, 8), *batch(range(4, 8)), {})
    assert files(tmp_path) == before
    assert make(tmp_path).missing() == [range(4, 8), range(8, 10)]


@pytest.mark.parametrize("write", ["shard", "final", "settings"])
def test_names_appear_by_renaming_a_whole_file(tmp_path, monkeypatch, write):
    store = fill(make(tmp_path / "run"), [range(0, 4), range(4, 8)] if write == "shard" else None)
    (tmp_path / "new").mkdir()
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


@pytest.mark.parametrize(
    "broken", ["guided_diffusion.runs.store._stream", "guided_diffusion.runs.store.save_grid"]
)
def test_interrupted_finish_can_be_repeated(tmp_path, monkeypatch, broken):
    whole = fill(make(tmp_path / "whole")).finish()
    store = fill(make(tmp_path / "cut"))

    def fail(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(broken, fail)
        store.finish()
    assert store.samples_file() is None
    assert not [name for name in files(tmp_path / "cut") if name.endswith(".part")]
    again = make(tmp_path / "cut")
    assert again.missing() == []
    assert again.finish().read_bytes() == whole.read_bytes()
    assert read_run(tmp_path / "cut")["totals"] == read_run(tmp_path / "whole")["totals"]


def test_part_of_a_killed_run_is_not_taken_for_a_shard(tmp_path):
    store = fill(make(tmp_path), [range(0, 4)])
    (tmp_path / "shards" / ".000004-000008.npz.123.part").write_bytes(b"half")
    assert store.missing() == [range(4, 8), range(8, 10)]
    fill(store).finish()
    assert not [name for name in files(tmp_path) if name.endswith(".part")]


# A PNG for every sample


def flat(index):
    return f"{index:06d}.png"


def in_subfolders(index):
    return f"{index - index % 1000:06d}/{index:06d}.png"


def make_pngs(folder, png_name=flat):
    return SampleStore(folder, SETTINGS, N, SHARD, png_name=png_name)


def png_files(count, png_name=flat):
    return sorted(png_name(index) for index in range(count))


def in_several_subfolders(index):
    return f"{index - index % 3:06d}/{index:06d}.png"


@pytest.mark.parametrize("png_name", [flat, in_several_subfolders])
def test_finish_writes_every_image_and_its_label(tmp_path, png_name):
    store = fill(make_pngs(tmp_path, png_name))
    assert store.samples_file() is None
    final = store.finish()
    assert final == store.samples_file() == tmp_path / "dataset.json"
    assert json.loads(final.read_text()) == {"labels": [[png_name(i), 7 * i % 10] for i in range(N)]}
    for index in range(N):
        with Image.open(tmp_path / png_name(index)) as picture:
            assert (picture.format, picture.mode) == ("PNG", "RGB")
            assert np.array_equal(np.asarray(picture), image(index))
    # No grid.png, which a reader of the folder would take for a sample, and no shards.
    assert files(tmp_path) == sorted([*png_files(N, png_name), "dataset.json", "run.json"])
    assert read_run(tmp_path)["totals"]["skipped"] == N
    assert make_pngs(tmp_path, png_name).missing() == []


@pytest.mark.parametrize("after", [0, 5, N])
def test_pngs_that_were_interrupted_end_the_same_and_the_labels_come_last(tmp_path, monkeypatch, after):
    fill(make_pngs(tmp_path / "whole")).finish()
    store, done, replace = fill(make_pngs(tmp_path / "cut")), [], os.replace

    def killed(source, target):
        if Path(target).name != "run.json":
            if len(done) == after:
                raise Interrupted
            done.append(Path(target).name)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "replace", killed)
        store.finish()
    assert done == png_files(after) and len(list((tmp_path / "cut").glob("[!.]*.png"))) == after
    assert store.samples_file() is None and len(list((tmp_path / "cut/shards").iterdir())) == 3
    assert make_pngs(tmp_path / "cut").finish() == tmp_path / "cut/dataset.json"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_finished_pngs_are_left_as_they_are(tmp_path):
    fill(make_pngs(tmp_path)).finish()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)}
    assert make_pngs(tmp_path).finish() == tmp_path / "dataset.json"
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files(tmp_path)} == before


@pytest.mark.parametrize("png_name", [flat, in_subfolders])
@pytest.mark.parametrize("finished", [True, False])
def test_clear_removes_the_pngs_and_nothing_else(tmp_path, png_name, finished, monkeypatch):
    store = fill(make_pngs(tmp_path, png_name))
    mine = ["00001.png", "a.png", "000001.jpg", "sub/000000.png", "notes.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    if not finished:
        monkeypatch.setattr("guided_diffusion.runs.store.write_json", lambda *args: None)
    store.finish()
    assert (tmp_path / "dataset.json").exists() == finished
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == sorted(mine)
    assert not (tmp_path / "000000").exists()


def test_what_a_kill_left_in_a_subfolder_goes_with_the_rest(tmp_path):
    store = fill(make_pngs(tmp_path, in_subfolders))
    (tmp_path / "000000").mkdir()
    (tmp_path / "000000" / ".000003.png.123.part").write_bytes(b"half")
    store.finish()
    assert [name for name in files(tmp_path) if name.endswith(".part")] == []


def test_pictures_of_somebody_else_are_not_written_over(tmp_path):
    """As a samples_*.npz without run.json is refused, so are the files that the PNGs would replace."""
    (tmp_path / flat(3)).write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"no run\.json"):
        fill(make_pngs(tmp_path)).finish()
    assert (tmp_path / flat(3)).read_bytes() == b"somebody's"


def test_read_samples_says_where_there_is_no_npz(tmp_path):
    fill(make_pngs(tmp_path)).finish()
    with pytest.raises(FileNotFoundError, match=r"no samples_NxHxWx3\.npz"):
        read_samples(tmp_path)


# What guidance did


def test_metrics_of_shards_in_any_order_become_lines_in_the_order_of_the_samples(tmp_path):
    store = make(tmp_path)
    for indices in (range(8, 10), range(0, 4)):
        store.write(indices, *batch(indices), {}, [{"step": 1}, {"step": 0}])
    expected = [{"samples": samples, "step": step} for samples in ([0, 4], [8, 10]) for step in (1, 0)]
    assert list(read_metrics(tmp_path)) == expected
    # A batch in which guidance rested has no line.
    fill(store)
    store.finish()
    assert list(read_metrics(tmp_path)) == expected
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == expected
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == []


# Other runs


@pytest.mark.parametrize("finished", [True, False])
def test_another_runs_output_is_refused_with_the_keys_that_differ(tmp_path, finished):
    store = fill(make(tmp_path))
    if finished:
        store.finish()
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"another run's output") as caught:
        make(tmp_path, seed=4, labels="random", extra="new")
    message = str(caught.value)
    assert all(
        part in message for part in (str(tmp_path), "seed 3 -> 4", "labels 'balanced' -> 'random'", "extra")
    )
    assert "softplus_beta" not in message
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "key"), [({"num_samples": 11}, "num_samples"), ({"shard_size": 5}, "shard_size")]
)
def test_other_number_of_samples_or_batch_size_is_another_run(tmp_path, changes, key):
    make(tmp_path)
    with pytest.raises(ValueError, match=key):
        make(tmp_path, **changes)


@pytest.mark.parametrize("name", ["samples_10x5x6x3.npz", "shards/000000-000004.npz"])
def test_samples_without_settings_are_refused(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"no run\.json"):
        make(tmp_path)
    assert files(tmp_path) == [name]


def test_folder_with_other_files_is_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fill(make(tmp_path)).finish()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"step": 3}'])
def test_run_json_of_something_else(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path)):
        make(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make(tmp_path / "file" / "out")


def test_clear_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    fill(make(tmp_path)).finish()
    fill(SampleStore(tmp_path, {**SETTINGS}, N, SHARD))
    mine = ["notes.txt", "samples.txt", "sub/run.json", "samples_of_mine.npz", "shards/notes.txt"]
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == sorted(mine)


@pytest.mark.parametrize("finished", [True, False])
def test_cleared_folder_takes_another_run(tmp_path, finished):
    store = fill(make(tmp_path))
    if finished:
        store.finish()
    SampleStore.clear(tmp_path)
    assert files(tmp_path) == []
    assert make(tmp_path, seed=9).missing() == [range(0, 4), range(4, 8), range(8, 10)]


def test_clear_of_a_folder_that_is_not_there(tmp_path):
    SampleStore.clear(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


# The grid


@pytest.mark.parametrize(("num_samples", "columns", "rows"), [(1, 1, 1), (10, 4, 3), (64, 8, 8), (70, 8, 8)])
def test_grid_of_a_run(tmp_path, num_samples, columns, rows):
    fill(make(tmp_path, num_samples=num_samples, shard_size=7)).finish()
    with Image.open(tmp_path / "grid.png") as picture:
        picture.load()
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert picture.size == (columns * (W + 2), rows * (H + 2))
        pixels = np.asarray(picture)
    last = min(num_samples, 64) - 1
    for i in (0, last):
        top, left = i // columns * (H + 2) + 1, i % columns * (W + 2) + 1
        assert np.array_equal(pixels[top : top + H, left : left + W], image(i))


def test_grid_of_groups(tmp_path):
    groups = [np.stack([image(i) for i in range(n)]) for n in (5, 2)]
    save_grid(tmp_path / "grid.png", groups, scale=3, columns=4)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == ((2 + 1) * (H + 2) * 3, 4 * (W + 2) * 3, 3)
    assert np.array_equal(pixels[2 * (H + 2) * 3 + 3 :: 3, 3::3][:H, :W], image(0))


def test_grid_titles_stand_to_the_left(tmp_path):
    groups = [np.stack([image(i) for i in range(4)])] * 2
    save_grid(tmp_path / "plain.png", groups, scale=4)
    save_grid(tmp_path / "titled.png", groups, scale=4, titles=["unguided", "guided"])
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "titled.png") as titled:
        assert titled.height == plain.height
        margin = titled.width - plain.width
        assert margin > 0
        assert np.array_equal(np.asarray(titled)[:, margin:], np.asarray(plain))
        assert (np.asarray(titled)[:, :margin] < 128).any()

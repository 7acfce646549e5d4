"""scripts/sweep.py: the cells of a file, what is drawn once and what again, and the table; plot_sweep.py
draws it.
"""

import csv
import json
import shlex
import shutil

import numpy as np
import pytest
import sweep
import torch
from helpers import DIGITS_NETWORK, TINY, call, flags_of, load_samples, load_script, save_unet
from PIL import Image

SWEEP, CELLS, PLOT = load_script("sweep"), load_script("sweep_cells"), load_script("plot_sweep")
LINES = """# two lines, three cells
unguided: digits --use_ddim 1 --steps 2 --classifier_scale 0
EDM / ours: digits-edm --guidance_form score --sampler heun --steps {1,2} --guidance_every 2  # of two
"""
EVALUATIONS = {"unguided": [(2, 0)], "EDM / ours": [(1, 1), (3, 2)]}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cells.txt"
    path.write_text(LINES)
    return path


def flags(file, out, *more):
    return [file, "--num_samples", 6, "--out", out, *more]


def rows_of(folder):
    return json.loads((folder / "rows.json").read_text())


def table_of(folder):
    return json.loads((folder / "table.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, result) of two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "cells.txt").write_text(LINES)
    result = call(SWEEP.main, flags(folder / "cells.txt", folder / "out", "--seeds", "0-1"))
    assert result.code == 0, result.err
    return folder / "out", result


def test_braces_make_a_cell_for_every_combination():
    cells = list(CELLS.expanded("a / b: digits --steps {5,10} --labels 1,2 --sampler {euler,heun}"))
    chosen = [tuple(cell.chosen.items()) for cell in cells]
    grid = [("5", "euler"), ("5", "heun"), ("10", "euler"), ("10", "heun")]
    assert chosen == [(("steps", steps), ("sampler", name)) for steps, name in grid]
    assert {(cell.name, cell.preset) for cell in cells} == {("a / b", "digits")}
    assert cells[2].words == ("--steps", "10", "--labels", "1,2", "--sampler", "euler")
    presets = [cell.chosen for cell in CELLS.expanded("a: {digits,digits-edm} --steps 1")]
    assert presets == [{"preset": "digits"}, {"preset": "digits-edm"}]


def test_a_row_for_each_cell_and_seed_with_what_it_cost(finished):
    rows = rows_of(finished[0])
    assert [(row["name"], row["seed"]) for row in rows] == [
        (name, seed) for seed in (0, 1) for name in ("unguided", "EDM / ours", "EDM / ours")
    ]
    for name, expected in EVALUATIONS.items():
        own = [(row["evaluations"], row["classifier_passes"]) for row in rows if row["name"] == name]
        assert own == expected * 2
    assert len({row["fd_digits"] for row in rows}) == len(rows)  # seeds draw other images


def test_the_table_has_means_and_deviations_and_a_column_for_what_differs(finished):
    folder, result = finished
    with open(folder / "table.csv", newline="") as file:
        head, *lines = csv.reader(file)
    assert head[:4] == ["", "steps", "evaluations", "classifier passes"]
    assert [line[:3] for line in lines] == [
        ["unguided", "", "2"], ["EDM / ours", "1", "1"], ["EDM / ours", "2", "3"]
    ]  # fmt: skip
    values = [row["fd_digits"] for row in rows_of(folder) if row["name"] == "unguided"]
    cell = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"
    assert lines[0][head.index("FD(digits)")] == cell
    markdown = (folder / "table.md").read_text()
    assert result.out == markdown and f"| {cell} |" in markdown


def test_the_second_table_has_the_differences_seed_by_seed(finished, file, tmp_path):
    folder, result = finished
    unguided, _, ours = table_of(folder)
    runs = np.subtract(ours["fd_digits"]["runs"], unguided["fd_digits"]["runs"])
    difference, half = ours["differences"]["fd_digits"], 12.706 * runs.std(ddof=1) / 2**0.5
    np.testing.assert_allclose(difference["runs"], runs)
    assert difference["interval"] == pytest.approx(half, rel=1e-4)
    text = f"| {runs.mean():+.2f} ± {half:.2f}, {'real' if abs(runs.mean()) > half else 'cannot be told'} |"
    assert "The differences to unguided:" in result.out and text in result.out
    assert "| unguided |  | equal | equal |" in result.out and "| -1 ± 0, real |" in result.out
    shutil.copy(folder / "rows.json", tmp_path)
    other = call(SWEEP.main, flags(file, tmp_path, "--seeds", "0-1", "--against", "EDM / ours"))
    assert "The differences to EDM / ours:" in other.out and "| unguided |  | +1 ± 0, real |" in other.out


def test_what_is_measured_is_not_drawn_again_and_a_new_cell_alone(finished, file, tmp_path, monkeypatch):
    folder, first = tmp_path / "out", finished[1]
    shutil.copytree(finished[0], folder)
    before = rows_of(folder)
    monkeypatch.setattr(SWEEP, "run", None)
    assert call(SWEEP.main, flags(file, folder, "--seeds", "0-1")).out == first.out
    monkeypatch.undo()
    file.write_text(LINES + "one more: digits --steps 1\n")
    file.write_text(file.read_text().replace("unguided:", "another name:"))
    result = call(SWEEP.main, flags(file, folder))
    assert [line for line in result.err.splitlines() if "/" in line[:4]] == [
        "1/1: one more: digits --steps 1, seed 0"
    ]
    assert rows_of(folder)[:-1] == before and rows_of(folder)[-1]["name"] == "one more"
    assert [row["name"] for row in table_of(folder)] == ["another name", *["EDM / ours"] * 2, "one more"]


def cheap_quality(folder):
    keys = ("fd_digits", "precision", "recall", "density", "coverage")
    return dict(zip(keys, load_samples(folder)[0][:5].mean((1, 2, 3)), strict=True))


def test_a_sweep_of_12_cells_that_is_stopped_three_times_has_the_table_of_an_undisturbed_one(
    file, tmp_path, monkeypatch
):
    tiny = {**DIGITS_NETWORK, **TINY, "class_cond": False}
    network = shlex.join(flags_of({**TINY, "model_path": save_unet(tmp_path / "tiny.pt", tiny)}))
    network += " --class_cond False --null_class False --classifier_type ''"
    file.write_text(f"a: digits {network} --steps {{1,2,3}} --labels {{0,1,2,3}}\n")
    monkeypatch.setattr(SWEEP, "judges_of", lambda *_: (torch.nn.Flatten(), cheap_quality))
    assert call(SWEEP.main, flags(file, tmp_path / "undisturbed")).code == 0
    drawn, run = [], SWEEP.run

    def run_one(job):
        drawn.append(job.folder)
        if len(drawn) in (1, 6, 9):
            raise KeyboardInterrupt
        return run(job)

    monkeypatch.setattr(SWEEP, "run", run_one)
    counts = []
    while (result := call(SWEEP.main, flags(file, tmp_path / "out"))).code == 130:
        counts.append(len(rows_of(tmp_path / "out")) if counts else 0)
    assert result.code == 0 and counts == [0, 4, 6] and len(drawn) == 12 + 3 and len(set(drawn)) == 12
    tables = [table_of(tmp_path / name) for name in ("out", "undisturbed")]
    for row in (*tables[0], *tables[1]):  # times are never the same
        del row["seconds_per_image"], row["differences"]["seconds_per_image"]
    assert tables[0] == tables[1] and len(tables[0]) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "digits --steps 2",
            "cells.txt:1: 'digits --steps 2' is not understood (write NAME: PRESET [FLAGS...])",
        ),
        ("name:", "cells.txt:1: 'name:' is not understood"),
        (
            "a: digits --labels '1",
            'cells.txt:1: "a: digits --labels \'1" is not understood (No closing quotation)',
        ),
        ("a: digits --steps={1,2}", "braces stand for a whole word, not for a part of --steps={1,2}"),
        ("# nothing", "has no cells: write lines such as"),
        (
            "a: digits --stepz 2",
            "a: digits --stepz 2: unrecognized arguments: --stepz 2 (did you mean --steps?)",
        ),
        ("a: digits --sampler euler --gamma_factor 2 --guidance_strength ddim", "a: digits --sampler euler"),
        (
            "a: nothing --steps 2",
            "a: nothing --steps 2: judge and metrics are those of digits, cifar10, imagenet128, and nothing",
        ),
        ("a: imagenet64-edm-unguided", "imagenet64-edm-unguided is none of their presets"),
        (
            "a: digits --steps 2\nb: cifar10 --steps 2",
            "one table compares images of one problem, and these cells are of digits and cifar10",
        ),
        ("a: digits --num_samples 9", "a: digits --num_samples 9: --num_samples is this script's own"),
        ("a: digits-edm --seeds 9", "a: digits-edm --seeds 9: --seeds is this script's own"),
        ("a: digits --out x", "a: digits --out x: --out is this script's own"),
        ("a: digits --preset digits-fewstep", "the preset stands first, without --preset"),
        ("a: digits --classifier_type digits_judge", "--judge digits_judge is the guide itself"),
        (
            "a: digits --steps 2\nb: digits --steps 2 --classifier_scale 2",
            "two cells are the same run, 'a: digits",
        ),
    ],
)
def test_what_cannot_be_a_cell_is_refused_before_anything_is_drawn(file, tmp_path, line, message):
    file.write_text(line)
    result = call(SWEEP.main, flags(file, tmp_path / "out"))
    assert result.code == 1 and message in result.err and "\n" not in result.err.strip(), result.err
    assert not (tmp_path / "out").exists()


def test_processes_side_by_side_draw_the_same_rows(finished, file, tmp_path):
    """Their module is imported by name, as that of a script that runs is."""
    result = call(sweep.main, flags(file, tmp_path / "out", "--processes", 2))
    assert result.code == 0 and result.err.count(" done: ") == 3, result.err
    rows = sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])
    alone = sorted(rows_of(finished[0])[:3], key=lambda row: row["id"])
    for row in (*rows, *alone):
        del row["seconds_per_image"]
    assert rows == alone


def test_a_run_that_fails_is_named_and_the_others_are_drawn(finished, file, tmp_path, monkeypatch):
    judge = SWEEP.judge

    def fail_once(folder, classifier):
        if not list(tmp_path.glob("out/rows.json")):
            return judge(folder, classifier)
        raise ValueError("no such luck")

    monkeypatch.setattr(SWEEP, "judge", fail_once)
    result = call(SWEEP.main, flags(file, tmp_path / "out"))
    assert result.code == 1 and "error: 2 of 3 runs failed: EDM / ours: digits-edm" in result.err
    assert result.err.count("seed 0: no such luck") == 2 and "| unguided |" in result.out
    monkeypatch.undo()
    assert call(SWEEP.main, flags(file, tmp_path / "out")).code == 0
    assert [row["fd_digits"] for row in rows_of(tmp_path / "out")] == [
        row["fd_digits"] for row in rows_of(finished[0])[:3]
    ]


def test_another_judge_judges_anew(finished, file, tmp_path):
    shutil.copy(finished[0] / "rows.json", tmp_path)
    file.write_text(LINES.splitlines()[1].replace("digits ", "digits --classifier_type digits_judge ", 1))
    result = call(SWEEP.main, flags(file, tmp_path, "--judge", "digits_guide"))
    assert result.code == 0 and "1/1: unguided" in result.err
    assert len(rows_of(tmp_path)) == 7


def test_what_is_compared_with_must_be_a_cell(file, tmp_path):
    result = call(SWEEP.main, flags(file, tmp_path / "out", "--against", "EDM"))
    assert result.code == 1 and "--against 'EDM' is no cell; choose unguided, EDM / ours" in result.err


def test_it_is_for_one_process(file, tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    result = call(SWEEP.main, flags(file, tmp_path / "out"))
    assert result.code == 1 and "is for one process: start it with plain python" in result.err


def test_the_reference_is_not_measured_for_a_refused_number(file, tmp_path, monkeypatch):
    monkeypatch.setattr(SWEEP, "Quality", None)
    result = call(SWEEP.main, [file, "--num_samples", 5, "--out", tmp_path / "out"])
    assert result.code == 1 and "--num_samples must be at least 6, got 5" in result.err


# plot_sweep.py


def test_a_line_of_the_file_is_a_curve_in_the_panels_before_its_slash(finished):
    panels = PLOT.curves(table_of(finished[0]))
    assert {panel: list(lines) for panel, lines in panels.items()} == {"": ["unguided"], "EDM": ["ours"]}
    figure = PLOT.draw(panels, "evaluations", ["fd_digits", "recall"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["FD(digits)", "recall"] * 2
    (points, *_), ours = figure.axes[2].containers[0], panels["EDM"]["ours"]
    assert points.get_xdata().tolist() == [1, 3]
    assert points.get_ydata().tolist() == [cell["fd_digits"]["mean"] for cell in ours]


def test_the_picture_of_a_sweep(finished):
    result = call(PLOT.main, [finished[0], "--x", "recall", "--y", "precision"])
    assert result.out == f"{finished[0] / 'sweep.png'}\n"
    with Image.open(finished[0] / "sweep.png") as picture:
        assert picture.format == "PNG"


def test_rings_mark_the_front_where_the_axes_have_one(finished):
    panels = PLOT.curves(table_of(finished[0]))
    by_recall, by_cost = (PLOT.draw(panels, x, ["fd_digits"]) for x in ("recall", "evaluations"))
    cells, (points, *_) = panels["EDM"]["ours"], by_recall.axes[1].containers[0]
    front = [cell["recall"]["mean"] for cell in cells if "fd_digits" in cell["fronts"]]
    assert by_recall.axes[1].lines[-1].get_xdata().tolist() == front != []
    assert len(by_recall.axes[1].lines) == len(by_cost.axes[1].lines) + 1 and points.get_xdata().size == 2


@pytest.mark.parametrize(
    ("folder", "more", "message"),
    [
        ("out", ["--y", "precision,fid"], "--y precision,fid: 'fid' is not a number of this sweep"),
        ("out", ["--y", "fd_cifar10"], "choose evaluations, classifier_passes, seconds_per_image, fd_digits"),
        ("nothing", [], "has no table.json"),
    ],
)
def test_what_cannot_be_drawn(finished, folder, more, message):
    result = call(PLOT.main, [finished[0].with_name(folder), *more])
    assert result.code == 1 and message in result.err

"""scripts/compare_guidance.py, compare_edm.py and compare_fewstep.py: which runs they make, from which noise,
and what they say.
The metrics: tests of scripts/comparison.py.
"""

import errno
import io
import json
import shutil
import sys
from contextlib import suppress
from itertools import product

import numpy as np
import pytest
import torch
from comparison import judge
from helpers import call, contents, load_samples, load_script
from PIL import Image
from problems import PROBLEMS, Quality
from samplers import DDPM, RELEASED, manifest

from classifiers import load_classifier

DIGITS = PROBLEMS["digits"]
GUIDANCE, EDM = load_script("compare_guidance"), load_script("compare_edm")
FEW_STEPS = load_script("compare_fewstep")
NETWORKS = ("class-conditional", "unconditional")
ROWS = list(product(NETWORKS, ("unguided", "guided")))
EDM_ROWS = list(product(NETWORKS, ("unguided", "released", "score"), (1, 2)))
COLUMNS = {"hit": ".1%", "fd_digits": ".2f", "precision": ".3f", "recall": ".3f"}
QUICK = ("--num_samples", 6, "--steps", 2)
QUICK_EDM = ("--num_samples", 6, "--steps", "1,2", "--batch", 4)


@pytest.fixture(scope="module")
def guidance(tmp_path_factory):
    """(folder, flags, result) of two seeds of compare_guidance.py."""
    folder = tmp_path_factory.mktemp("guidance")
    flags = (*QUICK, "--seeds", "3-4", "--labels", "2,7", "--gamma_factor", 0.1, "--out", folder)
    result = call(GUIDANCE.main, flags)
    assert result.code == 0, result.err
    return folder, flags, result


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The same of compare_edm.py, two numbers of steps."""
    folder = tmp_path_factory.mktemp("edm")
    strengths = ("--max_guidance", 0.02, "--gamma_factor", -0.2, "--S_churn", 2, "--log_guidance", 1)
    flags = (*QUICK_EDM, *strengths, "--seeds", "0-1", "--out", folder)
    result = call(EDM.main, flags)
    assert result.code == 0, result.err
    return folder, flags, result


def table_of(folder):
    return json.loads((folder / "comparison.json").read_text())


def of_runs(folder, seeds, rows):
    """{(seed, row): folder of the run}."""
    return {(seed, row): folder / f"seed{seed}" / "-".join(map(str, row)) for seed in seeds for row in rows}


def assert_spreads(rows, runs):
    """Each cell is the mean and the deviation of so many runs."""
    for row in rows:
        for cell in (value for value in row.values() if isinstance(value, dict)):
            assert len(cell["runs"]) == runs
            spread = (np.mean(cell["runs"]), np.std(cell["runs"], ddof=1))
            assert (cell["mean"], cell["std"]) == pytest.approx(spread)


# compare_guidance.py


def test_rows_differ_in_network_and_scale_alone_and_draw_from_the_same_noise(guidance):
    folder, _, result = guidance
    runs = of_runs(folder, (3, 4), ROWS)
    notes = ("classifier digits_guide: ", "without effect")
    said = [line for line in result.err.splitlines() if not line.startswith(notes)]
    assert said == [f"{network}, {mode}, seed {seed}" for seed, (network, mode) in runs]
    for (seed, (network, mode)), out in runs.items():
        settings = manifest(out)["settings"]
        assert (settings["seed"], settings["gamma_factor"], settings["num_samples"]) == (seed, 0.1, 6)
        assert settings["unconditional"] == (network == "unconditional")
        assert settings["classifier_scale"] == (0 if mode == "unguided" else 2)
    settings = [manifest(out)["settings"] for (seed, _), out in runs.items() if seed == 3]
    varied = {key for key in settings[0] if len({str(each.get(key)) for each in settings}) > 1}
    assert varied == {"unconditional", "classifier_scale"}
    labels = [load_samples(out)[1].tolist() for (seed, _), out in runs.items() if seed == 3]
    assert labels == [labels[0]] * 4 and set(labels[0]) == {2, 7}
    assert len({load_samples(out)[0].tobytes() for out in runs.values()}) == len(runs)


def test_both_tables_of_guidance(guidance):
    folder, _, result = guidance
    rows, quality = table_of(folder)["judge"], table_of(folder)["features"]
    assert [(row["network"], row["guidance"]) for row in rows] == ROWS
    assert [(row["network"], row["guidance"]) for row in quality] == [*ROWS, ("real", "")]
    assert_spreads([*rows, *quality], 2)
    for row in rows:
        numbers = {"hit", "log_prob", "seconds_per_image", "guidance_share"}
        assert set(row) == {"network", "guidance", *numbers}
        assert max(row["log_prob"]["runs"]) < 0 < min(row["seconds_per_image"]["runs"])
        share = row["guidance_share"]["mean"]
        assert share < 0.05 if row["guidance"] == "unguided" else 0.05 < share < 1
        assert f"{row['hit']['mean']:.1%} ± {row['hit']['std']:.1%}" in result.out
    assert [row["images"]["runs"] for row in quality] == [[6, 6]] * 5
    for key in ("fd_digits", "recall"):
        cell, form = quality[-1][key], COLUMNS[key]
        assert f"{cell['mean']:{form}} ± {cell['std']:{form}}" in result.out
    first, second = result.out.split("FD(digits)")
    assert (first.count("±"), second.count("±")) == (8, 26) and "deviation over the seeds" in second
    assert result.out.splitlines()[-1].endswith(str(folder / "comparison.png"))
    with Image.open(folder / "comparison.png") as picture:
        # Four rows of six enlarged images with their borders, and a margin for the titles.
        assert picture.size == (150 + 6 * 18 * 3, 4 * 18 * 3)


def test_one_small_run_has_the_first_table_alone(tmp_path):
    result = call(GUIDANCE.main, ["--num_samples", 5, "--steps", 1, "--out", tmp_path])
    assert result.code == 0 and "wanted class" in result.out
    assert "±" not in result.out and "FD(digits)" not in result.out
    assert "no table of FD(digits): 5 images, it takes 6" in result.err
    assert table_of(tmp_path)["features"] == []


# compare_edm.py


def test_each_seed_is_a_set_of_images_of_its_own_and_flags_go_where_they_mean_something(sweep):
    folder, _, result = sweep
    runs = of_runs(folder, (0, 1), EDM_ROWS)
    told = [f"{network}, {form}, {n} steps, seed {seed}" for seed, (network, form, n) in runs]
    said = [line for line in result.err.splitlines() if not line.startswith("classifier digits_guide: ")]
    assert said == told
    for (seed, (network, form, n)), out in runs.items():
        settings = manifest(out)["settings"]
        assert (settings["seeds"], settings["steps"]) == (("0-5", "6-11")[seed], n)
        assert (settings["S_churn"], settings["unconditional"]) == (2, network == "unconditional")
        assert settings["use_classifier"] == (form != "unguided") == (out / "metrics.jsonl").exists()
        assert settings.get("max_guidance") == (0.02 if form == "released" else None)
        assert settings.get("gamma_factor") == (-0.2 if form == "score" else None)
    for seed in (0, 1):
        labels = [load_samples(out)[1].tolist() for (number, _), out in runs.items() if number == seed]
        assert labels == [labels[0]] * len(EDM_ROWS)
    assert len({load_samples(out)[0].tobytes() for out in runs.values()}) == len(runs)


def test_the_table_of_edm(sweep):
    folder, _, result = sweep
    rows, quality = table_of(folder), Quality(DIGITS)
    assert [(row["network"], row["guidance"], row["steps"]) for row in rows] == [
        *EDM_ROWS,
        ("real", "", None),
    ]
    assert_spreads(rows, 2)
    classifier, runs = load_classifier("digits_judge", num_classes=10), of_runs(folder, (0, 1), EDM_ROWS)
    for row, key in ((rows[3], EDM_ROWS[3]), (rows[-2], EDM_ROWS[-1])):
        outs = [runs[seed, key] for seed in (0, 1)]
        hits = []
        for images, labels in map(load_samples, outs):
            x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
            hits.append(np.mean(classifier(x).argmax(dim=1).numpy() == labels))
        assert row["hit"]["runs"] == pytest.approx(hits)
        assert row["fd_digits"]["runs"] == [quality(out)["fd_digits"] for out in outs]
    with np.load(DIGITS.held_out, allow_pickle=False) as file:
        held_out = {image.tobytes() for image in file["arr_0"]}
    real = []
    for seed in (0, 1):
        with np.load(folder / f"seed{seed}" / "held_out.npz", allow_pickle=False) as file:
            real.append({image.tobytes() for image in file["arr_0"]})
    assert set.union(*real) <= held_out and [len(digits) for digits in real] == [6, 6] and real[0] != real[1]
    assert "hit" not in rows[-1]
    head, *lines, about, curves = result.out.splitlines()
    words = "network guidance steps evaluations wanted class FD(digits) precision recall"
    assert head.split() == words.split()
    assert about == "6 images in each run, 2 runs each; ± is their standard deviation"
    assert curves == f"curves: {folder / 'comparison.png'}"
    for line, row in zip(lines, rows, strict=True):
        name = ["real"] if row["network"] == "real" else [row["network"], row["guidance"], str(row["steps"])]
        evaluations = {1: ["1"], 2: ["3"], None: []}[row["steps"]]  # 2 N - 1
        cells = [(row[key], form) for key, form in COLUMNS.items() if key in row]
        numbers = [f"{cell['mean']:{form}} ± {cell['std']:{form}}" for cell, form in cells]
        assert line.split() == [*name, *evaluations, *" ".join(numbers).split()]
        assert len(line) == len(head)  # the columns stand below their names


def test_the_curves(sweep, monkeypatch):
    from matplotlib.figure import Figure

    folder, drawn = sweep[0], []
    with Image.open(folder / "comparison.png") as picture:
        picture.load()
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(1 << 20)) > 100
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    EDM.draw(folder / "other.png", rows := table_of(folder))
    assert [axes.get_title() for axes in drawn[0].axes] == [
        "wanted class",
        "FD(digits)",
        "precision",
        "recall",
    ]
    for axes, key in zip(drawn[0].axes, COLUMNS, strict=True):
        lines, labels = axes.get_legend_handles_labels()
        curves = dict(zip(labels, lines, strict=True))
        real = curves.pop("real digits, unseen", None)
        means = {}
        for row in rows[:-1]:
            means.setdefault(f"{row['network']}, {row['guidance']}", []).append(row[key]["mean"])
        assert {label: list(bar[0].get_ydata()) for label, bar in curves.items()} == means
        assert {tuple(bar[0].get_xdata()) for bar in curves.values()} == {(1, 3)}
        assert real is None if key == "hit" else set(real.get_ydata()) == {rows[-1][key]["mean"]}


def test_without_matplotlib_one_line_says_so_and_the_table_stands(sweep, monkeypatch):
    folder, flags, first = sweep
    (folder / "comparison.png").rename(folder / "kept.png")
    with monkeypatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure"):  # importing them fails
            patch.setitem(sys.modules, name, None)
        result = call(EDM.main, flags)
    (folder / "kept.png").rename(folder / "comparison.png")
    assert result.code == 0 and result.out == "".join(first.out.splitlines(True)[:-1])
    assert result.err.count("complete, nothing to do") == 2 * len(EDM_ROWS)  # it is the same command again
    assert [line for line in result.err.splitlines() if "no curves: " in line and "[plot]" in line]


# Both


def test_the_same_command_again_samples_nothing(guidance):
    folder, flags, first = guidance
    before = contents(folder, but="log.txt")
    again = call(GUIDANCE.main, flags)
    assert again.code == 0 and "complete, nothing to do" in again.err
    assert again.out == first.out
    other = call(GUIDANCE.main, [*flags, "--joint_temperature", 2])
    assert other.code == 1 and "another run's output" in other.err.splitlines()[-1]
    assert contents(folder, but="log.txt") == before


class Closed(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize(
    ("script", "name"), [(GUIDANCE, "guidance"), (EDM, "sweep")], ids=["guidance", "edm"]
)
def test_the_files_are_written_before_the_tables_are_printed(tmp_path, monkeypatch, request, script, name):
    before, flags, _ = request.getfixturevalue(name)
    shutil.copytree(before, folder := tmp_path / "copy")
    for path in folder.glob("comparison.*"):
        path.unlink()
    one = ("--seeds", 3) if script is GUIDANCE else ("--seeds", 0, "--steps", 1)
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, [*flags[:-1], folder, *one])])
    monkeypatch.setattr("sys.stdout", Closed())
    with suppress(BrokenPipeError, SystemExit):
        script.main()
    assert {path.name for path in folder.glob("comparison.*")} == {"comparison.json", "comparison.png"}


@pytest.mark.parametrize(("sampler", "steps"), [(DDPM, 8), (RELEASED, 14)], ids=["digits", "digits-edm"])
def test_guidance_makes_an_unconditional_network_draw_the_wanted_class(tmp_path, sampler, steps):
    classifier, hits = load_classifier("digits_judge", num_classes=10), {}
    for name, scale in (("guided", ()), ("unguided", sampler.scale_0)):
        flags = ("--unconditional", True, "--steps", steps, *sampler.images(30), "--batch_size", 30)
        sampler.run(tmp_path / name, *flags, *scale)
        hits[name] = judge(tmp_path / name, classifier)["hit"]
    assert hits["unguided"] < 0.35 and hits["guided"] > hits["unguided"] + 0.3


# compare_fewstep.py


def test_few_steps_beside_the_recipe(tmp_path, monkeypatch):
    steps = {name: max(1, values["steps"] // 10) for name, values in FEW_STEPS.ROWS.items()}
    rows = {name: values | {"steps": steps[name]} for name, values in FEW_STEPS.ROWS.items()}
    monkeypatch.setattr(FEW_STEPS, "ROWS", rows)
    flags = ("--num_samples", 6, "--seeds", "2-3", "--softplus_beta", 4, "--out", tmp_path)
    result = call(FEW_STEPS.main, flags)
    assert result.code == 0, result.err
    settings = [manifest(path.parent)["settings"] for path in tmp_path.glob("seed2/*/run.json")]
    assert sorted(each["sampler"] for each in settings) == ["ddpm"] * 3 + ["dpmpp_2m_sde"] * 2
    assert len({each.get("softplus_beta") for each in settings} - {None}) == 1  # 4, where it is guided
    for row in table_of(tmp_path):
        assert row["evaluations"]["runs"] == [steps[row["name"]]] * 2
        assert (
            row["classifier_passes"]["runs"]
            == [0 if row["name"].startswith("unguided") else steps[row["name"]]] * 2
        )
        assert f"{row['hit']['mean']:.1%} ± {row['hit']['std']:.1%}" in result.out
    assert_spreads(table_of(tmp_path), 2)
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.height == len(rows) * 18 * 3

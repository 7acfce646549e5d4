"""scripts/compare_edm.py: which runs it starts, with which flags, from which noise, and what it makes of
them.
"""

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import HELD_OUT, DigitsQuality
from helpers import ROOT, Result, call, contents, load_samples, load_script
from PIL import Image

from classifiers.registry import load_classifier
from guided_diffusion.files.pretrained import PRETRAINED_DIR

compare = load_script("compare_edm")
edm_sample = load_script("edm_sample")
NETWORKS = {"class-conditional": "False", "unconditional": "True"}
FORMS = {
    "unguided": {"--use_classifier": "False"},
    "released": {"--use_classifier": "True", "--guidance_form": "released"},
    "score": {"--use_classifier": "True", "--guidance_form": "score"},
}
STEPS = (2, 3)
ROWS = [(network, form, n) for network in NETWORKS for form in FORMS for n in STEPS]
COLUMNS = {"hit": ".1%", "fd_digits": ".2f", "precision": ".3f", "recall": ".3f"}
QUICK = ["--steps", "1", "--num_samples", "6"]
MODES = [(network, form) for network in NETWORKS for form in FORMS]


@dataclass
class Child:
    """A child process's flags, its exit code, and what each of its batches began from."""

    flags: dict[str, str]
    code: int = 0
    latents: list[torch.Tensor] = field(default_factory=list)
    labels: list[torch.Tensor | None] = field(default_factory=list)


def pairs(words):
    """["--a", "1", "--b=2"] as a dictionary."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return dict(zip(words[::2], words[1::2], strict=True))


@contextlib.contextmanager
def children_run_here():
    """Run the child processes here instead, which saves their start; yields the list of them."""
    started = []
    sampler = edm_sample.edm_sampler

    def run_here(command, stdout):
        assert Path(command[1]) == ROOT / "scripts/edm_sample.py"
        started.append(Child(pairs(command[2:])))
        started[-1].code = call(edm_sample.main, command[2:]).code
        return started[-1].code

    def watched(denoiser, latents, class_labels, *args, **kwargs):
        started[-1].latents.append(latents)
        started[-1].labels.append(class_labels)
        return sampler(denoiser, latents, class_labels, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "call", run_here)
        patch.setattr(edm_sample, "edm_sampler", watched)
        yield started


@pytest.fixture
def children():
    with children_run_here() as started:
        yield started


@dataclass
class Sweep:
    folder: Path
    flags: list
    result: Result
    children: list[Child]

    @property
    def rows(self):
        return json.loads((self.folder / "comparison.json").read_text())

    def out(self, seed, network, form, n):
        return self.folder / f"seed{seed}" / f"{network}-{form}-{n}"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two numbers of steps, three seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    flags = ["--steps", "2,3", "--num_samples", "6", "--seeds", "0-2", "--batch", "4", "--out", folder]
    with children_run_here() as started:
        result = call(compare.main, flags)
    assert result.code == 0, result.err
    return Sweep(folder, flags, result, started)


# The runs


def test_every_network_form_and_number_of_steps_is_sampled_for_every_seed(sweep):
    asked = [(seed, *row) for seed in range(3) for row in ROWS]
    assert [Path(child.flags["--out"]) for child in sweep.children] == [sweep.out(*run) for run in asked]
    for child, (seed, network, form, n) in zip(sweep.children, asked, strict=True):
        own = {
            "--preset": "digits-edm",
            "--unconditional": NETWORKS[network],
            "--steps": str(n),
            "--solver": "heun",
            "--format": "npz",
        }
        images = {
            "--seeds": ("0-5", "6-11", "12-17")[seed],
            "--batch": "4",
            "--out": str(sweep.out(seed, network, form, n)),
        }
        assert child.flags == own | FORMS[form] | images


def test_the_seeds_of_the_table_are_sets_of_images_without_a_common_one(sweep):
    noise = [torch.cat(child.latents) for child in sweep.children[:: len(ROWS)]]
    assert [x.shape for x in noise] == [(6, 3, 16, 16)] * 3
    assert len({image.numpy().tobytes() for x in noise for image in x}) == 18


def test_the_rows_of_a_seed_start_from_the_same_noise_and_want_the_same_classes(sweep):
    for seed in range(3):
        runs = sweep.children[seed * len(ROWS) : (seed + 1) * len(ROWS)]
        labels = [load_samples(sweep.out(seed, *row))[1].tolist() for row in ROWS]
        assert labels == [labels[0]] * len(ROWS)
        for child, (network, *_) in zip(runs, ROWS, strict=True):
            assert torch.equal(torch.cat(child.latents), torch.cat(runs[0].latents))
            if network == "unconditional":
                assert child.labels == [None, None]  # of the two batches
            else:
                assert torch.cat(child.labels).argmax(dim=1).tolist() == labels[0]


def test_the_rows_differ_in_their_images(sweep):
    assert len({load_samples(sweep.out(0, *row))[0].tobytes() for row in ROWS}) == len(ROWS)


# The table


def test_the_json_holds_what_judge_and_features_say_of_each_run_and_of_held_out_digits(sweep):
    assert [(row["network"], row["guidance"], row["steps"]) for row in sweep.rows] == [
        *ROWS,
        ("real", "", None),
    ]
    classifier, quality = load_classifier("digits_judge", num_classes=10), DigitsQuality()
    for row in sweep.rows:
        for cell in (value for value in row.values() if isinstance(value, dict)):
            assert len(cell["runs"]) == 3
            assert (cell["mean"], cell["std"]) == pytest.approx(
                (np.mean(cell["runs"]), np.std(cell["runs"], ddof=1))
            )
        assert row["images"]["runs"] == [6, 6, 6]
    for row, key in ((sweep.rows[3], ROWS[3]), (sweep.rows[-2], ROWS[-1])):
        outs = [sweep.out(seed, *key) for seed in range(3)]
        images, labels = zip(*map(load_samples, outs), strict=True)
        answers = [
            classifier(torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1).argmax(dim=1).numpy()
            for x in images
        ]
        assert row["hit"]["runs"] == pytest.approx(
            [np.mean(a == y) for a, y in zip(answers, labels, strict=True)]
        )
        assert row["fd_digits"]["runs"] == [quality(out)["fd_digits"] for out in outs]
    real = sweep.rows[-1]
    assert "hit" not in real and "log_prob" not in real
    assert real["recall"]["runs"] == [
        quality(sweep.folder / f"seed{seed}" / "held_out.npz")["recall"] for seed in range(3)
    ]


def test_the_real_digits_are_held_out_ones_as_many_as_samples_and_others_for_each_seed(sweep):
    with np.load(HELD_OUT, allow_pickle=False) as file:
        held_out = {image.tobytes() for image in file["arr_0"]}
    real = []
    for seed in range(3):
        with np.load(sweep.folder / f"seed{seed}" / "held_out.npz", allow_pickle=False) as file:
            real.append({image.tobytes() for image in file["arr_0"]})
    assert [len(digits) for digits in real] == [6, 6, 6] and set.union(*real) <= held_out
    assert len(set.union(*real)) > 12


def test_the_table_prints_them_in_columns_the_real_digits_last(sweep):
    head, *lines, about, curves = sweep.result.out.splitlines()
    assert head.split() == [
        "network",
        "guidance",
        "steps",
        "evaluations",
        "wanted",
        "class",
        "FD(digits)",
        "precision",
        "recall",
    ]
    assert about == "6 images in each run, 3 runs each; ± is their standard deviation"
    assert curves == f"curves: {sweep.folder / 'comparison.png'}"
    for line, row in zip(lines, sweep.rows, strict=True):
        name = (
            [row["network"]]
            if row["network"] == "real"
            else [row["network"], row["guidance"], str(row["steps"])]
        )
        evaluations = {2: ["3"], 3: ["5"], None: []}[row["steps"]]  # 2 N - 1
        cells = [
            f"{row[key]['mean']:{form}} ± {row[key]['std']:{form}}"
            for key, form in COLUMNS.items()
            if key in row
        ]
        assert line.split() == [*name, *evaluations, *" ".join(cells).split()]
        assert len(line) == len(head)  # the columns stand below their names


def test_of_a_single_run_nothing_is_said_about_spread(tmp_path, children):
    result = call(compare.main, [*QUICK, "--out", tmp_path])
    assert result.code == 0, result.err
    assert "±" not in result.out and "6 images in each run\n" in result.out
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert {row[key]["std"] for row in rows for key in COLUMNS if key in row} == {None}
    with Image.open(tmp_path / "comparison.png") as picture:
        picture.verify()


def test_the_curves_are_a_png(sweep):
    with Image.open(sweep.folder / "comparison.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100  # not an empty sheet


def test_each_panel_has_a_curve_for_each_network_and_form_over_the_evaluations(sweep, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: drawn.append(figure))
    compare.draw(sweep.folder / "other.png", sweep.rows)
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["wanted class", "FD(digits)", "precision", "recall"]
    for axes, key in zip(figure.axes, COLUMNS, strict=True):
        lines, labels = axes.get_legend_handles_labels()
        expected = {
            f"{n}, {form}": [
                row[key]["mean"] for row in sweep.rows if row["network"] == n and row["guidance"] == form
            ]
            for n, form in MODES
        }
        curves = dict(zip(labels, lines, strict=True))
        real = curves.pop("real digits, unseen", None)
        assert {label: list(bar[0].get_ydata()) for label, bar in curves.items()} == expected
        assert {tuple(bar[0].get_xdata()) for bar in curves.values()} == {(3, 5)}
        assert real is None if key == "hit" else set(real.get_ydata()) == {sweep.rows[-1][key]["mean"]}


def test_without_matplotlib_one_line_says_so_and_the_table_stands(tmp_path, children, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it fails
    result = call(compare.main, [*QUICK, "--out", tmp_path])
    assert result.code == 0, result.err
    assert [line for line in result.err.splitlines() if "matplotlib" in line] == [
        'no curves: they are drawn with matplotlib, pip install -e ".[plot]"'
    ]
    assert len(result.err.splitlines()) == len(MODES) + 1
    assert "real" in result.out and "curves" not in result.out
    assert len(json.loads((tmp_path / "comparison.json").read_text())) == len(MODES) + 1
    assert not (tmp_path / "comparison.png").exists()


# The flags


OF_FORM = {
    "unguided": {},
    "released": {"--max_guidance": "0.02", "--add_factor": "0.1"},
    "score": {"--classifier_scale": "0.5", "--gamma_factor": "-0.2"},
}
OF_BOTH = {
    "--classifier_type": "digits_guide",
    "--classifier_path": str(PRETRAINED_DIR / "digits/guide.safetensors"),
    "--classifier_input": "paper",
    "--softplus_beta": "4",
    "--joint_temperature": "1.5",
    "--uncond_temperature": "0.5",
    "--guidance_interval": "0.01,200",
    "--on_nonfinite": "skip",
    "--log_guidance": "1",
}
OF_ALL = {"--S_churn": "5", "--device": "cpu"}


def test_the_flags_of_a_form_go_to_its_rows_those_of_both_to_both_and_the_others_to_all(tmp_path, children):
    written = [
        word for flags in (*OF_FORM.values(), OF_BOTH, OF_ALL) for pair in flags.items() for word in pair
    ]
    result = call(compare.main, [*QUICK, *written, "--out", tmp_path])
    assert result.code == 0, result.err
    for child, (network, form) in zip(children, MODES, strict=True):
        own = {
            "--preset": "digits-edm",
            "--unconditional": NETWORKS[network],
            "--steps": "1",
            "--solver": "heun",
        }
        own |= {"--format": "npz", "--seeds": "0-5"}
        shared = {} if form == "unguided" else OF_BOTH
        out = tmp_path / "seed0" / f"{network}-{form}-1"
        assert child.flags == own | FORMS[form] | OF_FORM[form] | shared | OF_ALL | {"--out": str(out)}
        assert (out / "metrics.jsonl").exists() == (form != "unguided")
        settings = json.loads((out / "run.json").read_text())["settings"]
        assert settings["S_churn"] == 5
        if form != "unguided":
            assert (settings["uncond_temperature"], settings["guidance_form"]) == (0.5, form)


def test_the_strength_of_one_form_changes_its_rows_alone(tmp_path, sweep, children):
    result = call(
        compare.main,
        ["--steps", "2", "--num_samples", "6", "--batch", "4", "--max_guidance", "0.2", "--out", tmp_path],
    )
    assert result.code == 0, result.err
    for network, form in MODES:
        name = f"{network}-{form}-2"
        images, before = (
            load_samples(tmp_path / "seed0" / name)[0],
            load_samples(sweep.folder / "seed0" / name)[0],
        )
        assert np.array_equal(images, before) == (form != "released"), name


# The same folder again


def test_the_same_command_again_samples_nothing_and_more_steps_only_what_is_missing(tmp_path, children):
    flags = [*QUICK, "--seeds", "0,3", "--out", tmp_path]
    first = call(compare.main, flags)
    before = contents(tmp_path, but="log.txt")
    assert len(before) > len(children) == 2 * len(MODES) and all(child.latents for child in children)

    children.clear()
    again = call(compare.main, flags)
    assert (again.code, again.out) == (0, first.out), again.err
    assert [child.latents for child in children] == [[]] * 2 * len(MODES)
    assert contents(tmp_path, but="log.txt") == before

    children.clear()
    assert call(compare.main, [*flags, "--steps", "2,1", "--seeds", "3"]).code == 0
    assert [child.flags["--steps"] for child in children if child.latents] == ["2"] * len(MODES)


def test_a_folder_with_runs_of_another_strength_is_refused(tmp_path, sweep, children):
    shutil.copytree(sweep.folder, tmp_path / "again")
    result = call(compare.main, [*sweep.flags[:-1], tmp_path / "again", "--add_factor", "0.7"])
    assert result.code == 1
    assert [child.code for child in children] == [0, 0, 1]  # the unguided runs are the same
    assert contents(tmp_path / "again", but="log.txt") == contents(sweep.folder, but="log.txt")


# What is refused


OWN_FLAGS = (
    "unconditional=True",
    "use_classifier=1",
    "guidance_form=score",
    "outdir=x",
    "format=png",
    "subdirs",
    "dry_run=1",
)
TWICE = "names a number twice; each gives one run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "5,10,5"], f"--steps 5,10,5 {TWICE}"),
        (["--seeds", "2,1-3"], f"--seeds 2,1-3 {TWICE}"),
        (
            ["--steps", "5-"],
            "--steps '5-' is not understood at '5-'; write numbers and ranges such as 1,2,5-10",
        ),
        (["--seeds", ""], "--seeds '' is not understood at ''; write numbers and ranges such as 1,2,5-10"),
        (["--seeds", "-1"], "--seeds must be from 0 on, got -1"),
        (["--num_samples", "5"], "--num_samples must be at least 6, got 5"),
        *(
            (["--" + flag], f"--{flag.partition('=')[0]} is this script's own to give to each row: drop it")
            for flag in OWN_FLAGS
        ),
        (
            ["--judge", "digits_guide"],
            "--judge digits_guide is the guide itself; choose another classifier, of another architecture",
        ),
        (
            ["--classifier_type", "digits_judge"],
            "--judge digits_judge is the guide itself; choose another classifier, of another architecture",
        ),
        (
            ["--classifier_type=resnet18", "--judge", "resnet18"],
            "--judge resnet18 is the guide itself; choose another classifier, of another architecture",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line_before_anything_is_sampled(
    tmp_path, children, flags, message
):
    result = call(compare.main, [*QUICK, "--out", tmp_path / "out", *flags])
    assert (result.code, result.out) == (1, "")
    assert result.err == f"error: {message}\n"
    assert children == [] and not (tmp_path / "out").exists()


def test_a_judge_that_nobody_knows_is_refused_before_anything_is_sampled(tmp_path, children):
    result = call(compare.main, [*QUICK, "--out", tmp_path, "--judge", "nobody"])
    assert result.code == 1 and "unknown classifier 'nobody'" in result.err and result.err.count("\n") == 1
    assert children == []


def test_the_guide_of_the_preset_may_judge_where_another_guides(tmp_path, children):
    swapped = ["--judge", "digits_guide", "--classifier_type", "digits_judge"]
    result = call(compare.main, [*QUICK, *swapped, "--out", tmp_path])
    assert result.code == 0, result.err
    assert [child.flags.get("--classifier_type") for child in children] == [
        None,
        "digits_judge",
        "digits_judge",
    ] * 2


@pytest.mark.parametrize(
    ("flags", "codes"),
    [
        (["--class", "10"], [1]),
        (["--steps", "0"], [1]),
        (["--num_sampl", "3"], [2]),
        (["--max_guidance", "strong"], [0, 2]),
        (["--guidance_interval", "3"], [0, 1]),
    ],
)
def test_the_first_child_that_fails_ends_it_with_its_exit_code(tmp_path, children, flags, codes):
    result = call(compare.main, [*QUICK, "--out", tmp_path, *flags])
    assert [child.code for child in children] == codes
    assert result.code == codes[-1]
    assert result.out == "" and "error" not in result.err  # the child has said it
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (130, None),
        (-9, "error: edm_sample.py was ended by signal 9; the same command goes on from what is finished"),
    ],
)
def test_a_child_that_is_stopped_stops_it(tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(subprocess, "call", lambda command, stdout: code)
    result = call(compare.main, [*QUICK, "--out", tmp_path])
    assert result.code == (1 if message else code)
    assert result.err.splitlines()[1:] == ([message] if message else [])


# What the shipped preset is for


def test_the_released_form_makes_the_unconditional_network_draw_the_wanted_class(tmp_path):
    shares = {}
    for form in ("unguided", "released"):
        written = [word for pair in FORMS[form].items() for word in pair]
        flags = [
            "--preset",
            "digits-edm",
            "--unconditional",
            "True",
            "--steps",
            "36",
            "--seeds",
            "0-59",
            "--batch",
            "60",
            *written,
        ]
        result = call(edm_sample.main, [*flags, "--out", tmp_path / form])
        assert result.code == 0, result.err
        images, labels = load_samples(tmp_path / form)
        answers = load_classifier("digits_judge", num_classes=10)(
            torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        )
        shares[form] = float((answers.argmax(dim=1).numpy() == labels).mean())
    assert shares["released"] >= 0.85
    assert shares["unguided"] < 0.3

"""scripts/compare_guidance.py and guided_sample.sh: which runs they start, with which flags, and what they
make of them.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, call, contents, environment, load_samples, load_script
from PIL import Image

compare = load_script("compare_guidance")
classifier_sample = load_script("classifier_sample")
ROWS = [
    ("class-conditional", "unguided"),
    ("class-conditional", "guided"),
    ("unconditional", "unguided"),
    ("unconditional", "guided"),
]
NO_NULL_CLASS = "has no network with a null class, to sample unconditionally; choose digits"
FLAGS = ["--num_samples", "10", "--timestep_respacing", "3"]


@pytest.fixture
def children(monkeypatch):
    """Run the child processes here instead, which saves their start; their flags are kept in the list."""
    started = []

    def run_here(command, stdout):
        assert Path(command[1]) == ROOT / "scripts/classifier_sample.py"
        started.append(command[2:])
        return call(classifier_sample.main, command[2:]).code

    monkeypatch.setattr(subprocess, "call", run_here)
    return started


def test_two_seeds_make_four_rows(tmp_path, children):
    result = call(compare.main, [*FLAGS, "--seeds", "3-4", "--out", tmp_path])
    assert result.code == 0, result.err
    folders = [tmp_path / f"seed{seed}" / f"{network}-{mode}" for seed in (3, 4) for network, mode in ROWS]
    assert [Path(flags[flags.index("--out") + 1]) for flags in children] == folders

    tables = json.loads((tmp_path / "comparison.json").read_text())
    rows = tables["judge"]
    assert [(row["network"], row["guidance"]) for row in rows] == ROWS
    for row in rows:
        assert set(row) == {"network", "guidance", "hit", "log_prob", "seconds_per_image", "guidance_share"}
        for key in set(row) - {"network", "guidance"}:
            runs = row[key]["runs"]
            assert len(runs) == 2
            assert row[key]["mean"] == pytest.approx(np.mean(runs))
            assert row[key]["std"] == pytest.approx(np.std(runs, ddof=1))
        assert all(10 * hit == pytest.approx(round(10 * hit)) and 0 <= hit <= 1 for hit in row["hit"]["runs"])
        assert max(row["log_prob"]["runs"]) < 0 < min(row["seconds_per_image"]["runs"])
        assert (
            row["guidance_share"]["mean"] < 0.05
            if row["guidance"] == "unguided"
            else 0.05 < row["guidance_share"]["mean"] < 1
        )

    first, second = result.out.split("FD(digits)")
    table = [line.split() for line in first.splitlines()]
    assert [
        tuple(words[:2]) for words in table if words and words[0] in ("class-conditional", "unconditional")
    ] == ROWS
    assert first.count("±") == 8
    assert_features_table(tables["features"], second)
    assert f"{rows[0]['hit']['mean']:.1%} ± {rows[0]['hit']['std']:.1%}" in result.out
    with Image.open(tmp_path / "comparison.png") as picture:
        # Four rows of ten enlarged images with their borders, and a margin for the titles.
        assert picture.size == (150 + 10 * 18 * 3, 4 * 18 * 3)


def assert_features_table(rows, text):
    """Five metrics with their spread over two seeds, of the four kinds of runs and of real digits."""
    assert [(row["network"], row["guidance"]) for row in rows] == [*ROWS, ("real", "")]
    assert [row["images"]["runs"] for row in rows] == [[10, 10]] * 5
    assert text.count("±") == 26 and "± is the standard deviation over the seeds" in text
    last = rows[-1]
    assert f"{last['fd_digits']['mean']:.2f} ± {last['fd_digits']['std']:.2f}" in text
    assert f"{last['recall']['mean']:.3f} ± {last['recall']['std']:.3f}" in text


def test_runs_that_are_too_small_for_the_second_table_still_have_the_first(tmp_path, children):
    result = call(compare.main, [*FLAGS, "--num_samples", "5", "--out", tmp_path])
    assert result.code == 0
    assert "wanted class" in result.out and "FD(digits)" not in result.out
    assert "no table of FD(digits): 5 images, it takes 6" in result.err
    assert json.loads((tmp_path / "comparison.json").read_text())["features"] == []


def test_the_rows_start_from_the_same_noise_and_labels_and_the_flags_go_on(tmp_path, children):
    result = call(compare.main, [*FLAGS, "--labels", "2,7", "--gamma_factor", "0.1", "--out", tmp_path])
    assert result.code == 0, result.err
    first, second = result.out.split("FD(digits)")
    assert "±" not in first
    assert second.count("±") == 6  # of one run, only the distance has a spread
    assert "± is the standard deviation over resamples of the images" in second
    runs = [
        json.loads((tmp_path / "seed0" / f"{n}-{m}" / "run.json").read_text())["settings"] for n, m in ROWS
    ]
    varied = {key for key in runs[0] if len({str(run[key]) for run in runs}) > 1}
    assert varied == {"unconditional", "classifier_scale"}
    assert [(run["unconditional"], run["classifier_scale"]) for run in runs] == [
        (False, 0),
        (False, 2),
        (True, 0),
        (True, 2),
    ]
    assert (runs[0]["gamma_factor"], runs[0]["num_samples"], runs[0]["seed"]) == (0.1, 10, 0)
    labels = [load_samples(tmp_path / "seed0" / f"{n}-{m}")[1].tolist() for n, m in ROWS]
    assert labels == [labels[0]] * 4 and set(labels[0]) == {2, 7}


def test_the_same_command_again_samples_nothing(tmp_path, children):
    flags = [*FLAGS, "--out", tmp_path]
    assert call(compare.main, flags).code == 0
    before = contents(tmp_path, but="log.txt")
    assert call(compare.main, flags).code == 0
    assert contents(tmp_path, but="log.txt") == before


def test_the_guides_share_of_hits_is_counted_by_the_judge(tmp_path, children):
    result = call(compare.main, ["--num_samples", "40", "--timestep_respacing", "10", "--out", tmp_path])
    assert result.code == 0, result.err
    hit = {
        (row["network"], row["guidance"]): row["hit"]["mean"]
        for row in json.loads((tmp_path / "comparison.json").read_text())["judge"]
    }
    assert hit["unconditional", "unguided"] < 0.35
    assert hit["unconditional", "guided"] > hit["unconditional", "unguided"] + 0.3


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--labels", "10"], 1, None),
        (["--num_sampl", "3"], 2, None),
        (["--preset", "digit"], 1, f"error: --preset digit {NO_NULL_CLASS}"),
        (["--preset", "imagenet128-resnet50"], 1, f"error: --preset imagenet128-resnet50 {NO_NULL_CLASS}"),
        (["--seed", "3"], 1, "error: --seed would give every run the same seed: use --seeds"),
        (["--seed=3"], 1, "error: --seed would give every run the same seed: use --seeds"),
        (
            ["--seeds", "3-"],
            1,
            "error: --seeds '3-' is not understood at '3-'; write numbers and ranges such as 1,2,5-10",
        ),
        (["--seeds", "2,1-3"], 1, "error: --seeds 2,1-3 names a seed twice; each gives one run"),
        (
            ["--seeds", ""],
            1,
            "error: --seeds '' is not understood at ''; write numbers and ranges such as 1,2,5-10",
        ),
    ],
)
def test_the_first_failure_ends_it(tmp_path, children, flags, code, message):
    result = call(compare.main, [*FLAGS, "--out", tmp_path, *flags])
    assert result.code == code
    assert len(children) == (message is None)
    if message:
        assert result.err.strip() == message
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize(
    "flags", [["--unconditional", "True"], ["--unconditional", "False"], ["--unconditional=True"]]
)
def test_the_flags_that_tell_the_rows_apart_cannot_be_overridden(tmp_path, children, flags):
    result = call(compare.main, [*FLAGS, "--out", tmp_path, *flags])
    assert result.code == 1
    assert result.err.strip().splitlines()[-1].startswith("error: ") and "--unconditional" in result.err


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--judge", "digits_guide"], ["digits_guide", "guide"]),
        (["--classifier_type=digits_judge"], ["digits_judge", "guide"]),
        (["--classifier_type", "resnet18", "--classifier_type", "digits_judge"], ["digits_judge", "guide"]),
        (["--judge", "nobody"], ["unknown classifier 'nobody'"]),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_minutes_of_sampling(tmp_path, children, flags, fragments):
    result = call(compare.main, [*FLAGS, "--out", tmp_path, *flags])
    assert result.code == 1
    assert [fragment for fragment in fragments if fragment not in result.err] == []
    assert children == []


# guided_sample.sh


def run_shell(folder, *words):
    """Run the real thing from a folder without ImageNet files."""
    for name in ("guided_sample.sh", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return subprocess.run(
        [folder / "guided_sample.sh", *words], cwd=folder, env=environment(), capture_output=True, text=True
    )


def test_guided_sample_ends_with_a_table_and_a_picture(tmp_path):
    result = run_shell(tmp_path, "--num_samples", "10", "--timestep_respacing", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("preset: digits (the ImageNet files are not in pretrained_models")
    assert "\r" not in result.stderr  # no bar where no terminal is
    tables = [
        line.split()[:2]
        for line in result.stdout.splitlines()
        if line.startswith(("class", "uncond", "real"))
    ]
    assert tables == [*map(list, ROWS), *map(list, ROWS), ["real", "10"]]
    assert result.stdout.splitlines()[-1].endswith("results/digits/comparison.png")
    assert sorted(path.name for path in (tmp_path / "results/digits").iterdir()) == [
        "comparison.json",
        "comparison.png",
        "seed0",
    ]


def test_guided_sample_passes_on_what_a_child_of_digits_edm_says_and_its_code(tmp_path):
    result = run_shell(tmp_path, "digits-edm", "--steps", "1", "--num_samples", "6", "--class", "10")
    assert (result.returncode, result.stdout) == (1, "")
    told = [
        "class-conditional, unguided, 1 steps, seed 0",
        "error: --class 10 is out of range, the classes are 0 to 9",
    ]
    assert result.stderr.splitlines() == told

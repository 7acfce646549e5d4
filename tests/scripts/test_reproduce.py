"""scripts/reproduce.py: from cells to a page, what it says of the paper's claims, and its dry run."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import ROOT, TINY, call, flags_of, load_script, save_unet
from PIL import Image
from scipy.spatial.distance import cdist

from evaluation.networks import feature_network
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import model_and_diffusion_defaults

REPRODUCE = load_script("reproduce")
CLAIMS, PAGE, CALIBRATION = (sys.modules[f"reproduce_{name}"] for name in ("claims", "page", "calibration"))
PROBLEMS, SWEEP_CELLS = (sys.modules[name] for name in ("problems", "sweep_cells"))
CELLS = """
table / unguided: digits --steps 1 --classifier_scale 0
table / off the shelf: digits --steps 1
ablation / Softplus: digits --steps 1
ranking / ADM: digits --steps 1 --unconditional True --softplus_beta {2,3,inf}
"""


def flags(folder, *more):
    own = {"--num_samples": 6, "--out": folder / "out", "--page": folder / "docs" / "results.md"}
    return [*(word for pair in own.items() for word in pair), *more]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, flags, what the script printed) of two seeds."""
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "docs").mkdir()
    (folder / "docs" / "results.md").write_text("# Results\n\nBy hand.\n")
    (folder / "cells.txt").write_text(CELLS)
    more = ("--cells", folder / "cells.txt", "--seeds", "0-1", "--num_labelled", 20, "--num_levels", 2)
    words = ["digits", *flags(folder, *more)]
    result = call(REPRODUCE.main, words)
    assert result.code == 0, result.err
    return folder, words, result


def long_lines(page):
    """Those that are no command."""
    return [line for line in page.splitlines() if len(line) > 110 and line[:4].strip()]


def result_of(folder):
    return json.loads((folder / "docs" / "results" / "digits.json").read_text())


def test_each_run_is_drawn_once_and_stands_wherever_it_is_named(finished):
    folder, _, printed = finished
    drawn = [line for line in printed.err.splitlines() if re.match(r"\d+/\d+: ", line)]
    assert len(drawn) == 2 * 5  # of six cells two are the same run
    rows = result_of(folder)["rows"]
    names = [row["name"] for row in rows if row["seed"] == 0]
    assert names[1:3] == ["table / off the shelf", "ablation / Softplus"] and len(names) == 6
    assert rows[1]["fd_digits"] == rows[2]["fd_digits"] != rows[0]["fd_digits"]


def test_the_settings_are_ranked_with_their_own_calibration(finished):
    ranking = result_of(finished[0])["ranking"]
    adm = [(each["shown"], each["beta"], each["tau"]) for each in ranking["ADM"]]
    assert adm == [("x0", "2", 1), ("x0", "3", 1), ("x0", "inf", 1)]
    numbers = [value for each in ranking["ADM"] for value in each["ece"].values()]
    assert len(set(numbers)) == 6 and all(0 <= value <= 1 for value in numbers)  # of each setting and seed


def test_what_the_classifier_is_shown_is_read_from_the_rule():
    words = "--labels balanced --unconditional True --softplus_beta 2 --joint_temperature 0.5 --steps 1"
    cells = [
        next(SWEEP_CELLS.expanded(f"ranking / EDM: digits-edm {words} {more}"))
        for more in ("", "--guidance_form score --sampler heun")
    ]
    noisy, clean = map(CALIBRATION.setting_of, cells)
    assert (noisy.shown, clean.shown) == ("x_t", "x0") and (clean.beta, clean.tau) == (2.0, 0.5)
    networks = ("--preset", "digits-edm", "--unconditional", "True")  # of both, which are measured at once
    asked = ["--softplus_betas", "2", "--joint_temperatures", "0.5"]
    assert CALIBRATION.calls(cells) == {networks: asked}


def test_answers_come_from_the_rows(finished):
    result = result_of(finished[0])
    answers = {each["claim"]: each for each in result["answers"]}
    lowers = answers["an off-the-shelf classifier lowers the distance"]
    by_name = {(row["name"], row["seed"]): row["fd_digits"] for row in result["rows"]}
    runs = [by_name["table / off the shelf", seed] - by_name["table / unguided", seed] for seed in (0, 1)]
    assert lowers["difference"]["runs"] == pytest.approx(runs)
    assert lowers["answer"] == CLAIMS.judged(lowers["difference"], -1)
    assert answers["a deeper classifier guides better"]["answer"] == "not measured here"
    ranked = answers["what is better calibrated guides better (ADM)"]
    assert ranked["answer"] == "cannot be told here" and ranked["by_chance"] >= 1 / 6  # of three settings


def digits_features(images):
    return feature_network("digits")(images)["pool3"].astype(np.float64)


def test_a_second_look_at_the_runs_of_the_table(finished):
    folder, result = finished[0], result_of(finished[0])
    opinion, row = result["opinions"][0], result["rows"][0]
    assert [each["name"] for each in result["opinions"]] == ["table / unguided", "table / off the shelf"] * 2
    (samples,) = (folder / "out" / "runs" / row["id"]).glob("samples_*.npz")
    other = PROBLEMS.Quality(PROBLEMS.PROBLEMS["digits"], "digits_mixer")(samples)
    assert opinion["second"] == pytest.approx(other["fd_digits"])  # under the first network's name
    images = {}
    for name in ("reference", "held_out"):
        with np.load(PRETRAINED_DIR / "digits" / f"{name}.npz", allow_pickle=False) as file:
            images[name] = file["arr_0"]
    with np.load(samples, allow_pickle=False) as file:
        images["samples"] = file["arr_0"]
    train, unseen, drawn = map(digits_features, images.values())
    unseen, drawn = (cdist(points, train).min(1) for points in (unseen, drawn))
    assert opinion["nearer"] == pytest.approx((drawn[:, None] < unseen).mean())
    assert 0 <= opinion["nearer_confident"] <= 1  # of one image in six


def test_real_images_stand_below_the_table(finished):
    folder, result = finished[0], result_of(finished[0])
    assert all(each["images"] == 6 and each["hit"] > 0.8 for each in result["real"])
    one, other = (np.load(folder / f"out/real{i}/samples_6x16x16x3.npz")["arr_0"] for i in (0, 1))
    assert not (one[:, None] == other).all((2, 3, 4)).any()  # they share no image
    assert result["real"][0]["nearer_confident"] == result["real"][1]["nearer_confident"] > 0.5
    page = (folder / "docs" / "results" / "digits.md").read_text()
    assert page.count("| *6 real images that no network has seen* |") == 2
    assert f"| digits/unet.safetensors | {sha256(PRETRAINED_DIR / 'digits/unet.safetensors')[:16]}… |" in page
    networks = {
        f"{what}, {name}" for what in ("reference", "features") for name in ("digits", "digits_mixer")
    }
    assert networks | {"held out, 360 images and labels"} < result["sha256"].keys()


def test_real_images_are_not_those_of_an_earlier_call(tmp_path):
    problem, held_out = PROBLEMS.PROBLEMS["digits"], PRETRAINED_DIR / "digits/held_out.npz"
    opinions = sys.modules["reproduce_opinion"].Opinions(problem, problem.judge, held_out, tmp_path)
    assert [opinions.real(count, 1)[0]["images"] for count in (12, 6, 500)] == [12, 6, 360]


def test_what_there_is_nothing_for_is_left_out(finished, tmp_path, capsys):
    folder, result = finished[0], result_of(finished[0])
    problem = replace(PROBLEMS.PROBLEMS["digits"], second="dinov2:nowhere")
    opinions = sys.modules["reproduce_opinion"].Opinions(problem, problem.judge, None, tmp_path)
    run = folder / "out" / "runs" / result["rows"][0]["id"]
    assert opinions({"a": run}) == {"a": {"second": None, "nearer": None, "nearer_confident": None}}
    assert "no second opinion: " in capsys.readouterr().err
    nothing = [{**each, "second": None, "nearer": None} for each in result["opinions"]]
    page = PAGE.page({**result, "opinions": nothing, "real": []})
    assert "A second look" not in page and "real images" not in page


def test_the_page_and_the_part_of_the_other_page(finished):
    folder, _, printed = finished
    docs = folder / "docs"
    text, answers = (docs / "results.md").read_text(), result_of(folder)["answers"]
    assert text.startswith("# Results\n\nBy hand.\n") and "[digits](results/digits.md)" in text
    assert all(f"| {each['claim']} | {each['answer']} |" in text for each in answers)
    page = (docs / "results" / "digits.md").read_text()
    assert all(f"| {each['claim']} | {each['answer']} | " in page for each in answers)
    assert "6 images for each of 2 seeds" in page and not long_lines(page)
    for name in re.findall(r"\]\(([^)]+\.png)\)", page):
        with Image.open(docs / "results" / name) as picture:
            assert picture.format == "PNG"
    assert printed.out.split() == [
        str(docs / path)
        for path in [
            *("results/digits.png", "results/digits-calibration.png", "results/digits-nearest.png"),
            *("results/digits.json", "results/digits.md", "results.md"),
        ]
    ]


def test_what_is_there_is_not_drawn_again(finished, monkeypatch):
    folder, words, first = finished
    before = (folder / "docs" / "results.md").read_bytes()
    monkeypatch.setattr(sys.modules["sweep"], "run", None)
    monkeypatch.setattr(sys.modules["calibrate"], "main", None)
    assert call(REPRODUCE.main, words).out == first.out
    assert (folder / "docs" / "results.md").read_bytes() == before


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """The cells of ImageNet on a tiny network, with random classifiers and the digits' features."""
    preset = PRESETS["imagenet128-unguided"]
    settings = {key: preset[key] for key in model_and_diffusion_defaults() if key in preset} | TINY
    network = {**TINY, "model_path": save_unet(tmp_path / "unet.pt", settings)}
    tiny = " ".join(flags_of(network)) + " --steps 2"
    lines = (ROOT / "docs/results/imagenet128.txt").read_text().replace("--steps 25", "").splitlines()
    guided = f"{tiny} --classifier_type shufflenet_v2_x0_5 --classifier_path random"
    cells = [
        f"{line} {guided if 'resnet' in line else tiny}".replace("3,5,10,inf", "3,inf")
        for line in lines
        if line and not line.startswith("#") and "finetuned" not in line  # which has no such small network
    ]
    (tmp_path / "cells.txt").write_text("\n".join(cells))
    problem = replace(
        PROBLEMS.PROBLEMS["imagenet128"],
        judge="mnasnet0_5",
        judge_weights="random",
        features="digits",
        second="digits_mixer",
        images="digits/reference.npz",
    )
    monkeypatch.setitem(PROBLEMS.PROBLEMS, "imagenet128", problem)
    return ["imagenet128", *flags(tmp_path, "--cells", tmp_path / "cells.txt", "--seeds", 0)]


def test_imagenet_end_to_end_with_random_weights(imagenet, tmp_path):
    (tmp_path / "docs").mkdir()
    result = call(REPRODUCE.main, imagenet)
    assert result.code == 0, result.err
    assert "no calibration: it takes labelled images, --data_dir" in result.err
    page = (tmp_path / "docs" / "results" / "imagenet128.md").read_text()
    assert "| unguided | 2 |" in page and "| few steps | 2 |" in page and "| agrees |" not in page


def test_the_dry_run_lists_files_disk_and_hours_and_draws_nothing(imagenet, tmp_path):
    result = call(REPRODUCE.main, [*imagenet, "--dry_run"])
    assert result.code == 0, result.err
    assert f"found: {tmp_path / 'unet.pt'}, " in result.out and "reference.npz, " in result.out
    assert re.search(r"\ndisk: 0\.0 GB for 10 cells of 6 images\ntime: some [\d.]+ minutes", result.out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "unet.pt").rename(tmp_path / "128x128_diffusion.pt")
    cells = tmp_path / "cells.txt"
    cells.write_text(cells.read_text().replace("unet.pt", "nowhere/128x128_diffusion.pt"))
    result = call(REPRODUCE.main, [*imagenet, "--dry_run"])
    assert result.code == 1 and result.err == "error: 1 file is missing: see above\n"
    assert "`python scripts/download.py 128x128_diffusion.pt`" in result.out and "\ntime: some" in result.out


@pytest.mark.parametrize("problem", PROBLEMS.PROBLEMS)
def test_claims_are_of_cells_that_the_files_have(problem):
    cells = REPRODUCE.cells_of(REPRODUCE.create_argparser().parse_args([problem]))
    names = {cell.name for cell in cells}
    claimed = {name for claim in CLAIMS.CLAIMS for name in (claim.ours, claim.theirs)}
    absent = {name for name in claimed - names if not name.startswith("calibration / ")}
    assert {name.partition(" / ")[0] for name in absent} <= {"table", "input"}
    assert {cell.name for same in CALIBRATION.ranked(cells).values() for cell in same} >= {"ranking / ADM"}


@pytest.mark.parametrize(
    ("cells", "more", "message"),
    [
        ("table / a: cifar10", [], "cells.txt has cells of cifar10, not of digits"),
        ("a: digits\na: digits --steps 2", [], "cells.txt has two cells 'a'"),
        ("table / a: digits", [], "cells.txt has no cell 'table / off the shelf'"),
        ("a: digits", ["--num_samples", 5], "--num_samples must be at least 6, got 5"),
        ("a: digits", ["--seeds", "1,1"], "--seeds 1,1 names a number twice"),
        ("a: digits", ["--cells", "none.txt"], "none.txt: no such file of cells"),
        ("a: digits", ["--data_dir", "none.npz"], "--data_dir none.npz: there is nothing"),
        (
            "a: digits",
            ["--data_dir", "TRAIN"],
            "has the images that networks are trained on: give its test_batch",
        ),
    ],
)
def test_refusals(tmp_path, cells, more, message):
    (tmp_path / "cells.txt").write_text(cells)
    (tmp_path / "data_batch_1").touch()
    more = [tmp_path if word == "TRAIN" else word for word in more]
    result = call(REPRODUCE.main, ["digits", "--cells", tmp_path / "cells.txt", *flags(tmp_path), *more])
    assert result.code == 1 and message in result.err and "\n" not in result.err.strip()
    assert not (tmp_path / "out").exists()

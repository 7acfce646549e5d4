"""scripts/calibrate.py: what it measures, of every system, how often it asks, and what it recommends."""

import json
import re
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    DIGITS_NETWORK,
    TINY,
    TINY_64,
    TINY_NOISY,
    call,
    flags_of,
    load_script,
    make_noisy_classifier,
    save_random,
    save_unet,
)
from PIL import Image

from classifiers import load_classifier
from evaluation.calibration import negative_log_likelihood
from guided_diffusion.denoisers import DiscreteDenoiser
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.runs.noise import SampleNoise

script = load_script("calibrate")
choice = load_script("calibration_choice")
DIGITS = PRETRAINED_DIR / "digits"
QUICK = ("--num_samples", 7, "--num_levels", 2)
GRID = ("--softplus_betas", "3,inf", "--joint_temperatures", "0.5,1")
SYSTEMS = ["digits-edm", *(["digits-dit"] if find_spec("diffusers") else [])]

NETWORK = {key: value for key, value in DIGITS_NETWORK.items() if key != "timestep_respacing"}
NETWORK |= {"model_path": DIGITS / "unet.safetensors", "null_class": True, "num_classes": 10}
UNET = flags_of(NETWORK)
GUIDE = ("--classifier_type", "digits_guide")


def measured(folder, *flags):
    """(the script's answer, its JSON)."""
    result = call(script.main, [*flags, "--json", folder / "out.json"])
    assert result.code == 0, result.err
    return result, json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on 7 digits, with how many images the network and the classifiers were shown."""
    folder, seen = tmp_path_factory.mktemp("digits"), {"network": 0, "classifiers": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiscreteDenoiser, "__call__", counted(DiscreteDenoiser.__call__, seen, "network"))
        patch.setattr(script, "logits_at", with_counted_classifiers(script.logits_at, seen))
        flags = ("--preset", "digits", *QUICK, *GRID, "--plot", folder / "out.png")
        return folder, *measured(folder, *flags), seen


def counted(function, seen, name):
    def counting(*args):
        seen[name] += len(args[-2])
        return function(*args)

    return counting


def with_counted_classifiers(logits_at, seen):
    def counting(batches, classifiers, *rest):
        watched = {beta: counted(function, seen, "classifiers") for beta, function in classifiers.items()}
        return logits_at(batches, watched, *rest)

    return counting


def cell_of(report, shown, beta, tau):
    (found,) = [
        cell
        for cell in report["cells"]
        if (cell["shown"], cell["softplus_beta"], cell["joint_temperature"]) == (shown, beta, tau)
    ]
    return found


def test_every_setting_is_a_row_and_the_integral_is_the_mean_over_levels(digits):
    folder, result, report, _ = digits
    lines = result.out.splitlines()
    assert lines[0] == (
        "7 images, 2 noise levels, 15 bins; the network is given the true labels, which its predictions tell"
    )
    assert [line.split()[:3] for line in lines[7:11]] == [
        ["x_t", beta, tau] for beta in ("3", "inf") for tau in ("0.5", "1")
    ]
    assert len(report["cells"]) == 8 and report["images"] == 7
    assert report["flags"].items() >= {"data_dir": str(DIGITS / "held_out.npz"), "num_samples": "7"}.items()
    for cell in report["cells"]:
        assert [level["t"] for level in cell["levels"]] == [999, 0]
        assert all(sum(level["reliability"]["counts"]) == 7 for level in cell["levels"])
        for name, value in cell["means"].items():
            assert value == pytest.approx(np.mean([level[name] for level in cell["levels"]]))
    chosen = report["recommended"]
    beta = float(chosen["softplus_beta"])
    flags = f"--softplus_beta {beta:g} --joint_temperature {chosen['joint_temperature']:g}"
    assert f"recommended, shown the predicted x0: {flags}" in lines
    with Image.open(folder / "out.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 50


def test_each_image_is_denoised_once_at_a_level_and_no_temperature_costs_a_pass(digits):
    assert digits[-1] == {"network": 7 * 2, "classifiers": 7 * 2 * 2 * 2}  # images, levels; betas, inputs


def test_x_t_is_the_process_s_with_noise_by_the_image_s_number(digits):
    """Made again here: the first draw of each image's stream is for the noisiest level."""
    with np.load(DIGITS / "held_out.npz") as file:
        indices = np.sort(np.random.RandomState(0).permutation(360)[:7])
        images, y = file["arr_0"][indices], file["arr_1"][indices]
    clean = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 127.5 - 1
    noise, classifier = SampleNoise(0, indices.tolist()), load_classifier("digits_guide", num_classes=10)
    for level in cell_of(digits[2], "x_t", "inf", 0.5)["levels"]:
        alpha_bar = 1 / (1 + level["sigma"] ** 2)
        x_t = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise(clean)
        probs = (0.5 * classifier(x_t.float()).double()).softmax(dim=1)
        assert level["nll"] == pytest.approx(negative_log_likelihood(probs, y), rel=1e-4)


def test_neither_the_batch_nor_the_other_images_change_a_number(tmp_path, digits):
    report = digits[2]
    _, other = measured(tmp_path, "--preset", "digits", *QUICK, *GRID, "--batch_size", 3)
    assert other["recommended"] == report["recommended"]
    for cell, same in zip(report["cells"], other["cells"], strict=True):
        assert cell["means"] == pytest.approx(same["means"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("preset", SYSTEMS)
def test_every_system_is_measured_with_and_without_labels(tmp_path, preset):
    quick = ("--preset", preset, *QUICK, "--softplus_betas", "inf", "--joint_temperatures", "1")
    result, told = measured(tmp_path, *quick)
    assert told["network_told_the_labels"]
    result, report = measured(tmp_path, *quick, "--unconditional", "True")
    assert "the network is given no labels" in result.out and not report["network_told_the_labels"]
    with_labels, without = (cell_of(each, "x0", "inf", 1.0)["means"]["nll"] for each in (told, report))
    assert with_labels < without
    assert cell_of(told, "x_t", "inf", 1.0)["means"] == cell_of(report, "x_t", "inf", 1.0)["means"]
    clean = cell_of(report, "x0", "inf", 1.0)["levels"][-1]
    assert clean["sigma"] == pytest.approx(0.01, rel=0.01) and clean["accuracy"] == 1


def test_a_classifier_of_noisy_images_is_shown_x_t_alone(tmp_path):
    save_unet(tmp_path / "unet.pt", {**TINY_64, "learn_sigma": True}, 3)
    save_random(tmp_path / "noisy.pt", make_noisy_classifier(num_classes=3))
    np.savez(tmp_path / "data.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8), arr_1=[0, 1, 2, 1])
    flags = flags_of({**TINY_64, **TINY_NOISY, "learn_sigma": True, "num_classes": 3, "num_levels": 2})
    flags += ["--model_path", tmp_path / "unet.pt", "--classifier_path", tmp_path / "noisy.pt"]
    flags += ["--data_dir", tmp_path / "data.npz"]
    result, report = measured(tmp_path, *flags, "--plot", tmp_path / "out.png")
    assert {(cell["shown"], cell["softplus_beta"]) for cell in report["cells"]} == {("x_t", None)}
    assert "no prediction is asked for" in result.out and "recommended, shown the x_t: --joint" in result.out
    refused = call(script.main, [*flags, "--softplus_betas", "3"])
    assert refused.err == "error: --softplus_betas: a classifier of noisy images is not smoothed: drop it\n"


def setting(shown="x0", beta=3.0, tau=1.0, ece=0.1, nll=1.0, spread=0.0):
    """A cell with these means; spread: by how much its resamples go up and down."""
    means = {"accuracy": 0.5, "ece": ece, "noise_floor": 0.03, "nll": nll, "brier": 0.4}
    resampled = ece + spread * np.tile([-1.0, 1.0], 10)
    return SimpleNamespace(shown=shown, beta=beta, tau=tau, mean=means.get, resampled=resampled)


@pytest.mark.parametrize(
    ("cells", "beta", "reason"),
    [
        ([setting(), setting(beta=5, ece=0.05, nll=2)], 5, "0.0500 (beta 5, tau1 1), is below every other"),
        ([setting(), setting(beta=5, ece=0.08, nll=2)], 3, "all ECE are within the noise of the least"),
        ([setting(spread=0.1), setting(beta=5, ece=0.02, nll=2)], 3, "all ECE are within the noise"),
        (
            [setting(), setting(beta=5, ece=0.08, nll=2), setting(beta=9, ece=0.3, nll=0.5)],
            3,
            "2 of 3 ECE are within the noise of the least, 0.0800 (beta 5, tau1 1): the NLL decides",
        ),
        ([setting(), setting(shown="x_t", ece=0.01)], 3, "the same setting has ECE 0.0100, lower,"),
        ([setting(), setting(shown="x_t", ece=0.11)], 3, "ECE 0.1100, within the noise of its own,"),
    ],
)
def test_the_likelihood_decides_where_the_error_tells_nothing_apart(cells, beta, reason):
    found = choice.recommendation(cells)
    assert found.cell.shown == "x0" and found.cell.beta == beta
    assert any(reason in line for line in choice.lines_of(cells, found))


def test_a_disagreement_of_the_scores_and_the_end_of_a_grid_are_said():
    cells = [setting(tau=1, ece=0.1, nll=1), setting(tau=2, ece=0.3, nll=0.5)]
    lines = choice.lines_of(cells, choice.recommendation(cells))
    assert any("but beta 3, tau1 2 has 0.5000" in line for line in lines)
    assert lines[-1] == "- tau1 1 is at the end of those that were tried: try further ones."
    cells = [setting(beta=5), setting(beta=float("inf"), nll=2)]
    lines = choice.lines_of(cells, choice.recommendation(cells))
    assert lines[-1] == "- beta 5 is at the end of those that were tried: try further ones."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "nothing"), "unknown preset 'nothing'"),
        (("--preset", "digits", "--softplus_beta", 3), "--softplus_beta decides nothing .* --softplus_betas"),
        (("--preset", "digits", "--steps", 9), "--steps decides nothing .*: drop it"),
        (("--preset", "digits", "--softplus_betas", "3,-1"), "--softplus_betas '3,-1' must be different"),
        (("--preset", "digits", "--joint_temperatures", "1,inf"), "--joint_temperatures '1,inf' must be"),
        (("--preset", "digits", "--joint_temperatures", "1,1"), "--joint_temperatures '1,1' must be"),
        (("--preset", "digits", "--num_levels", 1001), "--num_levels 1001 must be from 1 to 1000"),
        (("--preset", "digits", "--num_samples", 361), "--num_samples 361: .* has 360 images"),
        (("--preset", "digits", "--bins", 0), "--bins must be at least 1, got 0"),
        (("--preset", "digits", "--num_samples", 1), "--num_samples must be at least 2, got 1"),
        (("--preset", "digits", "--json", "nowhere/a.json"), "--json nowhere/a.json must be a file in a fol"),
        (("--preset", "digits", "--data_dir", "none.npz"), "there is nothing at none.npz"),
        (("--preset", "digits", "--data_dir", "plain.npz"), "plain.npz has no labels"),
        (("--preset", "digits", "--data_dir", "eleven.npz"), "image 1 has label 11, and --num_classes 10"),
        (("--preset", "digits", "--classifier_type", "resnet999"), "unknown classifier 'resnet999'"),
        (("--preset", "digits-edm", "--network", "gone.pkl"), "--network: no .*gone.pkl"),
        (("--system", "edm", "--network", DIGITS / "edm.safetensors"), "resnet101"),
        (UNET, "no classifier to measure: add --classifier_type"),
        ((*UNET, *GUIDE), "--data_dir is missing: give labelled images"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    np.savez("plain.npz", arr_0=images)
    np.savez("eleven.npz", arr_0=images, arr_1=[0, 11])
    result = call(script.main, flags)
    assert result.code == 1 and result.out == "" and len(result.err.splitlines()) == 1, result.err
    assert re.search(message, result.err), result.err


def test_one_class_has_no_calibration(tmp_path):
    save_unet(tmp_path / "unet.pt", TINY)
    flags = flags_of({**TINY, "model_path": tmp_path / "unet.pt", "num_classes": 1})
    result = call(script.main, [*flags, *GUIDE, "--data_dir", DIGITS / "held_out.npz"])
    assert (result.code, result.err) == (1, "error: 1 class: it takes at least 2 to be calibrated\n")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call(script.main, ["--preset", "digits", "--plot", "a.png"])
    message = 'error: --plot needs matplotlib, which is not installed: pip install -e ".[plot]"\n'
    assert (result.code, result.err) == (1, message)

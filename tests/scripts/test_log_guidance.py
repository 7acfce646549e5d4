"""What a run leaves behind about itself: metrics.jsonl of --log_guidance, the record in run.json, and the
progress on stderr.
"""

import io
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from helpers import (
    DIGITS_NETWORK,
    ROOT,
    TINY_64,
    TINY_NOISY,
    call,
    environment,
    flags_of,
    load_script,
    make_noisy_classifier,
    make_unet,
    samples_bytes,
    save_random,
    save_unet,
)

import guided_diffusion.runs.job
from guided_diffusion.files.pixels import ROUNDING, to_uint8
from guided_diffusion.files.pretrained import PRETRAINED_DIR, sha256
from guided_diffusion.files.run_folder import read_metrics
from guided_diffusion.flags.parser import parse_flags
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import loop as engine
from guided_diffusion.runs import workers as crew

script = load_script("classifier_sample")
# Batches of 2, 2 and 1 images.
QUICK = ("--preset", "digits", "--num_samples", 5, "--batch_size", 2, "--timestep_respacing", 5)
LOGGED = (*QUICK, "--log_guidance", True)
BATCHES = ([0, 2], [2, 4], [4, 5])
NUMBERS = ("gradient_norm", "confidence", "clipped", "non_finite")


def sample(folder, *flags, base=LOGGED):
    result = call(script.main, [*base, *flags, "--out", folder])
    assert result.code == 0, result.err
    return result


def metrics(folder):
    """The lines of a finished run as standard JSON, which knows no NaN and no infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    sample(folder)
    return folder


def test_one_line_for_each_batch_and_step_in_the_order_of_the_samples(whole):
    lines = metrics(whole)
    assert [(line["samples"], line["step"]) for line in lines] == [
        (batch, step) for batch in BATCHES for step in (4, 3, 2, 1, 0)
    ]
    alphas = make_unet({**DIGITS_NETWORK, "timestep_respacing": "5"}, 11)[1].alphas_cumprod
    for line in lines:
        assert set(line) == {"samples", "step", "sigma", *NUMBERS}
        a = alphas[line["step"]]
        assert line["sigma"] == pytest.approx(math.sqrt((1 - a) / a), rel=1e-9)
        assert (
            line["gradient_norm"] > 0
            and 0 < line["confidence"] <= 1
            and 0 <= line["clipped"] <= 1
            and line["non_finite"] == 0
        )
    # The guide comes to see what it asks for.
    assert all(
        last["confidence"] > first["confidence"] for first, last in zip(lines[::5], lines[4::5], strict=True)
    )
    assert list(read_metrics(whole)) == lines


def test_the_scale_is_part_of_the_gradient_that_is_told(tmp_path, whole):
    scale = PRESETS["digits"]["classifier_scale"]
    sample(tmp_path, "--classifier_scale", 4 * scale)
    # The first step sees the same images, whatever is added to them.
    assert metrics(tmp_path)[0]["gradient_norm"] == pytest.approx(
        4 * metrics(whole)[0]["gradient_norm"], rel=1e-5
    )


def test_looking_changes_no_image_and_without_the_flag_nothing_is_written(tmp_path, whole):
    sample(tmp_path, base=QUICK)
    assert samples_bytes(tmp_path) == samples_bytes(whole)
    assert not (tmp_path / "metrics.jsonl").exists() and list(read_metrics(tmp_path)) == []


def test_a_run_that_was_interrupted_has_the_lines_of_its_batches_and_in_the_end_all(
    tmp_path, whole, monkeypatch
):
    rounded = []

    def third_fails(*args):
        rounded.append(args)
        if len(rounded) == 3:
            raise KeyboardInterrupt
        return to_uint8(*args)

    with monkeypatch.context() as patch:
        patch.setattr(guided_diffusion.runs.job, "to_uint8", third_fails)
        assert call(script.main, [*LOGGED, "--out", tmp_path]).code == 130
    assert not (tmp_path / "metrics.jsonl").exists()
    assert list(read_metrics(tmp_path)) == metrics(whole)[:10]
    sample(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_two_processes_write_the_lines_of_one(tmp_path):
    flags = [*LOGGED, "--num_samples", 12]
    sample(tmp_path / "one", base=flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "scripts/classifier_sample.py", *flags, "--out", tmp_path / "two"]
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")


def test_where_guidance_rests_there_is_no_line(tmp_path, whole):
    sample(tmp_path, "--guidance_interval", "0.9,20", "--num_samples", 2, "--use_ddim", True)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 2, 1]
    assert [line["sigma"] for line in lines] == [line["sigma"] for line in metrics(whole)[1:4]]


def test_a_noisy_classifier_is_told_by_its_timesteps(tmp_path):
    unet, noisy = (
        save_unet(tmp_path / "unet.pt", TINY_64),
        save_random(tmp_path / "noisy.pt", make_noisy_classifier()),
    )
    flags = [
        "--model_path",
        unet,
        "--classifier_path",
        noisy,
        *flags_of({**TINY_64, **TINY_NOISY}),
        "--log_guidance",
        True,
    ]
    sample(tmp_path / "out", "--num_samples", 1, "--timestep_respacing", 2, base=flags)
    assert [(line["step"], line["sigma"]) for line in metrics(tmp_path / "out")] == [(999, None), (0, None)]


def test_edm_counts_its_steps_upwards_as_the_noise_falls(tmp_path):
    flags = [
        "--preset",
        "digits-edm",
        "--steps",
        3,
        "--seeds",
        "0-2",
        "--batch",
        2,
        "--log_guidance",
        1,
        "--out",
        tmp_path,
    ]
    result = call(load_script("edm_sample").main, flags)
    assert result.code == 0, result.err
    lines = metrics(tmp_path)
    assert [(line["samples"], line["step"]) for line in lines] == [
        (batch, step) for batch in ([0, 2], [2, 3]) for step in range(3)
    ]
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert [line["sigma"] for line in lines[:3]] == pytest.approx([80, middle, 0.002], rel=1e-6)


def test_dropped_guidance_is_counted_in_its_line_and_in_the_totals(tmp_path):
    """A classifier that is overwhelmed by the first image of each batch: its logits, and with them the
    gradient, are NaN.
    """
    (tmp_path / "own.py").write_text("""
import torch

class Overwhelmed(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(3 * 16 * 16, num_classes)

    def forward(self, x):
        fault = torch.zeros(len(x), 1)
        fault[0] = float("nan")
        return self.linear(x.flatten(1)) + fault

builder = Overwhelmed
""")
    flags = [
        "--classifier_type",
        f"{tmp_path / 'own.py'}:builder",
        "--softplus_beta",
        "inf",
        "--on_nonfinite",
        "skip",
    ]
    sample(tmp_path / "out", *flags)
    assert json.loads((tmp_path / "out/run.json").read_text())["totals"]["skipped_guidance"] == 15
    assert [line["non_finite"] for line in metrics(tmp_path / "out")] == [1] * 15


def test_there_is_nothing_to_log_without_a_classifier(tmp_path):
    network = {**DIGITS_NETWORK, "model_path": PRETRAINED_DIR / "digits/unet.safetensors"}
    result = call(script.main, [*flags_of(network), "--log_guidance", True, "--out", tmp_path / "out"])
    assert result.code == 1 and result.err.startswith(
        "error: --log_guidance True needs a classifier: add --classifier_type"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_is_logged_as_a_whole_or_not_at_all(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    result = call(script.main, [*QUICK, "--out", whole])
    assert result.code == 1 and "another run's output (log_guidance True -> False)" in result.err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_overwrite_takes_the_old_lines_away(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "copy")
    sample(tmp_path / "copy", "--overwrite", True, base=QUICK)
    assert list(read_metrics(tmp_path / "copy")) == []


# run.json


def test_every_flag_after_defaults_is_on_record(tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("3 1 4 1 5")
    sample(tmp_path / "out", "--labels", labels, base=QUICK)
    run = json.loads((tmp_path / "out/run.json").read_text())
    flags = vars(
        parse_flags(script.create_argparser(), list(map(str, [*QUICK, "--labels", labels])), PRESETS)
    )
    recorded = {**run["settings"], **run["not_compared"]}
    known = {key: value for key, value in flags.items() if key not in ("given", "out", "device")}
    assert {key: recorded.get(key, "no such flag") for key in known} == known
    assert recorded["out"] == str(tmp_path / "out") and "device" in recorded
    assert run["settings"]["sha256"]["labels"] == sha256(labels)
    assert run["rounding"] == ROUNDING["adm"]
    assert set(run["drawn_by"]) == {"noise", "labels"} and "Philox" in run["drawn_by"]["noise"]


def test_files_are_compared_by_what_they_hold_wherever_they_lie(tmp_path):
    one, other = tmp_path / "labels.txt", tmp_path / "elsewhere.txt"
    one.write_text("3 1 4 1 5")
    other.write_text("3 1 4 1 5")
    sample(tmp_path / "out", "--labels", one, base=QUICK)
    assert "nothing to do" in sample(tmp_path / "out", "--labels", other, base=QUICK).err
    other.write_text("3 1 4 1 6")
    result = call(script.main, [*QUICK, "--labels", other, "--out", tmp_path / "out"])
    assert result.code == 1 and "another run's output (sha256 " in result.err


# Progress


@pytest.fixture
def often(monkeypatch):
    """The processes tell how far they are after a few steps, not twice a second."""
    monkeypatch.setattr(crew, "PROGRESS_SECONDS", 0.01)


def test_a_short_run_is_silent_where_there_is_no_terminal(tmp_path, often):
    assert sample(tmp_path, base=QUICK).err == ""


def test_a_long_run_says_from_time_to_time_how_far_it_is(tmp_path, often, monkeypatch):
    monkeypatch.setattr(engine, "LINE_SECONDS", 0.05)
    said = sample(tmp_path, "--num_samples", 12, base=QUICK).err
    lines = [
        re.fullmatch(r"(\d+)/12 images, [\d.]+ images/s, 0:00:\d\d left", line) for line in said.splitlines()
    ]
    assert lines and all(lines), said
    assert (tmp_path / "log.txt").read_text() == said
    images = [int(line[1]) for line in lines]
    assert images == sorted(images) and images[-1] <= 12


def test_on_a_terminal_there_is_one_bar_for_the_run(tmp_path, often, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(io, "StringIO", Terminal)
    said = sample(tmp_path, "--num_samples", 12, base=QUICK).err
    states = said.split("\r")
    assert all("/12 images [" in state for state in states[1:]) and len(states) > 2
    assert "100%" in states[-1] and "12/12 images [" in states[-1] and said.count("\n") == 1

"""The benchmark prints its figures, and the training script writes files that load."""

import json
import re

import pytest
import torch
from helpers import call, load_script

from classifiers import load_classifier
from guided_diffusion.checkpoints import load_into, load_state_dict
from guided_diffusion.presets import PRESETS
from guided_diffusion.script_util import create_from_flags


def test_the_benchmark_prints_the_four_figures():
    result = call(load_script("benchmark").main, ["--preset", "digits", "--device", "cpu", "--repeats", "1"])
    assert result.code == 0, result.err
    for figure in (
        r"network, float32: \d+ GFLOP/s, \d+% of a plain 3x3 convolution's \d+ GFLOP/s",
        r"bfloat16 makes the guided step \d+\.\d\d times as fast",
        r"peak resident memory of the process \d+\.\d\d GB",
        r"guidance takes \d+\.\d% of the float32 step",
    ):
        assert re.search(figure, result.out), result.out


def test_the_benchmark_needs_an_off_the_shelf_classifier():
    result = call(load_script("benchmark").main, ["--preset", "imagenet128-unguided", "--device", "cpu"])
    assert result.code == 1 and "imagenet128-unguided has no off-the-shelf classifier" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compile"], "error: --compile is for CUDA, and this runs on the CPU: drop it"),
        (["--batch_sizes", "1,2"], "error: --batch_sizes is for CUDA, and this runs on the CPU: drop it"),
        (["--repeats", "0"], "error: --repeats must be at least 1, got 0"),
    ],
)
def test_the_benchmark_refuses_flags_that_mean_nothing(flags, message):
    result = call(load_script("benchmark").main, ["--preset", "digits", "--device", "cpu", *flags])
    assert (result.code, result.err.strip()) == (1, message)


def test_training_writes_networks_that_load_and_a_record(tmp_path):
    torch.manual_seed(0)
    result = call(load_script("train_digits").main, ["--out", str(tmp_path), "--iterations", "3", "--classifier_iterations", "3"])
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "training.json").read_text())
    assert set(record) == {"unet", "guide", "judge", "features"} and record["unet"]["iterations"] == 3
    model, _ = create_from_flags(PRESETS["digits"])
    load_into(model, load_state_dict(tmp_path / "unet.safetensors"), "unet")
    for name in ("guide", "judge"):
        load_classifier(f"digits_{name}", tmp_path / f"{name}.safetensors", num_classes=10)
        assert 0 <= record[name]["accuracy"]["test"] <= 1

"""A training that is killed at any moment and started again ends as one that was not: weights, averages and
log, bit for bit.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
# Kills itself with signal 9: before the step, or before the file, whose turn sys.argv[1] says.
KILLER = """
import os, runpy, signal, sys
turn, script = int(sys.argv[1]), sys.argv[2]
sys.argv = sys.argv[2:]
sys.path.insert(0, "scripts")
import _beside
import torch
from guided_diffusion.training.loop import Loop

moments = 0
def mortal(function):
    def wrapped(*args, **kwargs):
        global moments
        moments += 1
        if moments == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

Loop.advance, torch.save, os.replace = mortal(Loop.advance), mortal(torch.save), mortal(os.replace)
runpy.run_path(script, run_name="__main__")
"""
IMAGES = {
    "script": "scripts/image_train.py",
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": 4,
    "class_cond": True,
    "learn_sigma": True,
    "diffusion_steps": 30,
    "labels_dropout": 0.2,
    "dropout": 0.1,
    "microbatch": 2,
    "ema_rate": "0.9,0.5",
    "samples": 0,
    "schedule_sampler": "loss-second-moment",
    "lr_anneal_steps": 11,
}
EDM = {
    **{
        key: value
        for key, value in IMAGES.items()
        if key not in ("learn_sigma", "schedule_sampler", "diffusion_steps")
    },
    "loss": "edm",
}
CLASSIFIER = {
    "script": "scripts/classifier_train.py",
    "image_size": 32,
    "classifier_type": "cifar_resnet20",
    "noised": False,
    "optimizer": "sgd",
    "random_crop": 2,
    "anneal_lr": True,
    "iterations": 11,
    "eval_interval": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An npz of ten images for each size."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for size in (8, 32):
        pixels = generator.randint(0, 256, (10, size, size, 3), dtype=np.uint8)
        np.savez(folder / f"{size}.npz", arr_0=pixels, arr_1=np.arange(10) % 3)
    return folder


def call(flags, data, out, turn=0):
    file = data / f"{flags['image_size']}.npz"
    common = {"data_dir": file, "num_classes": 3, "batch_size": 4, "log_interval": 3, "save_interval": 4}
    common |= {"keep": 2, "seed": 3, "out": out, "lr": 0.01}
    if "iterations" in flags:
        common["val_data_dir"] = file
    words = [f"--{name}={value}" for name, value in {**common, **flags}.items() if name != "script"]
    command = [sys.executable, "-c", KILLER, str(turn), flags["script"], *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("flags", [IMAGES, EDM, CLASSIFIER], ids=["images", "edm", "classifier"])
def test_killed_again_and_again_ends_as_the_undisturbed(flags, data, tmp_path):
    done = call(flags, data, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    for turn in (3, 7, 9, 14, 18):
        killed = call(flags, data, tmp_path / "killed", turn)
        assert killed.returncode in (0, -signal.SIGKILL), killed.stderr
    done = call(flags, data, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    whole = {path.name: path for path in (tmp_path / "whole").iterdir()}
    assert {"model000008.pt", "model000011.pt", "opt000011.pt", "progress.csv"} <= whole.keys()
    assert whole.keys() == {path.name for path in (tmp_path / "killed").iterdir()}
    for name in whole:
        if name.startswith(("model", "ema")) or name.endswith(".csv"):
            assert (tmp_path / "killed" / name).read_bytes() == whole[name].read_bytes(), name
    parts = [torch.load(tmp_path / run / "opt000011.pt", weights_only=True) for run in ("whole", "killed")]
    for part in parts:
        del part["seconds"]  # the only thing that depends on the clock
    assert str(parts[0]) == str(parts[1])

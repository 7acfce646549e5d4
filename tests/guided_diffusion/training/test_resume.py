"""A training that is killed at any moment and started again ends as one that was not: weights, averages and
log, bit for bit.
"""

import signal
import sys

import numpy as np
import pytest
import torch
from forked import Forked
from helpers import ROOT, environment

# Runs a script that kills itself with signal 9 before the step, or before the file, whose turn it is; 0 lets
# it live.
MORTAL = """
import os, runpy, signal, sys
import torch
from guided_diffusion.training.loop import Loop
turn, moments = int(sys.argv[1]), 0

def mortal(function):
    def wrapped(*args, **kwargs):
        global moments
        moments += 1
        if moments == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

sys.argv = sys.argv[2:]
Loop.advance, torch.save, os.replace = map(mortal, (Loop.advance, torch.save, os.replace))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TURNS = (3, 9, 14)
IMAGES = {
    "script": ROOT / "scripts/image_train.py",
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
CLASSIFIER = {
    "script": ROOT / "scripts/classifier_train.py",
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


def words_of(flags, data, out):
    file = data / f"{flags['image_size']}.npz"
    common = {"data_dir": file, "num_classes": 3, "batch_size": 4, "log_interval": 3, "save_interval": 4}
    common |= {"keep": 2, "seed": 3, "out": out, "lr": 0.01}
    if "iterations" in flags:
        common["val_data_dir"] = file
    given = {**common, **flags}
    script = given.pop("script")
    return [script, *(f"--{name}={value}" for name, value in given.items())]


@pytest.mark.parametrize(
    ("flags", "turns"),
    [(IMAGES, (2, 3, 5, 7, 9, 11, 14, 16, 18, 20)), (CLASSIFIER, TURNS)],
    ids=["images", "classifier"],
)
def test_killed_again_and_again_ends_as_the_undisturbed(flags, turns, data, tmp_path):
    attempts, codes = [(0, "whole"), *((turn, "killed") for turn in (*turns, 0))], []
    for turn, name in attempts:
        words = words_of(flags, data, tmp_path / name)
        with Forked([sys.executable, "-c", MORTAL, turn, *words], environment()) as process:
            _, err = process.communicate(timeout=300)
        codes.append(process.returncode)
    assert codes[0] == codes[-1] == 0 and set(codes) == {0, -signal.SIGKILL}, err
    assert codes.count(-signal.SIGKILL) >= 3, codes  # later attempts may have less to do than their turn
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

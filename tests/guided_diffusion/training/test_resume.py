"""A training that is killed at any moment and started again ends as one that was not: weights, averages and
log, bit for bit.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
# Every attempt is a child of a process that has imported everything: it kills itself with signal 9 before the
# step, or before the file, whose turn it is; 0 lets it live. Prints the exit codes.
ATTEMPTS = """
import json, os, runpy, signal, sys
sys.path.insert(0, "scripts")
import _beside
import matplotlib.backends.backend_agg
import torch, torch._dynamo  # an optimizer imports it at its first step
from guided_diffusion.training import classifiers, images
from guided_diffusion.training.loop import Loop

def mortal(function, turn):
    def wrapped(*args, **kwargs):
        global moments
        moments += 1
        if moments == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

def attempt(turn, words):
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.argv = words
    Loop.advance, torch.save = mortal(Loop.advance, turn), mortal(torch.save, turn)
    os.replace = mortal(os.replace, turn)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(0)

moments = 0
print(json.dumps([attempt(*each) for each in json.loads(sys.stdin.read())]), file=sys.stderr)
"""
TURNS = (3, 9, 14)
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
    whole, killed = (words_of(flags, data, tmp_path / name) for name in ("whole", "killed"))
    attempts = [(0, whole), *((turn, killed) for turn in turns), (0, killed)]
    command, environment = [sys.executable, "-c", ATTEMPTS], {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, input=json.dumps(attempts), cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    codes = json.loads(done.stderr.splitlines()[-1])
    assert codes[0] == codes[-1] == 0 and set(codes) == {0, -signal.SIGKILL}, done.stderr
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

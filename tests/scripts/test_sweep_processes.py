"""What the processes of scripts/sweep.py run on."""

import os
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
from helpers import load_script

SWEEP = load_script("sweep")


@pytest.mark.parametrize(
    ("environment", "count", "taken"),
    [
        ({}, 2, ["0", "1", "0"]),
        ({"CUDA_VISIBLE_DEVICES": "3,5"}, 2, ["3", "5", "3"]),
        ({"CUDA_VISIBLE_DEVICES": "MIG-a"}, 1, ["MIG-a"] * 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, ["unset"] * 3),
    ],
)
def test_processes_take_the_gpus_in_turn(monkeypatch, environment, count, taken):
    devices, number = SWEEP.visible_devices(environment, count), get_context("spawn").Value("i", 0)
    monkeypatch.setattr(SWEEP.threading, "Thread", lambda **options: SimpleNamespace(start=lambda: None))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "unset")
    found = []
    for _ in taken:
        SWEEP.begin_worker(devices, number)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == taken

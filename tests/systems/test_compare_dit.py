"""scripts/compare_dit.py: its four rows, and what each costs."""

import json

import pytest
from helpers import call, load_script
from samplers import manifest


def test_the_rows_differ_in_who_guides_and_draw_from_the_same_noise(tmp_path):
    pytest.importorskip("diffusers")
    flags = ("--num_samples", 6, "--steps", 2, "--seeds", 3, "--softplus_beta", 4, "--out", tmp_path)
    result = call(load_script("compare_dit").main, flags)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "comparison.json").read_text())
    costs = {row["name"]: (row["evaluations"]["mean"], row["classifier_passes"]["mean"]) for row in rows}
    assert costs == {"unguided": (2, 0), "classifier-free": (4, 0), "classifier": (2, 2), "both": (4, 2)}
    settings = [manifest(tmp_path / "seed3" / name)["settings"] for name in costs]
    varied = {key for key in settings[0] if len({str(each.get(key)) for each in settings}) > 1}
    assert varied <= {"cfg_scale", "cfg_channels", "classifier_scale"}
    assert (tmp_path / "comparison.png").exists() and "wanted class" in result.out

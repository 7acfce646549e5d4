"""Flags that no tensor's shape shows: those of known networks are known, by the file's name and by its
content.
"""

import json
import shutil

import pytest
import torch
from helpers import call, load_script

from guided_diffusion.files.pretrained import PRETRAINED_DIR, read_table
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import configure
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.flags.trained import NETWORKS, known_name, unlike_training
from guided_diffusion.script_util import classifier_defaults, create_classifier, create_from_flags

DIGITS = PRETRAINED_DIR / "digits/unet.safetensors"


def config(**given):
    return configure(ADMFlags, PRESETS, {"preset": "digits", **given})


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({}, {}),
        ({"num_heads": 2}, {"num_heads": 4}),
        ({"use_new_attention_order": True}, {"use_new_attention_order": False}),
        ({"noise_schedule": "cosine"}, {"noise_schedule": "linear"}),
        ({"diffusion_steps": 500}, {"diffusion_steps": 1000}),
        ({"rescale_timesteps": True, "num_heads": 8}, {"rescale_timesteps": False, "num_heads": 4}),
        ({"timestep_respacing": "10", "use_fp16": True, "classifier_scale": 0.0}, {}),
    ],
    ids=str,
)
def test_a_network_is_known_by_its_content_under_any_name(tmp_path, given, trained):
    renamed = shutil.copy(DIGITS, tmp_path / "mine.pt")
    for path in (DIGITS, renamed):
        assert known_name(path) == "digits/unet.safetensors"
        assert unlike_training(path, config(**given)) == trained


def test_a_published_name_is_known_and_another_file_is_not(tmp_path):
    path = tmp_path / "64x64_diffusion.pt"
    path.write_bytes(b"a")
    assert unlike_training(path, config())["noise_schedule"] == "cosine"
    other = path.rename(tmp_path / "other.pt")
    assert known_name(other) is None and unlike_training(other, config(num_heads=2)) == {}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_known_builds_a_network_and_has_a_place_in_the_table(name):
    flags = NETWORKS[name]
    with torch.device("meta"):
        if any(key.startswith("classifier") for key in flags):
            create_classifier(**{**classifier_defaults(), **flags})
        else:
            create_from_flags(flags)
    assert (PRETRAINED_DIR / name).is_file() or read_table().find(name)


def test_a_difference_is_said_at_the_start_and_in_the_record(tmp_path):
    script = load_script("classifier_sample")
    flags = ["--preset", "digits", "--num_samples", 2, "--batch_size", 2, "--steps", 2]
    said = call(script.main, [*flags, "--num_heads", 2, "--out", tmp_path / "wrong"])
    assert said.code == 0 and "--num_heads 2, but this network was trained with 4" in said.err
    assert json.loads((tmp_path / "wrong/run.json").read_text())["trained_with"] == {"num_heads": 4}
    silent = call(script.main, [*flags, "--out", tmp_path / "right"])
    assert "trained with" not in silent.err
    assert "trained_with" not in json.loads((tmp_path / "right/run.json").read_text())

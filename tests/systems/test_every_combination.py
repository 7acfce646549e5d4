"""README's "What works with what": the cells that no other file holds. DiT and a diffusers pipeline under
every sampler and rules by flags; torchvision's networks by name under all but ADM.
"""

import numpy as np
import pytest
from helpers import call, load_samples, load_script
from safetensors.torch import load_file, save_file
from samplers import DIGITS_DIT, DIT, RELEASED, manifest
from tiny_pipelines import tiny

from evaluation.networks import feature_network
from evaluation.sets import measure, open_set
from guided_diffusion.flags.adm import SAMPLERS

pytest.importorskip("diffusers")
QUICK = ("--num_samples", 1, "--steps", 2)
GUIDED = ("--classifier_type", "digits_guide", "--softplus_beta", 3, "--classifier_scale", 5)
OWN = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
"""
RULES = ("--reverse_kl", 0.5, "--adam", "0.5,0.8", "--fixed_length", 0.3, "--parallel_part", 0)


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """{name: (main, flags of a guided run of one image)}."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny("ddpm", folder)
    pipeline = ("--pipeline", folder, *GUIDED, "--num_classes", 10, "--device", "cpu")
    return {
        "edm": (RELEASED.main, (*RELEASED.flags, "--seeds", 0, "--steps", 2)),
        "dit": (load_script("dit_sample").main, (*DIT, *QUICK, "--cfg_scale", 2)),
        "pipeline": (load_script("pipeline_sample").main, (*pipeline, *QUICK)),
    }


def drawn(systems, name, out, *flags):
    main, base = systems[name]
    result = call(main, [*base, *flags, "--out", out])
    assert result.code == 0, result.err
    return load_samples(out)[0]


@pytest.mark.parametrize("name", ["dit", "pipeline"])
def test_every_sampler_is_guided(systems, name, tmp_path):
    for sampler in SAMPLERS:
        images = drawn(systems, name, tmp_path / sampler, "--sampler", sampler)
        assert images.std() > 0
        assert manifest(tmp_path / sampler)["totals"]["classifier_passes"] >= 2, sampler


@pytest.mark.parametrize("name", ["dit", "pipeline", "edm"])
def test_torchvisions_networks_by_name_and_ones_own(systems, name, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    for kind in ("shufflenet_v2_x0_5", f"{tmp_path / 'own.py'}:build"):
        path = ("--classifier_path", "random") if "own" not in kind else ()
        out = tmp_path / str(len(kind))
        drawn(systems, name, out, "--classifier_type", kind, *path)
        assert manifest(out)["totals"]["classifier_passes"] >= 2


def test_a_worse_dit_guides(systems, tmp_path):
    weights = load_file(DIGITS_DIT / "dit.safetensors")
    save_file({name: 0.9 * tensor for name, tensor in weights.items()}, tmp_path / "worse.safetensors")
    guided = ("--guide_model", tmp_path / "worse.safetensors", "--guide_scale", 2, "--sampler", "euler")
    plain = drawn(systems, "dit", tmp_path / "plain", "--sampler", "euler")
    assert (drawn(systems, "dit", tmp_path / "guided", *guided) != plain).any()
    assert manifest(tmp_path / "guided")["totals"]["network_evaluations"] > 2 * 2


@pytest.mark.parametrize("name", ["dit", "pipeline"])
def test_rules_by_flags_and_metrics_of_the_folder(systems, name, tmp_path):
    six = ("--num_samples", 6, "--batch_size", 6)
    plain = drawn(systems, name, tmp_path / "plain", *six)
    network = feature_network("digits")
    measured = measure(open_set(tmp_path / "plain", network), network, progress=False)
    np.testing.assert_array_equal(measured.features.pool3, network(plain)["pool3"])
    assert (drawn(systems, name, tmp_path / "rules", *six, *RULES) != plain).any()

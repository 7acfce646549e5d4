"""Runs of denoisers that are made of denoisers, from the command line."""

import math

import pytest
from helpers import load_samples
from samplers import BY_NAME, DDPM, DIGITS, RELEASED, SCORE

EULER, HEUN = BY_NAME["euler"], BY_NAME["heun"]
UNET, EDM_NET = DIGITS / "unet.safetensors", DIGITS / "edm.safetensors"
CFG = ("--cfg_scale", 2)
RUNS = [
    (EULER, CFG),
    (EULER, (*CFG, "--cfg_channels", 1)),
    (EULER, ("--cfg_rule", "cfg++", "--cfg_scale", 0.6)),
    (HEUN, ("--cfg_rule", "cfg-zero", "--cfg_scale", 2, "--cfg_zero_steps", 1)),
    (EULER, ("--recurrence", 2)),
    (RELEASED, CFG),
    (SCORE, ("--cfg_rule", "cfg++", "--cfg_scale", 0.6, "--S_churn", 1)),
    (SCORE, (*CFG, "--through_network", "--guidance_every", 2)),
]


def images(sampler, folder, *flags, base=None):
    sampler.run(folder, *sampler.images(2), *flags, base=base)
    return load_samples(folder)[0]


@pytest.mark.parametrize(("sampler", "flags"), RUNS)
def test_a_run_with_it_differs_from_one_without(sampler, flags, tmp_path):
    plain, mixed = images(sampler, tmp_path / "plain"), images(sampler, tmp_path / "mixed", *flags)
    assert (plain != mixed).any()


@pytest.mark.parametrize(("sampler", "net"), [(EULER, UNET), (SCORE, EDM_NET)], ids=["adm", "edm"])
def test_a_network_does_not_guide_itself_and_the_labels_are_those_of_the_null(sampler, net, tmp_path):
    plain = images(sampler, tmp_path / "plain", base=sampler.unguided)
    itself = images(sampler, tmp_path / "self", "--guide_model", net, base=sampler.unguided)
    assert (plain == itself).all()
    null = images(sampler, tmp_path / "null", "--unconditional", True, base=sampler.unguided)
    assert (images(sampler, tmp_path / "scale 0", "--cfg_scale", 0, base=sampler.unguided) == null).all()


@pytest.mark.parametrize(
    ("sampler", "flags", "told"),
    [
        (DDPM, CFG, "--cfg_scale given under a sampler that asks the network itself: add --sampler euler"),
        (DDPM, ("--guide_model", UNET), "--guide_model given under a sampler that asks the network itself"),
        (EULER, ("--cfg_channels", 1), "without classifier-free guidance: add --cfg_scale"),
        (EULER, (*CFG, "--cfg_zero_steps", 1), "without --cfg_rule cfg-zero"),
        (EULER, (*CFG, "--null_class", False), "null class: add --null_class True"),
        (EULER, (*CFG, "--unconditional", True), "drop --unconditional"),
        (EULER, (*CFG, "--cfg_channels", 4), "4 channels are to be guided, but the network answers 3"),
        (EULER, ("--cfg_rule", "cfg++", "--cfg_scale", 2), "from 0 to 1, got 2.0"),
        (EULER, ("--cfg_rule", "cfg-zero", "--cfg_zero_steps", 3), "of 3 steps some must be left"),
        (EULER, ("--guide_scale", 3), "add --guide_model PATH"),
        (EULER, ("--guide_model", "nowhere.pt"), "nowhere.pt"),
        (SCORE, (*CFG, "--unconditional", True), "drop --unconditional"),
        (SCORE, ("--cfg_scale", math.nan), "--cfg_scale must be a number"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(sampler, flags, told, tmp_path):
    result = sampler.call(tmp_path, *flags)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: ") and told in result.err

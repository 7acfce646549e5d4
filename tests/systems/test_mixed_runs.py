"""Runs of denoisers that are made of denoisers, from the command line."""

import math

import pytest
from helpers import DIGITS_NETWORK, load_samples, save_unet
from samplers import BY_NAME, DDPM, DIGITS, DIT_SAMPLERS, RELEASED, SCORE

from guided_diffusion.solvers import SOLVERS

EULER, HEUN = BY_NAME["euler"], BY_NAME["heun"]
UNET, EDM_NET = DIGITS / "unet.safetensors", DIGITS / "edm.safetensors"
CFG = ("--cfg_scale", 2)
PLUS, ZERO = ("--cfg_rule", "cfg++", "--cfg_scale", 0.6), ("--cfg_rule", "cfg-zero")
RUNS = [
    (EULER, CFG),
    (EULER, (*CFG, "--cfg_channels", 1)),
    (EULER, PLUS),
    (HEUN, (*ZERO, *CFG, "--cfg_zero_steps", 1)),
    (EULER, ("--recurrence", 2)),
    (RELEASED, CFG),
    (SCORE, PLUS),
    (SCORE, (*CFG, "--through_network", "--guidance_every", 2)),
    *((row, PLUS) for row in DIT_SAMPLERS if row.choice in SOLVERS),
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


def test_cfg_zero_at_scale_1_is_the_network_under_churn_too(tmp_path):
    churn = ("--S_churn", 1)
    zero = images(SCORE, tmp_path / "zero", *churn, *ZERO)
    assert (zero == images(SCORE, tmp_path / "plain", *churn)).all()


@pytest.mark.parametrize("mixed", [CFG, (*CFG, "--cfg_rule", "cfg-zero", "--cfg_zero_steps", 1), ()])
def test_the_learned_variance_is_that_of_a_mixture_too(mixed, tmp_path):
    net = save_unet(tmp_path / "net.pt", {**DIGITS_NETWORK, "learn_sigma": True}, num_classes=11)
    flags = (
        "--model_path",
        net,
        "--learn_sigma",
        True,
        "--guidance_strength",
        "posterior",
        "--guide_model",
        net,
    )
    images(EULER, tmp_path / "out", *flags, "--posterior", "learned", *mixed)


@pytest.mark.parametrize(
    ("sampler", "flags", "told"),
    [
        (DDPM, CFG, "with --sampler ddpm, which takes one network: add a solver, such as"),
        (DDPM, ("--guide_model", UNET), "--guide_model given with --sampler ddpm, which takes one network"),
        (EULER, ("--cfg_channels", 1), "without classifier-free guidance: add --cfg_scale"),
        (EULER, (*CFG, "--cfg_zero_steps", 1), "without --cfg_rule cfg-zero"),
        (EULER, (*CFG, "--null_class", False), "null class: add --null_class True"),
        (EULER, (*CFG, "--unconditional", True), "drop --unconditional"),
        (EULER, (*CFG, "--cfg_channels", 4), "--cfg_channels 4: the images have 3"),
        (SCORE, (*CFG, "--cfg_channels", 4), "--cfg_channels 4: the images have 3"),
        (EULER, ("--cfg_rule", "cfg++", "--cfg_scale", 2), "from 0 to 1, got 2.0"),
        (EULER, (*PLUS, "--restart", "3,1,1,2"), "--cfg_rule cfg++ goes by the noise levels of the run"),
        (
            SCORE,
            (*PLUS, "--S_churn", 1),
            "--cfg_rule cfg++ goes by the noise levels of the run, which --S_churn",
        ),
        (SCORE, (*ZERO, "--cfg_zero_steps", 1, "--S_churn", 1), "--cfg_zero_steps goes by the noise levels"),
        (EULER, (*ZERO, "--cfg_zero_steps", 3), "of 3 steps some must be left"),
        (SCORE, (*ZERO, "--cfg_zero_steps", 3), "of 3 steps some must be left"),
        (EULER, ("--guide_scale", 3), "add --guide_model PATH"),
        (EULER, ("--guide_model", "nowhere.pt"), "nowhere.pt"),
        (SCORE, (*CFG, "--unconditional", True), "drop --unconditional"),
        (SCORE, ("--cfg_scale", math.nan), "--cfg_scale must be a number"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(sampler, flags, told, tmp_path):
    result = sampler.call(tmp_path, *flags)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: ") and told in result.err
    assert not list(tmp_path.iterdir())  # the folder is not taken

"""Noise levels of a solver: by name, by list, by file; and the scripts that make such files."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import call, load_script

from guided_diffusion.edm import iDDPMPrecond
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.edm import EDMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.presets import EDM_PRESETS, PRESETS
from guided_diffusion.flags.solvers import read_levels
from guided_diffusion.guidance import read_spectrum
from guided_diffusion.runs.systems import system_of
from guided_diffusion.schedules import get_named_beta_schedule, named_levels

SCRIPTS = {name: load_script(name) for name in ("classifier_sample", "edm_sample")}
SPECTRUM, OPTIMIZE = load_script("data_spectrum"), load_script("optimize_levels")
ADM = ["--preset", "digits", "--num_samples", "2"]
EDM = ["--preset", "digits-edm", "--seeds", "0-1", "--guidance_form", "score"]


def adm(*flags):
    return parse(ADMFlags, None, PRESETS, [*ADM, *flags])


def edm(*flags):
    return parse(EDMFlags, None, EDM_PRESETS, [*EDM, *flags])


def test_levels_by_their_formulas():
    low, high, n = 0.01, 40.0, 5
    i = np.linspace(0, 1, n)
    karras = (high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    np.testing.assert_allclose(named_levels("karras", n, low, high), karras, rtol=1e-12)
    np.testing.assert_allclose(named_levels("logsnr", n, low, high), high * (low / high) ** i, rtol=1e-12)
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("linear", 1000))
    log_sigmas = np.log(1 / alpha_bar - 1) / 2
    trained = named_levels("uniform", 4, *np.exp(log_sigmas[[0, -1]]), log_sigmas=log_sigmas)
    np.testing.assert_allclose(trained, np.exp(log_sigmas[[999, 666, 333, 0]]), rtol=1e-12)
    between = named_levels("uniform", 3, *np.exp(log_sigmas[[0, -1]]), log_sigmas=log_sigmas)[1]
    assert between == pytest.approx(math.exp((log_sigmas[499] + log_sigmas[500]) / 2))
    vp = named_levels("uniform", 6, 0.002, 80.0)  # VP's beta is linear in t
    assert (vp[0], vp[-1]) == pytest.approx((80, 0.002)) and (np.diff(vp) < 0).all()
    for name in ("karras", "logsnr", "uniform"):
        assert named_levels(name, 1, low, high).tolist() == pytest.approx([high])
    with pytest.raises(ValueError, match="unknown levels 'even'; choose karras, logsnr, uniform"):
        named_levels("even", n, low, high)


@pytest.mark.parametrize("text", ["80,10, 1", "8e1 10 1,0", "80,10,1,0.0"])
def test_lists_and_files_of_levels(tmp_path, text):
    assert read_levels(text) == [80, 10, 1]
    path = tmp_path / "levels.txt"
    path.write_text(f"# a comment, 5\n{text.replace(',', chr(10))} # and one\n")
    assert read_levels(str(path)) == [80, 10, 1]


@pytest.mark.parametrize("text", ["1,2", "3,3,1", "-1", "5,inf", "5,,e"])
def test_levels_that_cannot_be(tmp_path, text):
    (tmp_path / "levels.txt").write_text(text)
    for levels in (text, str(tmp_path / "levels.txt")):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"--levels .* (is not understood|no such file)"
        ):
            adm("--sampler", "heun", "--levels", levels)


def test_levels_that_a_network_rounds_to_one_are_merged_and_said():
    net = iDDPMPrecond(
        img_resolution=8,
        img_channels=3,
        model_channels=32,
        channel_mult=(1,),
        num_blocks=1,
        attn_resolutions=(),
    )
    levels, notes = edm("--sampler", "heun", "--levels", "80,3,2.9999999,0.5").solver_levels(
        4, (0.002, 80.0), net.round_sigma
    )
    assert len(levels) == 4 and levels[-1] == 0 and all(a > b for a, b in itertools.pairwise(levels))
    [note] = notes
    assert note.startswith("noise levels: ") and note.endswith(
        "(1 merged, which the network takes for the same)"
    )
    same, quiet = edm("--sampler", "heun").solver_levels(5, (0.002, 80.0), lambda level: level)
    assert (len(same), quiet) == (6, [])


REFUSED_ADM = {
    "--sampler heun --timestep_respacing 9 --levels 9,1": "--timestep_respacing 9, but --levels 9,1 says all",
    "--levels karras": "--levels given with --sampler ddpm: add --sampler euler",
    "--sigma_max 5": "--sigma_max given with --sampler ddpm, which has the process's levels",
    "--sampler euler --sigma_max 5": "--sigma_max given with --levels trained, which says all levels",
    "--sampler heun --solver_order 2": "--solver_order given with --sampler heun: it is for ipndm or unipc",
    "--sampler unipc --solver_order 4": "--solver_order 4: unipc has the orders 2, 3",
    "--sampler ipndm --unipc_variant bh1": "--unipc_variant given with --sampler ipndm",
    "--sampler euler --split_guidance True": "--split_guidance given with --sampler euler",
    "--sampler heun --steps 3 --levels 9,1": "--steps 3, but --levels 9,1 are 2 steps",
    "--sampler dpmpp_2m_sde --restart 3,1,1,2": "--restart given with --sampler dpmpp_2m_sde",
    "--sampler heun --restart 3,1,1": "--restart '3,1,1' is not understood",
    "--sampler heun --restart 3,1,2,1": "a restart interval needs",
    "--guidance_strength ddim --gamma_factor 1": "--gamma_factor given without --guidance_strength sampler",
    "--sigma_data 1": "--sigma_data given without --guidance_strength posterior --posterior scalar",
    "--guidance_strength posterior --spectrum x": (
        "--spectrum given without --guidance_strength posterior --posterior frequency"
    ),
    "--guidance_strength posterior --posterior learned --learn_sigma False": "--posterior learned needs",
}
REFUSED_EDM = {
    "--sampler heun --levels trained": "--levels trained: EDM's networks have no levels",
    "--sampler heun --S_churn 3": "--S_churn given with --sampler heun: it belongs to EDM's own",
    "--sampler heun --solver euler": "--solver given with --sampler heun",
    "--sampler heun --guidance_form released": "--guidance_form released looks at the noisy sample",
    "--sampler heun --use_classifier False --split_guidance True": "--split_guidance given",
    "--sampler heun --levels logsnr --rho 5": "--rho given with --levels logsnr",
    "--sampler heun --levels 9,1 --sigma_max 5": "--sigma_max given with --levels 9,1",
    "--sampler heun --guidance_strength posterior --posterior learned": "do not predict a variance",
    "--guidance_form released --guidance_strength ddim": (
        "--guidance_strength given with --guidance_form released"
    ),
}


@pytest.mark.parametrize(
    ("flags_of", "text", "message"),
    [*((adm, *row) for row in REFUSED_ADM.items()), *((edm, *row) for row in REFUSED_EDM.items())],
)
def test_flags_that_mean_nothing_are_refused(flags_of, text, message):
    with pytest.raises(ValueError) as caught:
        flags_of(*text.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("script", "base"), [("classifier_sample", ADM), ("edm_sample", [*EDM, "--format", "npz"])]
)
def test_the_same_flags_run_on_both_networks(tmp_path, script, base):
    file = tmp_path / "levels.txt"
    file.write_text("60 5 0.5")
    flags = ["--sampler", "unipc", "--solver_order", 3, "--unipc_variant", "bh1", "--split_guidance", True,
             "--guidance_strength", "posterior", "--posterior", "frequency",
             "--spectrum", str(PRETRAINED_DIR / "digits/spectrum.npz"), "--restart", "3,2,0.4,1"]  # fmt: skip
    sampled = call(SCRIPTS[script].main, [*base, *flags, "--levels", file, "--out", tmp_path / "out"])
    assert sampled.code == 0, sampled.err
    assert "noise levels: 60, 5, 0.5, 0" in sampled.out + sampled.err
    hashes = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["sha256"]
    assert {"levels", "spectrum"} <= hashes.keys()
    file.write_text("60 5 0.4")
    again = call(SCRIPTS[script].main, [*base, *flags, "--levels", file, "--out", tmp_path / "out"])
    assert again.code == 1 and "levels" in again.err
    outside = call(
        SCRIPTS[script].main, [*base, "--sampler", "heun", "--levels", "1e4,1", "--out", tmp_path / "new"]
    )
    assert outside.code == 1 and "10000 is outside those of this network" in outside.err


def test_levels_between_ends_of_ones_own():
    known = (0.01, 157.0)
    config = adm("--sampler", "heun", "--sigma_max", "20")
    assert config.range_within(*known) == (0.01, 20)
    levels, _ = config.solver_levels(4, config.range_within(*known), lambda level: level)
    assert levels[0] == pytest.approx(20) and levels[-2] == pytest.approx(0.01)
    assert adm("--sampler", "heun").range_within(*known) == known
    assert adm("--sampler", "heun", "--sigma_min", "0.009999").range_within(*known) == known
    preset = parse(ADMFlags, None, PRESETS, ["--preset", "digits-fewstep", "--levels", "40,1"])
    assert preset.range_within(*known) == known  # its sigma_max is for levels by name
    refused = {
        "--sigma_max 158": "--sigma_max 158 is outside the levels of this network, 0.01 to 157",
        "--sigma_min 0": "--sigma_min 0 is outside",
        "--sigma_min 3 --sigma_max 2": "--sigma_min 3 must be below --sigma_max 2",
    }
    for text, message in refused.items():
        with pytest.raises(ValueError, match=message):
            adm("--sampler", "heun", *text.split()).range_within(*known)


@pytest.mark.parametrize(
    "preset", ["digits-fewstep", "imagenet128-resnet101-fewstep", "imagenet64-edm-resnet101-fewstep"]
)
def test_presets_of_few_steps_ask_the_network_25_times_at_most(preset):
    system = system_of(preset)
    config = parse(system.config, None, system.presets, ["--preset", preset])
    steps = int(config.timestep_respacing) if hasattr(config, "timestep_respacing") else config.steps
    assert config.sampler not in ("heun", "ddpm", "edm") and steps <= 25
    assert (config.guidance_strength, config.without_effect()) == ("posterior", [])


# The scripts


def test_the_best_levels_are_those_of_all_choices():
    generator = np.random.RandomState(0)
    sigmas, costs = list(range(8, 0, -1)), generator.rand(8, 8)
    for count in (2, 3, 5, 8):
        levels, total = OPTIMIZE.best_levels(sigmas, costs, count)
        paths = [(0, *middle, 7) for middle in itertools.combinations(range(1, 7), count - 2)]
        sums = {path: sum(costs[i, j] for i, j in itertools.pairwise(path)) for path in paths}
        best = min(sums, key=sums.get)
        assert (levels, total) == ([sigmas[i] for i in best], pytest.approx(sums[best]))


@pytest.mark.parametrize(
    ("base", "highest", "script"),
    [(["--preset", "digits-fewstep"], 5, "classifier_sample"), (EDM[:2] + EDM[4:], 80, "edm_sample")],
)
def test_a_file_of_levels_for_ones_own_model(tmp_path, base, highest, script):
    file = tmp_path / "levels.txt"
    flags = [*base, "--steps", 4, "--teacher_steps", 9, "--num_samples", 3, "--batch_size", 2, "--out", file]
    done = call(OPTIMIZE.main, flags)
    assert done.code == 0, done.err
    levels = read_levels(str(file))
    assert len(levels) == 4 and levels[0] == pytest.approx(highest, rel=0.01) and levels[-1] < 0.02
    again = call(OPTIMIZE.main, flags)
    assert again.code == 1 and "pass --overwrite" in again.err
    assert "is this script's own" in call(OPTIMIZE.main, [*flags, "--overwrite", "--sampler", "heun"]).err


def test_a_straight_way_costs_nothing():
    teacher, x = OPTIMIZE.Teacher(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    end = teacher.walk(lambda x, sigma: torch.full_like(x, 0.5), x, [9.0, 4.0, 1.0, 0.0])
    torch.testing.assert_close(end, torch.full_like(end, 0.5))
    assert teacher.costs.shape == (3, 3) and teacher.costs.max() < 1e-12


def test_the_spectrum_of_images(tmp_path):
    out = tmp_path / "spectrum.npz"
    done = call(SPECTRUM.main, [PRETRAINED_DIR / "digits/reference.npz", out])
    assert done.code == 0 and "1437 images (3, 16, 16), standard deviation 0.42" in done.out
    spectrum = read_spectrum(out)
    torch.testing.assert_close(spectrum, read_spectrum(PRETRAINED_DIR / "digits/spectrum.npz"))
    with np.load(PRETRAINED_DIR / "digits/reference.npz") as file:
        images = file["arr_0"] / 127.5 - 1
    assert spectrum.sum() == pytest.approx(images.var(axis=0, ddof=1).sum(), rel=1e-5)
    mean = images.reshape(len(images), -1).sum(axis=1) / math.sqrt(3 * 16 * 16)
    assert spectrum[0, 0, 0] == pytest.approx(mean.var(ddof=1), rel=1e-5)
    assert "along differences of classes: 4.70, 4.52, 4.12; within a class: 1.93, 2.49, 2.36" in done.out
    assert call(SPECTRUM.main, [PRETRAINED_DIR / "digits/reference.npz", out]).code == 1  # it exists


def test_the_deviation_along_differences_of_classes(tmp_path):
    """Two classes apart in red alone, with little noise there, and much in blue."""
    random = np.random.RandomState(0)
    labels, images = np.repeat([3, 8], 50), np.full((100, 2, 2, 3), 128.0)
    images[..., 0] += np.where(labels == 3, -60, 60)[:, None, None] + random.randn(100, 1, 1)
    images[..., 2] += np.tile([-40, 40], 50)[:, None, None]  # alike in both
    np.savez(tmp_path / "it.npz", arr_0=images.clip(0, 255).astype(np.uint8), arr_1=labels)
    done = call(SPECTRUM.main, [tmp_path / "it.npz", tmp_path / "out.npz"])
    # Four pixels, so twice the deviation of one: 2 * 60 / 127.5, and 2 / 127.5 within.
    whole, within = map(float, re.search(r"classes: (\S+); within a class: (\S+)", done.out).groups())
    assert whole == pytest.approx(0.95, abs=0.02) and within == pytest.approx(0.02, abs=0.01)
    np.savez(tmp_path / "one.npz", arr_0=images.astype(np.uint8), arr_1=np.zeros(100, int))
    assert "classes" not in call(SPECTRUM.main, [tmp_path / "one.npz", tmp_path / "out2.npz"]).out

"""Every kind of classifier under guidance: a few steps of the digits' samplers, in this process."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
from helpers import call, load_samples, load_script
from tiny_pipelines import tiny

PAIR = "digits_guide+hf:VIT"
# Classifier, its weights, softplus_beta, prompts (FILE is one for each digit), a word of the log.
KINDS = {
    "timm": ("timm:test_resnet", "random", 3.0, "", "sees 160x160 bilinear"),
    "hf": ("hf:VIT", "", "inf", "", "activations as they are"),
    "hf, smoothed": ("hf:RESNET", "", 3.0, "", "ReLU -> S(x)"),
    "clip, a prompt each": ("clip:CLIP", "", "inf", "FILE", "sees 16x16 bicubic"),
    "clip, one prompt": ("clip:CLIP", "", "inf", "a digit 3", "sees 16x16 bicubic"),
    "two": (PAIR, "", 3.0, "", "smooth already: gelu"),
}
RUNS = {
    "adm": ("classifier_sample", ["--preset", "digits", "--num_samples", 2, "--steps", 2]),
    "edm": ("edm_sample", ["--preset", "digits-edm", "--seeds", "0-1", "--steps", 2]),
}
if find_spec("diffusers"):
    RUNS["dit"] = ("dit_sample", ["--preset", "digits-dit", "--num_samples", 2, "--steps", 2])
    flags = [
        "--pipeline",
        "PIPELINE",
        "--num_classes",
        10,
        "--num_samples",
        2,
        "--steps",
        2,
        "--device",
        "cpu",
    ]
    RUNS["pipeline"] = ("pipeline_sample", flags)
SCRIPTS = {script: load_script(script) for script, _ in RUNS.values()}


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """A run of two images: (images, run.json, log.txt)."""

    pipeline = tmp_path_factory.mktemp("pipeline")
    if "pipeline" in RUNS:
        tiny("ddpm", pipeline)

    def draw(system, *flags):
        script, base = RUNS[system]
        base = [pipeline if word == "PIPELINE" else word for word in base]
        out = tmp_path_factory.mktemp("run")
        done = call(SCRIPTS[script].main, [*base, "--out", out, *flags])
        assert done.code == 0, done.err
        return load_samples(out)[0], json.loads((out / "run.json").read_text()), (out / "log.txt").read_text()

    return draw


@pytest.fixture(scope="module")
def unguided(draw):
    off = {"adm": ("--classifier_scale", 0), "edm": ("--use_classifier", False), "pipeline": ()}
    return {system: draw(system, *off.get(system, off["adm"]))[0] for system in RUNS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", RUNS)
def test_it_guides_the_digits(draw, unguided, request, prompts, system, kind):
    name, weights, beta, words, logged = KINDS[kind]
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="networks by timm's names need timm")
    for part in ("VIT", "RESNET", "CLIP"):
        if part in name:
            name = name.replace(part, str(request.getfixturevalue(f"{part.lower()}_folder")))
    flags = ["--classifier_type", name, "--softplus_beta", beta]
    flags += [] if system == "edm" else ["--fixed_length", 0.3]  # a random network has a small gradient
    flags += ["--classifier_path", weights] if weights else []
    flags += ["--prompts", str(prompts) if words == "FILE" else words] if words else []
    images, run, log = draw(system, *flags)
    assert not np.array_equal(images, unguided[system]) and logged in log
    hashes, versions = run["settings"]["sha256"], run["settings"]["versions"]
    assert ("prompts" in hashes) == (words == "FILE")
    assert ("transformers" in versions) == ("hf:" in name or "clip:" in name)
    assert ("timm" in versions) == ("timm:" in name)
    assert ("classifier_preprocessor_config.json" in hashes) == (name[:3] == "hf:" or name[:5] == "clip:")


def test_a_single_prompt_is_wanted_whatever_the_label(draw, clip_folder):
    """The network is asked without labels, so that only guidance could tell them apart."""
    flags = ["--classifier_type", f"clip:{clip_folder}", "--softplus_beta", "inf", "--fixed_length", 0.3]
    flags += ["--unconditional", "True"]
    by_text = [draw("adm", *flags, "--prompts", "a digit 3", "--labels", label)[0] for label in (5, 9)]
    other = draw("adm", *flags, "--prompts", "a digit 4", "--labels", 5)[0]
    assert np.array_equal(*by_text) and not np.array_equal(by_text[0], other)

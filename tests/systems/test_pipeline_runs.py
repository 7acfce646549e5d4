"""scripts/pipeline_sample.py on tiny pipelines: every kind sampled and guided, again, resumed, in other
batches; what it refuses.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import call, load_samples, load_script, samples_bytes
from samplers import levels_apart, manifest, metrics
from tiny_pipelines import tiny

from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.runs.noise import SampleNoise

diffusers = pytest.importorskip("diffusers")
MAIN = load_script("pipeline_sample").main
GUIDED = ("--classifier_type", "digits_guide", "--softplus_beta", 3, "--classifier_scale", 5)
KINDS = {
    "ddpm": (*GUIDED, "--num_classes", 10, "--sampler", "dpmpp_2m"),
    "dit": (*GUIDED, "--sampler", "ddpm", "--cfg_scale", 2),
    "sd": (*GUIDED, "--num_classes", 10, "--prompt", "a cat", "--cfg_scale", 3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in KINDS:
        tiny(kind, folder / kind, **({"num_embeds_ada_norm": 10} if kind == "dit" else {}))
    return folder


def flags(folders, kind, *more):
    sizes = ("--steps", 3, "--num_samples", 3, "--batch_size", 2, "--device", "cpu")
    return ["--pipeline", folders / kind, *sizes, *more]


def run(folders, kind, out, *more):
    result = call(MAIN, flags(folders, kind, *KINDS[kind], "--out", out, *more))
    assert result.code == 0, result.err
    return result


@each_kind
def test_a_run_that_was_stopped_ends_with_the_same_bytes(folders, tmp_path, kind, monkeypatch):
    run(folders, kind, tmp_path / "whole", "--log_guidance", 1)
    replace = os.replace

    def stopped(source, target):
        if str(target).endswith("000002-000003.npz"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        half = flags(folders, kind, *KINDS[kind], "--log_guidance", 1, "--out", tmp_path / "half")
        assert call(MAIN, half).code == 130
    resumed = run(folders, kind, tmp_path / "half", "--log_guidance", 1)
    assert "resumes, 2 of 3 samples are there" in resumed.err
    assert samples_bytes(tmp_path / "half") == samples_bytes(tmp_path / "whole")
    images, labels = load_samples(tmp_path / "whole")
    assert images.shape == (3, 16, 16, 3) and images.std() > 0 and labels.shape == (3,)
    totals = manifest(tmp_path / "whole")["totals"]
    halves = 1 if kind == "ddpm" else 2
    assert (totals["network_evaluations"], totals["classifier_passes"]) == (3 * 3 * halves, 3 * 3)
    assert [line["samples"] for line in metrics(tmp_path / "whole")] == [[0, 2]] * 3 + [[2, 3]] * 3


@each_kind
def test_an_image_does_not_depend_on_its_batch(folders, tmp_path, kind):
    run(folders, kind, tmp_path / "two")
    run(folders, kind, tmp_path / "three", "--batch_size", 3)
    assert levels_apart(tmp_path / "two", tmp_path / "three").max() <= 1
    assert (load_samples(tmp_path / "two")[1] == load_samples(tmp_path / "three")[1]).all()


def test_guidance_moves_the_images_and_scale_0_has_the_bytes_of_none(folders, tmp_path):
    plain = ("--prompt", "a cat", "--labels", 3, "--num_classes", 10)
    for name, more in (("plain", ()), ("zero", (*GUIDED, "--classifier_scale", 0)), ("guided", GUIDED)):
        result = call(MAIN, flags(folders, "sd", *plain, *more, "--out", tmp_path / name))
        assert result.code == 0, result.err
    assert samples_bytes(tmp_path / "zero") == samples_bytes(tmp_path / "plain")
    assert samples_bytes(tmp_path / "guided") != samples_bytes(tmp_path / "plain")


def test_a_run_of_ddim_is_the_pipelines_own_scheduler_on_the_samples_noise(folders, tmp_path):
    unet = diffusers.UNet2DModel.from_pretrained(folders / "ddpm" / "unet", low_cpu_mem_usage=False)
    result = call(MAIN, flags(folders, "ddpm", "--clip_denoised", 0, "--steps", 4, "--out", tmp_path))
    assert result.code == 0, result.err
    scheduler = diffusers.DDIMScheduler(clip_sample=False)  # leading, as the pipeline's DDPMScheduler is
    scheduler.set_timesteps(4)
    noise = SampleNoise(0, range(3))
    x = noise.randn((3, 3, 16, 16))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    assert abs(load_samples(tmp_path)[0].astype(int) - to_uint8(x, "edm").numpy().astype(int)).max() <= 1


def test_the_run_of_a_record_is_the_run(folders, tmp_path):
    run(folders, "sd", tmp_path / "first")
    record = tmp_path / "first" / "run.json"
    assert call(MAIN, ["--config", record, "--out", tmp_path / "again"]).code == 0
    assert samples_bytes(tmp_path / "again") == samples_bytes(tmp_path / "first")
    changed = call(MAIN, ["--config", record, "--prompt", "a dog", "--out", tmp_path / "other"])
    assert changed.code == 0
    settings = [manifest(tmp_path / name)["settings"] for name in ("first", "other")]
    assert {key for key in settings[0] if settings[0][key] != settings[1][key]} == {"prompt"}


def test_other_rules_of_classifier_free_guidance_and_a_worse_pipeline_are_mixed(folders, tmp_path):
    for name, more in {
        "++": ("--prompt", "a cat", "--cfg_rule", "cfg++", "--cfg_scale", 0.5),
        "worse": ("--prompt", "a cat", "--guide_model", folders / "sd"),
    }.items():
        result = call(MAIN, flags(folders, "sd", *more, "--sampler", "euler", "--out", tmp_path / name))
        assert result.code == 0, result.err
        assert manifest(tmp_path / name)["totals"]["network_evaluations"] == 2 * 3 * 3


# What cannot be


def broken(folders, tmp_path, kind, edit):
    """A copy of a pipeline that was changed."""
    shutil.copytree(folders / kind, tmp_path / "broken")
    edit(tmp_path / "broken")
    return tmp_path / "broken"


def set_in(file, **values):
    return lambda folder: (folder / file).write_text(
        json.dumps({**json.loads((folder / file).read_text()), **values})
    )


def truncated(file):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-10])


def pickled(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")


def other_weights(folder):
    shutil.copy(
        folder / "vae/diffusion_pytorch_model.safetensors",
        folder / "unet/diffusion_pytorch_model.safetensors",
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (
            set_in("model_index.json", _class_name="FluxPipeline"),
            "class FluxPipeline; known are DDPMPipeline",
        ),
        (set_in("model_index.json", unet=["pipeline", "UNet"]), "no code of a pipeline's own is run"),
        (set_in("model_index.json", unet=[None, None]), "names no unet"),
        (set_in("model_index.json", unet=["diffusers", "UNet1DModel"]), "holds a UNet1DModel"),
        (set_in("model_index.json", scheduler=["diffusers", "KarrasVeScheduler"]), "KarrasVe"),
        (set_in("scheduler/scheduler_config.json", prediction_type="odd"), "unknown prediction_type 'odd'"),
        (set_in("scheduler/scheduler_config.json", beta_schedule="odd"), "scheduler is not a DDIMScheduler"),
        (set_in("model_index.json", text_encoder=["transformers", "T5EncoderModel"]), "holds a T5EncoderM"),
        (set_in("model_index.json", text_encoder=[None, None]), "there is no text encoder"),
        (set_in("vae/config.json", latents_mean=[0.1] * 4), "with latents_mean and latents_std is not known"),
        (truncated("text_encoder/model.safetensors"), "text_encoder is not a CLIPTextModel"),
        (set_in("unet/config.json", out_channels=3), "unet is not a UNet2DConditionModel"),
        (
            set_in("unet/config.json", class_embed_type="identity"),
            "asks for more than is known",
        ),
        (pickled, "pickles are not read"),
        (other_weights, "do not fit its config.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "the pipeline is not complete"),
    ],
)
def test_folders_that_are_no_pipeline_are_one_line(folders, tmp_path, edit, message):
    folder = broken(folders, tmp_path, "sd", edit)
    result = call(MAIN, ["--pipeline", folder, "--prompt", "a cat", "--steps", 2, "--out", tmp_path / "out"])
    assert result.code == 1 and message in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1 and not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("dit", ["--prompt", "a cat"], "told classes: drop it"),
        ("ddpm", ["--prompt", "a cat"], "told nothing: drop it"),
        ("sd", [], "is told a text: give a prompt"),
        ("sd", ["--negative_prompt", "a dog"], "--negative_prompt given without a prompt"),
        ("sd", ["--prompt", "far too many letters"], "the text encoder reads 12"),
        ("ddpm", ["--cfg_scale", 2], "knows no null class: drop it"),
        ("ddpm", ["--labels", 3], "is told nothing, and nothing guides it"),
        ("ddpm", [*GUIDED, "--num_classes", 10, "--latent_decoder", "linear"], "makes pixels, not latents"),
        ("dit", ["--num_classes", 12], "was trained with 10"),
        ("dit", ["--class_labels", 10], "class 10 is out of range"),
        ("dit", ["--image_size", 32], "is for 16"),
        ("sd", ["--prompt", "a cat", "--image_size", 15], "takes multiples of 2"),
        ("ddpm", ["--image_size", 15], "takes multiples of 2"),
        ("sd", ["--prompt", "a cat", "--sizes", "8,8,0,0,8"], "--sizes takes 6 numbers"),
        ("sd", ["--prompt", "a cat", "--cfg_scale", 2, "--cfg_channels", 5], "the samples have 4"),
        ("ddpm", ["--steps", 2000], "--steps 2000: steps must be from 1 to 1000"),
        ("ddpm", ["--posterior", "learned", *GUIDED, "--num_classes", 10], "--posterior learned needs"),
        ("dit", ["--guide_model", "nowhere", "--sampler", "euler"], "nowhere has no model_index.json"),
        ("ddpm", ["--seed", -1], "--seed must be from 0"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(folders, tmp_path, kind, more, message):
    result = call(MAIN, flags(folders, kind, *more, "--out", tmp_path / "out"))
    assert result.code == 1 and message in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1 and not list(tmp_path.rglob("run.json"))


def test_a_class_conditional_unet_may_have_a_null_class(folders, tmp_path):
    tiny("ddpm", tmp_path / "labelled", num_class_embeds=11)
    more = ("--labels", "1,4,7", "--cfg_scale", 2)
    plain = call(MAIN, flags(tmp_path, "labelled", *more, "--num_classes", 11, "--out", tmp_path / "no"))
    assert "say by --num_classes that its last embedding is that of no class" in plain.err
    done = call(MAIN, flags(tmp_path, "labelled", *more, "--num_classes", 10, "--out", tmp_path / "out"))
    assert done.code == 0, done.err
    assert np.isin(load_samples(tmp_path / "out")[1], [1, 4, 7]).all()

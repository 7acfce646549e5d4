"""scripts/dit_sample.py on tiny networks: its loops and solvers, guided and not, by hand and again; what it
refuses.

The networks are random, and their autoencoder halves: 16x16 images, which the digits' guide takes.
"""

import json

import numpy as np
import pytest
import torch
from goldens_util import set_golden_weights
from helpers import call, contents, load_samples, load_script, samples_bytes
from PIL import Image
from samplers import manifest, metrics

from classifiers.decoders import load_decoder
from guided_diffusion.dit import DiT
from guided_diffusion.files.pixels import to_uint8
from guided_diffusion.flags.dit import DiTFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.presets import DIT_PRESETS
from guided_diffusion.mixed_denoisers import in_one_batch
from guided_diffusion.runs.noise import SampleNoise
from guided_diffusion.runs.store import SampleStore
from guided_diffusion.script_util import create_gaussian_diffusion

SCRIPT = load_script("dit_sample")
CONFIG = {"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
GUIDED = ("--classifier_type", "digits_guide", "--softplus_beta", 3, "--margin_temperature_discount", 0.5)
LINE = (
    "--model DiT-XL/2 --vae mse --sample-dir samples --per-proc-batch-size 8 --num-fid-samples 100 "
    "--image-size 256 "
    "--num-classes 1000 --cfg-scale 4.0 --num-sampling-steps 100 --global-seed 3 --no-tf32 --ckpt it.pt"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of the networks."""
    diffusers, folder = pytest.importorskip("diffusers"), tmp_path_factory.mktemp("networks")
    # Small answers, so that latents stay latents.
    net = set_golden_weights(DiT(**CONFIG), factors={"final_layer.linear.weight": 0.1})
    torch.save(net.state_dict(), folder / "dit.pt")
    blocks = {
        f"{way}_block_types": (f"{name}Block2D",) * 2
        for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(folder / "vae")
    return folder


def flags(folder, *more):
    return ["--ckpt", folder / "dit.pt", "--vae", folder / "vae", "--image_size", 16, "--num_classes", 10,
            "--num_samples", 3, "--batch_size", 2, "--steps", 3, "--format", "npz", *more]  # fmt: skip


@pytest.fixture(autouse=True)
def published_heads(monkeypatch):
    """A width of 32 is no published one: here it has two heads."""
    monkeypatch.setattr("guided_diffusion.dit.SIZES", {"tiny": (1, 32, 2)})


def run(folder, out, *more):
    result = call(SCRIPT.main, flags(folder, *more, "--out", out))
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_every_kind_of_sampler_is_guided_and_repeats(folder, tmp_path, sampler):
    guided = (*GUIDED, "--sampler", sampler, "--log_guidance", 1)
    run(folder, tmp_path / "a", *guided)
    run(folder, tmp_path / "b", *guided)
    run(folder, tmp_path / "plain", "--sampler", sampler)
    assert samples_bytes(tmp_path / "a") == samples_bytes(tmp_path / "b") != samples_bytes(tmp_path / "plain")
    assert [line["samples"] for line in metrics(tmp_path / "a")] == [[0, 2]] * 3 + [[2, 3]] * 3
    totals = manifest(tmp_path / "a")["totals"]
    # Both halves of the batch are evaluations; guidance sees each image once.
    assert (totals["network_evaluations"], totals["classifier_passes"]) == (2 * 3 * 3, 3 * 3)
    images, labels = load_samples(tmp_path / "a")
    assert images.shape == (3, 16, 16, 3) and labels.shape == (3,)


def test_a_run_that_was_stopped_ends_with_the_same_images(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "whole")
    write, batches = SampleStore.write, []

    def write_one(store, *arguments):
        if batches:
            raise KeyboardInterrupt
        batches.append(write(store, *arguments))

    monkeypatch.setattr(SampleStore, "write", write_one)
    assert call(SCRIPT.main, flags(folder, "--out", tmp_path / "again")).code == 130
    monkeypatch.undo()
    monkeypatch.setattr("guided_diffusion.dit.SIZES", {"tiny": (1, 32, 2)})
    assert "resumes, 2 of 3 samples are there" in run(folder, tmp_path / "again").err
    assert samples_bytes(tmp_path / "again") == samples_bytes(tmp_path / "whole")


@pytest.mark.parametrize("decoder", ["vae", "linear"])
def test_scale_0_has_the_bytes_of_a_run_without_classifier_and_decoders_differ(folder, tmp_path, decoder):
    chosen = (*GUIDED, "--latent_decoder", decoder)
    run(folder, tmp_path / "plain")
    run(folder, tmp_path / "zero", *chosen, "--classifier_scale", 0)
    run(folder, tmp_path / "guided", *chosen, "--classifier_scale", 30)
    assert samples_bytes(tmp_path / "zero") == samples_bytes(tmp_path / "plain")
    assert samples_bytes(tmp_path / "guided") != samples_bytes(tmp_path / "plain")


def test_a_run_is_the_loop_by_hand(folder, tmp_path):
    run(folder, tmp_path, "--labels", 4, "--num_samples", 2, "--seed", 5)
    net = DiT(**CONFIG)
    net.load_state_dict(torch.load(folder / "dit.pt", weights_only=True))
    process, noise = (
        create_gaussian_diffusion(learn_sigma=True, timestep_respacing="3"),
        SampleNoise(5, range(2)),
    )
    y = torch.full((2,), 4)
    with torch.no_grad():
        guided = in_one_batch(net.eval(), 10, 1.5, 3)
        options = {"clip_denoised": False, "model_kwargs": {"y": y}, "randn_like": noise}
        latents = process.p_sample_loop(guided, (2, 4, 8, 8), **options)
        images = torch.cat([load_decoder("vae", folder / "vae")(z) for z in latents.split(1)])
    assert (load_samples(tmp_path)[0] == to_uint8(images, "edm").numpy()).all()
    assert (load_samples(tmp_path)[1] == 4).all()


def test_pngs_have_their_labels_and_the_npz_beside_them(folder, tmp_path):
    result = run(folder, tmp_path / "png", "--format", "png")
    assert result.out.strip().endswith("dataset.json")
    names = sorted(path.name for path in contents(tmp_path) if path.suffix == ".png")
    assert names == ["000000.png", "000001.png", "000002.png"]
    run(folder, tmp_path / "npz")
    assert samples_bytes(tmp_path / "png") == samples_bytes(tmp_path / "npz")
    images, labels = load_samples(tmp_path / "png")
    told = json.loads((tmp_path / "png" / "dataset.json").read_text())["labels"]
    assert told == [[name, int(label)] for name, label in zip(names, labels, strict=True)]
    for name, image in zip(names, images, strict=True):
        assert (np.asarray(Image.open(tmp_path / "png" / name)) == image).all()


def test_flags_change_the_images(folder, tmp_path):
    alike = {}
    changes = [
        (),
        ("--cfg_scale", 3),
        ("--cfg_channels", 4),
        ("--cfg_scale", 1),
        ("--cfg_scale", 1, "--unconditional", 1),
    ]
    changes += [("--sampler", "euler", "--cfg_rule", "cfg++", "--cfg_scale", 0.5), ("--sampler", "euler")]
    changes += [("--sampler", "euler", "--guide_model", folder / "dit.pt", "--cfg_scale", 3)]
    for i, change in enumerate(changes):
        run(folder, tmp_path / str(i), *change)
        alike.setdefault(samples_bytes(tmp_path / str(i)), []).append(change)
    assert len(alike) == len(changes), [same for same in alike.values() if len(same) > 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image_size", 32], "--image_size 32: "),
        (["--num_classes", 12], "--num_classes 12: "),
        (["--num_classes", 11], "has 11 labels and none for no class"),
        (["--model", "DiT-S/2"], "--model DiT-S/2: "),
        (["--unconditional", 1], "--cfg_scale 1.5 needs the labels: drop --unconditional"),
        (["--latent_decoder", "tiny"], "--latent_decoder given without an off-the-shelf classifier"),
        ([*GUIDED, "--latent_decoder", "tiny"], "--latent_decoder tiny needs --decoder_path"),
        ([*GUIDED, "--decoder_path", "x"], "--decoder_path given without a decoder of its own"),
        (
            [*GUIDED, "--latent_decoder", "linear", "--decode_dtype", "float16"],
            "--decode_dtype given without an auto",
        ),
        (["--cfg_scale", 1, "--cfg_channels", 4], "--cfg_channels given without classifier-free guidance"),
        (["--cfg_rule", "cfg++"], "--cfg_rule given with --sampler ddpm"),
        (["--cfg_channels", 5], "--cfg_channels 5: the latents have 4"),
        (["--classifier_path", "x"], "--classifier_path x: of which network?"),
        (["--tf32", 1, "--no-tf32"], "--tf32 and --no-tf32 are two names"),
        (["--vae", "mse"], "put both files of https://huggingface.co/stabilityai/sd-vae-ft-mse there"),
        (["--vae", "nowhere"], "give diffusers' folder of an autoencoder"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(folder, tmp_path, more, message):
    result = call(SCRIPT.main, flags(folder, *more, "--out", tmp_path / "out"))
    assert result.code in (1, 2) and message in result.err, result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("run.json"))


def test_the_published_line_parses_and_the_presets_are_the_published_settings():
    config = parse(DiTFlags, None, DIT_PRESETS, LINE.split())
    expected = {
        "model": "DiT-XL/2",
        "vae": "mse",
        "out": "samples",
        "batch_size": 8,
        "num_samples": 100,
        "steps": 100,
    }
    expected |= {
        "image_size": 256,
        "num_classes": 1000,
        "cfg_scale": 4.0,
        "seed": 3,
        "tf32": False,
        "ckpt": "it.pt",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    config = parse(DiTFlags, None, DIT_PRESETS, ["--preset", "imagenet256-dit"])
    assert (config.cfg_scale, config.cfg_channels, config.steps, config.vae) == (1.5, 3, 250, "ema")
    other = parse(DiTFlags, None, DIT_PRESETS, ["--preset", "imagenet256-dit-cfg4"])
    assert (other.cfg_scale, other.cfg_channels) == (1.375, 4)

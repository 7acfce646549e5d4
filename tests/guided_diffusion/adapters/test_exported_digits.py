"""The digits' network as a pipeline of diffusers, guided by networks of timm and transformers that are
trained here: what the ADM run gives.
"""

from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call, load_script

import classifiers
from guided_diffusion.adapters.diffusers import load_pipeline
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.flags.adm import ADMFlags
from guided_diffusion.flags.fields import parse
from guided_diffusion.flags.pipeline import PipelineFlags
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.runs import adm, pipeline
from guided_diffusion.runs.tally import Tally

pytest.importorskip("diffusers")
EXPORT = load_script("export_diffusers").main
UNET = PRETRAINED_DIR / "digits" / "unet.safetensors"
TIMM = "timm:test_efficientnet"
BETA = ("--softplus_beta",)
FLAGS = (
    "--num_samples 2 --batch_size 2 --labels 3,8 --sampler dpmpp_2m --steps 3 --levels karras --sigma_max 5 "
    "--device cpu --cfg_scale 1.5 --guidance_strength posterior --classifier_scale 4 "
    "--margin_temperature_discount 0.5"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "digits"
    assert call(EXPORT, ["--preset", "digits", "--out", out]).code == 0
    return out


def digits(name):
    """Images, (N, 3, 16, 16) in [-1, 1], and labels, in another order."""
    with np.load(PRETRAINED_DIR / "digits" / f"{name}.npz") as file:
        images, labels = (torch.from_numpy(file[key]) for key in ("arr_0", "arr_1"))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order].permute(0, 3, 1, 2) / 127.5 - 1, labels[order]


def trained(name, steps, batch):
    """The network of a random classifier, after it learnt digits as they will be shown to it."""
    torch.manual_seed(0)
    classifier = classifiers.load_classifier(name, "random", num_classes=10)
    network = classifier.network.requires_grad_(True).train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.4  # of few steps
    optimiser = torch.optim.AdamW(network.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    images, labels = digits("reference")
    for x, y in islice(zip(images.split(batch), labels.split(batch), strict=True), steps):
        optimiser.zero_grad()
        F.cross_entropy(classifier(x), y).backward()
        optimiser.step()
        rate.step()
    network.requires_grad_(False).eval()
    images, labels = (tensor[:60] for tensor in digits("held_out"))
    assert (classifier(images).argmax(1) == labels).float().mean() > 0.4
    return network


def timm_classifier(folder):
    pytest.importorskip("timm", reason="networks by timm's names need timm")
    torch.save(trained(TIMM, steps=32, batch=12).state_dict(), folder / "timm.pt")
    return ["--classifier_type", TIMM, "--classifier_path", folder / "timm.pt", *BETA, "inf"]


def hf_classifier(folder):
    transformers = pytest.importorskip("transformers", reason="networks by folder need transformers")
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10
    )
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    trained(f"hf:{folder}", steps=40, batch=32).save_pretrained(folder)
    return ["--classifier_type", f"hf:{folder}", *BETA, "5"]


def drawn(runs, flags, *more):
    """The float images of a run, before they are rounded to pixels, and the labels."""
    config = parse(flags, None, PRESETS, [*map(str, more), *FLAGS.split()])
    job = runs.make_job(config, classifiers)
    return job.build(torch.device("cpu"), Tally(torch.device("cpu"))).sample(range(2), lambda: None)


@pytest.fixture(scope="module")
def unguided():
    return drawn(adm, ADMFlags, "--preset", "digits", "--classifier_scale", 0)[0]


def test_the_export_is_the_network_bit_for_bit(folder):
    kept = load_state_dict(UNET).values()
    read = load_pipeline(folder).network.state_dict().values()
    numbers = [torch.cat([tensor.flatten() for tensor in tensors]).sort().values for tensors in (kept, read)]
    assert torch.equal(*numbers)
    again = call(EXPORT, ["--preset", "digits", "--out", folder])
    assert again.code == 1 and "choose another --out" in again.err


@pytest.mark.parametrize("classifier", [timm_classifier, hf_classifier])
def test_a_network_trained_here_guides_it_as_it_guides_adm(folder, tmp_path, unguided, classifier):
    named = classifier(tmp_path)
    ours, labels = drawn(adm, ADMFlags, "--preset", "digits", *named)
    theirs, same = drawn(pipeline, PipelineFlags, "--pipeline", folder, "--num_classes", 10, *named)
    assert torch.equal(labels, same)
    assert (ours - theirs).abs().max() < 1e-4 < 0.1 < (ours - unguided).abs().max()

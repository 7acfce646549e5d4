"""load_classifier: names, weights, inputs, and what it says where something does not fit."""

import json
import math
import re
import shutil
from functools import cache

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from classifiers import load_classifier
from guided_diffusion.files import pretrained as table

OWN = """
from __future__ import annotations  # with which dataclasses look their module up by its name
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Config:
    width: int = 12

def build(num_classes):
    torch.manual_seed(0)
    pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*pooled, nn.Linear(Config().width, 16), nn.ReLU(), nn.Linear(16, num_classes))

def half(num_classes):
    return build(num_classes).half()

def double(num_classes):
    return build(num_classes).double()

def frozen_batch_norm(num_classes):
    return nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.ReLU(), build(num_classes))

def seven(num_classes):
    return build(7)

def picky(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes), nn.ReLU())

def leaky(num_classes):
    return nn.Sequential(build(num_classes), nn.LeakyReLU())

nothing = lambda num_classes: None
pair = lambda num_classes: nn.AdaptiveMaxPool2d(1, return_indices=True)
number = 3
"""


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


@cache
def resnet18_weights(num_classes=5):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=num_classes)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def images(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# What is returned


@pytest.mark.parametrize("builder", ["build", "half", "double", "frozen_batch_norm"])
def test_classifier_is_frozen_in_eval_mode_in_float32_on_the_cpu(own, builder):
    classifier = load_classifier(f"{own}:{builder}", num_classes=4)
    assert isinstance(classifier, nn.Module)
    assert not any(m.training for m in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    tensors = [*classifier.parameters(), *(b for b in classifier.buffers() if b.is_floating_point())]
    assert {(t.dtype, t.device.type) for t in tensors} == {(torch.float32, "cpu")}
    logits = classifier(images())
    assert (logits.shape, logits.dtype) == ((2, 4), torch.float32)


@pytest.mark.parametrize("beta", [math.inf, 3.0])
@pytest.mark.parametrize("name", ["resnet18", "digits_guide", "digits_judge", "cifar_resnet20"])
def test_random_weights(name, beta):
    classifier = load_classifier(name, "random", num_classes=6, softplus_beta=beta)
    x = images().requires_grad_()
    logits = classifier(x)
    logits.sum().backward()
    assert logits.shape == (2, 6) and x.grad.isfinite().all() and (x.grad != 0).any()
    assert any(isinstance(m, nn.ReLU) for m in classifier.modules()) == math.isinf(beta)


def test_default_number_of_classes_is_imagenets():
    assert load_classifier("resnet18", "random")(images()).shape == (2, 1000)


# Weights


@pytest.mark.parametrize("form", ["state dict", "pth", "safetensors", "wrapped"])
def test_weights_by_state_dict_and_file(tmp_path, form):
    weights, plain = resnet18_weights(), torchvision.models.resnet18(num_classes=5)
    plain.load_state_dict(weights)
    if form == "wrapped":  # as DataParallel and a training script leave them, from before BatchNorm counted
        kept = {f"module.{k}": v for k, v in weights.items() if "num_batches_tracked" not in k}
        weights = {"epoch": 3, "state_dict": kept, "optimizer": {"state": {}, "param_groups": []}}
    if form != "state dict":
        path = tmp_path / "weights.th"
        save_file(weights, path) if form == "safetensors" else torch.save(weights, path)
        weights = path if form == "pth" else str(path)
    got = load_classifier("resnet18", weights, num_classes=5)(images())
    torch.testing.assert_close(got, plain.eval()(images()), rtol=1e-4, atol=1e-5)


def test_one_of_several_state_dicts_is_chosen(tmp_path):
    zeros = {name: torch.zeros_like(t) for name, t in resnet18_weights().items()}
    torch.save({"ema": zeros, "model": resnet18_weights()}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"ema .*model .*--checkpoint_key"):
        load_classifier("resnet18", tmp_path / "w.ckpt", num_classes=5)
    for weights in (tmp_path / "w.ckpt", torch.load(tmp_path / "w.ckpt")):
        classifier = load_classifier("resnet18", weights, num_classes=5, checkpoint_key="ema")
        assert (classifier(images()) == 0).all()


def test_old_names_of_densenets():
    torch.manual_seed(0)
    network = torchvision.models.densenet121(num_classes=5).eval()
    state = {k: v for k, v in network.state_dict().items() if "num_batches_tracked" not in k}
    pattern = re.compile(r"(layer\d+\.(?:norm|conv))([12])")
    old = {pattern.sub(r"\1.\2", name): tensor for name, tensor in state.items()}
    assert old.keys() != state.keys()
    x = images(64)
    with torch.no_grad():
        got = load_classifier("densenet121", {f"module.{k}": v for k, v in old.items()}, num_classes=5)(x)
        torch.testing.assert_close(got, network(x), rtol=1e-4, atol=1e-5)


def test_weights_stored_in_float16_are_computed_in_float32(tmp_path):
    halved = {name: t.half() if t.is_floating_point() else t for name, t in resnet18_weights().items()}
    torch.save(halved, tmp_path / "half.pth")
    classifier = load_classifier("resnet18", tmp_path / "half.pth", num_classes=5)
    assert {p.dtype for p in classifier.parameters()} == {torch.float32}
    rounded = load_classifier("resnet18", {name: t.float() for name, t in halved.items()}, num_classes=5)
    assert torch.equal(classifier(images()), rounded(images()))


def test_given_state_dict_is_not_changed_and_not_shared():
    weights = {name: t.clone() for name, t in resnet18_weights().items()}
    classifier = load_classifier("resnet18", weights, num_classes=5, softplus_beta=3.0)
    next(classifier.parameters()).data.zero_()
    assert all(torch.equal(weights[name], t) for name, t in resnet18_weights().items())


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """An empty pretrained_models/ with the table of files."""
    shutil.copy(table.PRETRAINED_DIR / "files.json", tmp_path)
    monkeypatch.setattr(table, "PRETRAINED_DIR", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "weights", "file"),
    [
        ("resnet50", None, "resnet50-11ad3fa6.pth"),
        ("resnet50", "IMAGENET1K_V1", "resnet50-0676ba61.pth"),
        ("resnet101", None, "resnet101-cd907fc2.pth"),
        ("resnet18", None, "resnet18-f37072fd.pth"),
        ("digits_guide", None, "digits/guide.safetensors"),
        ("cifar_resnet56", None, "resnet56-4bfd9763.th"),
    ],
)
def test_missing_file_is_named_with_its_place(pretrained, name, weights, file):
    with pytest.raises(FileNotFoundError) as caught:
        load_classifier(name, weights)
    assert str(pretrained / file) in str(caught.value)
    assert (f"scripts/download.py {file}" in str(caught.value)) == (file in table.read_table().files)


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
@pytest.mark.parametrize("there", ["resnet18-f37072fd.pth", "renamed.pth"])
def test_weights_by_torchvision_name_under_any_file_name(pretrained, weights, there):
    content = json.loads((pretrained / "files.json").read_text())
    row = content["files"]["resnet50-11ad3fa6.pth"] | {"also_named": ["renamed.pth"]}
    (pretrained / "files.json").write_text(json.dumps({"files": {"resnet18-f37072fd.pth": row}}))
    torch.save(resnet18_weights(), pretrained / there)
    got = load_classifier("resnet18", weights, num_classes=5)(images())
    assert torch.equal(got, load_classifier("resnet18", resnet18_weights(), num_classes=5)(images()))


@pytest.mark.parametrize(("beta", "image_size"), [(math.inf, None), (math.inf, 16), (3.0, 16)])
def test_own_builder(own, beta, image_size):
    name = f"{own}:build"
    classifier = load_classifier(name, num_classes=9, softplus_beta=beta, image_size=image_size)
    assert classifier(images(16)).shape == (2, 9)
    assert any(isinstance(m, nn.Softplus) for m in classifier.modules()) == (beta == 3.0)
    state = load_classifier(name, num_classes=9).network.state_dict()
    zeros = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    assert (load_classifier(name, zeros, num_classes=9)(images()) == 0).all()


# Inputs


def seen_by(name, x, **options):
    """What the network of a classifier is fed."""
    seen = []
    classifier = load_classifier(name, num_classes=3, **options)
    classifier.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    classifier(x)
    return seen[0]


def test_paper_input_reaches_the_network_untouched(own):
    x = images(13)
    assert torch.equal(seen_by(f"{own}:build", x), x)


@pytest.mark.parametrize("size", [32, 224, 256])
@pytest.mark.parametrize(
    ("name", "classifier_input", "trained_on"),
    [("resnet18", "imagenet", 224), ("cifar_resnet20", "imagenet", 32), ("cifar_resnet20", "paper", 32)],
)
def test_image_is_resized_and_normalised(name, classifier_input, trained_on, size):
    x = torch.full((1, 3, size, size), 0.2)
    got = seen_by(name, x, weights="random", classifier_input=classifier_input)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((0.6 - mean) / std).view(1, 3, 1, 1).expand(1, 3, trained_on, trained_on)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_imagenet_gradient_matches_finite_differences():
    # Softplus, and a mean in place of the one maximum, make the network smooth: central differences in
    # float64 are off by h^2 = 1e-8 times a third derivative.
    torch.manual_seed(0)
    classifier = load_classifier(
        "resnet18", "random", num_classes=3, softplus_beta=3.0, classifier_input="imagenet"
    ).double()
    classifier.network.maxpool = nn.AvgPool2d(3, 2, 1)
    x, direction = images(16)[:1].double(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    slope = (torch.autograd.grad(classifier(leaf)[0, 1], leaf)[0] * direction).sum()
    with torch.no_grad():
        numeric = (classifier(x + 1e-4 * direction)[0, 1] - classifier(x - 1e-4 * direction)[0, 1]) / 2e-4
    assert float(slope) == pytest.approx(float(numeric), rel=1e-4) and slope != 0


# What does not fit


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet19", {}, r"'resnet19'.*cifar_resnet56.*resnet18.*vit_b_16"),
        ("resnet18", {"weights": resnet18_weights(), "num_classes": 10}, r"resnet18.*fc\.\w+ is \[5.*\[10"),
        ("resnet34", {"weights": resnet18_weights(), "num_classes": 5}, r"layer1\.2"),
        ("resnet18", {"classifier_input": "raw"}, r"classifier_input 'raw'.*paper.*imagenet"),
        ("resnet18", {"softplus_beta": 0.0}, "softplus_beta must be positive or inf, got 0.0"),
        ("resnet18", {"softplus_beta": math.nan}, "softplus_beta must be positive or inf, got nan"),
        ("OWN:leaky", {"softplus_beta": 3.0, "image_size": 16}, r"LeakyReLU.*softplus_beta inf"),
        ("resnet18", {"prompts": "a dog"}, r"prompts 'a dog' are for clip:FOLDER, not for resnet18"),
        ("vit_b_32", {"image_size": 128}, r"vit_b_32 cannot take 128x128 images.*classifier_input imagenet"),
        ("OWN:builder", {}, r"own\.py has no function 'builder'.*builder\(num_classes\)"),
        ("OWN:number", {}, r"own\.py has no function 'number'"),
        ("OWN:", {}, r"own\.py has no function ''"),
        ("OWN:nothing", {}, r"own\.py:nothing built NoneType"),
        ("OWN:build", {"classifier_input": "imagenet"}, r"classifier_input.*paper"),
        ("OWN:build", {"softplus_beta": 3.0}, r"own\.py:build.*image_size"),
        ("OWN:seven", {"num_classes": 5, "image_size": 16}, r"\[1, 7\].*num_classes 5.*\[1, 5\]"),
        ("OWN:pair", {"num_classes": 5, "image_size": 16}, r"answers a tuple .*num_classes 5.*\[1, 5\]"),
        ("OWN:picky", {"num_classes": 4, "image_size": 16}, r"own\.py:picky cannot take 16x16 images"),
        ("OWN:picky", {"num_classes": 4, "image_size": 9, "softplus_beta": 3.0}, "cannot take 9x9 images"),
    ],
)
def test_one_line_says_what_does_not_fit(own, name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(name.replace("OWN", own), **{"weights": "random", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_32", "swin_t"])
def test_networks_without_relu_need_an_infinite_beta(name):
    with pytest.raises(ValueError, match=rf"{name}.*ReLU.*softplus_beta inf"):
        load_classifier(name, "random", num_classes=2, softplus_beta=3.0)


@pytest.mark.parametrize(("name", "weights"), [("resnet18", "nowhere.pth"), ("nowhere.py:build", None)])
def test_files_that_are_not_there(tmp_path, monkeypatch, name, weights):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.p"):
        load_classifier(name, weights)

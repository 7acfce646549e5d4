"""load_classifier: names, weights, inputs, and what it says where something does not fit."""

import json
import math
import shutil
from functools import cache

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from classifiers import load_classifier
from guided_diffusion.files import checkpoints

OWN = """
import torch
from torch import nn

def build(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, num_classes))

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

def nothing(num_classes):
    return None

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
    assert logits.shape == (2, 4)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("beta", [math.inf, 3.0])
@pytest.mark.parametrize("name", ["resnet18", "digits_guide", "digits_judge"])
def test_random_weights(name, beta):
    classifier = load_classifier(name, "random", num_classes=6, softplus_beta=beta)
    assert classifier(images()).shape == (2, 6)
    assert not any(p.requires_grad for p in classifier.parameters())
    assert any(isinstance(m, nn.ReLU) for m in classifier.modules()) == math.isinf(beta)


def test_default_number_of_classes_is_imagenets():
    assert load_classifier("resnet18", "random")(images()).shape == (2, 1000)


def test_gradient_reaches_the_image():
    x = images().requires_grad_()
    load_classifier("resnet18", resnet18_weights(), num_classes=5)(x).sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).any()


# Weights


@pytest.mark.parametrize("form", ["state dict", "pth", "pt", "safetensors", "path object"])
def test_weights_by_state_dict_and_file(tmp_path, form):
    weights = resnet18_weights()
    if form != "state dict":
        path = tmp_path / f"weights.{form if form != 'path object' else 'pth'}"
        save_file(weights, path) if form == "safetensors" else torch.save(weights, path)
        weights = path if form == "path object" else str(path)
    plain = torchvision.models.resnet18(num_classes=5)
    plain.load_state_dict(resnet18_weights())
    got = load_classifier("resnet18", weights, num_classes=5)(images())
    torch.testing.assert_close(got, plain.eval()(images()), rtol=1e-4, atol=1e-5)


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
    shutil.copy(checkpoints.PRETRAINED_DIR / "files.json", tmp_path)
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "file"), [("resnet50", "resnet50-11ad3fa6.pth"), ("resnet101", "resnet101-cd907fc2.pth")]
)
def test_missing_default_file_says_which_and_how_to_fetch_it(pretrained, name, file):
    with pytest.raises(FileNotFoundError, match=r"scripts/download\.py") as caught:
        load_classifier(name)
    assert str(pretrained / file) in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "digits_guide"])
def test_missing_default_file_of_another_network_is_named(pretrained, name):
    with pytest.raises(
        FileNotFoundError, match=rf"{pretrained}/(resnet(18|34)-.*\.pth|digits/guide\.safetensors)"
    ):
        load_classifier(name, num_classes=1000)


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_weights_by_torchvision_name(pretrained, weights):
    torch.save(resnet18_weights(), pretrained / "resnet18-f37072fd.pth")
    got = load_classifier("resnet18", weights, num_classes=5)(images())
    assert torch.equal(got, load_classifier("resnet18", resnet18_weights(), num_classes=5)(images()))


@pytest.mark.parametrize(
    ("weights", "file"),
    [("IMAGENET1K_V1", "resnet50-0676ba61.pth"), ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth")],
)
def test_named_weights_are_looked_for_under_their_own_file(pretrained, weights, file):
    with pytest.raises(FileNotFoundError, match=file):
        load_classifier("resnet50", weights)


@pytest.mark.parametrize("there", ["resnet50-11ad3fa6.pth", "resnet50_weight_V2.pth"])
def test_pretrained_files_are_found_under_either_name(tmp_path, there):
    (tmp_path / there).touch()
    assert checkpoints.find_pretrained("resnet50-11ad3fa6.pth", folder=tmp_path) == tmp_path / there


@pytest.mark.parametrize("there", ["resnet18-f37072fd.pth", "renamed.pth"])
def test_default_weights_are_found_under_either_name(pretrained, there):
    table = json.loads((pretrained / "files.json").read_text())
    table["files"]["resnet18-f37072fd.pth"] = {
        "url": "https://example.org/r.pth",
        "also_named": ["renamed.pth"],
    }
    (pretrained / "files.json").write_text(json.dumps(table))
    torch.save(resnet18_weights(), pretrained / there)
    assert load_classifier("resnet18", num_classes=5)(images()).shape == (2, 5)


def test_weights_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_classifier("resnet18", tmp_path / "nowhere.pth")


def test_weights_for_another_number_of_classes():
    with pytest.raises(ValueError, match=r"fc\.\w+ is \[5.*\[10") as caught:
        load_classifier("resnet18", resnet18_weights(), num_classes=10)
    assert "resnet18" in str(caught.value)


def test_weights_of_another_network():
    with pytest.raises(ValueError, match=r"layer1\.2"):
        load_classifier("resnet34", resnet18_weights(), num_classes=5)


# Names


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r"'resnet19'.*resnet18.*vit_b_16"):
        load_classifier("resnet19", "random")


@pytest.mark.parametrize(("beta", "image_size"), [(math.inf, None), (math.inf, 16), (3.0, 16)])
def test_own_builder(own, beta, image_size):
    classifier = load_classifier(f"{own}:build", num_classes=9, softplus_beta=beta, image_size=image_size)
    assert classifier(images(16)).shape == (2, 9)
    assert any(isinstance(m, nn.Softplus) for m in classifier.modules()) == (beta == 3.0)


def test_own_builder_is_smoothed_only_if_its_image_size_is_known(own):
    with pytest.raises(ValueError, match=r"own\.py:build.*image_size"):
        load_classifier(f"{own}:build", num_classes=9, softplus_beta=3.0)


def test_own_builder_with_weights(own):
    first = load_classifier(f"{own}:build", num_classes=9)
    weights = {name: torch.zeros_like(t) for name, t in first.network.state_dict().items()}
    assert (load_classifier(f"{own}:build", weights, num_classes=9)(images()) == 0).all()


def test_own_file_may_hold_dataclasses(tmp_path):
    # Dataclasses look their module up by name where annotations are strings.
    path = tmp_path / "with_dataclass.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from torch import nn\n"
        "@dataclasses.dataclass\n"
        "class Config:\n"
        "    width: int = 12\n"
        "def build(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(Config().width, num_classes))\n"
    )
    assert load_classifier(f"{path}:build", num_classes=3)(images()).shape == (2, 3)


@pytest.mark.parametrize("function", ["builder", "number", ""])
def test_own_file_without_that_function(own, function):
    with pytest.raises(ValueError, match=rf"own\.py has no function '{function}'.*builder\(num_classes\)"):
        load_classifier(f"{own}:{function}")


def test_own_builder_that_returns_no_network(own):
    with pytest.raises(ValueError, match=r"own\.py:nothing"):
        load_classifier(f"{own}:nothing")


def test_own_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
        load_classifier(f"{tmp_path}/nowhere.py:build")


def test_own_builder_with_another_number_of_classes(own):
    with pytest.raises(ValueError, match=r"\[1, 7\].*num_classes 5.*\[1, 5\]"):
        load_classifier(f"{own}:seven", num_classes=5, image_size=16)


# Smoothing, as far as the user hears of it


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_b_32", "swin_t"])
def test_networks_without_relu_need_an_infinite_beta(name):
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("classifiers.registry._probe", lambda *_: None)
        with pytest.raises(ValueError, match=rf"{name}.*ReLU.*softplus_beta inf"):
            load_classifier(name, "random", softplus_beta=3.0)


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_networks_with_other_kinks_are_refused_by_name(name):
    with pytest.raises(ValueError, match=r"(ReLU6|Hardswish).*softplus_beta inf"):
        load_classifier(name, "random", softplus_beta=3.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_beta_that_is_not_positive(beta):
    with pytest.raises(ValueError, match="softplus_beta"):
        load_classifier("resnet18", "random", softplus_beta=beta)


# Inputs


def test_paper_input_reaches_the_network_untouched(own):
    seen = []
    classifier = load_classifier(f"{own}:build", num_classes=3)
    classifier.network.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = images(13)
    classifier(x)
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("size", [64, 224, 256])
def test_imagenet_input_is_resized_and_normalised(size):
    # torchvision's weights of this network: 224 pixels, and the usual mean and standard deviation.
    seen = []
    classifier = load_classifier("resnet18", "random", num_classes=3, classifier_input="imagenet")
    classifier.network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    classifier(torch.full((1, 3, size, size), 0.2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((0.6 - mean) / std).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


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
    assert float(slope) == pytest.approx(float(numeric), rel=1e-4)
    assert slope != 0


def test_unknown_input_lists_the_choices():
    with pytest.raises(ValueError, match=r"classifier_input 'raw'.*paper.*imagenet"):
        load_classifier("resnet18", "random", classifier_input="raw")


def test_own_classifier_has_no_imagenet_input(own):
    with pytest.raises(ValueError, match=r"classifier_input.*paper"):
        load_classifier(f"{own}:build", classifier_input="imagenet")


@pytest.mark.parametrize("beta", [math.inf, 3.0])
def test_resolution_that_the_network_cannot_take(own, beta):
    assert load_classifier(f"{own}:picky", num_classes=4, image_size=8, softplus_beta=beta)(
        images(8)
    ).shape == (2, 4)
    with pytest.raises(ValueError, match=r"own\.py:picky cannot take 16x16 images"):
        load_classifier(f"{own}:picky", num_classes=4, image_size=16, softplus_beta=beta)


def test_resolution_that_needs_a_resize_says_so():
    with pytest.raises(ValueError, match=r"vit_b_32 cannot take 128x128 images.*classifier_input imagenet"):
        load_classifier("vit_b_32", "random", num_classes=4, image_size=128)

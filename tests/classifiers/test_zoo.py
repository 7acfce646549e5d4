"""timm's and transformers' networks: weights, input, gradient, and one line for what does not fit."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from classifiers import classifier_files, classifier_packages, load_classifier
from classifiers.registry import find_classifier
from guided_diffusion.files import pretrained

NO_TIMM = "networks by timm's names need timm"


def images(size, dtype=torch.float64):
    """Pictures of bytes, as pixels and in [-1, 1]."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    return pixels, torch.from_numpy(pixels).to(dtype).permute(0, 3, 1, 2) / 127.5 - 1


def assert_slope(classifier, x):
    """The gradient of a smooth classifier is that of central differences, in float64: off by h^2 = 1e-10
    times a third derivative.
    """
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    leaf = x.clone().requires_grad_()
    slope = (torch.autograd.grad(classifier(leaf)[:, 1].sum(), leaf)[0] * direction).sum()
    with torch.no_grad():
        ends = [classifier(x + h * direction)[:, 1].sum() for h in (1e-5, -1e-5)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4) and slope != 0


# timm


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason=NO_TIMM)


@pytest.fixture(scope="module")
def timm_file(timm, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet50.a1_in1k", "vit_base_patch16_clip_224"])
def test_input_and_licence_are_those_of_timms_configuration(timm, name):
    spec, published = find_classifier(f"timm:{name}"), timm.get_pretrained_cfg(name)
    transform = spec.trained_on
    assert (3, transform.size, transform.size) == published.input_size and not spec.takes_raw
    assert (transform.mean, transform.std) == (published.mean, published.std)
    assert (transform.mode, spec.image_size) == (published.interpolation, published.input_size[1])
    assert published.license in spec.licence


def test_timm_says_where_the_weights_are_published(timm):
    for name, host in (("test_vit", "https://huggingface.co/timm/"), ("gcvit_tiny", "https://github.com/")):
        (url,) = find_classifier(f"timm:{name}").weights_files.values()
        assert url.startswith(host) and url.endswith(f"#timm/{name}.safetensors")


def test_timm_by_file(timm, timm_file):
    classifier = load_classifier("timm:test_vit", timm_file, num_classes=10, image_size=16)
    network = timm.create_model("test_vit", num_classes=10).eval()
    network.load_state_dict(load_file(timm_file))
    _, x = images(160, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(classifier(x), network(x), rtol=1e-4, atol=1e-5)  # mean and std are 1/2


def test_timm_gradient_through_the_enlarged_image(timm_file):
    assert_slope(load_classifier("timm:test_vit", timm_file, num_classes=10).double(), images(16)[1])


def test_timm_file_has_a_place_of_its_own(timm_file, tmp_path, monkeypatch):
    shutil.copy(pretrained.PRETRAINED_DIR / "files.json", tmp_path)
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path)
    path = tmp_path / "timm" / "test_vit.safetensors"
    with pytest.raises(FileNotFoundError) as caught:
        load_classifier("timm:test_vit", num_classes=10)
    assert str(path) in str(caught.value) and "https://huggingface.co/timm/test_vit" in str(caught.value)
    path.parent.mkdir()
    shutil.copy(timm_file, path)
    _, x = images(16, torch.float32)
    by_file = load_classifier("timm:test_vit", timm_file, num_classes=10)
    assert torch.equal(load_classifier("timm:test_vit", num_classes=10)(x), by_file(x))
    assert classifier_files("timm:test_vit", "")["classifier_path"]() == path


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("timm:test_vits", {}, r"no network 'test_vits'; did you mean test_vit"),
        ("timm:hf-hub:timm/x", {}, "no network 'hf-hub:timm/x'"),
        ("timm:test_vit.none", {}, r"\(none\) for test_vit; choose one of test_vit\."),
        (
            "timm:test_vit",
            {"softplus_beta": 3.0},
            r"no ReLU to smooth \(smooth already: gelu\).*softplus_beta inf",
        ),
    ],
)
def test_timm_says_in_one_line_what_does_not_fit(timm, name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_classifier(name, "random", num_classes=10, **options)
    assert "\n" not in str(caught.value)


def test_hard_activations_of_timm_are_smoothed(timm):
    classifier = load_classifier("timm:mobilenetv3_small_050", "random", num_classes=3, softplus_beta=3.0)
    assert {"ReLU", "Hardswish", "Hardsigmoid"} == set(classifier.replaced)
    assert "Hardswish -> x (S(x + 3) - S(x - 3)) / 6" in classifier.notes[0]


# transformers


@pytest.mark.parametrize("size", [16, 40])
def test_folder_answers_as_transformers_does(transformers, vit_folder, size):
    pixels, x = images(size, torch.float32)
    network = transformers.ViTForImageClassification.from_pretrained(vit_folder).eval()
    seen = transformers.ViTImageProcessor.from_pretrained(vit_folder)(list(pixels), return_tensors="pt")
    classifier = load_classifier(f"hf:{vit_folder}", num_classes=10, image_size=size)
    with torch.no_grad():
        # A resize is rounded to bytes there, by up to 1/510 after the rows and after the columns; std is 0.2.
        tolerance = 1e-5 if size == 16 else 1 / 255 / 0.2
        torch.testing.assert_close(classifier.transform(x), seen.pixel_values, rtol=0, atol=tolerance)
        expected = network(classifier.transform(x)).logits
        torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-5)


PREPROCESSORS = {
    "crop of a bicubic resize": ("CLIPImageProcessor", {"crop_size": {"height": 24, "width": 24}}),
    "not normalised": ("ViTImageProcessor", {"size": {"height": 24, "width": 24}, "do_normalize": False}),
    "bytes": ("ViTImageProcessor", {"size": {"height": 24, "width": 24}, "do_rescale": False}),
    "halves": ("ViTImageProcessor", {"size": {"height": 24, "width": 24}, "rescale_factor": 1 / 510}),
    "shortest edge": ("ConvNextImageProcessor", {"size": {"shortest_edge": 24}, "crop_pct": 1.0}),
}


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_input_is_that_of_the_preprocessor(transformers, vit_folder, tmp_path, kind):
    name, options = PREPROCESSORS[kind]
    if "crop_size" in options:
        options = options | {"size": {"shortest_edge": 24}}
    preprocessor = getattr(transformers, name)(**options)
    shutil.copy(vit_folder / "config.json", tmp_path)
    preprocessor.save_pretrained(tmp_path)
    pixels, x = images(24, torch.float32)
    spec = find_classifier(f"hf:{tmp_path}")
    expected = preprocessor(list(pixels), return_tensors="pt").pixel_values
    torch.testing.assert_close(spec.trained_on(x), expected, rtol=1e-4, atol=1e-4)
    assert (spec.trained_on.mode == "bicubic") == (preprocessor.resample == 3)


def test_gradient_of_a_folder_through_its_input(vit_folder):
    assert_slope(load_classifier(f"hf:{vit_folder}", num_classes=10).double(), images(24)[1])


def test_folder_is_smoothed_and_takes_other_weights(resnet_folder, tmp_path):
    name, _x = f"hf:{resnet_folder}", images(16)[1]
    assert_slope(load_classifier(name, num_classes=10, softplus_beta=3.0).double(), _x)
    state = load_file(resnet_folder / "model.safetensors")
    save_file({key: torch.zeros_like(t) for key, t in state.items()}, tmp_path / "zeros.safetensors")
    assert (load_classifier(name, tmp_path / "zeros.safetensors", num_classes=10)(_x.float()) == 0).all()
    torch.save({**state, "embedder.position_ids": torch.arange(4)}, tmp_path / "old.bin")  # as they once were
    old, new = (load_classifier(name, path, num_classes=10) for path in (tmp_path / "old.bin", None))
    assert torch.equal(old(_x.float()), new(_x.float()))


def test_files_and_packages_that_decide(vit_folder):
    files = classifier_files(f"hf:{vit_folder}", "")
    found = {name: find() for name, find in files.items()}
    assert found == {
        "classifier_path": vit_folder / "model.safetensors",
        "classifier_config.json": vit_folder / "config.json",
        "classifier_preprocessor_config.json": vit_folder / "preprocessor_config.json",
    }
    assert classifier_packages("hf:x+timm:y+resnet18+clip:z") == ["timm", "transformers"]


def without(*names):
    """What damages a copy of a folder: files that go."""
    return lambda folder: [(folder / name).unlink() for name in names]


def changed(file, **values):
    """What damages a copy of a folder: values in a JSON file of it."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return change


BAD = {
    "no config": (without("config.json"), "has no config.json; give a folder of save_pretrained's"),
    "no weights": (without("model.safetensors"), r"no weights at .*model\.safetensors"),
    "no preprocessor": (without("preprocessor_config.json"), "AutoImageProcessor cannot read its folder"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "AutoConfig cannot read its folder"),
    "unknown network": (changed("config.json", model_type="nothing"), "AutoConfig cannot read its folder"),
    "no classifier": (changed("config.json", model_type="bert"), "no image classifier of bert can be built"),
    "no number": (
        changed("config.json", hidden_size="x"),
        r"AutoConfig cannot .*expected int, got str .*'x'",
    ),
    "no activation": (
        changed("config.json", hidden_act="x"),
        "no image classifier of vit can be built .*'x'",
    ),
    "no list": (
        lambda folder: (folder / "preprocessor_config.json").write_text("[]"),
        "AutoImageProcessor cannot read its folder",
    ),
    "two means": (
        changed("preprocessor_config.json", image_mean=[0.5, 0.5]),
        "the mean .* three numbers each",
    ),
    "no mean": (changed("preprocessor_config.json", image_mean=0.5), "the mean 0.5 and the std"),
    "std of zero": (changed("preprocessor_config.json", image_std=[0.2, 0, 0.2]), "the latter above 0"),
    "another network": (changed("config.json", hidden_size=8), "does not fit"),
    "flipped": (changed("preprocessor_config.json", do_flip_channel_order=True), "do_flip_channel_order"),
    "not square": (changed("preprocessor_config.json", size={"height": 8, "width": 16}), "only squares fit"),
}


@pytest.mark.parametrize("damage", BAD)
def test_bad_folders(vit_folder, tmp_path, damage):
    folder, (change, words) = tmp_path / "copy", BAD[damage]
    shutil.copytree(vit_folder, folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        load_classifier(f"hf:{folder}", num_classes=10)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_number_of_classes_is_the_folders(vit_folder):
    with pytest.raises(ValueError, match="is for 10 classes, and num_classes is 1000"):
        load_classifier(f"hf:{vit_folder}")


# Neither package


@pytest.mark.parametrize("name", ["timm:resnet50", "hf:folder", "clip:folder"])
def test_missing_package_is_one_line_with_what_to_install(monkeypatch, name):
    def missing(package):
        raise ImportError(f"No module named {package}")

    monkeypatch.setattr(importlib, "import_module", missing)
    (package,) = classifier_packages(name)
    with pytest.raises(ValueError, match=rf'{name} needs {package}: pip install -e "\.\[zoo\]"'):
        load_classifier(name, "random", prompts="a dog" if name.startswith("clip") else "")

"""Where classifiers come from: torchvision, this project, timm, transformers, a file of the user's. Each
gives a `ClassifierSpec`.

torchvision is imported where one of its networks is asked for: that alone takes as long as all of torch.
"""

import importlib.util
import sys
from functools import partial
from pathlib import Path

from classifiers.cifar_resnet import CIFARResNet
from classifiers.clip import from_clip
from classifiers.input_transform import InputTransform, resize_mode
from classifiers.spec import ClassifierSpec
from classifiers.zoo import from_folder, from_timm

OTHERS = "timm:NAME, hf:FOLDER, clip:FOLDER, FILE.py:builder"


def find_classifier(name: str, prompts: str = "") -> ClassifierSpec:
    """Look a name up; raises ValueError that lists the choices. prompts: what a CLIP compares images with."""
    source = name.partition(":")[0]
    if source == "timm":
        return from_timm(name)
    if source == "hf":
        return from_folder(name)
    if source == "clip":
        return from_clip(name, prompts)
    if ".py:" in name:
        return _from_file(name)
    if name in OWN:
        return OWN[name]
    return _from_torchvision(name)


def _from_torchvision(name):
    from torchvision import models

    choices = models.list_models(module=models)
    if name not in choices:
        listed = ", ".join([*OWN, *choices])
        raise ValueError(f"unknown classifier {name!r}; choose {OTHERS} or one of {listed}")
    table = {w.name: w for w in models.get_model_weights(name)}
    default = models.get_model_weights(name).DEFAULT
    preset = default.transforms()
    size, mode = preset.crop_size[0], resize_mode(preset.interpolation.value)
    # What torchvision itself sets for the published weights of these two.
    published = {"transform_input": True, "init_weights": False}
    options = published if name in ("googlenet", "inception_v3") else {}
    return ClassifierSpec(
        name=name,
        build=lambda num_classes: models.get_model(name, weights=None, num_classes=num_classes, **options),
        weights_files={key: table[key].url for key in [default.name, *table]},
        image_size=size,
        trained_on=InputTransform(size, tuple(preset.mean), tuple(preset.std), mode),
        licence="BSD-3-Clause (torchvision); trained on ImageNet, whose terms allow research only",
    )


def _from_file(name):
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file}, named by classifier {name!r}")
    module_spec = importlib.util.spec_from_file_location(f"own_classifier_{Path(file).stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses, for one, look their module up there
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(
            f"{file} has no function {function!r}; write FILE.py:builder, where builder(num_classes) returns "
            "the network"
        )
    return ClassifierSpec(name, getattr(module, function), {}, None, None, "your own")


def _digits_guide(num_classes):
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=num_classes)


def _digits_judge(num_classes):
    from torchvision.models import DenseNet

    return DenseNet(growth_rate=16, block_config=(4, 4), num_init_features=32, num_classes=num_classes)


def _digits(name, build):
    file = f"digits/{name.removeprefix('digits_')}.safetensors"
    licence = "MIT; trained on the digits of scikit-learn (UCI, CC BY 4.0)"
    return ClassifierSpec(name, build, {"digits": file}, 16, None, licence)


def _cifar(depth, file, **shipped):
    """The network with its published weights, and with those that ship, by their name."""
    url = f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/{file}"
    return ClassifierSpec(
        name=f"cifar_resnet{depth}",
        build=partial(CIFARResNet, (depth - 2) // 6),
        weights_files={"CIFAR10": url, **shipped},
        image_size=32,
        trained_on=InputTransform(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        licence="BSD-2-Clause (akamaster/pytorch_resnet_cifar10) as published, MIT where the weights ship",
        takes_raw=False,
    )


DIGITS = {
    spec.name: spec
    for spec in (_digits("digits_guide", _digits_guide), _digits("digits_judge", _digits_judge))
}
OWN = {
    **DIGITS,
    "cifar_resnet20": _cifar(
        20,
        "resnet20-12fca82f.th",
        CIFAR10_20K="cifar10/resnet20.safetensors",
        DIGITS="digits/resnet20.safetensors",
    ),
    "cifar_resnet56": _cifar(56, "resnet56-4bfd9763.th", CIFAR10_20K="cifar10/resnet56.safetensors"),
}

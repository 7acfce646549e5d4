"""Networks of other packages: timm's by name, transformers' by the folder that save_pretrained wrote.

Neither package is imported before such a network is asked for, and nothing is fetched.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from classifiers.input_transform import InputTransform, resize_mode
from classifiers.spec import ClassifierSpec
from guided_diffusion.files.state_dicts import first_line

PACKAGES = {"timm": "timm", "hf": "transformers", "clip": "transformers"}  # by what their names begin with
FOLDER_LICENCE = "that of its folder, not known here"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a preprocessor may do beside size, mean and std: such an input is refused rather than shown wrong.
_UNKNOWN = ("include_top", "rescale_offset", "do_flip_channel_order")


def require(package: str, name: str, extra: str = "zoo") -> Any:
    """The package that a classifier or a decoder needs. Raises ValueError that says what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'{name} needs {package}: pip install -e ".[{extra}]"') from error


# timm


def from_timm(name: str) -> ClassifierSpec:
    """timm:NAME or timm:NAME.TAG, which says what weights are meant; input and licence are those of its
    pretrained_cfg. Raises ValueError.
    """
    timm, model = require("timm", name), name.removeprefix("timm:")
    architecture = model.partition(".")[0]
    if not timm.is_model(architecture):
        near = get_close_matches(architecture, timm.list_models(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"{name}: timm has no network {architecture!r}; {hint}")
    try:
        published = timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise ValueError(f"{name}: {first_line(error).rstrip('.')}; choose one of {tags}") from error
    channels, height, width = published.input_size
    if channels != 3 or height != width:
        raise ValueError(
            f"{name} takes images of {channels}x{height}x{width}: only squares of 3 channels fit"
        )
    return ClassifierSpec(
        name=name,
        build=lambda num_classes: timm.create_model(model, pretrained=False, num_classes=num_classes),
        weights_files={published.tag or "timm": _timm_file(published, model)},
        image_size=height,
        trained_on=normalised_input(name, height, published.mean, published.std, published.interpolation),
        licence=f"{published.license or 'not known'} (timm)",
        takes_raw=False,
    )


def _timm_file(published, model):
    """Where the weights are to lie in pretrained_models/, behind the address that they come from."""
    file, source = f"timm/{model}.safetensors", published.url
    if published.hf_hub_id:
        source = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/model.safetensors"
    return f"{source}#{file}" if source else file


# transformers


def from_folder(name: str) -> ClassifierSpec:
    """hf:FOLDER, an image classifier; its preprocessor says its input. Raises FileNotFoundError and
    ValueError.
    """
    transformers, config = require("transformers", name), saved_config(name)
    return ClassifierSpec(
        name=name,
        build=partial(_image_classifier, transformers, config, name),
        weights_files=saved_weights(name),
        licence=FOLDER_LICENCE,
        takes_raw=False,
        fill=converted,
        **saved_input(name),
    )


def _image_classifier(transformers, config, name, num_classes):
    if config.num_labels != num_classes:
        raise ValueError(f"{name} is for {config.num_labels} classes, and num_classes is {num_classes}")
    build = transformers.AutoModelForImageClassification.from_config
    build = partial(build, config, trust_remote_code=False)
    return built(name, f"image classifier of {config.model_type}", build)


def built(name: str, kind: str, make: Callable[[], Any]) -> Any:
    """What transformers makes of a configuration. Raises ValueError where it cannot."""
    try:
        return make()
    except Exception as error:  # transformers does not say what it raises
        raise ValueError(f"{name}: no {kind} can be built ({_reason(error)})") from error


def folder_of(name: str) -> Path:
    """FOLDER of hf:FOLDER and clip:FOLDER."""
    return Path(name.partition(":")[2])


def saved_config(name: str) -> Any:
    """The configuration in the folder of a name. Raises FileNotFoundError and ValueError."""
    folder = folder_of(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: {folder} has no config.json; give a folder of save_pretrained's")
    return saved(name, "AutoConfig")


def saved(name: str, kind: str) -> Any:
    """What a class of transformers reads in the folder of a name, by its name there. Raises ValueError."""
    reader = getattr(require("transformers", name), kind)
    try:
        with _quiet():
            return reader.from_pretrained(folder_of(name), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers does not say what it raises
        raise ValueError(f"{name}: {kind} cannot read its folder ({_reason(error)})") from error


def _reason(error):
    """The first sentence of what an error of transformers says, which may go over several lines."""
    return first_line(ValueError(" ".join(str(error).split())))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its advice about folders of other versions."""
    logs = importlib.import_module("transformers").utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()


def saved_weights(name: str) -> dict[str, str]:
    """The file of weights in the folder of a name, there or not."""
    files = [folder_of(name).absolute() / file for file in _WEIGHTS]
    return {"saved": str(next((file for file in files if file.is_file()), files[0]))}


def converted(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """The network with the weights of a state dict, under the names of any version of transformers, which may
    hold more than it needs. Raises ValueError for what it lacks, or of another shape.
    """
    reader: Any = type(network)
    options = {"config": network.config, "state_dict": dict(state), "output_loading_info": True}
    try:
        with _quiet():
            loaded, report = reader.from_pretrained(None, **options)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {reader.__name__} ({first_line(error)})") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(report[problem]):
            raise ValueError(
                f"{source} does not fit {reader.__name__}: {problem} {found[0]}, {len(found)} in all"
            )
    return loaded


def saved_settings(name: str) -> dict[str, Path]:
    """The files in the folder of a name that decide beside the weights, such as its preprocessor's."""
    folder = folder_of(name)
    return {path.name: path for path in sorted([*folder.glob("*.json"), *folder.glob("merges.txt")])}


def saved_input(name: str) -> dict[str, Any]:
    """image_size and trained_on by the preprocessor in the folder of a name.

    An image in [0, 255] is scaled by rescale_factor and normalised there, one in [0, 1] here. Raises
    ValueError.
    """
    processor = saved(name, "AutoImageProcessor")
    if odd := [each for each in _UNKNOWN if getattr(processor, each, False)]:
        raise ValueError(f"{name}: its preprocessor has {odd[0]}, which is not known here")
    cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = processor.crop_size if cropped else processor.size
    sides = {size.get(key) for key in ("height", "width", "shortest_edge")} - {None}
    if len(sides) != 1:
        raise ValueError(f"{name}: its preprocessor makes images of {dict(size)}, and only squares fit")
    side = sides.pop()
    normalises = getattr(processor, "do_normalize", True)
    mean, std = (processor.image_mean, processor.image_std) if normalises else ([0.0] * 3, [1.0] * 3)
    factor = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1)
    transform = normalised_input(name, side, mean, std, processor.resample)
    mean, std = (tuple(value / factor for value in values) for values in (transform.mean, transform.std))
    return {"image_size": side, "trained_on": replace(transform, mean=mean, std=std)}


def normalised_input(name: str, side: int, mean: Any, std: Any, interpolation: str | int) -> InputTransform:
    """What the files of a classifier say of its input. Raises ValueError for what is no mean or no std."""
    try:
        transform = InputTransform(
            side, (*map(float, mean),), (*map(float, std),), resize_mode(interpolation)
        )
    except (TypeError, ValueError):
        transform = None
    if transform is None or not len(transform.mean) == len(transform.std) == 3 or min(transform.std) <= 0:
        raise ValueError(
            f"{name} has the mean {mean} and the std {std}: three numbers each, the latter above 0"
        )
    return transform

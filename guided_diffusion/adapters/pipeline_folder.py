"""The folders of diffusers' pipelines: what may be in them, and the parts that a denoiser is made of.

Weights are data: safetensors alone, of this folder alone, and no code that it names is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from guided_diffusion.adapters.schedulers import require_known_scheduler
from guided_diffusion.files.diffusers_dit import read_config, weight_files

NETWORKS = {
    "DDPMPipeline": "unet",
    "DDIMPipeline": "unet",
    "DiTPipeline": "transformer",
    "StableDiffusionPipeline": "unet",
    "StableDiffusionXLPipeline": "unet",
}
TEXTS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))
_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_OLD_CLASSES = {"Transformer2DModel": "DiTTransformer2DModel"}  # as the published DiT's folder has it
_OPTIONAL = ("vae", *(name for pair in TEXTS for name in pair))
_INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"
_INSTALL = 'pip install -e ".[diffusers]"'


@dataclass(frozen=True)
class Pipeline:
    """The parts that a denoiser is made of.

    texts: a tokenizer and its text encoder, in pairs. latent: whether an autoencoder makes the images.
    factor: pixels of an image's side to one of a sample's. zero_negative: whether no negative prompt stands
    for zeros rather than for the text "". name: what messages call it.
    """

    network: nn.Module
    scheduler: Any
    texts: tuple[tuple[Any, Any], ...] = ()
    latent: bool = False
    factor: int = 1
    zero_negative: bool = False
    name: str = "the pipeline"

    @classmethod
    def of(cls, pipe: Any) -> "Pipeline":
        """Of a pipeline in memory. Raises ValueError for one of another kind."""
        kind, vae = type(pipe).__name__, getattr(pipe, "vae", None)
        require_known(kind, kind)
        pairs = [tuple(getattr(pipe, name, None) for name in pair) for pair in TEXTS]
        return cls(
            getattr(pipe, NETWORKS[kind]),
            pipe.scheduler,
            texts=tuple(pair for pair in pairs if None not in pair),
            latent=vae is not None,
            factor=_factor(vae.config) if vae is not None else 1,
            zero_negative=bool(pipe.config.get("force_zeros_for_empty_prompt")),
            name=kind,
        )


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Pipeline:
    """The parts of a saved pipeline, on the CPU, frozen; the autoencoder is left to
    `classifiers.load_decoder`.

    Raises FileNotFoundError and ValueError.
    """
    folder, parts = Path(folder), _index(folder)
    diffusers = require_diffusers()
    place, latent = NETWORKS[parts["_class_name"]], _has(parts, "vae")
    return Pipeline(
        _network(diffusers, folder / place, parts[place][1], dtype),
        _scheduler(diffusers, folder / "scheduler", parts["scheduler"][1]),
        texts=tuple(
            (_tokenizer(folder / tokens), _text_encoder(folder / encoder, parts[encoder][1], dtype))
            for tokens, encoder in TEXTS
            if _has(parts, tokens) and _has(parts, encoder)
        ),
        latent=latent,
        factor=_factor(read_config(folder / "vae" / "config.json")) if latent else 1,
        zero_negative=bool(parts.get("force_zeros_for_empty_prompt")),
        name=str(folder),
    )


def pipeline_files(folder: str | Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that decide about samples: configurations, weights and the indices of their
    shards, the tokenizers' tables.

    Raises FileNotFoundError for a folder without a pipeline, or where one of them is not there; ValueError
    for a pipeline of another kind.
    """
    parts = _index(folder)
    yield "pipeline", Path(folder) / _INDEX
    for name in (NETWORKS[parts["_class_name"]], "scheduler", *_OPTIONAL):
        if _has(parts, name):
            for path in _files_of(Path(folder) / name):
                yield f"{name}/{path.name}", path


def text_encoders_of(folder: str | Path) -> bool:
    """Whether a saved pipeline has text encoders. Raises as `pipeline_files`."""
    return any(_has(_index(folder), encoder) for _, encoder in TEXTS)


def require_known(kind: Any, source: object) -> None:
    """Raise ValueError unless a pipeline of this class is known."""
    if kind not in NETWORKS:
        raise ValueError(f"{source} is a pipeline of class {kind}; known are {', '.join(NETWORKS)}")


def require_diffusers() -> Any:
    """The diffusers package, without its progress bars. Raises ValueError that says what to install."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError(f"a pipeline needs diffusers: {_INSTALL}") from error
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def require_transformers() -> Any:
    """The transformers package, likewise."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"a pipeline with a text encoder needs transformers: {_INSTALL}") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _index(folder):
    """The checked content of model_index.json."""
    path = Path(folder) / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {_INDEX}: give the folder of a pipeline of diffusers")
    parts = read_config(path)
    kind = parts.get("_class_name")
    require_known(kind if isinstance(kind, str) else repr(kind), path)
    for name in (NETWORKS[kind], "scheduler", *_OPTIONAL):
        if not _has(parts, name) and name not in _OPTIONAL:
            raise ValueError(f"{path} names no {name}, which a {kind} has")
        if _has(parts, name) and parts[name][0] not in ("diffusers", "transformers"):
            raise ValueError(f"{path}: {name} is of {parts[name][0]}, and no code of a pipeline's own is run")
    return parts


def _has(parts, name):
    entry = parts.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _files_of(folder):
    """The files of a part that are read. Raises FileNotFoundError for one that is not there."""
    if folder.name == "scheduler":
        return [_existing(folder / _SCHEDULER)]
    if not folder.name.startswith("tokenizer"):
        return [_existing(folder / "config.json"), *weight_files(folder)]
    if tables := sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt")):
        return tables
    raise FileNotFoundError(f"{folder} is empty or not there: the pipeline is not complete")


def _existing(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the pipeline is not complete")
    return path


def _factor(config):
    """Of an autoencoder's configuration: it halves the image between two levels. Raises ValueError for one
    whose latents are not its own times a number.
    """
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError("an autoencoder with latents_mean and latents_std is not known")
    return 2 ** (len(config.get("block_out_channels") or [0]) - 1)


def _network(diffusers, folder, name, dtype):
    name = _OLD_CLASSES.get(name, name)
    if name not in _CLASSES:
        raise ValueError(f"{folder} holds a {name}; known are {', '.join(_CLASSES)}")
    return _read(getattr(diffusers, name), folder, {"torch_dtype": dtype, "low_cpu_mem_usage": False})


def _scheduler(diffusers, folder, name):
    require_known_scheduler(name)
    config = read_config(*_files_of(folder))
    try:
        return getattr(diffusers, name).from_config(config)
    except (ImportError, ValueError, NotImplementedError, TypeError) as error:
        raise _misfit(folder, name, error) from error


def _text_encoder(folder, name, dtype):
    if name not in _TEXT_CLASSES:
        raise ValueError(f"{folder} holds a {name}; known are {', '.join(_TEXT_CLASSES)}")
    return _read(getattr(require_transformers(), name), folder, {"dtype": dtype})


def _tokenizer(folder):
    try:
        return require_transformers().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _misfit(folder, "CLIPTokenizer", error) from error


def _read(network, folder, options):
    """A network of a folder. Raises ValueError where tensors are missing or too many."""
    _files_of(folder)
    try:
        read, found = network.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise _misfit(folder, network.__name__, error) from error
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in found[kind]]
    # Text encoders of old have the numbers 0, 1, 2, ... among their tensors.
    if wrong := [name for name in wrong if not str(name).endswith("position_ids")]:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its config.json, such as {wrong[0]}")
    return read


def _misfit(folder, name, error):
    return ValueError(f"{folder} is not a {name} ({' '.join(str(error).split())})")

"""The folders of diffusers' pipelines: what may be in them, and the parts that a denoiser is made of.

Weights are data: safetensors alone, of this folder alone, and no code that it names is run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from guided_diffusion.files.diffusers_dit import read_config

NETWORKS = {"DDPMPipeline": "unet", "DDIMPipeline": "unet", "DiTPipeline": "transformer"}
NETWORKS["StableDiffusionPipeline"] = "unet"
_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel")
_OLD_CLASSES = {"Transformer2DModel": "DiTTransformer2DModel"}  # as the published DiT's folder has it
_TOKEN_FILES = ("text_encoder", "tokenizer")
_INDEX = "model_index.json"


@dataclass(frozen=True)
class Pipeline:
    """The parts that a denoiser is made of. latent: whether an autoencoder makes the images. name: what
    messages call it.
    """

    network: nn.Module
    scheduler: Any
    tokenizer: Any = None
    text_encoder: Any = None
    latent: bool = False
    name: str = "the pipeline"

    @classmethod
    def of(cls, pipe: Any) -> "Pipeline":
        """Of a pipeline in memory. Raises ValueError for one of another kind."""
        kind = type(pipe).__name__
        require_known(kind, kind)
        text = {name: getattr(pipe, name, None) for name in ("tokenizer", "text_encoder")}
        latent = getattr(pipe, "vae", None) is not None
        return cls(getattr(pipe, NETWORKS[kind]), pipe.scheduler, **text, latent=latent, name=kind)


def load_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Pipeline:
    """The parts of a saved pipeline, on the CPU, frozen; the autoencoder is left to
    `classifiers.load_decoder`.

    Weights are read from safetensors alone, from this folder alone, and no code that it names is run. Raises
    FileNotFoundError and ValueError.
    """
    parts = _index(folder)
    diffusers = require_diffusers()
    kind = parts["_class_name"]
    network = _network(diffusers, Path(folder) / NETWORKS[kind], parts[NETWORKS[kind]][1], dtype)
    scheduler = _scheduler(diffusers, Path(folder) / "scheduler", parts["scheduler"][1])
    text = (
        dict(zip(_TOKEN_FILES, _text(Path(folder), dtype), strict=True))
        if _has(parts, "text_encoder")
        else {}
    )
    return Pipeline(network, scheduler, **text, latent=_has(parts, "vae"), name=str(folder))


def pipeline_files(folder: str | Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files that decide about samples: configurations, weights, the tokenizer's tables.

    Raises FileNotFoundError for a folder without a pipeline, or with weights that are no safetensors;
    ValueError for a pipeline of another kind.
    """
    parts = _index(folder)
    yield "pipeline", Path(folder) / _INDEX
    for name in (NETWORKS[parts["_class_name"]], "scheduler", "vae", *_TOKEN_FILES):
        if _has(parts, name):
            for path in _files_of(Path(folder) / name):
                yield f"{name}/{path.name}", path


def require_known(kind: Any, source: object) -> None:
    """Raise ValueError unless a pipeline of this class is known."""
    if kind not in NETWORKS:
        raise ValueError(f"{source} is a pipeline of class {kind}; known are {', '.join(NETWORKS)}")


def require_diffusers() -> Any:
    """The diffusers package, without its progress bars. Raises ValueError that says what to install."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError('a pipeline needs diffusers: pip install -e ".[diffusers]"') from error
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


def _index(folder):
    """The checked content of model_index.json."""
    path = Path(folder) / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {_INDEX}: give the folder of a pipeline of diffusers")
    parts = read_config(path)
    kind = parts.get("_class_name")
    require_known(kind if isinstance(kind, str) else repr(kind), path)
    for name in (NETWORKS[kind], "scheduler", *(("text_encoder", "tokenizer", "vae"))):
        if not (_has(parts, name) or name in (*_TOKEN_FILES, "vae")):
            raise ValueError(f"{path} names no {name}, which a {kind} has")
        if _has(parts, name) and parts[name][0] not in ("diffusers", "transformers"):
            raise ValueError(f"{path}: {name} is of {parts[name][0]}, and no code of a pipeline's own is run")
    return parts


def _has(parts, name):
    entry = parts.get(name)
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _files_of(folder):
    """The files of a part. Raises FileNotFoundError where its weights are no safetensors."""
    if folder.name not in ("scheduler", "tokenizer") and not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} holds no .safetensors, and pickles are not read: save the pipeline again with "
            "save_pretrained(FOLDER)"
        )
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".txt", ".safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} is empty or not there: the pipeline is not complete")
    return files


def _network(diffusers, folder, name, dtype):
    name = _OLD_CLASSES.get(name, name)
    if name not in _CLASSES:
        raise ValueError(f"{folder} holds a {name}; known are {', '.join(_CLASSES)}")
    options = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    network, found = _read(getattr(diffusers, name), folder, options)
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"{folder}: {len(wrong)} tensors do not fit its config.json, such as {wrong[0]}")
    return network


def _scheduler(diffusers, folder, name):
    config = read_config(next(iter(_files_of(folder))))
    scheduler = getattr(diffusers, name, None)
    if scheduler is None:
        raise ValueError(f"{folder} is for {name}, which diffusers {diffusers.__version__} does not have")
    return scheduler.from_config(config)


def _text(folder, dtype):
    """The text encoder and the tokenizer."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            'a pipeline with a text encoder needs transformers: pip install -e ".[diffusers]"'
        ) from error
    transformers.utils.logging.disable_progress_bar()
    encoder, found = _read(transformers.CLIPTextModel, folder / "text_encoder", {"dtype": dtype})
    if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"{folder}: the text encoder lacks {len(wrong)} tensors, such as {wrong[0]}")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return encoder, tokenizer


def _read(network, folder, options):
    """A network of a folder, and what was found wrong with its tensors."""
    _files_of(folder)
    try:
        return network.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} is not a {network.__name__} ({' '.join(str(error).split())})") from error

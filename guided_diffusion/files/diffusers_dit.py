"""diffusers' configurations and files of weights, and its copies of DiT: its folder, and its names of the
parameters as the original's.

diffusers holds the embeddings of timestep and class once in every block, and its queries, keys and values as
three layers. Its own arithmetic differs from the original's in two places (the timestep's frequencies, and
the epsilon of the blocks' second norm); the weights are the same.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SETTINGS = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
NUMBERS = ("sample_size", "num_attention_heads")  # what the weights do not say
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Of diffusers and of transformers; in shards, the index beside them says which.
SAFETENSORS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_EMBEDDINGS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_QKV = "to_q", "to_k", "to_v"


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are diffusers'."""
    return any(name.startswith("transformer_blocks.") for name in state)


def find_transformer(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights and the configuration, of a pipeline's folder, of its transformer's, or of a file
    in that. Raises FileNotFoundError and ValueError.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / "transformer").is_dir():
        folder = folder / "transformer"
    weights = next((folder / name for name in FILES if (folder / name).is_file()), None)
    weights = weights if path.is_dir() else path
    settings = folder / "config.json"
    if weights is None or not settings.is_file():
        lacking = "config.json" if weights else FILES[0]
        raise FileNotFoundError(f"{folder} has no {lacking}: give diffusers' folder of a DiT, as it is")
    config = read_config(settings)
    for name in NUMBERS:
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ValueError(
                f"{settings} has {name} {config.get(name)!r}, and DiT needs a whole number from 1 on"
            )
    for name, value in SETTINGS.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{settings} has {name} {config[name]!r}, and DiT has {value!r}: it is another network"
            )
    return weights, config


def read_config(path: Path) -> dict[str, Any]:
    """A config.json. Raises ValueError with its path for what is none."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a configuration of diffusers ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a configuration of diffusers: it holds no object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a network's folder: one file, or the index of its shards and these; both, where both
    are there, since libraries differ in which they prefer.

    Raises FileNotFoundError where there are none, or a shard is not there; ValueError for an index that names
    files elsewhere.
    """
    found = []
    for name in SAFETENSORS:
        if (folder / name).is_file():
            found.append(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            found += [index, *_shards(index)]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no {' or '.join(SAFETENSORS)}, and pickles are not read: save the pipeline "
            "again with save_pretrained(FOLDER)"
        )
    return found


def _shards(index):
    places = read_config(index).get("weight_map")
    names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
    if not names or any(name != Path(name).name or not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{index} is no index of the .safetensors beside it")
    for name in names:
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name} is not there, which {index.name} names")
    return [index.parent / name for name in names]


def original_names(state: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The state dict under the original's names, without pos_embed. Raises ValueError where blocks hold
    different embeddings, which the original network cannot express, and for names that are not DiT's.
    """
    result: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem)
        within = block[2] if block else ""
        if stem in _OUTSIDE:
            result[f"{_OUTSIDE[stem]}.{kind}"] = tensor
        elif within in _EMBEDDINGS:
            shared = f"{_EMBEDDINGS[within]}.{kind}"
            if not torch.equal(result.setdefault(shared, tensor), tensor):
                raise ValueError(
                    f"{source}: {name} differs from that of another block, and the original DiT has one "
                    "for all: it was fine-tuned in a form that this network cannot express"
                )
        elif block and within in _BLOCK:
            result[f"blocks.{block[1]}.{_BLOCK[within]}.{kind}"] = tensor
        elif block and within.removeprefix("attn1.") in _QKV:
            joined = f"blocks.{block[1]}.attn.qkv.{kind}"
            parts.setdefault(joined, {})[within.removeprefix("attn1.")] = tensor
        else:
            raise ValueError(f"{source} holds {name}, which is no parameter of diffusers' DiT")
    for joined, three in parts.items():
        if missing := [part for part in _QKV if part not in three]:
            raise ValueError(f"{source} lacks {missing[0]} of {joined}")
        result[joined] = torch.cat([three[part] for part in _QKV])
    return result

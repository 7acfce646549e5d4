"""CLIPs as open_clip saves them (Ilharco et al., 2021): read without that package, as transformers' network.

A CLIP of two plain transformers is the same function in both packages, under other names: queries, keys and
values stand in one matrix there, and a projection is x @ proj. Anything else that a configuration asks for,
such as a ResNet, a tower of timm's or transformers', CoCa or SigLIP, is refused.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from classifiers.zoo import built, folder_of, normalised_input
from guided_diffusion.files.state_dicts import load_into

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What each part of a configuration may say, with open_clip's defaults.
_MODEL: dict[str, Any] = {"embed_dim": 0, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}
_VISION: dict[str, Any] = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64}
_VISION |= {"mlp_ratio": 4.0}
_TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8}
_TEXT |= {"mlp_ratio": 4.0}
# Beside these: what says how it is anyway, and what is of training alone.
_AS_IT_IS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)}
_OF_TRAINING = ("patch_dropout",)
_INPUT = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
}

# How the name of a tensor begins, in open_clip and in transformers.
_BEGINNINGS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
}
_IN_A_BLOCK = {
    ".ln_1.": ".layer_norm1.",
    ".attn.": ".self_attn.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_TRANSPOSED = ("visual.proj", "text_projection")  # x @ proj there, a linear layer here


def is_open_clip(folder: Path) -> bool:
    """Whether a folder is read as open_clip's: it has that configuration, with weights or without another."""
    others = not (folder / "config.json").is_file()
    return (folder / CONFIG).is_file() and (others or _weights(folder).is_file())


def open_clip_parts(name: str, transformers: Any) -> tuple[Any, dict[str, Any]]:
    """The CLIPConfig of clip:FOLDER, and the fields of its ClassifierSpec: weights_files, image_size,
    trained_on, fill. Raises ValueError for what is not known here.
    """
    folder = folder_of(name)
    try:
        content = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{name}: {CONFIG} is not JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    model = _settings(name, "model_cfg", content.get("model_cfg"), _MODEL)
    vision = _settings(name, "vision_cfg", model["vision_cfg"], _VISION)
    text = _settings(name, "text_cfg", model["text_cfg"], _TEXT)
    seen = _INPUT | (content.get("preprocess_cfg") or {})
    size = vision["image_size"]
    config = partial(transformers.CLIPConfig, **_towers(model, vision, text))
    return built(name, "CLIP", config), {
        "weights_files": {"saved": str(_weights(folder).absolute())},
        "image_size": size,
        "trained_on": normalised_input(name, size, seen["mean"], seen["std"], seen["interpolation"]),
        "fill": _filled,
    }


def _weights(folder):
    """The file of weights in a folder, there or not."""
    return next((folder / file for file in _WEIGHTS if (folder / file).is_file()), folder / _WEIGHTS[0])


def _settings(name, part, given, defaults):
    """A part of the configuration, with the default where it says nothing. Raises ValueError for a setting
    that is not known here, unless that is off.
    """
    if not isinstance(given, dict):
        raise ValueError(f"{name}: {CONFIG} has {given!r} as its {part}")
    sides = {key: value[0] for key, value in given.items() if _is_square(value)}
    settings = defaults | given | sides
    for key, value in settings.items():
        kinds = (int, float) if key == "mlp_ratio" else type(defaults.get(key))
        idle = not value or key in _OF_TRAINING or value in _AS_IT_IS.get(key, ())
        if not (isinstance(value, kinds) if key in defaults else idle):
            raise ValueError(
                f"{name}: {CONFIG} has {part}.{key} {value!r}, which is not known here: only a CLIP of two "
                "plain transformers is"
            )
    return settings


def _is_square(value):
    return isinstance(value, list) and len(value) == 2 and value[0] == value[1]


def _towers(model, vision, text):
    """The arguments of a CLIPConfig."""
    both = {"hidden_act": "quick_gelu" if model["quick_gelu"] else "gelu", "layer_norm_eps": 1e-5}
    of_text = {"num_attention_heads": text["heads"], "vocab_size": text["vocab_size"]}
    # 2 is what transformers takes as: the largest token ends the text, as open_clip has it.
    of_text |= {"max_position_embeddings": text["context_length"], "eos_token_id": 2}
    of_image = {"num_attention_heads": vision["width"] // vision["head_width"]}
    of_image |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    return {
        "text_config": {**both, **_tower(text), **of_text},
        "vision_config": {**both, **_tower(vision), **of_image},
        "projection_dim": model["embed_dim"],
    }


def _tower(settings):
    width = settings["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * settings["mlp_ratio"]),
        "num_hidden_layers": settings["layers"],
    }


def _filled(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> nn.Module:
    """transformers' CLIPModel with the weights of open_clip's. Raises ValueError for what does not fit."""
    converted = {}
    for name, tensor in state.items():
        known = _name(name)
        if ".in_proj_" in known:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                converted[known.replace("in_proj_", f"{part}_proj.")] = third
        else:
            converted[known] = tensor.T if name in _TRANSPOSED else tensor
    load_into(network, converted, source)
    return network


def _name(name):
    """What transformers calls a tensor of open_clip's."""
    for old, new in _BEGINNINGS.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in _IN_A_BLOCK.items():
        name = name.replace(old, new)
    return name

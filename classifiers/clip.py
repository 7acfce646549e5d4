"""CLIP (Radford et al., 2021, arXiv 2103.00020) as a classifier by words.

    logits_k = exp(logit_scale) cos(image, prompt_k)      the logits of the K prompts

so that their softmax is CLIP's own answer, and all guidance of classes is guidance by words. A single prompt
has nothing to be compared with: it is given the empty prompt "" as a second class, and its log-probability is
that of the words against no words. At tau_2 = 0 the similarity itself is left.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifiers.open_clip import is_open_clip, open_clip_parts
from classifiers.spec import ClassifierSpec
from classifiers.zoo import (
    FOLDER_LICENCE,
    built,
    converted,
    folder_of,
    require,
    saved,
    saved_config,
    saved_input,
    saved_weights,
)
from guided_diffusion.files.prompts import prompts_file, read_prompts


class PromptedCLIP(nn.Module):
    """The image's side of CLIP, and the prompts' features.

    model: transformers' CLIPModel, whose text tower is not kept. text: (K, D), of unit length.
    """

    text: Tensor
    scale: Tensor

    def __init__(self, model: Any, text: Tensor):
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection
        self.register_buffer("text", text)
        self.register_buffer("scale", model.logit_scale.detach().exp())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, size, size), normalised -> scaled cosine similarities (N, K), in float32 (float64 if the
        network is): of 25, a usual one, float16 would leave steps of 1/64.
        """
        image = self.projection(self.vision(pixel_values=x).pooler_output)
        image = F.normalize(image if image.dtype == torch.float64 else image.float(), dim=-1)
        return self.scale.to(image) * image @ self.text.T.to(image)


def from_clip(name: str, prompts: str) -> ClassifierSpec:
    """clip:FOLDER, transformers' CLIP with its tokenizer and preprocessor, or open_clip's with a tokenizer.
    prompts: as `read_prompts` takes them; "" where none is to be built. Raises FileNotFoundError and
    ValueError.
    """
    transformers, folder = require("transformers", name), folder_of(name)
    theirs = is_open_clip(folder)
    config, parts = open_clip_parts(name, transformers) if theirs else _of_transformers(name)
    _check_tokenizer(name, folder)

    def finish(model: nn.Module) -> nn.Module:
        tokenizer = saved(name, "CLIPTokenizer" if theirs else "AutoTokenizer")
        return PromptedCLIP(model, text_features(model, tokenizer, prompts))

    build = partial(_build, transformers, config, name, prompts)
    return ClassifierSpec(
        name=name, build=build, finish=finish, licence=FOLDER_LICENCE, takes_raw=False, **parts
    )


def _of_transformers(name):
    """The configuration in a folder of transformers', and the fields of its ClassifierSpec."""
    config = saved_config(name)
    if config.model_type != "clip":
        raise ValueError(f"{name} holds {config.model_type}, not clip; an image classifier is hf:FOLDER")
    return config, {"weights_files": saved_weights(name), "fill": converted, **saved_input(name)}


def _check_tokenizer(name: str, folder: Path) -> None:
    """Raises ValueError without files of a tokenizer, where transformers would make one up of no words."""
    alone, together = "tokenizer.json", ("vocab.json", "merges.txt")
    if not (folder / alone).is_file() and not all((folder / file).is_file() for file in together):
        raise ValueError(f"{name} has no tokenizer: add {alone}, or {' and '.join(together)}, to {folder}")


def _build(transformers, config, name, prompts, num_classes):
    if not prompts:
        raise ValueError(f"{name} compares images with words: give --prompts, a file or a text")
    count = len(read_prompts(prompts))
    if prompts_file(prompts) and count != num_classes:
        raise ValueError(
            f"{prompts} has {count} prompts, one for each class, and num_classes is {num_classes}"
        )
    return built(name, "CLIP", partial(transformers.CLIPModel, config))


def text_features(model: Any, tokenizer: Any, prompts: str) -> Tensor:
    """(K, D) features of the prompts, of unit length. Raises ValueError for a prompt that is too long, and
    for tokens that the model does not know.
    """
    words, text = read_prompts(prompts), model.config.text_config
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    longest = text.max_position_embeddings
    for prompt, mask in zip(words, tokens["attention_mask"], strict=True):
        if (length := int(mask.sum())) > longest:
            raise ValueError(f"the prompt {prompt[:40]!r}... has {length} tokens, CLIP takes {longest}")
    if (largest := int(tokens["input_ids"].max())) >= text.vocab_size:
        raise ValueError(
            f"the tokenizer has a token {largest}, and CLIP knows {text.vocab_size}: add its own"
        )
    with torch.no_grad():
        pooled = model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(model.text_projection(pooled), dim=-1)

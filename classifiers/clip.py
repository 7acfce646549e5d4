"""CLIP (Radford et al., 2021, arXiv 2103.00020) as a classifier by words.

    logits_k = exp(logit_scale) cos(image, prompt_k)      the logits of the K prompts

so that their softmax is CLIP's own answer, and all guidance of classes is guidance by words. A single prompt
has nothing to be compared with: it is given the empty prompt "" as a second class, and its log-probability is
that of the words against no words. At tau_2 = 0 the similarity itself is left.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifiers.spec import ClassifierSpec
from classifiers.zoo import converted, folder_of, require, saved, saved_config, saved_input, saved_weights
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
        """(N, 3, size, size), normalised -> scaled cosine similarities (N, K)."""
        image = F.normalize(self.projection(self.vision(pixel_values=x).pooler_output), dim=-1)
        return self.scale * image @ self.text.T


def from_clip(name: str, prompts: str) -> ClassifierSpec:
    """clip:FOLDER, transformers' CLIP with its tokenizer and preprocessor. prompts: as `read_prompts` takes
    them; "" where none is to be built. Raises FileNotFoundError and ValueError.
    """
    transformers, config = require("transformers", name), saved_config(name)
    if config.model_type != "clip":
        raise ValueError(f"{name} holds {config.model_type}, not clip; an image classifier is hf:FOLDER")
    return ClassifierSpec(
        name=name,
        build=partial(_build, transformers, config, name, prompts),
        weights_files=saved_weights(name),
        licence="not known: that of its folder",
        takes_raw=False,
        fill=converted,
        finish=lambda model: PromptedCLIP(model, text_features(model, _tokenizer(name), prompts)),
        **saved_input(name),
    )


def _build(transformers, config, name, prompts, num_classes):
    if not prompts:
        raise ValueError(f"{name} compares images with words: give --prompts, a file or a text")
    count = len(read_prompts(prompts))
    if prompts_file(prompts) and count != num_classes:
        raise ValueError(
            f"{prompts} has {count} prompts, one for each class, and num_classes is {num_classes}"
        )
    return transformers.CLIPModel(config)


def _tokenizer(name):
    # Without these files transformers makes up a tokenizer of no words.
    if not any((folder_of(name) / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise ValueError(f"{name} has no tokenizer.json: save the tokenizer into the folder too")
    return saved(name, "AutoTokenizer")


def text_features(model: Any, tokenizer: Any, prompts: str) -> Tensor:
    """(K, D) features of the prompts, of unit length. Raises ValueError for a prompt that is too long."""
    words = read_prompts(prompts)
    tokens = tokenizer(words, padding=True, return_tensors="pt")
    longest = model.config.text_config.max_position_embeddings
    for prompt, mask in zip(words, tokens["attention_mask"], strict=True):
        if (length := int(mask.sum())) > longest:
            raise ValueError(f"the prompt {prompt[:40]!r}... has {length} tokens, CLIP takes {longest}")
    with torch.no_grad():
        pooled = model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        return F.normalize(model.text_projection(pooled), dim=-1)

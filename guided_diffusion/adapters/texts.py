"""Texts as the conditions of a network, by a pipeline's own text encoders."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.adapters.pipeline_folder import Pipeline

_SIZES = 6  # that SD-XL is told


class TextConditions(nn.Module):
    """A prompt and a negative one, and sizes where the network is SD-XL's (Podell et al., 2023), as what it
    takes: forward(x, is_negative) -> its keyword arguments, for samples x, (N, C, H, W), and (N,) bool.

    sizes: as `PipelineNetwork` has them. Where the pipeline says so no negative prompt is zeros. Raises
    ValueError for sizes that have no use, and for text encoders of another network.
    """

    def __init__(
        self, pipeline: Pipeline, prompt: str, negative_prompt: str = "", sizes: Sequence[float] | None = None
    ):
        super().__init__()
        config = pipeline.network.config
        self.is_xl, self.factor, self.sizes = is_xl(config), pipeline.factor, sizes
        if sizes is not None and (not self.is_xl or len(sizes) != _SIZES):
            told = f"is told {_SIZES}" if self.is_xl else "is told none: drop them"
            raise ValueError(f"{len(sizes)} sizes, but the network of {pipeline.name} {told}")
        states, pooled = encoded(pipeline, (prompt, negative_prompt), penultimate=self.is_xl)
        _refuse_widths(config, states, pooled, pipeline.name)
        if self.is_xl and pipeline.zero_negative and not negative_prompt:
            states[1], pooled[1] = 0, 0
        self.register_buffer("states", states, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)

    def forward(self, x: Tensor, is_negative: Tensor) -> dict[str, Any]:
        which = is_negative.long()
        told = {"encoder_hidden_states": self.states[which]}
        if not self.is_xl:
            return told
        side = x.shape[-1] * self.factor
        sizes = torch.tensor(self.sizes or (side, side, 0, 0, side, side), device=x.device).float()
        return told | {
            "added_cond_kwargs": {"text_embeds": self.pooled[which], "time_ids": sizes.expand(len(x), -1)}
        }


@torch.no_grad()
def encoded(
    pipeline: Pipeline, texts: Sequence[str], penultimate: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The hidden states of all text encoders side by side, (N, L, D), and the pooled state of the one that
    has a projection, (N, P); None without one.

    penultimate: the states before the last layer, as SD-XL is told them (section 2.1), rather than the last
    ones, which are Stable Diffusion's. Raises ValueError for a text that is cut off, and where there is no
    encoder.
    """
    if not pipeline.texts:
        raise ValueError(f"the network of {pipeline.name} is told a text, and there is no text encoder")
    states, pooled = [], None
    for tokenizer, encoder in pipeline.texts:
        tokens = _tokens(tokenizer, texts).to(next(encoder.parameters()).device)
        answer = encoder.eval()(tokens, output_hidden_states=penultimate)
        states.append(answer.hidden_states[-2] if penultimate else answer.last_hidden_state)
        pooled = answer.get("text_embeds", pooled)
    return torch.cat(states, dim=-1), pooled


def is_xl(config: Any) -> bool:
    """Whether a network's configuration is SD-XL's, which asks for a pooled text and sizes."""
    return config.get("addition_embed_type") == "text_time"


def _tokens(tokenizer, texts):
    longest = tokenizer.model_max_length
    for text in texts:
        if (whole := len(tokenizer(text).input_ids)) > longest:
            raise ValueError(
                f"the prompt {text!r} has {whole} tokens, and the text encoder reads {longest}: shorten it"
            )
    return tokenizer(list(texts), padding="max_length", max_length=longest, return_tensors="pt").input_ids


def _refuse_widths(config, states, pooled, name):
    asked = [(config.cross_attention_dim, "hidden", states)]
    if is_xl(config):
        of_sizes = _SIZES * config.addition_time_embed_dim
        asked.append((config.projection_class_embeddings_input_dim - of_sizes, "pooled", pooled))
    for width, kind, told in asked:
        found = 0 if told is None else told.shape[-1]
        if width not in (found, (found,) * len(config.block_out_channels)):
            raise ValueError(
                f"the network of {name} asks for {kind} states of {width} numbers, and its text encoders say "
                f"{found}"
            )

"""A pipeline of diffusers as a denoiser of ours.

    pipeline = load_pipeline(folder)                    or Pipeline.of(pipe), of a pipeline in memory
    network = PipelineNetwork(pipeline, prompt="a red car")
    denoise = network.denoiser(y, cfg_scale=7.5)        contract 1, for every solver and every guidance

The network computes as diffusers has it, and its process is its scheduler's. For a DiT that is another
arithmetic than the original's, with which the published weights were trained: the time embedding divides by
127 where that divides by 128, and the last norm has another eps. `guided_diffusion.dit.load_dit` reads the
same folder into the original network.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.adapters.pipeline_folder import Pipeline, load_pipeline
from guided_diffusion.adapters.schedulers import TrainedSchedule
from guided_diffusion.adapters.texts import TextConditions, is_xl
from guided_diffusion.denoisers import CFGDenoiser, DiscreteDenoiser

__all__ = ["Pipeline", "PipelineNetwork", "load_pipeline"]

# What a network asks for beside timestep, class or text, by the key of its configuration.
_MORE_CONDITIONS = ("addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim", "class_embed_type")


class PipelineNetwork(nn.Module):
    """A pipeline's network with our signature: forward(x_t, t, y) -> eps or the clean image, (N, C, H, W),
    and a learned variance's channels behind it.

    t: (N,), int or float. y: (N,) int64; `null_class` is no class, or the negative prompt. Of a network that
    is told texts every other y is the prompt; one without conditions does not look at y. It computes in its
    own dtype, the answer is like x_t.

    num_classes: of a UNet2DModel with class embeddings; one more embedding is the null class. sizes: what
    SD-XL is told beside texts, in pixels, with either prompt: height and width of the original, the top and
    left that were cut off, height and width of the target; by default S, S, 0, 0, S, S for images of side S.

    condition: "text", "class" or "". null_class: None where there is none. learned_variance, in_channels,
    input_size, latent, is_dit: of the network. multiple: of what its sample's sides must be. Raises
    ValueError for a prompt or sizes that have no use, for a prompt that is missing or too long, and for
    networks that ask for more.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        prompt: str | None = None,
        negative_prompt: str = "",
        num_classes: int | None = None,
        sizes: Sequence[float] | None = None,
    ):
        super().__init__()
        self.network, config = pipeline.network.eval().requires_grad_(False), pipeline.network.config
        self.schedule, self.latent = TrainedSchedule(pipeline.scheduler), pipeline.latent
        self.in_channels, self.input_size = config.in_channels, _side(config.sample_size, pipeline.name)
        self.learned_variance = _learns_variance(config, pipeline.name)
        self.is_dit, self.multiple = "num_embeds_ada_norm" in config, _multiple(config)
        _refuse_conditions(config, pipeline.name)
        embeddings = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
        self.condition = "text" if _is_told_text(config) else "class" if embeddings else ""
        self.null_class, self.num_classes = self._classes(config, embeddings, num_classes, pipeline.name)
        if self.condition == "text":
            if prompt is None:
                raise ValueError(f"{pipeline.name} is told a text: give a prompt")
            self.text = TextConditions(pipeline, prompt, negative_prompt, sizes)
        elif prompt is not None or negative_prompt or sizes is not None:
            given = "sizes" if sizes is not None else "a prompt"
            told = "classes" if self.condition else "nothing"
            raise ValueError(f"{given}, but the network of {pipeline.name} is told {told}: drop it")

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        x, times = self.schedule.asked(x_t, t)
        x = x.to(next(self.network.parameters()).dtype)
        answer = self.network(x, times, **self._conditions(x, y)).sample.to(x_t.dtype)
        prediction, variance = answer[:, : self.in_channels], answer[:, self.in_channels :]
        return torch.cat([self.schedule.answered(prediction, x_t, t), variance], dim=1)

    def process(self, steps: int | None = None, spacing: str = "") -> Any:
        """See `TrainedSchedule.process`."""
        return self.schedule.process(self.learned_variance, steps, spacing)

    def denoiser(
        self, y: Tensor, cfg_scale: float = 1.0, *, clip_denoised: bool | None = None
    ) -> DiscreteDenoiser | CFGDenoiser:
        """The denoiser for these labels, (N,) int64, with classifier-free guidance bound.

        clip_denoised: clamp the answer to [-1, 1]; by default where it is pixels. Raises ValueError for
        guidance of a network without a null class.
        """
        clip, process = not self.latent if clip_denoised is None else clip_denoised, self.process()
        if cfg_scale == 1:
            return DiscreteDenoiser(self, process, {"y": y}, clip_denoised=clip)
        parts = [
            DiscreteDenoiser(self, process, {"y": labels}, clip_denoised=False)
            for labels in (y, torch.full_like(y, self.require_null()))
        ]
        return CFGDenoiser(*parts, cfg_scale, clip_denoised=clip)

    def require_null(self) -> int:
        """The null class. Raises ValueError where there is none."""
        if self.null_class is None:
            raise ValueError("classifier-free guidance needs a network that was trained without labels too")
        return self.null_class

    def _classes(self, config, embeddings, num_classes, name):
        """The null class, and how many classes there are beside it; None for those that are none."""
        if self.condition == "text":
            return -1, None
        if self.condition == "":
            return None, None
        if self.is_dit:
            return embeddings, embeddings  # one more for the null class, which is not counted there
        if num_classes not in (None, embeddings, embeddings - 1):
            raise ValueError(f"{num_classes} classes: the network of {name} has {embeddings} embeddings")
        return (num_classes, num_classes) if num_classes == embeddings - 1 else (None, embeddings)

    def _conditions(self, x, y):
        if self.condition == "text":
            return self.text(x, y == self.null_class)
        return {"class_labels": y} if self.condition == "class" else {}


def _refuse_conditions(config, name):
    """Raise ValueError for a network that asks for what is not known."""
    for key in _MORE_CONDITIONS:
        if config.get(key) is not None and not (key == "addition_embed_type" and is_xl(config)):
            raise ValueError(f"{name} has {key} {config[key]!r}: its network asks for more than is known")


def _multiple(config):
    """A UNet2DModel puts its levels together at the sizes that it halved."""
    is_plain = not _is_told_text(config) and "num_embeds_ada_norm" not in config
    return 2 ** (len(config.block_out_channels) - 1) if is_plain else 1


def _is_told_text(config):
    return config.get("cross_attention_dim") is not None and "encoder_hid_dim" in config


def _side(size, name):
    """Height and width of a sample. Raises ValueError where they differ, or are not said."""
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(f"the network of {name} has sample_size {size}, and only squares can be sampled")
    return sides.pop()


def _learns_variance(config, name):
    """Whether the network answers a variance beside its prediction. Raises ValueError for other channels."""
    said, taken = config.out_channels or config.in_channels, config.in_channels
    if said not in (taken, 2 * taken):
        raise ValueError(
            f"the network of {name} takes {taken} channels and answers {said}: it is another kind"
        )
    return said == 2 * taken

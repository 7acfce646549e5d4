"""An ADM network as a pipeline of diffusers.

diffusers' UNet2DModel is the same function of the same weights where every attention has heads of one width
and the first level has the width of the time embedding: scale-shift norms, residual blocks that resample,
both orders of the attention's channels, a learned variance and class embeddings all have their place there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from guided_diffusion.adapters.pipeline_folder import require_diffusers
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.unet import AttentionBlock, Downsample, ResBlock, UNetModel, Upsample

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def export_pipeline(
    model: UNetModel, diffusion: GaussianDiffusion, noise_schedule: str, folder: str | Path
) -> None:
    """Write diffusers' folder of a DDPMPipeline: the same network, and a scheduler with the same process.

    noise_schedule: the name of the process's betas, linear or cosine. Raises ValueError for a network or a
    process that diffusers cannot express, and what `require_diffusers` raises.
    """
    diffusers = require_diffusers()
    scheduler = diffusers.DDPMScheduler(**_process(diffusion, noise_schedule))
    unet = diffusers_unet(model)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=True)


def diffusers_unet(model: UNetModel) -> Any:
    """diffusers' UNet2DModel with an ADM network's weights. Raises ValueError as above."""
    unet = require_diffusers().UNet2DModel(**_config(model))
    unet.load_state_dict(_state(model))
    return unet.eval()


def _process(diffusion, noise_schedule):
    trained = diffusion.original_num_steps
    if diffusion.rescale_timesteps and trained != 1000:
        raise ValueError(
            f"--rescale_timesteps True with {trained} timesteps: diffusers gives them as they are"
        )
    return {
        "num_train_timesteps": trained,
        "beta_schedule": _BETAS[noise_schedule],
        "beta_start": 1e-4 * 1000 / trained,
        "beta_end": 0.02 * 1000 / trained,
        "prediction_type": "sample" if diffusion.model_mean_type is ModelMeanType.START_X else "epsilon",
        "variance_type": {
            ModelVarType.LEARNED_RANGE: "learned_range",
            ModelVarType.FIXED_LARGE: "fixed_large",
            ModelVarType.FIXED_SMALL: "fixed_small",
        }[diffusion.model_var_type],
        "timestep_spacing": "linspace",
    }


def _places(model: UNetModel) -> Iterator[tuple[nn.Module, str]]:
    """(layer, diffusers' name) of all blocks: residual, attention and resampling ones."""
    yield from _places_on("down", list(model.input_blocks)[1:])
    yield from _places_on("mid", [model.middle_block])
    yield from _places_on("up", list(model.output_blocks))


def _places_on(way, blocks):
    level, resnets = 0, 0
    for block in blocks:
        for layer in block:
            prefix = "mid_block" if way == "mid" else f"{way}_blocks.{level}"
            if isinstance(layer, AttentionBlock):
                yield layer, f"{prefix}.attentions.{resnets - 1}"
            elif _resamples(layer):
                yield layer, f"{prefix}.{way}samplers.0"
                level, resnets = level + 1, 0
            else:
                yield layer, f"{prefix}.resnets.{resnets}"
                resnets += 1


def _resamples(layer):
    if isinstance(layer, ResBlock):
        return not isinstance(layer.resample, nn.Identity)
    return isinstance(layer, (Downsample, Upsample))


def _config(model):
    places = list(_places(model))
    levels: dict[int, int] = {}  # channels
    attended, widths = set(), set()
    resampled = {type(layer) for layer, place in places if "samplers" in place}
    for layer, place in places:
        level = int(place.split(".")[1]) if place.startswith("down") else None
        if isinstance(layer, AttentionBlock):
            widths.add(layer.norm.num_channels // layer.num_heads)
            attended |= {level} - {None}
        elif level is not None and ".resnets." in place:
            levels[level] = layer.out_layers[0].num_channels
    if len(widths) > 1:
        raise ValueError(
            f"the attentions have heads of {sorted(widths)} channels, and diffusers' UNet2DModel has one "
            "width"
        )
    if levels[0] != model.model_channels:
        raise ValueError(
            f"the first level has {levels[0]} channels and the time embedding {model.model_channels}, and "
            "diffusers' UNet2DModel has one width for both"
        )
    scale_shift = places[0][0].use_scale_shift_norm
    return {
        "sample_size": model.image_size,
        "in_channels": model.in_channels,
        "out_channels": model.out[-1].out_channels,
        "block_out_channels": tuple(levels.values()),
        "layers_per_block": sum(place.startswith("down_blocks.0.resnets") for _, place in places),
        "attention_head_dim": widths.pop(),
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "attn_norm_num_groups": 32,
        "num_class_embeds": model.num_classes,
        **_block_types(levels, attended, "resnet" if ResBlock in resampled else "conv"),
    }


def _block_types(levels, attended, resampling):
    plain = {"resnet": ("ResnetDownsample", "ResnetUpsample"), "conv": ("Down", "Up")}[resampling]
    down = [f"{'AttnDown' if level in attended else plain[0]}Block2D" for level in levels]
    up = [f"{'AttnUp' if level in attended else plain[1]}Block2D" for level in reversed(levels)]
    return {
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "downsample_type": resampling,
        "upsample_type": resampling,
    }


def _state(model) -> dict[str, Tensor]:
    state = model.state_dict()
    renamed = {
        f"{theirs}.{kind}": state[f"{ours}.{kind}"]
        for ours, theirs in _OUTSIDE.items()
        for kind in ("weight", "bias")
        if f"{ours}.{kind}" in state
    }
    for layer, theirs in _places(model):
        named = _attention(layer) if isinstance(layer, AttentionBlock) else _convolutions(layer)
        for own, name in named:
            renamed |= {f"{theirs}.{name}.{kind}": tensor for kind, tensor in own.items()}
    return {name: tensor.float().contiguous() for name, tensor in renamed.items()}


def _convolutions(layer):
    """(parameters by kind, diffusers' name) of a residual block, or of a convolution that resamples."""
    if not isinstance(layer, ResBlock):
        return [((layer.op if isinstance(layer, Downsample) else layer.conv).state_dict(), "conv")]
    parts = [(layer.get_submodule(ours).state_dict(), theirs) for ours, theirs in _RESNET.items()]
    return [part for part in parts if part[0]]


def _attention(layer):
    """The same of an attention, whose channels lie as `layers.attention` has them."""
    qkv, out = layer.qkv.state_dict(), layer.proj_out.state_dict()
    order = (3, layer.num_heads, -1) if layer.use_new_attention_order else (layer.num_heads, 3, -1)
    parts = {}
    for kind, tensor in qkv.items():
        rows = tensor.flatten(1) if kind == "weight" else tensor[:, None]
        each = rows.unflatten(0, order).movedim(0 if layer.use_new_attention_order else 1, 0).flatten(1, 2)
        parts[kind] = each if kind == "weight" else each[..., 0]
    three = [
        ({kind: tensor[i] for kind, tensor in parts.items()}, f"to_{name}") for i, name in enumerate("qkv")
    ]
    to_out = {"weight": out["weight"].flatten(1), "bias": out["bias"]}
    return [(layer.norm.state_dict(), "group_norm"), *three, (to_out, "to_out.0")]

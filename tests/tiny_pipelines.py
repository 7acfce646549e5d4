"""Tiny pipelines of diffusers with random weights, and sampling them by our steps and by their scheduler's; a
test that wants one skips without diffusers.
"""

import json
import math

import pytest
import torch

from guided_diffusion.solvers import SOLVERS

FLOW = "FlowMatchEulerDiscreteScheduler"
STEPS = 4
UNET = {"sample_size": 8, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny(kind, folder=None, **options):
    """A pipeline by its kind, "ddpm", "dit", "sd" or "sdxl"; saved in a folder, if one is given. options: of
    its network.
    """
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    pipe = {"ddpm": _ddpm, "dit": _dit, "sd": _stable_diffusion, "sdxl": _sdxl}[kind](options)
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def _ddpm(options):
    import diffusers

    ways = {"down": ("DownBlock2D", "AttnDownBlock2D"), "up": ("AttnUpBlock2D", "UpBlock2D")}
    blocks = {f"{way}_block_types": names for way, names in ways.items()}
    unet = diffusers.UNet2DModel(**{**UNET, "sample_size": 16}, **blocks, **options)
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def _dit(options):
    import diffusers

    size = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "sample_size": 8}
    net = diffusers.DiTTransformer2DModel(
        **size, in_channels=4, out_channels=8, **{"num_embeds_ada_norm": 1000, **options}
    )
    return diffusers.DiTPipeline(net, _vae(), diffusers.DDIMScheduler(clip_sample=False))


def _text_unet(options):
    import diffusers

    ways = {"down": ("DownBlock2D", "CrossAttnDownBlock2D"), "up": ("CrossAttnUpBlock2D", "UpBlock2D")}
    blocks = {f"{way}_block_types": names for way, names in ways.items()}
    latents = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(**{**UNET, **latents, **blocks, **options})


def _stable_diffusion(options):
    import diffusers

    tokenizer, encoder = _text()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=_text_unet(options),
        scheduler=diffusers.DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(options):
    """Its two text encoders say 16 + 24 numbers, and 12 pooled ones."""
    import diffusers

    (first, narrow), (second, wide) = _text(), _text(24, projection_dim=12)
    asked = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    asked |= {"cross_attention_dim": 40, "projection_class_embeddings_input_dim": 6 * 8 + 12}
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=narrow,
        text_encoder_2=wide,
        tokenizer=first,
        tokenizer_2=second,
        unet=_text_unet({**asked, **options}),
        scheduler=diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _vae():
    import diffusers

    ways = {"down": "DownEncoder", "up": "UpDecoder"}
    blocks = {f"{way}_block_types": (f"{name}Block2D",) * 2 for way, name in ways.items()}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks
    ).requires_grad_(False)


def _vocabulary():
    words = ["<|startoftext|>", "<|endoftext|>"]
    return words + [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]


def _text(width=16, **projection):
    """A tokenizer of single letters, and an encoder of 12 of them, with a projection or without."""
    import tempfile
    from pathlib import Path

    import transformers

    words = _vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer(str(vocabulary), str(merges), model_max_length=12)
    config = transformers.CLIPTextConfig(
        **dict.fromkeys(("hidden_size", "intermediate_size"), width),
        **projection,
        vocab_size=len(words),
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return tokenizer, getattr(transformers, kind)(config)


# Sampling by both


def with_scheduler(pipe, name, **options):
    """The pipeline with another scheduler, by its name in diffusers."""
    import diffusers

    pipe.scheduler = getattr(diffusers, name)(**options)
    return pipe


def noise_like(network, n=2):
    shape = (n, network.in_channels, network.input_size, network.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def levels_of(network, scheduler):
    """Those that the scheduler takes, its ends in noise and in the image as ours."""
    if network.schedule.is_flow:
        return [min(s / (1 - s), 1e6) if s < 1 else 1e6 for s in scheduler.sigmas.double().tolist()]
    process = network.process(STEPS)
    return [*(process.sigma(t) for t in range(STEPS - 1, -1, -1)), 0.0]


def sampled(denoise, noise, sigmas, scheduler):
    """Euler's method, from where the scheduler begins: in diffusers not always at sqrt(1 + sigma^2)."""
    start = math.sqrt(1 + sigmas[0] ** 2)
    if type(scheduler).__name__ == "EulerDiscreteScheduler":
        start = float(scheduler.init_noise_sigma)
    elif scheduler.config.get("use_flow_sigmas") or type(scheduler).__name__ == FLOW:
        start = 1 + sigmas[0]  # noise stands for x_0 (1 - s) + s noise, s = sigma / (1 + sigma)
    return SOLVERS["euler"](denoise, noise.double() * start, sigmas)


@torch.no_grad()
def own_loop(pipe, noise, callback=lambda pipe, i, t, kwargs: kwargs):
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(pipe.unet(given, t).sample, t, x).prev_sample
        x = callback(pipe, i, t, {"latents": x})["latents"]
    return x

"""DiT, the diffusion transformer, with the parameter names of the published checkpoints.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023). Shapes in the comments: N images,
C channels of the latent, H x W its sides, T patches of p x p, D the width.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.diffusers_dit import find_transformer, is_diffusers, original_names
from guided_diffusion.files.pretrained import existing_file
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.layers import timestep_embedding

FREQUENCIES = 256  # of the timestep, half of them cosines
GUIDED_CHANNELS = 3  # of `forward_with_cfg`, as published: the first three, though a latent has four


class DiT(nn.Module):
    """The network: forward(x, t, y) -> (N, C, H, W), or (N, 2C, H, W) with learn_sigma: eps, then the
    variance.

    x: (N, C, H, W) with H = W = input_size. t: (N,) timesteps, int or float. y: (N,) int64 classes; with
    class_dropout_prob > 0 there is a class more, num_classes, for no class, and in training mode a label
    becomes it with that probability. Raises ValueError for sizes that patches or heads do not divide.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ):
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"DiT of input_size {input_size}, patch_size {patch_size}, hidden_size {hidden_size}, "
                f"num_heads {num_heads}: patches must divide the input, heads and 4 the width"
            )
        self.input_size, self.patch_size, self.num_classes = input_size, patch_size, num_classes
        self.in_channels, self.out_channels = in_channels, in_channels * (1 + learn_sigma)
        self.learn_sigma = learn_sigma
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(num_classes, hidden_size, class_dropout_prob)
        positions = sine_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, c)
        return self._image(self.final_layer(x, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """As `forward`, where y is N / 2 classes and then N / 2 of no class: the first half of x is shown
        twice, and the first three channels of both answers are uncond + cfg_scale * (cond - uncond) (Ho and
        Salimans, 2022).
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :GUIDED_CHANNELS].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, GUIDED_CHANNELS:]], dim=1)

    def _image(self, patches: Tensor) -> Tensor:
        """(N, T, p * p * C) -> (N, C, H, W)."""
        side, p = self.input_size // self.patch_size, self.patch_size
        grid = patches.view(len(patches), side, side, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), self.out_channels, side * p, side * p)

    def _initialise(self) -> None:
        """As in the paper: each block begins as the identity ("adaLN-Zero"), and the output at 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.flatten(1))
        nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        for embedding in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(embedding.weight, std=0.02)
        modulated = [*self.blocks, self.final_layer]
        for layer in (*(each.adaLN_modulation[1] for each in modulated), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


class PatchEmbedding(nn.Module):
    """(N, C, H, W) -> (N, T, D), row by row."""

    def __init__(self, patch_size: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """(N,) -> (N, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, FREQUENCIES).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """(N,) int64 -> (N, D); the last row is for no class where labels are dropped."""

    def __init__(self, num_classes: int, width: int, dropout_prob: float):
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(len(y), device=y.device) < self.dropout_prob
            y = torch.where(dropped, self.num_classes, y)
        return self.embedding_table(y)


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the condition: x (N, T, D), c (N, D) -> (N, T, D)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate * self.attn(modulate(self.norm(x), shift, scale))
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class Attention(nn.Module):
    """Self-attention with all heads' queries, keys and values in one layer."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).view(n, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """x (N, T, D), c (N, D) -> (N, T, outputs)."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm(x), shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift."""
    return x * (1 + scale) + shift


def sine_positions(width: int, side: int) -> Tensor:
    """(side * side, width) float32, the fixed embedding of the patches, row by row: of the column in the
    first half of the width, of the row in the second, each sines and then cosines of width / 4 frequencies.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * frequencies  # (side, D / 4)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    column, row = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return torch.tensor(np.concatenate([column, row], axis=1), dtype=torch.float32)


def _size(depth: int, hidden_size: int, num_heads: int, patch_size: int) -> Callable[..., DiT]:
    return partial(DiT, depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)


# The published sizes, (depth, width, heads), and T, of the digits; the number behind the slash is the
# patches' side.
SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6), "T": (6, 128, 4)}
DIT_MODELS = {f"DiT-{name}/{p}": _size(*size, p) for name, size in SIZES.items() for p in (2, 4, 8)}


def dit_file(path: str | Path) -> Path:
    """The file of weights that `load_dit` reads. Raises FileNotFoundError and ValueError."""
    return find_transformer(Path(path))[0] if Path(path).is_dir() else existing_file(path)


def load_dit(path: str | Path, checkpoint_key: str | None = None, num_heads: int | None = None) -> DiT:
    """Read a DiT, in eval mode and frozen: the original's file, plain or a training checkpoint (its "ema"
    unless checkpoint_key says another), or diffusers' folder of the transformer or of the pipeline.

    Both compute the original's arithmetic. The weights say all but the heads: they are those of the published
    width, of diffusers' configuration, or `num_heads`. Raises FileNotFoundError and ValueError.
    """
    path, config = Path(path), {}
    if path.is_dir():
        path, config = find_transformer(path)
    state = load_state_dict(path, checkpoint_key, prefer="ema")
    if is_diffusers(state):
        config = config or find_transformer(path)[1]
        state = original_names(state, path)
        patch = state["x_embedder.proj.weight"].shape[-1]
        width, side = state["x_embedder.proj.weight"].shape[0], config["sample_size"] // patch
        state["pos_embed"] = sine_positions(width, side)[None]
        num_heads = num_heads or config["num_attention_heads"]
    with torch.device("meta"):
        net = DiT(**_architecture(state, path, num_heads))
    load_into(net, state, path)
    return net.eval().requires_grad_(False)


def _architecture(state, path, num_heads):
    """The constructor's arguments, from the shapes."""
    try:
        width, channels, patch = state["x_embedder.proj.weight"].shape[:3]
        patches, outputs = state["pos_embed"].shape[1], len(state["final_layer.linear.bias"])
        hidden, rows = len(state["blocks.0.mlp.fc1.bias"]), len(state["y_embedder.embedding_table.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is no DiT: {error} is not there, or has another shape") from error
    published = {size[1]: size[2] for size in SIZES.values()}
    if num_heads is None and width not in published:
        known = ", ".join(map(str, published))
        raise ValueError(f"{path} is a DiT of width {width}: name its heads; those of {known} are known")
    return {
        "input_size": math.isqrt(patches) * patch,
        **{"patch_size": patch, "in_channels": channels, "hidden_size": width},
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": num_heads or published[width],
        "mlp_ratio": hidden / width,
        "num_classes": rows - 1,  # the last row is for no class
        "learn_sigma": outputs == 2 * channels * patch**2,
    }

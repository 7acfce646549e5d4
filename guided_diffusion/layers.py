"""What the networks share: small layers, attention, resampling, and the switch for the reuse of activations.

Shapes in the comments: N images, C channels, H x W pixels, T = H*W positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def memory_format(device: torch.device) -> torch.memory_format:
    """How a network of convolutions keeps its tensors on a device.

    channels_last on a CPU. On CUDA PyTorch's group norm works and answers in NCHW, so that channels_last
    costs two changes of format for each norm: a step took 1.25 times as long (docs/benchmarks.md).
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


# The reuse of activations


class Reusable(nn.Module):
    """A network or layer that can write its results over activations that nobody reads any more.

    That saves time and memory, but a forward hook that kept such an activation finds it changed. So it is
    off until `reuse_activations` turns it on, for this module and all inside it. It never happens where a
    graph is recorded, and the numbers are the same bit for bit.
    """

    reuse = False

    def reuse_activations(self, on: bool = True) -> "Reusable":
        """Turn the reuse on or off; returns the module itself."""
        for module in self.modules():
            if isinstance(module, Reusable):
                module.reuse = on
        return self

    def overwrites(self) -> bool:
        """Whether this module may overwrite activations now."""
        return self.reuse and not torch.is_grad_enabled()

    def add(self, h: Tensor, residual: Tensor, scale: float = 1.0) -> Tensor:
        """(h + residual) * scale, in h's memory if allowed."""
        if self.overwrites():
            return h.add_(residual) if scale == 1 else h.add_(residual).mul_(scale)
        return h + residual if scale == 1 else (h + residual) * scale

    def scale_shift(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """h * (1 + scale) + shift, in h's memory if allowed."""
        return h.mul_(1 + scale).add_(shift) if self.overwrites() else h * (1 + scale) + shift


class SiLU(Reusable):
    """x * sigmoid(x), for an input that nobody else reads: in x's memory if allowed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=self.overwrites())


# Small layers and functions


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in float32 whatever the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # This kernel takes a bfloat16 input with float32 weights, and computes in float32.
            return super().forward(x)
        return super().forward(x.float()).to(x.dtype)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of (N,) timesteps, int or float: (N, dim) float32, cosines first, then sines.

    Vaswani et al., 2017, section 3.5: the frequencies are max_period ** (-i / (dim // 2)).
    """
    half = dim // 2
    powers = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    args = timesteps[:, None].float() * torch.exp(-math.log(max_period) * powers)
    return F.pad(torch.cat([torch.cos(args), torch.sin(args)], dim=1), (0, dim % 2))


def zeroed(module: nn.Module) -> nn.Module:
    """Start a residual branch at zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def run_recomputed(function: Any, *inputs: Tensor, recompute: bool) -> Tensor:
    """Call `function`; with `recompute`, the backward pass computes its activations again instead of keeping
    them (gradient checkpointing).
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)


# Attention


def head_count(channels: int, num_heads: int, num_head_channels: int) -> int:
    """The number of heads; `num_head_channels` other than -1 decides alone. Raises ValueError if channels
    are left over.
    """
    heads = num_heads if num_head_channels == -1 else channels // num_head_channels
    if heads < 1 or channels % heads or (num_head_channels != -1 and channels % num_head_channels):
        raise ValueError(
            f"{channels} channels cannot be cut into heads "
            f"(num_heads {num_heads}, num_head_channels {num_head_channels})"
        )
    return heads


def attention(qkv: Tensor, num_heads: int, use_new_attention_order: bool) -> Tensor:
    """(N, T, 3C) -> (N, T, C). The channels lie as [head, qkv, C/heads], or as [qkv, head, C/heads] in the
    new order.
    """
    n, length, width = qkv.shape
    qkv = qkv.contiguous()  # else the fused kernels refuse, and a slow one steps in
    if use_new_attention_order:
        q, k, v = qkv.view(n, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = qkv.view(n, length, num_heads, 3, -1).permute(3, 0, 2, 1, 4)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The fused kernel is no faster there than in float32; plain products are, by a third.
        h = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1) @ v
    else:
        h = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, C/heads)
    return h.transpose(1, 2).reshape(n, length, width // 3)


class Pointwise(nn.Conv1d):
    """A 1x1 convolution of (N, C, H, W) as it lies in memory, with the parameters of a Conv1d over H*W
    positions, which is what the published files hold.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[..., None], self.bias)


# 2x resampling


def resample(x: Tensor, mode: str, kernel: Tensor | None = None) -> Tensor:
    """(N, C, H, W) at twice ("up") or half ("down") the size.

    kernel: (1, 1, k, k), k even, of sum 1. None is the 2x2 box: the nearest neighbour, or the mean. Outside
    the image are zeros.
    """
    if kernel is None:
        return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else F.avg_pool2d(x, 2)
    weight = kernel.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    padding = kernel.shape[-1] // 2 - 1  # as many as keep H and W exactly doubled or halved
    if mode == "up":
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, weight, stride=2, padding=padding, groups=x.shape[1])


def filter_kernel(taps: Sequence[float]) -> Tensor:
    """(1, 1, k, k), of sum 1: the 2d filter of these taps. Raises ValueError unless their number is even."""
    if not taps or len(taps) % 2 or sum(taps) == 0:
        raise ValueError(f"resample_filter needs an even number of taps whose sum is not 0, got {list(taps)}")
    f = torch.as_tensor(taps, dtype=torch.float32) / sum(taps)
    return torch.outer(f, f)[None, None]

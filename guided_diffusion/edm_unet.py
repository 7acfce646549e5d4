"""The ADM U-Net as EDM trains it, "DhariwalUNet", and the blocks that EDM's networks share.

Architecture: the U-Net of Dhariwal and Nichol, 2021, in the variant of "Elucidating the Design Space of
Diffusion-Based Generative Models" (Karras et al., 2022). Parameter names and shapes are those of the
published files, so that `load_state_dict(strict=True)` is all it takes. What differs from unet.py: where the
blocks attend and which resample, the order of the channels in attention, the width of the normalisation's
groups, and a class embedding that joins before the last activation.

The file reads from the outside in. Shapes in the comments: N images, C channels, H x W pixels, T = H*W
positions, E embedding channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.layers import (
    GroupNorm32,
    Reusable,
    SiLU,
    attention,
    filter_kernel,
    memory_format,
    resample,
    timestep_embedding,
    zeroed,
)

CHANNELS_PER_HEAD = 64
BOX = (1, 1)  # the taps of the 2x2 box


class RawNetwork(Reusable):
    """What EDM's raw networks share: forward(x, noise_labels, class_labels=None, augment_labels=None) -> (N,
    out_channels, H, W) float32.

    x: (N, in_channels, H, W), whose dtype is that of the convolutions. noise_labels: (N,) or (1,) float.
    class_labels: (N, label_dim) and augment_labels: (N, augment_dim), float; None is zeros. Parameters are
    float32 whatever x is. `attn_resolutions` are in pixels of an image of `img_resolution`. Raises ValueError
    where sizes or channels cannot be divided as asked.
    """

    def __init__(self, img_resolution, label_dim, channel_mult, label_dropout):
        super().__init__()
        halvings = len(channel_mult) - 1
        if halvings < 0 or img_resolution < 1:
            raise ValueError(f"channel_mult {channel_mult} at img_resolution {img_resolution} has no levels")
        if img_resolution % 2**halvings:
            raise ValueError(
                f"img_resolution {img_resolution} cannot be halved {halvings} times, as channel_mult asks"
            )
        self.label_dim = label_dim
        self.label_dropout = label_dropout

    def known_labels(self, class_labels, emb):
        """The labels in emb's dtype, zeros for None; training drops a row with chance label_dropout."""
        if class_labels is None:
            return emb.new_zeros(1, self.label_dim)
        class_labels = class_labels.to(emb.dtype)
        if not (self.training and self.label_dropout):
            return class_labels
        kept = torch.rand(len(class_labels), 1, device=class_labels.device) >= self.label_dropout
        return class_labels * kept


class DhariwalUNet(RawNetwork):
    """The ADM network; forward and arguments as in `RawNetwork`."""

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=192,
        channel_mult=(1, 2, 3, 4),
        num_blocks=3,
        attn_resolutions=(32, 16, 8),
        dropout=0.1,
        label_dropout=0,
    ):
        super().__init__(img_resolution, label_dim, channel_mult, label_dropout)
        emb_channels = 4 * model_channels
        self.model_channels = model_channels
        self.map_augment = zeroed(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)  # one-hot rows pick a column: an embedding

        # (name of the level, its channels, whether its blocks attend), the finest first
        levels = [
            (f"{size}x{size}", model_channels * mult, size in attn_resolutions)
            for size, mult in ((img_resolution >> i, mult) for i, mult in enumerate(channel_mult))
        ]
        options = BlockOptions(emb_channels, dropout)
        self.enc, skip_channels = _encoder(in_channels, levels, num_blocks, options)
        self.dec = _decoder(skip_channels, levels, num_blocks, options)
        width = levels[0][1]
        self.out_norm = group_norm(width)
        self.out_conv = zeroed(Conv2d(width, out_channels, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self._embedding(noise_labels, class_labels, augment_labels)
        x = x.to(memory_format=memory_format(x.device))
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            x = layer(torch.cat([x, skips.pop()], dim=1) if _takes_skip(name) else x, emb)
        return self.out_conv(F.silu(self.out_norm(x.float())))

    def _embedding(self, noise_labels, class_labels, augment_labels):
        emb = timestep_embedding(noise_labels, self.model_channels)  # (N, model_channels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))  # (N, E)
        if self.map_label is not None:
            emb = emb + self.map_label(self.known_labels(class_labels, emb))
        return F.silu(emb)


def _encoder(in_channels, levels, num_blocks, options):
    """Return the descending blocks and the number of channels that each of them puts out."""
    blocks, channels = nn.ModuleDict(), [levels[0][1]]
    for name, width, attends in levels:
        if not blocks:
            blocks[f"{name}_conv"] = Conv2d(in_channels, width, 3)
        else:
            blocks[f"{name}_down"] = UNetBlock(channels[-1], channels[-1], options, mode="down")
            channels.append(channels[-1])
        for i in range(num_blocks):
            blocks[f"{name}_block{i}"] = UNetBlock(channels[-1], width, options, attends=attends)
            channels.append(width)
    return blocks, channels


def _decoder(skip_channels, levels, num_blocks, options):
    """The ascending blocks; those named "block" take the previous output and one skip connection,
    concatenated.
    """
    skip_channels = list(skip_channels)
    blocks, channels = nn.ModuleDict(), skip_channels[-1]
    for name, width, attends in reversed(levels):
        if not blocks:
            blocks[f"{name}_in0"] = UNetBlock(channels, channels, options, attends=True)
            blocks[f"{name}_in1"] = UNetBlock(channels, channels, options)
        else:
            blocks[f"{name}_up"] = UNetBlock(channels, channels, options, mode="up")
        for i in range(num_blocks + 1):
            joined = channels + skip_channels.pop()
            blocks[f"{name}_block{i}"] = UNetBlock(joined, width, options, attends=attends)
            channels = width
    return blocks


def _takes_skip(name):
    return "_block" in name


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of one network have in common; the defaults are DhariwalUNet's.

    channels_per_head: None is one head. adaptive_scale: the embedding gives a scale too, not only a shift.
    skip_scale: factor of each residual sum. eps: that of the normalisations. resample_filter: taps of the
    separable filter. project_resampled: a block that resamples has a 1x1 convolution beside it.
    """

    emb_channels: int
    dropout: float
    channels_per_head: int | None = CHANNELS_PER_HEAD
    adaptive_scale: bool = True
    skip_scale: float = 1.0
    eps: float = 1e-5
    resample_filter: Sequence[float] = BOX
    project_resampled: bool = False


class UNetBlock(Reusable):
    """Residual block, 2x resampling inside if asked for, then self-attention: (N, C, H, W), (N, E) -> (N,
    out, H', W').

    mode: "up", "down" or None. Attention that is asked for in a block narrower than a head is left out, as in
    the published networks.
    """

    def __init__(self, in_channels, out_channels, options, mode=None, attends=False):
        super().__init__()
        self.adaptive_scale = options.adaptive_scale
        self.skip_scale = options.skip_scale
        taps = options.resample_filter
        self.norm0 = group_norm(in_channels, options.eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, mode, taps)
        affine_channels = 2 * out_channels if options.adaptive_scale else out_channels
        self.affine = nn.Linear(options.emb_channels, affine_channels)
        self.norm1 = group_norm(out_channels, options.eps)
        self.conv1 = zeroed(Conv2d(out_channels, out_channels, 3))
        self.act = SiLU()
        self.dropout = nn.Dropout(options.dropout)
        if in_channels != out_channels or (mode and options.project_resampled):
            self.skip = Conv2d(in_channels, out_channels, 1, mode, taps)
        else:
            self.skip = Resample(mode, taps) if mode else nn.Identity()
        self.num_heads = _heads(out_channels, options.channels_per_head) if attends else 0
        if self.num_heads:
            self.norm2 = group_norm(out_channels, options.eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = zeroed(Conv2d(out_channels, out_channels, 1))

    def forward(self, x, emb):
        h = self.conv0(self.act(self.norm0(x)))
        emb = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), scale + 1)
        else:
            h = self.norm1(self.add(h, emb))
        h = self.conv1(self.dropout(self.act(h)))
        x = self.add(h, self.skip(x), self.skip_scale)
        return self.add(self._attend(x), x, self.skip_scale) if self.num_heads else x

    def _attend(self, x):
        # (N, T, 3C), the channels as [head, C/heads, qkv], then as [head, qkv, C/heads]
        qkv = self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)
        qkv = qkv.unflatten(2, (self.num_heads, -1, 3)).transpose(3, 4).flatten(2)
        h = attention(qkv, self.num_heads, use_new_attention_order=False)
        return self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]))


def _heads(channels, channels_per_head):
    heads = channels // channels_per_head if channels_per_head else 1
    if heads and channels % heads:
        raise ValueError(
            f"{channels} channels cannot be cut into {heads} heads; use a multiple of {channels_per_head}"
        )
    return heads


class _Resampler(nn.Module):
    """What resamples by 2, "up" or "down", with a separable filter of these taps; mode None leaves x alone.

    The kernel is the buffer `resample_filter`, which the published files carry. For the 2x2 box `resample`
    has a short form.
    """

    def set_resampling(self, mode, taps):
        self.mode = mode
        self.is_box = len(taps) == 2 and taps[0] == taps[1]
        if mode:
            self.register_buffer("resample_filter", filter_kernel(taps))

    def resampled(self, x):
        if not self.mode:
            return x
        return resample(x, self.mode, None if self.is_box else self.resample_filter)


class Resample(_Resampler):
    """2x resampling alone."""

    def __init__(self, mode, taps=BOX):
        super().__init__()
        self.set_resampling(mode, taps)

    def forward(self, x):
        return self.resampled(x)


class Conv2d(nn.Conv2d, _Resampler):
    """A convolution that keeps the size, after 2x resampling if asked for; it computes in the dtype of its
    input, not of its weights.
    """

    def __init__(self, in_channels, out_channels, kernel, mode=None, taps=BOX):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.set_resampling(mode, taps)

    def forward(self, x):
        x = self.resampled(x)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


def group_norm(channels, eps=1e-5):
    return GroupNorm32(min(32, channels // 4), channels, eps=eps)

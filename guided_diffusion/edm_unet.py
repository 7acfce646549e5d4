"""The ADM U-Net as EDM trains it, "DhariwalUNet".

Architecture: the U-Net of Dhariwal and Nichol, 2021, in the variant of "Elucidating the Design Space of
Diffusion-Based Generative Models" (Karras et al., 2022). Parameter names and shapes are those of the
published files, so that `load_state_dict(strict=True)` is all it takes. What differs from unet.py: where the
blocks attend and which resample, the order of the channels in attention, the width of the normalisation's
groups, and a class embedding that joins before the last activation.

The file reads from the outside in. Shapes in the comments: N images, C channels, H x W pixels, T = H*W
positions, E embedding channels.
"""

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.unet import GroupNorm32, SiLU, _add, _attention, _zeroed, timestep_embedding

CHANNELS_PER_HEAD = 64


class DhariwalUNet(nn.Module):
    """The raw network F: forward(x, noise_labels, class_labels=None, augment_labels=None) -> (N,
    out_channels, H, W) float32.

    x: (N, in_channels, H, W), whose dtype is that of the convolutions. noise_labels: (N,) or (1,) float.
    class_labels: (N, label_dim) and augment_labels: (N, augment_dim), float; None is zeros.
    `attn_resolutions` are in pixels of an image of `img_resolution`. Parameters are float32 whatever x is.
    Raises ValueError where sizes or channels cannot be divided as asked.
    """

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
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times, as channel_mult asks"
            )
        emb_channels = 4 * model_channels
        self.model_channels = model_channels
        self.label_dropout = label_dropout
        self.map_augment = (
            _zeroed(nn.Linear(augment_dim, model_channels, bias=False)) if augment_dim else None
        )
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
        options = {"emb_channels": emb_channels, "dropout": dropout}
        self.enc, skip_channels = _encoder(in_channels, levels, num_blocks, options)
        self.dec = _decoder(skip_channels, levels, num_blocks, options)
        width = levels[0][1]
        self.out_norm = _group_norm(width)
        self.out_conv = _zeroed(Conv2d(width, out_channels, 3))
        self.to(memory_format=torch.channels_last)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self._embedding(noise_labels, class_labels, augment_labels)
        x = x.to(memory_format=torch.channels_last)
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
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self._dropped(class_labels.to(emb.dtype)))
        return F.silu(emb)

    def _dropped(self, class_labels):
        if not (self.training and self.label_dropout):
            return class_labels
        return class_labels * (
            torch.rand(len(class_labels), 1, device=class_labels.device) >= self.label_dropout
        )


def _encoder(in_channels, levels, num_blocks, options):
    """Return the descending blocks and the number of channels that each of them puts out."""
    blocks, channels = nn.ModuleDict(), [levels[0][1]]
    for name, width, attention in levels:
        if not blocks:
            blocks[f"{name}_conv"] = Conv2d(in_channels, width, 3)
        else:
            blocks[f"{name}_down"] = UNetBlock(channels[-1], channels[-1], resample="down", **options)
            channels.append(channels[-1])
        for i in range(num_blocks):
            blocks[f"{name}_block{i}"] = UNetBlock(channels[-1], width, attention=attention, **options)
            channels.append(width)
    return blocks, channels


def _decoder(skip_channels, levels, num_blocks, options):
    """The ascending blocks; those named "block" take the previous output and one skip connection,
    concatenated.
    """
    skip_channels = list(skip_channels)
    blocks, channels = nn.ModuleDict(), skip_channels[-1]
    for name, width, attention in reversed(levels):
        if not blocks:
            blocks[f"{name}_in0"] = UNetBlock(channels, channels, attention=True, **options)
            blocks[f"{name}_in1"] = UNetBlock(channels, channels, **options)
        else:
            blocks[f"{name}_up"] = UNetBlock(channels, channels, resample="up", **options)
        for i in range(num_blocks + 1):
            blocks[f"{name}_block{i}"] = UNetBlock(
                channels + skip_channels.pop(), width, attention=attention, **options
            )
            channels = width
    return blocks


def _takes_skip(name):
    return "_block" in name


class UNetBlock(nn.Module):
    """Residual block, 2x resampling inside if asked for, then self-attention: (N, C, H, W), (N, E) -> (N,
    out, H', W').

    Attention needs 64 channels per head: asked for in a narrower block it is left out, as in the published
    networks.
    """

    def __init__(self, in_channels, out_channels, *, emb_channels, dropout, resample=None, attention=False):
        super().__init__()
        self.norm0 = _group_norm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = _group_norm(out_channels)
        self.conv1 = _zeroed(Conv2d(out_channels, out_channels, 3))
        self.act = SiLU()
        self.dropout = nn.Dropout(dropout)
        if in_channels != out_channels:
            self.skip = Conv2d(in_channels, out_channels, 1, resample)
        else:
            self.skip = Resample(resample) if resample else nn.Identity()
        self.num_heads = out_channels // CHANNELS_PER_HEAD if attention else 0
        if self.num_heads:
            if out_channels % self.num_heads:
                raise ValueError(
                    f"{out_channels} channels cannot be cut into {self.num_heads} heads; use a multiple of {CHANNELS_PER_HEAD}"
                )
            self.norm2 = _group_norm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = _zeroed(Conv2d(out_channels, out_channels, 1))

    def forward(self, x, emb):
        h = self.conv0(self.act(self.norm0(x)))
        scale, shift = self.affine(emb).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = self.act(torch.addcmul(shift, self.norm1(h), scale + 1))
        x = _add(self.conv1(self.dropout(h)), self.skip(x))
        return _add(self._attend(x), x) if self.num_heads else x

    def _attend(self, x):
        qkv = (
            self.qkv(self.norm2(x)).flatten(2).transpose(1, 2)
        )  # (N, T, 3C), the channels as [head, C/heads, qkv]
        qkv = qkv.unflatten(2, (self.num_heads, -1, 3)).transpose(3, 4).flatten(2)  # as [head, qkv, C/heads]
        h = _attention(qkv, self.num_heads, use_new_attention_order=False)
        return self.proj(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Conv2d(nn.Conv2d):
    """A convolution that keeps the size, after 2x resampling if asked for; it computes in the dtype of its
    input, not of its weights.
    """

    def __init__(self, in_channels, out_channels, kernel, resample=None):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        if resample:
            self.register_buffer("resample_filter", _box())

    def forward(self, x):
        x = _resample(x, self.resample) if self.resample else x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.padding)


class Resample(nn.Module):
    """2x resampling, "up" by the nearest neighbour or "down" by the mean."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode
        self.register_buffer("resample_filter", _box())

    def forward(self, x):
        return _resample(x, self.mode)


def _resample(x, mode):
    return F.interpolate(x, scale_factor=2, mode="nearest") if mode == "up" else F.avg_pool2d(x, 2)


def _box():
    """The filter that the published files carry with each resampling: a constant, for which `_resample` is
    the short form.
    """
    return torch.full((1, 1, 2, 2), 0.25)


def _group_norm(channels):
    return GroupNorm32(min(32, channels // 4), channels)

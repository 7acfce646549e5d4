"""The ADM U-Net and its noisy-classifier half.

Architecture: "Diffusion Models Beat GANs on Image Synthesis" (Dhariwal and Nichol, 2021), section 3 and
appendix B. Parameter names and shapes are those of the published guided-diffusion checkpoints, so that
`load_state_dict(strict=True)` is all it takes.

The file reads from the outside in: the two networks, then the encoder they share, then the blocks. The small
layers are in layers.py.
Shapes in the comments: N images, C channels, H x W pixels, T = H*W positions, E embedding channels.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from guided_diffusion.layers import (
    GroupNorm32,
    Pointwise,
    Reusable,
    SiLU,
    attention,
    head_count,
    memory_format,
    resample,
    run_recomputed,
    timestep_embedding,
    zeroed,
)


class _Torso(Reusable):
    """What both networks share: `dtype` is that of the blocks, and of their convolutions' weights once
    converted.

    Embeddings, normalisations and the output head stay in float32, as in the published models.
    """

    def __init__(self, model_channels, dims, use_fp16):
        super().__init__()
        if dims != 2:
            raise ValueError(f"dims={dims} is not supported: the published networks are two-dimensional")
        self.model_channels = model_channels
        self.dtype = torch.float16 if use_fp16 else torch.float32
        width = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, width), SiLU(), nn.Linear(width, width))

    def convert_to_fp16(self):
        """Halve the blocks: float16 on an accelerator, bfloat16 on a CPU, where float16 arithmetic is
        emulated and slow.
        """
        on_cpu = next(self.parameters()).device.type == "cpu"
        self._convert(torch.bfloat16 if on_cpu else torch.float16)

    def convert_to_fp32(self):
        """Undo `convert_to_fp16` (the rounding of the weights stays)."""
        self._convert(torch.float32)

    def _convert(self, dtype):
        self.dtype = dtype
        for name, module in self.named_modules():
            if not name.startswith("out.") and isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.to(dtype)


class UNetModel(_Torso):
    """eps (and variance) prediction network: forward(x, timesteps, y=None) -> (N, out_channels, H, W) in x's
    dtype.

    x: (N, in_channels, H, W) float, H and W divisible by 2**(levels - 1). timesteps: (N,) int or float, on
    the scale of the original 1000 steps. y: (N,) int64 in [0, num_classes), required when and only when
    `num_classes` is given.

    `attention_resolutions` are downsampling factors (2 means half resolution), `channel_mult` one factor per
    level. With `num_head_channels` other than -1 the head counts are ignored.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
    ):
        super().__init__(model_channels, dims, use_fp16)
        options = _BlockOptions(
            emb_channels=4 * model_channels,
            dropout=dropout,
            conv_resample=conv_resample,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * model_channels)
        self.input_blocks, skip_channels = _encoder(
            in_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, options
        )
        self.middle_block = _middle(skip_channels[-1], options)
        if num_heads_upsample != -1:
            options = replace(options, num_heads=num_heads_upsample)
        self.output_blocks = _decoder(
            skip_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, options
        )
        width = int(channel_mult[0] * model_channels)
        self.out = nn.Sequential(
            GroupNorm32(32, width), SiLU(), zeroed(nn.Conv2d(width, out_channels, 3, padding=1))
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x, timesteps, y=None):
        if (y is not None) != (self.num_classes is not None):
            raise ValueError(
                "y must be given when and only when the network is class-conditional (num_classes)"
            )
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))  # (N, E)
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.dtype, memory_format=memory_format(x.device))
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))


class EncoderUNetModel(_Torso):
    """The noisy classifier: forward(x, timesteps) -> logits (N, out_channels) in x's dtype. Arguments as in
    `UNetModel`.

    `pool` turns features into logits: "attention" (the published classifiers), "adaptive", "spatial",
    "spatial_v2".
    """

    def __init__(
        self,
        image_size,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        use_checkpoint=False,
        use_fp16=False,
        num_heads=1,
        num_head_channels=-1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
        resblock_updown=False,
        use_new_attention_order=False,
        pool="adaptive",
    ):
        super().__init__(model_channels, dims, use_fp16)
        options = _BlockOptions(
            emb_channels=4 * model_channels,
            dropout=dropout,
            conv_resample=conv_resample,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_head_channels=num_head_channels,
            use_scale_shift_norm=use_scale_shift_norm,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.pool = pool
        self.input_blocks, block_channels = _encoder(
            in_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, options
        )
        self.middle_block = _middle(block_channels[-1], options)
        final_size = image_size // 2 ** (len(channel_mult) - 1)
        self.out = _classifier_head(
            pool, [*block_channels, block_channels[-1]], final_size, num_head_channels, out_channels
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, x, timesteps):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h = x.to(self.dtype, memory_format=memory_format(x.device))
        means = []
        for block in [*self.input_blocks, self.middle_block]:
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                means.append(h.to(x.dtype).mean(dim=(2, 3)))
        return self.out(torch.cat(means, dim=1) if means else h.to(x.dtype))


# Building the two halves


@dataclass(frozen=True)
class _BlockOptions:
    emb_channels: int
    dropout: float
    conv_resample: bool
    use_checkpoint: bool
    num_heads: int
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool


def _encoder(in_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, options):
    """Return the descending blocks and the number of channels that each of them puts out."""
    ch = int(channel_mult[0] * model_channels)
    blocks = [TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))]
    channels = [ch]
    for level, mult in enumerate(channel_mult):
        out_ch = int(mult * model_channels)
        for _ in range(num_res_blocks):
            layers = [ResBlock(ch, out_ch, options)]
            if 2**level in attention_resolutions:
                layers.append(AttentionBlock(out_ch, options))
            blocks.append(TimestepEmbedSequential(*layers))
            channels.append(out_ch)
            ch = out_ch
        if level + 1 < len(channel_mult):
            down = (
                ResBlock(ch, ch, options, down=True)
                if options.resblock_updown
                else Downsample(ch, options.conv_resample)
            )
            blocks.append(TimestepEmbedSequential(down))
            channels.append(ch)
    return nn.ModuleList(blocks), channels


def _middle(ch, options):
    return TimestepEmbedSequential(
        ResBlock(ch, ch, options), AttentionBlock(ch, options), ResBlock(ch, ch, options)
    )


def _decoder(skip_channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, options):
    """The ascending blocks; each takes the previous output and one skip connection, concatenated."""
    skip_channels = list(skip_channels)
    ch = skip_channels[-1]
    blocks = []
    for level, mult in reversed(list(enumerate(channel_mult))):
        out_ch = int(mult * model_channels)
        for i in range(num_res_blocks + 1):
            layers = [ResBlock(ch + skip_channels.pop(), out_ch, options)]
            if 2**level in attention_resolutions:
                layers.append(AttentionBlock(out_ch, options))
            if level and i == num_res_blocks:
                up = (
                    ResBlock(out_ch, out_ch, options, up=True)
                    if options.resblock_updown
                    else Upsample(out_ch, options.conv_resample)
                )
                layers.append(up)
            blocks.append(TimestepEmbedSequential(*layers))
            ch = out_ch
    return nn.ModuleList(blocks)


def _classifier_head(pool, block_channels, final_size, num_head_channels, out_channels):
    ch, features = block_channels[-1], sum(block_channels)
    if pool == "adaptive":
        conv = zeroed(nn.Conv2d(ch, out_channels, 1))
        return nn.Sequential(GroupNorm32(32, ch), SiLU(), nn.AdaptiveAvgPool2d((1, 1)), conv, nn.Flatten())
    if pool == "attention":
        if num_head_channels == -1:
            raise ValueError(
                "pool 'attention' needs num_head_channels (the published classifiers use 64), got -1"
            )
        attention = AttentionPool2d(final_size, ch, num_head_channels, out_channels)
        return nn.Sequential(GroupNorm32(32, ch), SiLU(), attention)
    if pool == "spatial":
        return nn.Sequential(nn.Linear(features, 2048), nn.ReLU(), nn.Linear(2048, out_channels))
    if pool == "spatial_v2":
        return nn.Sequential(
            nn.Linear(features, 2048), GroupNorm32(32, 2048), SiLU(), nn.Linear(2048, out_channels)
        )
    raise ValueError(f"unknown pool {pool!r}; choose attention, adaptive, spatial or spatial_v2")


# Blocks


class TimestepEmbedSequential(nn.Sequential):
    """A sequential that hands the embedding to the residual blocks in it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(Reusable):
    """Residual block with timestep embedding and optional 2x up- or downsampling inside: (N, C, H, W), (N, E)
    -> (N, out, H', W').
    """

    def __init__(self, channels, out_channels, options, up=False, down=False):
        super().__init__()
        self.use_scale_shift_norm = options.use_scale_shift_norm
        self.use_checkpoint = options.use_checkpoint
        self.in_layers = nn.Sequential(
            GroupNorm32(32, channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.resample = (
            Upsample(channels, False) if up else Downsample(channels, False) if down else nn.Identity()
        )
        emb_out = 2 * out_channels if options.use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(options.emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            GroupNorm32(32, out_channels),
            SiLU(),
            nn.Dropout(options.dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x, emb):
        return run_recomputed(self._forward, x, emb, recompute=self.use_checkpoint)

    def _forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.scale_shift(norm(h), scale, shift)
        else:
            h = norm(h + emb)
        for layer in rest:
            h = layer(h)
        return self.add(h, self.skip_connection(self.resample(x)))


class AttentionBlock(Reusable):
    """Self-attention over all positions with a residual connection: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels, options):
        super().__init__()
        self.num_heads = head_count(channels, options.num_heads, options.num_head_channels)
        self.use_new_attention_order = options.use_new_attention_order
        self.use_checkpoint = options.use_checkpoint
        self.norm = GroupNorm32(32, channels)
        self.qkv = Pointwise(channels, 3 * channels)
        self.proj_out = zeroed(Pointwise(channels, channels))

    def forward(self, x):
        return run_recomputed(self._forward, x, recompute=self.use_checkpoint)

    def _forward(self, x):
        # (N, T, 3C), a view of channels-last memory
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        h = attention(qkv, self.num_heads, self.use_new_attention_order)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (N, C, H, W)
        return self.add(self.proj_out(h), x)


class AttentionPool2d(nn.Module):
    """Pool by letting the mean position attend to all (Radford et al., 2021): (N, C, S, S) -> (N,
    out_channels).
    """

    def __init__(self, spatial_size, channels, num_head_channels, out_channels):
        super().__init__()
        self.num_heads = head_count(channels, 1, num_head_channels)
        self.positional_embedding = nn.Parameter(torch.randn(channels, spatial_size**2 + 1) / channels**0.5)
        self.qkv_proj = Pointwise(channels, 3 * channels)
        self.c_proj = Pointwise(channels, out_channels)

    def forward(self, x):
        if x[0, 0].numel() + 1 != self.positional_embedding.shape[1]:
            raise ValueError(
                f"attention pooling was built for {self.positional_embedding.shape[1] - 1} positions, "
                f"got {x[0, 0].numel()}"
            )
        tokens = x.flatten(2).transpose(1, 2)  # (N, T, C)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + self.positional_embedding.T
        # The heads lie inside q, k and v here whatever the order in the torso.
        qkv = self.qkv_proj(tokens.transpose(1, 2)[..., None]).flatten(2).transpose(1, 2)
        h = attention(qkv, self.num_heads, use_new_attention_order=True)
        return self.c_proj(h[:, :1].transpose(1, 2)[..., None])[:, :, 0, 0]


class Upsample(nn.Module):
    """Nearest-neighbour 2x upsampling, followed by a convolution if asked for."""

    def __init__(self, channels, use_conv):
        super().__init__()
        if use_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.use_conv = use_conv

    def forward(self, x):
        x = resample(x, "up")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """2x downsampling by a strided convolution or by the mean."""

    def __init__(self, channels, use_conv):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x):
        return self.op(x)

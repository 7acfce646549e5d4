"""EDM's other network, "SongUNet": DDPM++ and NCSN++.

Architectures: "Score-Based Generative Modeling through Stochastic Differential Equations" (Song et al.,
2021), appendix H, in the variants of "Elucidating the Design Space of Diffusion-Based Generative Models"
(Karras et al., 2022). Parameter names and shapes are those of the published files, so that
`load_state_dict(strict=True)` is all it takes. The blocks are those of edm_unet.py.

DDPM++ is embedding_type "positional", channel_mult_noise 1, resample_filter (1, 1); NCSN++ is "fourier", 2,
(1, 3, 3, 1), with encoder_type "residual". "skip" encoders and decoders keep an image beside the features, at
every level. Shapes in the comments: N images, C channels, H x W pixels, E embedding channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion.edm_unet import BlockOptions, Conv2d, RawNetwork, Resample, UNetBlock, group_norm
from guided_diffusion.layers import memory_format

SQRT_HALF = math.sqrt(0.5)  # keeps the variance of a sum of two
FOURIER_SCALE = 16  # standard deviation of the random frequencies
EPS = 1e-6
CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(RawNetwork):
    """DDPM++ or NCSN++; forward and arguments as in `RawNetwork`.

    channel_mult_emb, channel_mult_noise: widths of the embedding and of that of the noise level, in units of
    model_channels. resample_filter: taps of the separable filter, an even number.
    """

    def __init__(
        self,
        img_resolution,
        in_channels,
        out_channels,
        label_dim=0,
        augment_dim=0,
        model_channels=128,
        channel_mult=(1, 2, 2, 2),
        channel_mult_emb=4,
        num_blocks=4,
        attn_resolutions=(16,),
        dropout=0.1,
        label_dropout=0,
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        resample_filter=(1, 1),
    ):
        super().__init__(img_resolution, label_dim, channel_mult, label_dropout)
        _check_choices(embedding_type=embedding_type, encoder_type=encoder_type, decoder_type=decoder_type)
        self.encoder_type, self.decoder_type, self.num_blocks = encoder_type, decoder_type, num_blocks
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        noise_embedding = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}[embedding_type]
        self.map_noise = noise_embedding(noise_channels)
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        sizes = [img_resolution >> i for i in range(len(channel_mult))]
        self.levels = [f"{size}x{size}" for size in sizes]  # the finest first
        widths = [model_channels * mult for mult in channel_mult]
        attends = [size in attn_resolutions for size in sizes]
        options = BlockOptions(
            emb_channels,
            dropout,
            channels_per_head=None,
            adaptive_scale=False,
            skip_scale=SQRT_HALF,
            eps=EPS,
            resample_filter=resample_filter,
            project_resampled=True,
        )
        stem = Conv2d(in_channels, model_channels, 3)
        self.enc, skip_channels = self._build_encoder(stem, widths, attends, options)
        self.dec = self._build_decoder(out_channels, skip_channels, widths, attends, options)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self._embedding(noise_labels, class_labels, augment_labels)
        x, skips = self._encode(x.to(memory_format=memory_format(x.device)), emb)
        return self._decode(x, skips, emb)

    def _embedding(self, noise_labels, class_labels, augment_labels):
        emb = self.map_noise(noise_labels)  # (N, noise channels)
        if self.map_label is not None:
            # one-hot rows get the mean square of 1 that the other inputs have
            emb = emb + self.map_label(self.known_labels(class_labels, emb) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels.to(emb.dtype))
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))  # (N, E)

    def _encode(self, x, emb):
        """(features, those for the skip connections)."""
        image = x  # what the side branch carries: the input at this level's size, or the last sum
        skips = []
        for i, name in enumerate(self.levels):
            if i == 0:
                x = self.enc[f"{name}_conv"](x)
            else:
                x = self.enc[f"{name}_down"](x, emb)
                if self.encoder_type == "skip":
                    image = self.enc[f"{name}_aux_down"](image)
                    x = self.add(self.enc[f"{name}_aux_skip"](image), x)
                elif self.encoder_type == "residual":
                    x = image = self.add(self.enc[f"{name}_aux_residual"](image), x, SQRT_HALF)
            skips.append(x)
            for k in range(self.num_blocks):
                x = self.enc[f"{name}_block{k}"](x, emb)
                skips.append(x)
        return x, skips

    def _decode(self, x, skips, emb):
        """The output image, float32."""
        deepest, finest = self.levels[-1], self.levels[0]
        image = None  # what the coarser levels have put out
        for name in reversed(self.levels):
            if name == deepest:
                x = self.dec[f"{name}_in0"](x, emb)
                x = self.dec[f"{name}_in1"](x, emb)
            else:
                x = self.dec[f"{name}_up"](x, emb)
            for k in range(self.num_blocks + 1):
                x = self.dec[f"{name}_block{k}"](torch.cat([x, skips.pop()], dim=1), emb)
            if self.decoder_type == "skip" or name == finest:
                out = self.dec[f"{name}_aux_conv"](F.silu(self.dec[f"{name}_aux_norm"](x.float())))
                image = out if image is None else self.add(out, self.dec[f"{name}_aux_up"](image))
        return image

    def _build_encoder(self, stem, widths, attends, options):
        """Return the descending layers and the number of channels of each skip connection."""
        layers, channels = nn.ModuleDict(), [stem.out_channels]
        side_channels = stem.in_channels
        for i, (name, width) in enumerate(zip(self.levels, widths, strict=True)):
            ch = channels[-1]
            if i == 0:
                layers[f"{name}_conv"] = stem
            else:
                layers[f"{name}_down"] = UNetBlock(ch, ch, options, mode="down")
                if self.encoder_type == "skip":
                    layers[f"{name}_aux_down"] = Resample("down", options.resample_filter)
                    layers[f"{name}_aux_skip"] = Conv2d(stem.in_channels, ch, 1)
                elif self.encoder_type == "residual":
                    layers[f"{name}_aux_residual"] = StridedConv2d(side_channels, ch, options.resample_filter)
                    side_channels = ch
                channels.append(ch)
            for k in range(self.num_blocks):
                layers[f"{name}_block{k}"] = UNetBlock(channels[-1], width, options, attends=attends[i])
                channels.append(width)
        return layers, channels

    def _build_decoder(self, out_channels, skip_channels, widths, attends, options):
        """The ascending layers; of the blocks with a skip connection, a level's last one may attend."""
        skip_channels, layers = list(skip_channels), nn.ModuleDict()
        ch, deepest = widths[-1], len(widths) - 1
        for i in range(deepest, -1, -1):
            name, width = self.levels[i], widths[i]
            if i == deepest:
                layers[f"{name}_in0"] = UNetBlock(ch, ch, options, attends=True)
                layers[f"{name}_in1"] = UNetBlock(ch, ch, options)
            else:
                layers[f"{name}_up"] = UNetBlock(ch, ch, options, mode="up")
            for k in range(self.num_blocks + 1):
                last = k == self.num_blocks
                layers[f"{name}_block{k}"] = UNetBlock(
                    ch + skip_channels.pop(), width, options, attends=last and attends[i]
                )
                ch = width
            if self.decoder_type == "skip" and i < deepest:
                layers[f"{name}_aux_up"] = Resample("up", options.resample_filter)
            if self.decoder_type == "skip" or i == 0:
                layers[f"{name}_aux_norm"] = group_norm(width, EPS)
                layers[f"{name}_aux_conv"] = Conv2d(width, out_channels, 3)
        return layers


def _check_choices(**chosen):
    for name, value in chosen.items():
        if value not in CHOICES[name]:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(CHOICES[name])}")


# Small layers


class PositionalEmbedding(nn.Module):
    """(N,) -> (N, channels) float32, sines first, then cosines; frequencies from 1 down to 1/10000, both
    included (Ho et al., 2020).
    """

    def __init__(self, channels):
        super().__init__()
        self.half = channels // 2

    def forward(self, c_noise):
        exponent = torch.arange(self.half, dtype=torch.float32, device=c_noise.device) / max(self.half - 1, 1)
        return _sines_and_cosines(c_noise, 10000**-exponent)


class FourierEmbedding(nn.Module):
    """(N,) -> (N, channels) float32, sines first, then cosines; frequencies that were drawn once, in the
    buffer `freqs` (Tancik et al., 2020).
    """

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * FOURIER_SCALE)

    def forward(self, c_noise):
        return _sines_and_cosines(c_noise, 2 * math.pi * self.freqs)


def _sines_and_cosines(c_noise, freqs):
    angles = c_noise[:, None].float() * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class StridedConv2d(Conv2d):
    """A 3x3 convolution of stride 2 behind the low-pass filter: (N, C, H, W) -> (N, out, H/2, W/2).

    Zeros are put around the image once, for filter and convolution together, so that it is one convolution
    with the product of the two kernels.
    """

    def __init__(self, in_channels, out_channels, taps):
        super().__init__(in_channels, out_channels, 3, "down", taps)

    def forward(self, x):
        channels, size = x.shape[1], self.resample_filter.shape[-1]
        low_pass = self.resample_filter.to(x.dtype).expand(channels, -1, -1, -1)
        x = F.conv2d(x, low_pass, padding=size // 2, groups=channels)
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), stride=2)

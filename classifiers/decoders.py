"""Decoders: from a latent diffusion model's latents to the images that classifiers look at, differentiable.

    image = decoder(z)      (N, C, h, w), scaled as the diffusion model has it -> (N, 3, H, W), about [-1, 1]

vae is the autoencoder itself; tiny a small network that was trained to answer as it does (diffusers'
AutoencoderTiny); linear one matrix from a latent's channels to red, green and blue, at a thousandth of the
cost: enough to know the class by, not to look at. The answer is not clamped: where it is, there would be no
gradient.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classifiers.zoo import require
from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.files.diffusers_dit import read_config
from guided_diffusion.files.state_dicts import load_into, renamed

DECODERS = ("vae", "tiny", "linear")
# Rows for the four channels of Stable Diffusion's first autoencoder, scaled by 0.18215, to red, green and
# blue: numbers in public use for previews of latents.
PUBLIC_MAP = ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473))
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# diffusers' own names before and after its version 0.18, of the attention in an autoencoder.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class AutoencoderDecoder(nn.Module):
    """The decoder of a diffusers autoencoder, for scaled latents.

    network: AutoencoderKL or AutoencoderTiny. channels: of its latents. factor: pixels of the image's side to
    one of the latent's. checkpointing: compute the activations again in the backward pass instead of keeping
    them. The answer is float32, whatever the network's dtype.
    """

    def __init__(self, network: Any, checkpointing: bool = False):
        super().__init__()
        self.network: Any = network
        self.scale = float(network.config.scaling_factor)
        self.shift = float(getattr(network.config, "shift_factor", None) or 0)
        self.channels = network.config.latent_channels
        widths = (
            getattr(network.config, "block_out_channels", None) or network.config.decoder_block_out_channels
        )
        self.factor = 2 ** (len(widths) - 1)
        if checkpointing:
            network.enable_gradient_checkpointing()

    def forward(self, z: Tensor) -> Tensor:
        dtype = next(self.network.parameters()).dtype
        image = self.network.decode((z / self.scale + self.shift).to(dtype)).sample
        return image if image.dtype == torch.float64 else image.float()


class LinearDecoder(nn.Module):
    """image = z W + b at every place of the latent, enlarged to `size` pixels (bilinear; None: as it is).

    weight: (C, 3), a row for each channel of the latent. bias: (3,).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, size: int | None = None):
        super().__init__()
        if weight.ndim != 2 or weight.shape[1] != 3 or bias.shape != (3,):
            raise ValueError(
                f"a linear decoder takes weight (channels, 3) and bias (3,), got {tuple(weight.shape)} and "
                f"{tuple(bias.shape)}"
            )
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.size = size
        self.channels = len(weight)

    def forward(self, z: Tensor) -> Tensor:
        weight, bias = self.weight.to(z.dtype), self.bias.to(z.dtype)
        image = torch.einsum("nchw,ck->nkhw", z, weight) + bias.view(1, 3, 1, 1)
        if self.size is None or image.shape[-1] == self.size:
            return image
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear")


class DecodedClassifier(nn.Module):
    """A classifier of latents: forward(z) -> logits of the decoded image."""

    def __init__(self, classifier: nn.Module, decoder: nn.Module):
        super().__init__()
        self.classifier, self.decoder = classifier, decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.classifier(self.decoder(z))


def load_decoder(
    kind: str, path: str | Path = "", *, size: int | None = None, checkpointing: bool = False
) -> nn.Module:
    """A decoder in eval mode, frozen, float32, on the CPU.

    kind: one of DECODERS. path: diffusers' folder of the autoencoder (vae, tiny), or a pipeline's with one in
    it; a file of scripts/fit_linear_decoder.py (linear), "" for the public map. size: pixels of a linear
    decoder's image. Raises FileNotFoundError, ValueError for what does not fit, and ValueError with what to
    install where diffusers is missing.
    """
    if kind not in DECODERS:
        raise ValueError(f"unknown latent decoder {kind!r}; choose {', '.join(DECODERS)}")
    if kind == "linear":
        weights = load_state_dict(path) if path else public_map()
        if missing := sorted({"weight", "bias"} - weights.keys()):
            raise ValueError(f"{path} is no linear decoder: it lacks {missing[0]}")
        return LinearDecoder(weights["weight"], weights["bias"], size).eval()
    network = load_autoencoder(path, tiny=kind == "tiny")
    return AutoencoderDecoder(network, checkpointing).eval()


def public_map() -> dict[str, Tensor]:
    """The public linear map of Stable Diffusion's first autoencoder."""
    return {"weight": torch.tensor(PUBLIC_MAP), "bias": torch.zeros(3)}


def load_autoencoder(path: str | Path, *, tiny: bool = False) -> Any:
    """diffusers' AutoencoderKL, or AutoencoderTiny, of a folder, frozen. Raises as `load_decoder`."""
    diffusers = require_diffusers()
    folder = autoencoder_weights(path).parent
    config = read_config(folder / "config.json")
    name = "AutoencoderTiny" if tiny else "AutoencoderKL"
    if config.get("_class_name", name) != name:
        raise ValueError(f"{folder} holds a {config['_class_name']}, not an {name}")
    if config.get("latents_mean") or config.get("latents_std"):
        raise ValueError(f"{folder} has latents_mean and latents_std, which are not known here")
    if tiny:  # which writes this key beside those that it was made of, and does not know it again
        config = {key: value for key, value in config.items() if key != "block_out_channels"}
    network = getattr(diffusers, name).from_config(config)
    weights = autoencoder_weights(folder)
    load_into(network, renamed(load_state_dict(weights), present_name), weights)
    return network.eval().requires_grad_(False)


def autoencoder_weights(path: str | Path) -> Path:
    """The file of weights beside an autoencoder's config.json: in the folder `path`, or in vae/ there. Raises
    FileNotFoundError.
    """
    for folder in (Path(path), Path(path) / "vae"):
        for file in _WEIGHTS:
            if (folder / file).is_file() and (folder / "config.json").is_file():
                return folder / file
    published = f"https://huggingface.co/stabilityai/{Path(path).name}"
    wanted = "give diffusers' folder of an autoencoder"
    if Path(path).name.startswith("sd-vae"):
        wanted = f"put both files of {published} there"
    raise FileNotFoundError(f"{path} has no config.json with {_WEIGHTS[0]}: {wanted}")


def require_diffusers() -> Any:
    """The diffusers package. Raises ValueError that says what to install."""
    return require("diffusers", "an autoencoder", extra="dit")


def present_name(name: str) -> str:
    """The name that diffusers gives a tensor of an autoencoder today."""
    found = re.search(r"\.attentions\.\d+\.(query|key|value|proj_attn)\.", name)
    return name.replace(f".{found[1]}.", f".{_OLD_NAMES[found[1]]}.") if found else name


def fit_linear(latents: Tensor, images: Tensor) -> Mapping[str, Tensor]:
    """The linear map of least squares: latents (N, C, h, w), scaled, and images (N, 3, h, w) in [-1, 1],
    shrunk to the latents' sides. Returns weight (C, 3) and bias (3,), float32.
    """
    z = latents.double().movedim(1, -1).reshape(-1, latents.shape[1])
    x = images.double().movedim(1, -1).reshape(-1, 3)
    solution = torch.linalg.lstsq(torch.cat([z, torch.ones_like(z[:, :1])], dim=1), x).solution
    return {"weight": solution[:-1].float().contiguous(), "bias": solution[-1].float()}

"""Features of DINOv2 and of CLIP, by the package transformers, which is imported once one is asked for.

FD(dinov2): Stein et al., "Exposing flaws of generative model evaluation metrics and their unfair treatment of
diffusion models" (2023): ViT-L/14, its CLS token after the last norm, images of 224x224 normalised as
ImageNet's. CMMD: Jayasumana et al. (2024): ViT-L/14 at 336x336, projected embeddings of length 1. Both resize
as Pillow's bicubic filter does, antialiased and rounded to 256 levels; programs that resize in another way
get other numbers.
"""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.networks.weights import read_weights
from guided_diffusion.files.diffusers_dit import read_config
from guided_diffusion.files.pretrained import PRETRAINED_DIR
from guided_diffusion.files.state_dicts import first_line

FILES = "model.safetensors", "pytorch_model.bin"
VIT_L_14 = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
DINOV2 = {**VIT_L_14, "image_size": 518}
CLIP = {**VIT_L_14, "intermediate_size": 4096, "image_size": 336, "projection_dim": 768}


def pillow_resize(images: Tensor, size: int) -> Tensor:
    """(N, 3, H, W) in 0..255 -> (N, 3, size, size) whole numbers in 0..255, as floats."""
    # Along the rows, then along the columns, rounded each time: as Pillow does.
    for shape in ((images.shape[2], size), (size, size)):
        if images.shape[2:] != shape:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
            images = images.round().clamp(0, 255)
    return images


def centre_square(images: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 3, S, S), S the shorter side."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def resize_positions(table: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n * n, D), the CLS token's first -> (1, 1 + side * side, D).

    As the published code of DINOv2 resizes them: by the factor (side + 0.1) / n, where transformers takes
    side / n. That moves each by up to a tenth of a patch.
    """
    n = math.isqrt(table.shape[1] - 1)
    if n == side:
        return table
    grid = table[:, 1:].unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


class TransformerFeatures:
    """Called on (N, H, W, 3) uint8 images, numpy or torch, it returns `pool3` (N, D), float32.

    weights: the folder of a network that transformers has saved (config.json, model.safetensors), a file in
    it, or a file of the published network's weights alone; None for the folder of its name in
    pretrained_models/. Raises FileNotFoundError where there are none, and ValueError without the package
    transformers, for weights of another network, and for images of another dtype or shape.
    """

    name: str
    outputs = ("pool3",)
    published: str
    config_class: str
    model_class: str
    model_types: tuple[str, ...]
    architecture: dict[str, Any]
    prefixes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        library = self._library()
        path, config = self._find(Path(weights) if weights else PRETRAINED_DIR / self.name)
        state, self.sha256 = read_weights(path)
        self.network = self._load(library, path, config, state).to(device).eval().requires_grad_(False)
        self.device = torch.device(device)
        self.batch_size = 16 if self.device.type == "cpu" else 128
        self.size = self._size()
        self.protocol = f"{self.name}-{self.size}"
        self._mean, self._std = (
            torch.tensor(numbers, device=device)[:, None, None] for numbers in (self.mean, self.std)
        )

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"{self.name} features need uint8 images (N, H, W, 3), not {given}")
        pixels = self._cut(images.to(self.device).permute(0, 3, 1, 2).float())
        x = (pillow_resize(pixels, self.size) / 255 - self._mean) / self._std
        # TensorFloat-32, cudnn's default, would move the features in the third digit.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return {"pool3": self._features(x).cpu().numpy()}

    def _library(self):
        try:
            return importlib.import_module("transformers")
        except ImportError as error:
            missing = f"--features {self.name} needs transformers, which is not installed"
            raise ValueError(f'{missing}: pip install -e ".[zoo]"') from error

    def _find(self, path):
        """The file of weights, and its config.json, or without one the published network's settings."""
        folder = path if path.is_dir() else path.parent
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        file = file if path.is_dir() else path if path.is_file() else None
        if file is None:
            raise FileNotFoundError(
                f"no {FILES[0]} of {self.name} at {path}: give --features {self.name}:FOLDER, with "
                f"config.json and {FILES[0]} of {self.published}"
            )
        if not (folder / "config.json").is_file():
            return file, self.architecture
        config = read_config(folder / "config.json")
        if config.get("model_type") not in self.model_types:
            kind = config.get("model_type")
            raise ValueError(
                f"{folder} holds a network of model_type {kind!r}, not {self.model_types[0]}: give one like "
                f"{self.published}"
            )
        return file, self._settings(config)

    def _load(self, library, path, config, state):
        """The network with all its weights; what the file holds besides is left out."""
        state = {key: value for key, value in state.items() if key.startswith(self.prefixes)}
        said = library.utils.logging
        verbosity, bars = said.get_verbosity(), said.is_progress_bar_enabled()
        said.set_verbosity_error()
        said.disable_progress_bar()
        try:
            network, found = getattr(library, self.model_class).from_pretrained(
                None,
                config=getattr(library, self.config_class).from_dict(config),
                state_dict=state,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} does not fit the config.json beside it, or without one {self.published}, whose file "
                f"transformers reads ({first_line(error)})"
            ) from error
        finally:
            said.set_verbosity(verbosity)
            if bars:
                said.enable_progress_bar()
        if lacking := sorted(found["missing_keys"]):
            raise ValueError(
                f"{path} lacks {len(lacking)} weights of {self.name}, such as {lacking[0]}: give the file "
                f"that transformers has saved, such as {self.published}'s"
            )
        return network

    def _settings(self, config):
        return config

    def _cut(self, pixels):
        return pixels

    def _size(self) -> int:
        raise NotImplementedError

    def _features(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DINOv2Features(TransformerFeatures):
    """`pool3`: the CLS token. An image that is no square is squeezed into one."""

    name, published = "dinov2", "facebook/dinov2-large"
    config_class, model_class, model_types = "Dinov2Config", "Dinov2Model", ("dinov2",)
    architecture = DINOV2
    prefixes = ("embeddings.", "encoder.", "layernorm.")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def _load(self, library, path, config, state):
        network = super()._load(library, path, config, state)
        embeddings = network.embeddings
        resized = resize_positions(embeddings.position_embeddings.detach(), 224 // network.config.patch_size)
        embeddings.position_embeddings = nn.Parameter(resized)  # now as many as patches: taken as they are
        return network

    def _size(self):
        return 224

    def _features(self, x):
        return self.network(pixel_values=x).last_hidden_state[:, 0]


class CLIPFeatures(TransformerFeatures):
    """`pool3`: the embedding that is compared with those of texts, of length 1. The centre square of an image
    is taken, at the size that the network was trained on.
    """

    name, published = "clip", "openai/clip-vit-large-patch14-336"
    config_class, model_class = "CLIPVisionConfig", "CLIPVisionModelWithProjection"
    model_types = ("clip", "clip_vision_model")
    architecture = CLIP
    prefixes = ("vision_model.", "visual_projection.")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def _settings(self, config):
        """Of the two towers, the images'."""
        dimension = {"projection_dim": config["projection_dim"]} if "projection_dim" in config else {}
        return {**config.get("vision_config", config), **dimension}

    def _cut(self, pixels):
        return centre_square(pixels)

    def _size(self):
        return self.network.config.image_size

    def _features(self, x):
        return F.normalize(self.network(pixel_values=x).image_embeds, dim=1)

"""Features of the Inception network of 2015-12-05, by which FID, sFID, Inception Score, precision and recall
are defined.

Two protocols, which differ in how an image becomes the network's 299x299 input:

    adm          guided-diffusion's: TensorFlow 1 bilinear resize of 0..255 (source coordinate
                 = i * in / out), then (x - 128) / 128
    pytorch-fid  pytorch-fid's: half-pixel bilinear resize of 0..1, then 2x - 1

Numbers of one must not be compared with numbers of the other. The blocks are those of the package
pytorch_fid, the rest of the network is torchvision's.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from pytorch_fid import inception as published
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.networks.weights import read_weights
from guided_diffusion.files.pretrained import find_pretrained, sha256
from guided_diffusion.files.state_dicts import load_into

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d"  # its beginning, which the published name carries
INPUT_SIZE = 299
SPATIAL_CHANNELS = 7
LAYERS = [
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "maxpool1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "maxpool2",
    "Mixed_5b",
    "Mixed_5c",
    "Mixed_5d",
    "Mixed_6a",
    "Mixed_6b",
    "Mixed_6c",
    "Mixed_6d",
    "Mixed_6e",
    "Mixed_7a",
    "Mixed_7b",
    "Mixed_7c",
]


def find_inception_weights(path: str | Path | None = None) -> Path:
    """Return `path`, or where the published weights lie in pretrained_models/.

    Raises FileNotFoundError that says which file to put where, and ValueError where a file with the published
    name has another content.
    """
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"no Inception weights at {path}; the published file {WEIGHTS} is at {published.FID_WEIGHTS_URL}"
        )
    path = find_pretrained(WEIGHTS, url=published.FID_WEIGHTS_URL) if path is None else Path(path)
    if path.name == WEIGHTS and not (digest := sha256(path)).startswith(WEIGHTS_SHA256):
        raise ValueError(
            f"{path} is not the published file (sha256 {digest[:8]}..., not {WEIGHTS_SHA256}...); "
            f"get it from {published.FID_WEIGHTS_URL}"
        )
    return path


def inception_network() -> nn.Module:
    """The network with the names and shapes of the published weights, its own weights random: nothing is
    downloaded.
    """
    network = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    )
    network.Mixed_5b = published.FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = published.FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = published.FIDInceptionA(288, pool_features=64)
    for name, width in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}.items():
        setattr(network, name, published.FIDInceptionC(768, channels_7x7=width))
    network.Mixed_7b = published.FIDInceptionE_1(1280)
    network.Mixed_7c = published.FIDInceptionE_2(2048)
    return network


def adm_input(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..255 -> (N, 3, 299, 299) in [-1, 1], resized as TensorFlow 1 does."""
    # TensorFlow 1 samples at i * in / out and repeats the last pixel beyond the edge. With that pixel
    # repeated once, torch's align_corners samples 300 points at i * in / 299: the first 299 are the ones
    # wanted.
    padded = F.pad(images, (0, 1, 0, 1), mode="replicate")
    resized = F.interpolate(
        padded, size=(INPUT_SIZE + 1, INPUT_SIZE + 1), mode="bilinear", align_corners=True
    )
    return (resized[:, :, :INPUT_SIZE, :INPUT_SIZE] - 128) / 128


def pytorch_fid_input(images: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..255 -> (N, 3, 299, 299) in [-1, 1], resized with half-pixel centres and no
    antialiasing.
    """
    return (
        2 * F.interpolate(images / 255, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
        - 1
    )


PROTOCOLS = {"adm": adm_input, "pytorch-fid": pytorch_fid_input}


class InceptionFeatures:
    """Called on (N, H, W, 3) uint8 images, numpy or torch, it returns float32 arrays:

    pool3    (N, 2048)  the last average pool: FID, precision, recall, KID
    spatial  (N, 2023)  the first 7 channels of Mixed_6d.branch1x1 after its ReLU, 17x17, in NHWC order: sFID
    logits   (N, 1008)  without the bias of the last layer, as the published Inception Score takes them

    `weights` is a file (see `find_inception_weights`) or a state dict. Raises ValueError for an unknown
    protocol, for weights that do not fit, and for images of another dtype or shape. Convolutions run in full
    float32 on an accelerator too.
    """

    name = "inception-2015-12-05"
    outputs = ("pool3", "spatial", "logits")

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor],
        protocol: str = "adm",
        device: str | torch.device = "cpu",
    ):
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; choose {' or '.join(PROTOCOLS)}")
        state_dict, self.sha256 = read_weights(weights)
        self.protocol, self.device = protocol, torch.device(device)
        self.batch_size = 16 if self.device.type == "cpu" else 128
        self.network = inception_network()
        load_into(
            self.network,
            state_dict,
            weights if isinstance(weights, str | Path) else "the state dict",
        )
        self.network.to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8] | Tensor) -> dict[str, NDArray[np.float32]]:
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"Inception features need uint8 images (N, H, W, 3), not {images.dtype} {tuple(images.shape)}"
            )
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        # TensorFloat-32, cudnn's default, would move the features in the third digit.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = self._forward(PROTOCOLS[self.protocol](pixels))
        return {key: value.cpu().numpy() for key, value in features.items()}

    def _forward(self, x):
        spatial = None
        for name in LAYERS:
            if name == "Mixed_6d":
                spatial = self.network.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]
            x = getattr(self.network, name)(x)
        pool = x.mean(dim=(2, 3))
        return {
            "pool3": pool,
            "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
            "logits": pool @ self.network.fc.weight.T,
        }

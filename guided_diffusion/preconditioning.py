"""The preconditionings: denoisers D(x; sigma) around raw networks, under EDM's names.

Method: "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022), table 1.
Noise levels sigma are standard deviations of the noise where the clean image has weight 1.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guided_diffusion.edm_unet import DhariwalUNet
from guided_diffusion.files.checkpoints import load_edm_checkpoint, load_into
from guided_diffusion.schedules import iddpm_levels


class _Precond(nn.Module):
    """What the preconditionings share: a raw network F of `out_channels`, called in the precision that was
    asked for.
    """

    def __init__(
        self, img_resolution, img_channels, label_dim, use_fp16, model_type, out_channels, model_options
    ):
        super().__init__()
        if model_type != "DhariwalUNet":
            raise ValueError(
                f"model_type {model_type!r} is not supported; only the ADM network, DhariwalUNet, is"
            )
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        self.model = DhariwalUNet(img_resolution, img_channels, out_channels, label_dim, **model_options)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        return self._denoised(
            x.float(), sigma, lambda x, c_noise: self._F(x, c_noise, class_labels, augment_labels)
        )

    def _denoised(self, x, sigma, F):
        """D(x; sigma) by the raw network F(x, c_noise)."""
        raise NotImplementedError

    def _F(self, x, c_noise, class_labels, augment_labels):
        if class_labels is not None and class_labels.shape != (len(x), self.label_dim):
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}, but the network takes {(len(x), self.label_dim)}: "
                "one-hot rows, or None where it is unconditional"
            )
        return self.model(x.to(self._dtype(x.device)), c_noise, class_labels, augment_labels)

    def _dtype(self, device):
        if not self.use_fp16:
            return torch.float32
        return torch.bfloat16 if device.type == "cpu" else torch.float16


class EDMPrecond(_Precond):
    """The denoiser D(x; sigma) around a raw network (Karras et al., 2022, eq. 7 and table 1): forward(x,
    sigma, class_labels) -> float32.

    x: (N, img_channels, H, W) float; the network was trained at H = W = img_resolution. sigma: a number or
    tensor, one level or N.
    class_labels: (N, label_dim), one-hot or zeros; None is zeros. augment_labels: (N, augment_dim), or None
    for none.

    sigma_min, sigma_max: the levels that a sampler may ask for. sigma_data: standard deviation of the data.
    With `use_fp16`, which may be set at any time, convolutions and attention compute in float16 on an
    accelerator and bfloat16 on a CPU, where float16 arithmetic is emulated and slow; parameters, embeddings,
    normalisations and the output head stay in float32. `attn_resolutions` are in pixels of an image of
    `img_resolution`. Raises ValueError for another model_type or class_labels of another shape.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        *,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: tuple[int, ...] = (32, 16, 8),
        augment_dim: int = 0,
        dropout: float = 0.1,
        label_dropout: float = 0,
    ):
        model_options = {
            "model_channels": model_channels,
            "channel_mult": channel_mult,
            "num_blocks": num_blocks,
            "attn_resolutions": attn_resolutions,
            "augment_dim": augment_dim,
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, img_channels, model_options
        )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def _denoised(self, x, sigma, F):
        total = (sigma**2 + self.sigma_data**2).sqrt()  # standard deviation of x
        c_skip = (self.sigma_data / total) ** 2
        c_out = sigma * self.sigma_data / total
        c_in = 1 / total
        c_noise = sigma.log().flatten() / 4
        return c_skip * x + c_out * F(c_in * x, c_noise)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows: sigma itself, since it knows all."""
        return torch.as_tensor(sigma)


class iDDPMPrecond(_Precond):
    """The denoiser around a network that was trained to predict eps at M discrete levels, as improved DDPM
    does: forward as EDMPrecond's.

    Karras et al., 2022, table 1 and appendix C.3: D(x; sigma) = x - sigma F(x / sqrt(sigma^2 + 1); c_noise).
    The levels are those of the cosine schedule of Nichol and Dhariwal, 2021, in the buffer `u`, (M + 1,),
    from the largest to u_M = 0; c_noise is M - 1 - j for the nearest u_j, their timestep. The network
    predicts a variance too, 2 * img_channels in all, of which this uses the first half.

    C_1: the least ratio of two neighbouring alpha_bar. C_2: the schedule's offset. model_options: those of
    EDMPrecond from model_channels on. sigma may be any number; a sampler rounds it by `round_sigma` first.
    """

    u: Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        *,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_options: Any,
    ):
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, 2 * img_channels, model_options
        )
        self.M = M
        self.register_buffer("u", torch.tensor(iddpm_levels(M, C_1, C_2), dtype=torch.float32))

    @property
    def sigma_min(self) -> float:
        """The least level above 0 that the network was trained at."""
        return float(self.u[self.M - 1])

    @property
    def sigma_max(self) -> float:
        """The largest level that the network was trained at."""
        return float(self.u[0])

    def _denoised(self, x, sigma, F):
        c_in = 1 / (sigma**2 + 1).sqrt()
        c_noise = (self.M - 1 - self.round_sigma(sigma, return_index=True)).flatten().float()
        return x - sigma * F(c_in * x, c_noise)[:, : self.img_channels]

    def round_sigma(self, sigma: Tensor | float, return_index: bool = False) -> Tensor:
        """The nearest level of `u`, of sigma's shape and dtype; or its index j, int64."""
        sigma = torch.as_tensor(sigma, device=self.u.device)
        distances = (sigma.reshape(-1, 1).double() - self.u.double()).abs()  # (N, M + 1)
        index = distances.argmin(dim=1).reshape(sigma.shape)
        return (
            index
            if return_index
            else self.u[index].to(sigma.dtype if sigma.is_floating_point() else self.u.dtype)
        )


_NETWORKS = {"EDMPrecond": EDMPrecond, "iDDPMPrecond": iDDPMPrecond}
_MOST = {
    "num_blocks": 100,
    "M": 100_000,
}  # what a constructor counts up to: a file must not make it count for ever


def create_edm_network(class_name: str, arguments: Mapping[str, Any]) -> EDMPrecond | iDDPMPrecond:
    """Build the network that a file describes: its class, and its constructor's arguments by name. Raises
    ValueError for others.
    """
    if class_name not in _NETWORKS:
        raise ValueError(f"network class {class_name!r} is not supported; only {' and '.join(_NETWORKS)} are")
    try:
        for name, most in _MOST.items():
            if name in arguments and not 0 < arguments[name] <= most:
                raise ValueError(f"{class_name} needs {name} between 1 and {most:,}, got {arguments[name]}")
        return _NETWORKS[class_name](**arguments)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{class_name} cannot be built with {dict(arguments)}: {str(error).splitlines()[0]}"
        ) from error


def load_edm_network(path: str | Path) -> EDMPrecond | iDDPMPrecond:
    """Read a network from an EDM .pkl or a converted .safetensors, strictly: float32, on the CPU, in eval
    mode, frozen.

    Raises FileNotFoundError, and ValueError for a file that cannot be read, or whose network is of another
    kind.
    """
    checkpoint = load_edm_checkpoint(path)
    with torch.device("meta"):
        net = create_edm_network(checkpoint.class_name, checkpoint.arguments)
    load_into(net, checkpoint.state_dict, path)
    del checkpoint  # so that the change of memory format, tensor by tensor, frees what it replaces
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)

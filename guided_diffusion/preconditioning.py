"""The preconditionings: denoisers D(x; sigma) around raw networks, under EDM's names.

Method: "Elucidating the Design Space of Diffusion-Based Generative Models" (Karras et al., 2022), table 1,
whose columns VP, VE, iDDPM and EDM are a class each. Noise levels sigma are standard deviations of the noise
where the clean image has weight 1.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guided_diffusion.edm_unet import DhariwalUNet
from guided_diffusion.files.checkpoints import load_edm_checkpoint
from guided_diffusion.files.state_dicts import load_into
from guided_diffusion.layers import Reusable
from guided_diffusion.song_unet import SongUNet

MODELS = {"DhariwalUNet": DhariwalUNet, "SongUNet": SongUNet}


class Precond(Reusable):
    """What the denoisers share: forward(x, sigma, class_labels=None, augment_labels=None) -> D(x; sigma),
    float32.

    x: (N, img_channels, H, W) float; the network was trained at H = W = img_resolution. sigma: a number or
    tensor, one level or N. class_labels: (N, label_dim), one-hot or zeros; None is zeros. augment_labels:
    (N, augment_dim), or None for none. sigma_min, sigma_max: the levels that a sampler may ask for, which it
    rounds by `round_sigma` first.

    model_type: "DhariwalUNet" or "SongUNet", whose constructor's other arguments are `model_options`.
    With `use_fp16`, which may be set at any time, convolutions and attention compute in float16 on an
    accelerator and bfloat16 on a CPU, where float16 arithmetic is emulated and slow; parameters, embeddings,
    normalisations and the output head stay in float32. Raises ValueError for another model_type, and for
    class_labels of another shape.
    """

    out_channels_per_image_channel = 1

    def __init__(self, img_resolution, img_channels, label_dim, use_fp16, model_type, model_options):
        super().__init__()
        if model_type not in MODELS:
            raise ValueError(f"model_type {model_type!r} is not supported; choose {' or '.join(MODELS)}")
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.use_fp16 = use_fp16
        out_channels = img_channels * self.out_channels_per_image_channel
        self.model = MODELS[model_type](
            img_resolution, img_channels, out_channels, label_dim, **model_options
        )

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

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows: sigma itself, where it knows all."""
        return torch.as_tensor(sigma)

    def _denoised(self, x, sigma, F):
        """D(x; sigma) by the raw network F(x, c_noise), with c_noise (N,) or (1,)."""
        raise NotImplementedError

    def _F(self, x, c_noise, class_labels, augment_labels):
        if class_labels is not None and class_labels.shape != (len(x), self.label_dim):
            raise ValueError(
                f"class_labels has shape {tuple(class_labels.shape)}, but the network takes "
                f"{(len(x), self.label_dim)}: one-hot rows, or None where it is unconditional"
            )
        return self.model(x.to(self._dtype(x.device)), c_noise.flatten(), class_labels, augment_labels)

    def _dtype(self, device):
        if not self.use_fp16:
            return torch.float32
        return torch.bfloat16 if device.type == "cpu" else torch.float16


class EDMPrecond(Precond):
    """The paper's own preconditioning (eq. 7); forward and model options as in `Precond`.

    sigma_data: standard deviation of the training data.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_options: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_options)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.sigma_data = sigma_data

    def _denoised(self, x, sigma, F):
        total = (sigma**2 + self.sigma_data**2).sqrt()  # standard deviation of x
        c_skip = (self.sigma_data / total) ** 2
        c_out = sigma * self.sigma_data / total
        c_in = 1 / total
        return c_skip * x + c_out * F(c_in * x, sigma.log() / 4)


class VPPrecond(Precond):
    """The denoiser around a network that predicts eps in the variance-preserving process of Song et al.,
    2021; forward and model options as in `Precond`.

    Its noise levels are sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), t from epsilon_t to 1.
    c_noise is (M - 1) t.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_options: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_options)
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.M = M
        self.sigma_min = self._level(epsilon_t)
        self.sigma_max = self._level(1)

    def _level(self, t):
        """sigma(t) in float32, as published: at epsilon_t that is 2^-10, not 0.0010005."""
        exponent = torch.tensor(self.beta_d * t**2 / 2 + self.beta_min * t, dtype=torch.float32, device="cpu")
        return float((exponent.exp() - 1).sqrt())

    def _time(self, sigma):
        """t of sigma(t), float64: near 0 the difference of the root and beta_min would lose digits."""
        log_variance = torch.log1p(sigma.double() ** 2)
        return ((self.beta_min**2 + 2 * self.beta_d * log_variance).sqrt() - self.beta_min) / self.beta_d

    def _denoised(self, x, sigma, F):
        c_in = 1 / (sigma**2 + 1).sqrt()
        return x - sigma * F(c_in * x, ((self.M - 1) * self._time(sigma)).float())


class VEPrecond(Precond):
    """The denoiser around a network that predicts -eps in the variance-exploding process of Song et al.,
    2021; forward and model options as in `Precond`. c_noise is ln(sigma / 2).
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **model_options: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_options)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def _denoised(self, x, sigma, F):
        return x + sigma * F(x, (sigma / 2).log())


class iDDPMPrecond(Precond):
    """The denoiser around a network that predicts eps at M discrete levels, as improved DDPM trains it;
    forward and model options as in `Precond`.

    The levels are those of the cosine schedule of Nichol and Dhariwal, 2021 (appendix C.3 of Karras et al.),
    in the buffer `u`, (M + 1,), from the largest to u_M = 0; c_noise is M - 1 - j for the nearest u_j, their
    timestep. The network predicts a variance too, 2 * img_channels in all, of which this uses the first half.
    C_1: the least ratio of two neighbouring alpha_bar. C_2: the schedule's offset.
    """

    u: Tensor
    out_channels_per_image_channel = 2

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_options: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, model_options)
        self.M = M
        self.register_buffer("u", torch.as_tensor(_published_levels(M, C_1, C_2)))

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
        c_noise = (self.M - 1 - self.round_sigma(sigma, return_index=True)).float()
        return x - sigma * F(c_in * x, c_noise)[:, : self.img_channels]

    def round_sigma(self, sigma: Tensor | float, return_index: bool = False) -> Tensor:
        """The nearest level of `u`, of sigma's shape and dtype; or its index j, int64."""
        sigma = torch.as_tensor(sigma, device=self.u.device)
        distances = (sigma.reshape(-1, 1).double() - self.u.double()).abs()  # (N, M + 1)
        index = distances.argmin(dim=1).reshape(sigma.shape)
        if return_index:
            return index
        return self.u[index].to(sigma.dtype if sigma.is_floating_point() else self.u.dtype)


def _published_levels(M, C_1, C_2):
    """u_0 .. u_M = 0: the recursion of `schedules.iddpm_levels` in float32, as in the published networks.

    The rounding moves the lowest levels by up to 5e-4 of their value.
    """
    angle = math.pi / 2 * torch.arange(M + 1, dtype=torch.float32, device="cpu") / M / (C_2 + 1)
    alpha_bar = (angle.sin() ** 2).numpy()
    u = np.zeros(M + 1, np.float32)
    with np.errstate(divide="raise", invalid="raise"):
        for j in range(M, 0, -1):
            ratio = np.maximum(alpha_bar[j - 1] / alpha_bar[j], np.float32(C_1))
            u[j - 1] = np.sqrt((u[j] ** 2 + 1) / ratio - 1)
    return u


NETWORKS = {c.__name__: c for c in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)}
# What a constructor counts up to: a file must not make it count for ever.
MOST = {"num_blocks": 100, "M": 100_000}


def create_edm_network(class_name: str, arguments: Mapping[str, Any]) -> Precond:
    """Build the network that a file describes: its class, and its constructor's arguments by name.

    Raises ValueError for another class, and for arguments that it cannot be built with.
    """
    if class_name not in NETWORKS:
        raise ValueError(f"network class {class_name!r} is not supported; choose {', '.join(NETWORKS)}")
    try:
        for name, most in MOST.items():
            if name in arguments and not 0 < arguments[name] <= most:
                raise ValueError(f"{class_name} needs {name} between 1 and {most:,}, got {arguments[name]}")
        return NETWORKS[class_name](**arguments)
    except (TypeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(
            f"{class_name} cannot be built with {dict(arguments)}: {str(error).splitlines()[0]}"
        ) from error


def load_edm_network(path: str | Path) -> Precond:
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

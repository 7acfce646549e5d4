"""What networks are trained by: likelihood terms of the variational bound, in nats, elementwise; and EDM's
weighted error.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # of the noise levels that EDM trains at


def edm_loss(
    net: Callable[..., Tensor],
    images: Tensor,
    class_labels: Tensor | None,
    sigma_data: float = 0.5,
    *,
    sigma: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """lambda(sigma) * (D(images + n; sigma) - images)^2, shaped like images, (N, C, H, W): Karras et al.,
    2022, eq. 2 and table 1.

    ln sigma ~ N(-1.2, 1.2^2), one level per image; lambda = (sigma^2 + sigma_data^2) / (sigma *
    sigma_data)^2. sigma: (N, 1, 1, 1), and noise: like images, of variance 1; drawn by torch where not given.
    """
    if sigma is None:
        sigma = edm_sigmas(torch.randn(len(images), 1, 1, 1, device=images.device))
    noise = torch.randn_like(images) if noise is None else noise
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised = net(images + sigma * noise, sigma, class_labels)
    return weight * (denoised - images) ** 2


def edm_sigmas(normal: Tensor) -> Tensor:
    """The noise levels that standard normal numbers stand for."""
    return (LOG_SIGMA_STD * normal + LOG_SIGMA_MEAN).exp()


def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), tensors of one shape."""
    return 0.5 * (
        logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    )


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Log-probability of 8-bit values x, scaled to [-1, 1], under a Gaussian integrated over each value's bin
    of width 2/255.

    The outermost bins reach to infinity. Ho et al., 2020, eq. 13.
    """
    inv_std = torch.exp(-log_scales)
    upper = _normal_cdf((x - means + 1 / 255) * inv_std)
    lower = _normal_cdf((x - means - 1 / 255) * inv_std)
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return torch.log(mass.clamp(min=1e-12))


def _normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))

"""Wrappers: guidance -> guidance, about when it acts, and how its shift is shaped.

A gradient (see classifier.py) is called in the same way, so each of them could wrap one too; what remembers
earlier steps is in stateful.py.
"""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from guided_diffusion.guidance.step import Guidance, GuidanceStep, name_of

DECLARED = ("looks_at", "through_network")  # what a rule says of itself, and its wrappers say after it
AUGMENTATION_SHARE = 1 / 8  # of the image's side, the largest shift of an augmented image


def wrapper(make: Callable[..., Guidance]) -> Callable[..., Guidance]:
    """Decorate a function (guidance, ...) -> guidance: what it returns looks at what the wrapped rule looks
    at.
    """

    @wraps(make)
    def wrapped(guidance: Guidance, *args, **kwargs) -> Guidance:
        rule = make(guidance, *args, **kwargs)
        rule.__name__ = f"{make.__name__}({name_of(guidance)})"
        for name in DECLARED:
            if hasattr(guidance, name) and not hasattr(rule, name):
                setattr(rule, name, getattr(guidance, name))
        return rule

    return wrapped


def no_shift(x: Tensor) -> Tensor:
    """The shift that changes no bit of what it is added to: -0.0, since -0.0 + 0.0 would be 0.0."""
    return torch.full_like(x, -0.0)


def root_mean_square(x: Tensor) -> Tensor:
    """RMS of each image, (N, 1, ...) float64: in float32 the squares of a small gradient would be 0."""
    return x.double().square().flatten(1).mean(dim=1).sqrt().view(-1, *[1] * (x.ndim - 1))


@wrapper
def of_class(guidance: Guidance, wanted: int) -> Guidance:
    """Guide every image to one class of the classifier, whatever the label that the network is given."""

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        return guidance(x, torch.full_like(y, wanted), step)

    return guided


@wrapper
def within_interval(guidance: Guidance, sigma_lo: float, sigma_hi: float) -> Guidance:
    """Guide only where sigma_lo < step.sigma <= sigma_hi (Kynkäänniemi et al., 2024); elsewhere the
    classifier is not called. Raises ValueError for an empty interval.
    """
    if not 0 <= sigma_lo < sigma_hi:
        raise ValueError(
            f"guidance interval {sigma_lo},{sigma_hi} is empty; it takes 0 <= lo < hi, noise levels sigma"
        )

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        return guidance(x, y, step) if sigma_lo < step.sigma <= sigma_hi else no_shift(x)

    return guided


@wrapper
def max_shift(guidance: Guidance, most: float) -> Guidance:
    """shift * min(1, most / RMS(shift)), per image: the norm cap of APG (Sadat et al., 2024, arXiv
    2410.02416); its r is most * sqrt(values in an image).
    """
    return _reshaped(guidance, lambda shift, x: shift * (most / root_mean_square(shift)).clamp(max=1))


@wrapper
def parallel_part(guidance: Guidance, eta: float) -> Guidance:
    """shift - (1 - eta) <shift, u> u, u = x / |x|, per image: of the part along the predicted image, which
    mostly raises contrast, a share of eta stays (APG: Sadat et al., 2024, arXiv 2410.02416).
    """

    def change(shift: Tensor, x: Tensor) -> Tensor:
        x = x.double()
        along = (shift * x).sum(dim=_inner(x), keepdim=True) / x.square().sum(dim=_inner(x), keepdim=True)
        # An image of zeros has no direction.
        return shift - (1 - eta) * along.nan_to_num(0.0, 0.0, 0.0) * x

    return _reshaped(guidance, change)


@wrapper
def band_weights(guidance: Guidance, low: float, high: float) -> Guidance:
    """low * blur(shift) + high * (shift - blur(shift)) (FDG: Sadat et al., 2025, arXiv 2506.19713).

    blur: by (1, 4, 6, 4, 1) / 16 along either side, as in a Laplacian pyramid; edges repeat.
    """

    def change(shift: Tensor, x: Tensor) -> Tensor:
        smooth = _blur(shift)
        return low * smooth + high * (shift - smooth)

    return _reshaped(guidance, change)


@wrapper
def fixed_length(guidance: Guidance, length: float) -> Guidance:
    """length * shift / RMS(shift), per image: the direction alone decides."""
    return _reshaped(guidance, lambda shift, x: shift * length / root_mean_square(shift))


@wrapper
def damping(guidance: Guidance, alpha: float) -> Guidance:
    """shift * exp(-alpha |shift| / |x|), per image: less of what is large beside the predicted image
    (MAMBO-G: Zhu et al., 2025, arXiv 2508.03442, where alpha is 8).
    """

    def change(shift: Tensor, x: Tensor) -> Tensor:
        return shift * torch.exp(-alpha * root_mean_square(shift) / root_mean_square(x))

    return _reshaped(guidance, change)


@wrapper
def augmentations(gradient: Guidance, count: int) -> Guidance:
    """The mean of the gradient over `count` copies of x, each shifted by up to 1/8 of its side, edges
    repeated, and of the gradient the same way back.

    The shifts depend on step.index alone, and so are the same for every image and every batch. Cf. SmoothGrad
    (Smilkov et al., 2017), and the translations of DiffAugment (Zhao et al., 2020).
    """

    def averaged(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        total = torch.zeros_like(x)
        for down, right in _offsets(count, x.shape[-2:], step.index):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                moved = _moved(leaf, down, right)
                g = gradient(moved.detach(), y, step)
                total = total + torch.autograd.grad(moved, leaf, g)[0]
        return total / count

    return averaged


def _reshaped(guidance: Guidance, change: Callable[[Tensor, Tensor], Tensor]) -> Guidance:
    """The guidance with change(shift, x) in the place of each shift; an image whose shift is zero keeps it,
    bit for bit.
    """

    def guided(x: Tensor, y: Tensor, step: GuidanceStep) -> Tensor:
        shift = guidance(x, y, step)
        return torch.where(is_zero(shift), shift, change(shift, x).to(x.dtype))

    return guided


def is_zero(x: Tensor) -> Tensor:
    """Which images are all zero, (N, 1, ...) bool."""
    return (x == 0).flatten(1).all(dim=1).view(-1, *[1] * (x.ndim - 1))


def _inner(x):
    return tuple(range(1, x.ndim))


def _blur(x):
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype, device=x.device) / 16
    channels = x.shape[1]
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, line.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(rows, line.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def _offsets(count, sides, index):
    """`count` pairs of whole numbers, (down, right)."""
    generator = torch.Generator().manual_seed(index)
    most = [int(side * AUGMENTATION_SHARE) for side in sides]
    return [[int(torch.randint(-m, m + 1, (), generator=generator)) for m in most] for _ in range(count)]


def _moved(x, down, right):
    """x shifted by whole pixels; the edge that comes in is repeated."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (abs(right), abs(right), abs(down), abs(down)), mode="replicate")
    top, left = abs(down) - down, abs(right) - right
    return padded[..., top : top + height, left : left + width]

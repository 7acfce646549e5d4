"""Denoisers made of denoisers: classifier-free guidance and its kin.

Each answers as contract 1 in denoisers.py says, at the levels of its first part, whose attributes (sigma_min,
round_sigma, ...) are its own. Further arguments of a call go to all parts. They compose: a solver takes
GuidedDenoiser(CFGDenoiser(...), ...).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Tensor]

# How far a level may lie from a listed one, as a share of it, and be taken for it.
_SAME_LEVEL = 1e-6


def answer_with_variance(
    denoise: Denoiser, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """A denoiser's answer, and the variance of each of its pixels, like x, by the network's own account; None
    where it gives none.
    """
    # Of the class: a denoiser may pass on the attributes of another one inside it.
    with_variance = getattr(type(denoise), "with_variance", None)
    if with_variance is None:
        return denoise(x, sigma, *args, **kwargs), None
    return with_variance(denoise, x, sigma, *args, **kwargs)


def in_one_batch(
    network: Callable[..., Tensor], null_class: int, scale: float, channels: int | None = None
) -> Callable[..., Tensor]:
    """Classifier-free guidance of a network of the discrete process, (x_t, t, y) -> (N, C or more, H, W):
    both answers from one batch of 2 N, eps_u + scale (eps_c - eps_u) in the first `channels` of x's (None:
    all), and the answer for y in the others, the variance among them.

    eps or x_0 are mixed alike, so it is `CFGDenoiser` with the parts' variance, for the process's own loops
    too.
    """

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        nobody = torch.full_like(y, null_class)
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, nobody]))
        cond, uncond = both.chunk(2)
        n = channels or x.shape[1]
        mixed = uncond[:, :n] + scale * (cond[:, :n] - uncond[:, :n])
        return torch.cat([mixed, cond[:, n:]], dim=1)

    return guided


class CFGDenoiser:
    """Classifier-free guidance, D = D_u + scale (D_c - D_u) (Ho and Salimans, 2022); 1 is D_c, 0 is D_u.

    conditional, unconditional: the two denoisers. Autoguidance is the same with a network and a worse one
    (Karras et al., 2024a): CFGDenoiser(network, guide, scale). channels: guide only the first so many, and
    leave D_c in the others (DiT's released script has 3 of 4); None is all. clip_denoised: clamp the answer
    to [-1, 1]; the parts are then to answer without a clamp of their own. At scale 1 the answer is D_c bit
    for bit, and D_u is not asked.

    Raises ValueError for channels below 1 or beyond those of the answer.
    """

    def __init__(
        self,
        conditional: Denoiser,
        unconditional: Denoiser,
        scale: float,
        *,
        channels: int | None = None,
        clip_denoised: bool = False,
    ):
        if channels is not None and channels < 1:
            raise ValueError(f"guided channels must be at least 1, got {channels}")
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale
        self.channels, self.clip_denoised = channels, clip_denoised

    def __call__(self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._answer(self.conditional(x, sigma, *args, **kwargs), x, sigma, args, kwargs)

    def with_variance(
        self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The answer, and the variance of D_c (`answer_with_variance`), which stands for the mixture's."""
        d_c, variance = answer_with_variance(self.conditional, x, sigma, *args, **kwargs)
        return self._answer(d_c, x, sigma, args, kwargs), variance

    def mix(self, d_c: Tensor, d_u: Tensor, sigma: float) -> Tensor:
        """What is made of the two answers, (N, C, H, W) each, at a level."""
        return d_u + self.scale * (d_c - d_u)

    def _is_conditional(self) -> bool:
        return self.scale == 1

    def _answer(self, d_c, x, sigma, args, kwargs):
        d = d_c if self._is_conditional() else self._mixed(d_c, x, sigma, args, kwargs)
        return d.clamp(-1, 1) if self.clip_denoised else d

    def _mixed(self, d_c, x, sigma, args, kwargs):
        d_u = self.unconditional(x, sigma, *args, **kwargs)
        if self.channels is not None and self.channels > d_c.shape[1]:
            raise ValueError(
                f"{self.channels} channels are to be guided, but the network answers {d_c.shape[1]}"
            )
        n = self.channels or d_c.shape[1]
        mixed = self.mix(d_c[:, :n], d_u[:, :n], float(sigma))
        return torch.cat([mixed, d_c[:, n:]], dim=1)

    def __getattr__(self, name: str) -> Any:
        # Without __getattribute__, a copy in the making, which has no parts yet, would ask itself for ever.
        return getattr(object.__getattribute__(self, "conditional"), name)


class CFGPlusPlusDenoiser(CFGDenoiser):
    """CFG++ (Chung et al., 2024, arXiv 2406.08070): step to D_u + scale (D_c - D_u), but renoise with the
    unconditional noise, scale in [0, 1].

    Euler's step from sigma to sigma' then is x' = D_cfg + sigma' (x - D_u) / sigma, which a denoiser brings
    about by D_u + scale (D_c - D_u) / (1 - sigma' / sigma). sigmas: the levels of the run, falling to 0, from
    which sigma' is read: the one after sigma. Exact under Euler's method; other solvers get the same mixture.

    Raises ValueError for a scale outside [0, 1], and at a level that is not one of the run, as churn and
    restarts have them: there the next level is not known.
    """

    def __init__(
        self, conditional: Denoiser, unconditional: Denoiser, scale: float, sigmas: Sequence[float], **options
    ):
        if not 0 <= scale <= 1:
            raise ValueError(f"the scale of CFG++ must be from 0 to 1, got {scale}")
        super().__init__(conditional, unconditional, scale, **options)
        self.sigmas = [float(level) for level in sigmas]

    def mix(self, d_c: Tensor, d_u: Tensor, sigma: float) -> Tensor:
        return d_u + self.scale / (1 - self._after(sigma) / sigma) * (d_c - d_u)

    def _after(self, sigma):
        for level, after in pairwise(self.sigmas):
            if math.isclose(level, sigma, rel_tol=_SAME_LEVEL):
                return after
        raise ValueError(
            f"noise level {sigma:g} is not one of the run, so that CFG++ does not know the next: "
            "take a sampler without churn and restarts"
        )

    def _is_conditional(self) -> bool:
        return False


class CFGZeroStarDenoiser(CFGDenoiser):
    """CFG-Zero* (Fan et al., 2025, arXiv 2503.18886): D = s D_u + scale (D_c - s D_u), s = <D_c, D_u> /
    |D_u|^2 for each image, the projection of the conditional answer on the unconditional one.

    zero_above: at higher levels D = 0, so that the first steps only lower the noise; infinity is nowhere. The
    network is not asked there, unless for its variance.
    """

    def __init__(
        self,
        conditional: Denoiser,
        unconditional: Denoiser,
        scale: float,
        *,
        zero_above: float = float("inf"),
        **options: Any,
    ):
        super().__init__(conditional, unconditional, scale, **options)
        self.zero_above = zero_above

    def __call__(self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._zero(x) if self._is_zero(sigma) else super().__call__(x, sigma, *args, **kwargs)

    def with_variance(
        self, x: Tensor, sigma: float | Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not self._is_zero(sigma):
            return super().with_variance(x, sigma, *args, **kwargs)
        return self._zero(x), answer_with_variance(self.conditional, x, sigma, *args, **kwargs)[1]

    def _is_zero(self, sigma):
        return float(sigma) > self.zero_above * (1 + _SAME_LEVEL)

    def _zero(self, x):
        return x - x  # rather than a constant, so that it has a derivative: guidance may go through it

    def mix(self, d_c: Tensor, d_u: Tensor, sigma: float) -> Tensor:
        inner = tuple(range(1, d_u.ndim))
        square = d_u.square().sum(dim=inner, keepdim=True)
        s = (d_c * d_u).sum(dim=inner, keepdim=True) / torch.where(square > 0, square, 1)
        return s * d_u + self.scale * (d_c - s * d_u)

"""Directions: from logits to the number, one per image, that guidance makes grow.

A direction is a function (logits, y) -> (N,), with logits (N, classes) in float32 or float64 and y (N,)
int64. The functions below `log_prob` take a direction and return another one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Direction = Callable[[Tensor, Tensor], Tensor]


def log_prob(
    logits: Tensor, y: Tensor, joint_temperature: float = 1.0, marginal_temperature: float = 1.0
) -> Tensor:
    """tau_1 f_y - log sum_i exp(tau_2 f_i): (N, classes) logits, (N,) labels -> (N,) float32 (float64 if the
    logits are).

    tau_1 = tau_2 = 1 is the log-probability; a smaller tau_2 leans from the conditional to the joint
    direction (Ma et al., 2024).
    """
    logits = _precise(logits)
    f_y = logits.gather(1, y[:, None])[:, 0]
    return joint_temperature * f_y - torch.logsumexp(marginal_temperature * logits, dim=1)


def reverse_kl(direction: Direction, weight: float, smoothing: float = 0.1) -> Direction:
    """direction - weight * KL(p || q): p the classifier's answer, q the wanted one.

    q is 1 - smoothing on the wanted class, and smoothing spread over all K, as in label smoothing: q = (1 -
    e) [i = y] + e / K (arXiv 2511.05844). Raises ValueError where not 0 < smoothing < 1.
    """
    _require_smoothing(smoothing)

    def regularised(logits: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = _log_p_and_q(logits, y, smoothing)
        return direction(logits, y) - weight * _kl(log_p, log_q)

    return regularised


def forward_kl(direction: Direction, weight: float, smoothing: float = 0.1) -> Direction:
    """direction - weight * KL(q || p); p, q, source and error as in `reverse_kl`."""
    _require_smoothing(smoothing)

    def regularised(logits: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = _log_p_and_q(logits, y, smoothing)
        return direction(logits, y) - weight * _kl(log_q, log_p)

    return regularised


def jensen_shannon(direction: Direction, weight: float, smoothing: float = 0.1) -> Direction:
    """direction - weight * (KL(q || m) + KL(p || m)) / 2, m = (p + q) / 2; p, q, source and error as in
    `reverse_kl`.
    """
    _require_smoothing(smoothing)

    def regularised(logits: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = _log_p_and_q(logits, y, smoothing)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return direction(logits, y) - weight * (_kl(log_q, log_m) + _kl(log_p, log_m)) / 2

    return regularised


def reference_contrast(direction: Direction, weight: float) -> Direction:
    """direction + weight * (f_y - f_r), r the strongest other class: the reference class of Shenoy et al.
    (2024, arXiv 2411.15393), here as a direction. Raises ValueError for a classifier of a single class.
    """

    def contrasted(logits: Tensor, y: Tensor) -> Tensor:
        if logits.shape[1] < 2:
            raise ValueError("a contrast with another class needs a classifier of 2 classes or more")
        precise = _precise(logits)
        f_y = precise.gather(1, y[:, None])
        others = precise.scatter(1, y[:, None], -math.inf)
        return direction(logits, y) + weight * (f_y[:, 0] - others.amax(dim=1))

    return contrasted


def entropy_scaling(direction: Direction, floor: float) -> Direction:
    """direction * log K / H(p), H(p) the entropy of the classifier's answer over its K classes, not below
    `floor` * log K (EDS: Zheng et al., 2022, arXiv 2206.11474).

    The factor counts as a constant: the gradient is the direction's, larger where the classifier is sure.
    """

    def scaled(logits: Tensor, y: Tensor) -> Tensor:
        log_p = _precise(logits.detach()).log_softmax(dim=1)
        share = -(log_p.exp() * log_p).sum(dim=1) / math.log(max(log_p.shape[1], 2))
        return direction(logits, y) / share.clamp(min=floor)

    return scaled


def _precise(logits):
    return logits if logits.dtype == torch.float64 else logits.float()


def _log_p_and_q(logits, y, smoothing):
    """(N, K) log-probabilities: the classifier's, and those that are wanted."""
    log_p = _precise(logits).log_softmax(dim=1)
    q = torch.full_like(log_p, smoothing / log_p.shape[1])
    return log_p, q.scatter_add(1, y[:, None], torch.full_like(q[:, :1], 1 - smoothing)).log()


def _kl(log_a, log_b):
    """KL(a || b) of each row, (N,)."""
    return (log_a.exp() * (log_a - log_b)).sum(dim=1)


def _require_smoothing(smoothing):
    if not 0 < smoothing < 1:
        raise ValueError(f"the smoothing of the wanted answer must be above 0 and below 1, got {smoothing}")

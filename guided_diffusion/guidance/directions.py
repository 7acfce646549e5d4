"""Directions: from logits to the number, one per image, that guidance makes grow.

A direction is a function (logits, y) -> (N,), with logits (N, classes) in float32 or float64 and y (N,)
int64.
"""

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
    logits = logits if logits.dtype == torch.float64 else logits.float()
    f_y = logits.gather(1, y[:, None])[:, 0]
    return joint_temperature * f_y - torch.logsumexp(marginal_temperature * logits, dim=1)

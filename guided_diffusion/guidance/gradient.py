"""The gradient of a direction with respect to the classifier's input.

The policy for gradients that are not finite and the observer stand here, and nowhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from guided_diffusion.files.nonfinite import nonfinite_images, require_finite
from guided_diffusion.guidance.directions import Direction

POLICIES = ("stop", "skip")


@dataclass(frozen=True)
class Observation:
    """What guidance saw and found at one step, for whoever watches: `observe(Observation(...))`.

    index, sigma: those of the step; where a noisy classifier guides, its timestep t and None. x: (N, C, H,
    W), what the classifier was shown. y: (N,). logits: (N, classes). gradient: like x, scaled, before
    anything changes it and before the step's strength.
    skipped: (N,) bool, the images whose gradient was not finite, and is zero here.
    """

    index: int
    sigma: float | None
    x: Tensor
    y: Tensor
    logits: Tensor
    gradient: Tensor
    skipped: Tensor


Observe = Callable[[Observation], None]


def input_gradient(
    classifier: Callable[[Tensor], Tensor], x: Tensor, direction: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradient of the sum of direction(logits), (N,), with respect to x: like x; and the logits. Both
    detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = classifier(x)
        return torch.autograd.grad(direction(logits).sum(), x)[0], logits.detach()


class ClassifierGradient:
    """Called as (classifier, x, y, index, sigma): the gradient of direction(classifier(x), y) with respect to
    x.

    scale: what the caller multiplies the gradient by, at last; the observer and the policy look at the
    product. on_nonfinite: "stop" raises NonFiniteError where an image's gradient holds a NaN or an infinity,
    "skip" makes that image's gradient zero. observe: called with an Observation each time. Raises ValueError
    for another policy.
    """

    def __init__(
        self,
        direction: Direction,
        *,
        scale: float = 1.0,
        on_nonfinite: str = "stop",
        observe: Observe | None = None,
    ):
        if on_nonfinite not in POLICIES:
            raise ValueError(f"unknown on_nonfinite {on_nonfinite!r}; choose {' or '.join(POLICIES)}")
        self.direction, self.scale = direction, scale
        self.on_nonfinite, self.observe = on_nonfinite, observe

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        index: int,
        sigma: float | None,
    ) -> Tensor:
        gradient, logits = input_gradient(classifier, x, lambda logits: self.direction(logits, y))
        scaled = gradient * self.scale
        if self.on_nonfinite == "stop":
            require_finite(scaled, "guidance gradient", index, sigma)
        skipped = nonfinite_images(scaled)
        of_skipped = skipped.view(-1, *[1] * (x.ndim - 1))
        if self.observe is not None:
            seen = torch.where(of_skipped, 0, scaled)
            self.observe(Observation(index, sigma, x, y, logits, seen, skipped))
        return torch.where(of_skipped, 0, gradient)

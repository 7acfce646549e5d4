"""Guidance by a second network: the classifier of noisy images."""

from collections.abc import Callable

from torch import Tensor

from guided_diffusion.guidance.directions import Direction, log_prob
from guided_diffusion.guidance.gradient import ClassifierGradient, Observe


def noisy_classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor],
    classifier_scale: float = 1.0,
    on_nonfinite: str = "stop",
    observe: Observe | None = None,
    direction: Direction = log_prob,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the classic `cond_fn(x, t, y)` of a classifier that was trained on noisy images (Dhariwal and
    Nichol, 2021).

    classifier(x_t, t) -> logits. The result goes to the loops as `cond_fn=`, not as `guidance=`: it is taken
    at x_t. direction: see guidance/directions.py. on_nonfinite and observe: as in `ClassifierGradient`, but
    that the original timestep t stands in the place of the index, in the error as well.
    """
    gradient_of = ClassifierGradient(
        direction, scale=classifier_scale, on_nonfinite=on_nonfinite, observe=observe
    )

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return classifier_scale * gradient_of(lambda x_t: classifier(x_t, t), x, y, int(t[0]), None)

    return cond_fn

"""NaN and infinity: found once, reported alike, whatever they stand in."""

import torch
from torch import Tensor


class NonFiniteError(FloatingPointError):
    """NaN or infinity where numbers belong.

    what: where they were found, "network output", "guidance gradient" or "pixels". positions: which images of
    the batch, none where that is not known. step_index, sigma: where the sampler stood, None where it does
    not apply.
    """

    def __init__(
        self, what: str, positions: list[int], step_index: int | None = None, sigma: float | None = None
    ):
        self.what, self.positions, self.step_index, self.sigma = what, positions, step_index, sigma
        step = "" if step_index is None else f" at step {step_index}"
        images = f" at batch positions {positions}" if positions else ""
        super().__init__(f"non-finite {what}{step}{images}")


def nonfinite_images(x: Tensor) -> Tensor:
    """(N,) bool: which images of (N, ...) hold a NaN or an infinity."""
    return ~x.isfinite().flatten(1).all(dim=1)


def require_finite(x: Tensor, what: str, step_index: int | None = None, sigma: float | None = None) -> None:
    """Raise NonFiniteError where an image of (N, ...) holds a NaN or an infinity."""
    bad = nonfinite_images(x)
    if torch.any(bad):
        raise NonFiniteError(what, bad.nonzero()[:, 0].tolist(), step_index, sigma)

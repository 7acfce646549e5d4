"""Where the sampler stands, and which input a rule looks at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Guidance = Callable[[Tensor, Tensor, "GuidanceStep"], Tensor]
Input = Literal["denoised", "noisy"]

# What each kind of rule looks at, and who takes rules of that kind.
_INPUTS = {
    "denoised": ("the predicted clean image", "p_sample_loop, ddim_sample_loop and GuidedDenoiser take it"),
    "noisy": ("the noisy sample", "edm_sampler takes it"),
}


@dataclass(frozen=True)
class GuidanceStep:
    """Where the sampler stands.

    index: as the sampler counts: the respaced t, T-1 .. 0 (DDPM, DDIM), or i, 0 .. N-1 (`edm_sampler`); under
    `GuidedDenoiser`, which is not told, the timestep of the linear 1000-step process with this noise level.
    num_steps: T, N or 1000. variance: what one unit of gradient is worth at this step under the sampler's own
    rule, a float or a tensor that broadcasts to x. variance_max: float, the largest variance so far. sigma:
    the noise level of the sample, as the standard deviation of the noise where the clean image has weight 1.
    progress: the share of the way that lies behind, in [0, 1]: 0 at the noisiest step.
    denoised_weight: what one unit of the predicted clean image is worth in what the shift is added to: 1
    where that is the prediction itself, the posterior's coefficient in the ancestral mean. denoised_variance:
    like x, the variance of the clean image by the network's own account; None where it gives none.
    memory: what rules keep over one trajectory, by rule. All steps of a trajectory have the same dict: a loop
    makes one when it starts, a GuidedDenoiser when it is built, so that it is for one trajectory.
    pull_back: v -> J^T v, J the derivative of the predicted clean image by the noisy sample; None where the
    sampler does not offer it.
    """

    index: int
    num_steps: int
    variance: float | Tensor
    variance_max: float
    sigma: float
    progress: float
    denoised_weight: float = 1.0
    denoised_variance: Tensor | None = None
    memory: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    pull_back: Callable[[Tensor], Tensor] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def counting_down(
        cls,
        index: int,
        num_steps: int,
        variance: float | Tensor,
        variance_max: float,
        sigma: float,
        **more: Any,
    ) -> "GuidanceStep":
        """A step of a sampler whose index runs from num_steps - 1 to 0. more: the other fields."""
        progress = (num_steps - 1 - index) / num_steps
        return cls(index, num_steps, variance, variance_max, sigma, progress, **more)


def looks_at(kind: Input) -> Callable[[Guidance], Guidance]:
    """Declare what a rule looks at: the "denoised" (predicted clean) image, or the "noisy" sample."""

    def declare(guidance: Guidance) -> Guidance:
        guidance.looks_at = kind  # type: ignore[attr-defined]
        return guidance

    return declare


def require_input(guidance: Guidance | None, given: Input, sampler: str) -> None:
    """Raise ValueError, with both names, where `guidance` looks at another input than `sampler` hands to it.

    A plain function that declares nothing is taken to fit.
    """
    wanted = getattr(guidance, "looks_at", given)
    if wanted != given:
        looks, takers = _INPUTS[wanted]
        what = f"{name_of(guidance)} looks at {looks}, but {sampler} hands over {_INPUTS[given][0]}"
        raise ValueError(f"{what}: {takers}")


def name_of(guidance: object) -> str:
    """What messages call a rule."""
    return getattr(guidance, "__name__", type(guidance).__name__)

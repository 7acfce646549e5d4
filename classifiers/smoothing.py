"""Kinked activations -> smooth ones, so that the gradient of a classifier is smooth (Ma et al., ICLR 2024).

With S(x) = log(1 + exp(beta x)) / beta, Softplus, in the place of max(x, 0):

    ReLU         S(x)                                ReLU6       S(x) - S(x - 6)
    Hardsigmoid  (S(x + 3) - S(x - 3)) / 6           Hardswish   x (S(x + 3) - S(x - 3)) / 6

each within a constant over beta of the original. GELU, SiLU, Mish, tanh and the sigmoid are smooth already.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Activations with a kink that have no counterpart here: a network that holds one is refused rather than left
# half smooth.
_KINKED = (
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.SELU,
    nn.Hardtanh,  # whose subclass ReLU6 has one
    nn.Hardshrink,
    nn.Softshrink,
    nn.Threshold,
)
_FUNCTIONAL_KINKED = {
    getattr(place, f"{name}{inplace}")
    for place in (F, torch, torch.Tensor)
    for name in ("leaky_relu", "prelu", "rrelu", "selu", "hardtanh", "hardshrink", "softshrink", "threshold")
    for inplace in ("", "_")
    if hasattr(place, f"{name}{inplace}")
}
_CLAMPS = tuple(
    getattr(place, name) for place in (torch, torch.Tensor) for name in ("clamp", "clamp_", "clip", "clip_")
)
_LOWER_CLAMPS = (torch.clamp_min, torch.clamp_min_, torch.Tensor.clamp_min, torch.Tensor.clamp_min_)
_SMOOTH_ALREADY = {"gelu", "silu", "mish", "tanh", "sigmoid"}


def smooth_relu6(x: Tensor, beta: float) -> Tensor:
    """S(x) - S(x - 6), from 0 to 6."""
    return F.softplus(x, beta) - F.softplus(x - 6, beta)


def smooth_hardsigmoid(x: Tensor, beta: float) -> Tensor:
    """(S(x + 3) - S(x - 3)) / 6, from 0 to 1."""
    return smooth_relu6(x + 3, beta) / 6


def smooth_hardswish(x: Tensor, beta: float) -> Tensor:
    """x (S(x + 3) - S(x - 3)) / 6."""
    return x * smooth_hardsigmoid(x, beta)


FORMULAS = {
    "ReLU": "S(x)",
    "ReLU6": "S(x) - S(x - 6)",
    "Hardsigmoid": "(S(x + 3) - S(x - 3)) / 6",
    "Hardswish": "x (S(x + 3) - S(x - 3)) / 6",
}
_Smooth = Callable[[Tensor, float], Tensor]


class Smooth(nn.Module):
    """function(x, beta), in the place of a kinked activation."""

    def __init__(self, function: _Smooth, beta: float):
        super().__init__()
        self.function, self.beta = function, beta

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.beta)


_SMOOTH: dict[type, Callable[[float], nn.Module]] = {
    nn.ReLU: nn.Softplus,
    nn.ReLU6: partial(Smooth, smooth_relu6),
    nn.Hardsigmoid: partial(Smooth, smooth_hardsigmoid),
    nn.Hardswish: partial(Smooth, smooth_hardswish),
}
_FUNCTIONAL_SMOOTH: dict[Callable, tuple[str, _Smooth]] = {
    **dict.fromkeys(
        (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_),
        ("ReLU", F.softplus),
    ),
    F.relu6: ("ReLU6", smooth_relu6),
    F.hardsigmoid: ("Hardsigmoid", smooth_hardsigmoid),
    F.hardswish: ("Hardswish", smooth_hardswish),
}


def smooth_activations(network: nn.Module, beta: float) -> Counter[str]:
    """Replace every activation of FORMULAS below `network`, in place; return how many by name.

    One that several parents share counts once for each. Raises ValueError for activations that are kinked in
    another way.
    """
    kinked = [m for m in network.modules() if isinstance(m, _KINKED) and not isinstance(m, nn.ReLU6)]
    if kinked:
        raise ValueError(
            f"{type(network).__name__} has {', '.join(sorted({type(m).__name__ for m in kinked}))} "
            "activations, which cannot be smoothed; use softplus_beta inf"
        )
    replaced: Counter[str] = Counter()
    for module in network.modules():
        # Not named_children(), which passes over the second name of a shared module.
        for name, child in module._modules.items():
            for kind, smooth in _SMOOTH.items():
                if isinstance(child, kind):
                    module._modules[name] = smooth(beta)
                    replaced[kind.__name__] += 1
    return replaced


class SmoothFunctions(TorchFunctionMode):
    """While active, the activations of FORMULAS that are called as functions are smooth.

    `replaced` says how many such calls were met, by name; `kinked` names the calls that have no counterpart,
    `smooth` those of activations that are smooth already.
    """

    def __init__(self, beta: float):
        super().__init__()
        self.beta, self.replaced = beta, Counter[str]()
        self.kinked: set[str] = set()
        self.smooth: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        called = getattr(func, "__name__", "")
        if func in _FUNCTIONAL_KINKED or _clamps_at_zero(func, args, kwargs):
            self.kinked.add(called)
        if called.rstrip("_") in _SMOOTH_ALREADY:
            self.smooth.add(called.rstrip("_"))
        if func not in _FUNCTIONAL_SMOOTH:
            return func(*args, **kwargs)
        name, smooth = _FUNCTIONAL_SMOOTH[func]
        self.replaced[name] += 1
        x = args[0] if args else kwargs["input"]
        in_place = called.endswith("_") or kwargs.get("inplace", args[1:] == (True,))
        return x.copy_(smooth(x.clone(), self.beta)) if in_place else smooth(x, self.beta)


def _clamps_at_zero(func, args, kwargs):
    """Whether a call is a ReLU in the clothes of a clamp."""
    if func not in (*_CLAMPS, *_LOWER_CLAMPS):
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max") if func in _CLAMPS else None
    return high is None and not isinstance(low, torch.Tensor) and low == 0


def told(replaced: Counter[str], smooth: set[str], beta: float) -> str:
    """What was replaced by what, and what was smooth already, in one line."""
    parts = [f"{count} {name} -> {FORMULAS[name]}" for name, count in replaced.items()]
    if parts:
        parts[-1] += f" with S Softplus of beta {beta:g}"
    if smooth:
        parts.append(f"smooth already: {', '.join(sorted(smooth))}")
    return ", ".join(parts) or "no activations known here"

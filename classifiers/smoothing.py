"""ReLU -> Softplus, so that the gradient of a classifier is smooth (Ma et al., ICLR 2024)."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

# Activations with a kink that have no counterpart here: a network that holds one is refused rather than left
# half smooth.
_KINKED = (
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardshrink,
    nn.Softshrink,
    nn.Threshold,
)
_FUNCTIONAL_KINKED = (
    F.relu6,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    F.rrelu,
    F.rrelu_,
    F.hardtanh,
    F.hardtanh_,
    F.hardswish,
    F.hardsigmoid,
    F.hardshrink,
    F.softshrink,
    F.threshold,
    torch.threshold_,
)
_CLAMPS = (torch.clamp, torch.clamp_, torch.Tensor.clamp, torch.Tensor.clamp_)
_LOWER_CLAMPS = (torch.clamp_min, torch.clamp_min_, torch.Tensor.clamp_min, torch.Tensor.clamp_min_)
_FUNCTIONAL_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_)


def smooth_relus(network: nn.Module, beta: float) -> int:
    """Replace every nn.ReLU below `network`, in place, by Softplus_beta(x) = log(1 + exp(beta x)) / beta;
    return how many.

    A ReLU that several parents share counts once for each. Raises ValueError for activations that are kinked
    in another way.
    """
    names = sorted({type(m).__name__ for m in network.modules() if isinstance(m, _KINKED)})
    if names:
        raise ValueError(
            f"{type(network).__name__} has {', '.join(names)} activations, which cannot be smoothed; "
            "use softplus_beta inf"
        )
    count = 0
    for module in network.modules():
        # Not named_children(), which passes over the second name of a shared module.
        for name, child in module._modules.items():
            if isinstance(child, nn.ReLU):
                module._modules[name] = nn.Softplus(beta)
                count += 1
    return count


class SmoothFunctionalRelus(TorchFunctionMode):
    """While active, relu called as a function is Softplus_beta.

    `count` says how many such calls were met, `kinked` names the calls that have no counterpart.
    """

    def __init__(self, beta: float):
        super().__init__()
        self.beta, self.count = beta, 0
        self.kinked: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FUNCTIONAL_KINKED or _clamps_at_zero(func, args, kwargs):
            self.kinked.add(func.__name__)
        if func not in _FUNCTIONAL_RELUS:
            return func(*args, **kwargs)
        self.count += 1
        x = args[0] if args else kwargs["input"]
        in_place = func.__name__.endswith("_") or kwargs.get("inplace", args[1:] == (True,))
        return x.copy_(F.softplus(x.clone(), self.beta)) if in_place else F.softplus(x, self.beta)


def _clamps_at_zero(func, args, kwargs):
    """Whether a call is a ReLU in the clothes of a clamp."""
    if func not in (*_CLAMPS, *_LOWER_CLAMPS):
        return False
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max") if func in _CLAMPS else None
    return high is None and not isinstance(low, torch.Tensor) and low == 0

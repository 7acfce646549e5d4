"""What the golden tests share: the weight rule, the fixed noise, the data files and three distances.

The golden numbers come from networks that were never trained. Their weights are drawn by a rule that needs
only the names and shapes of the parameters, so that no weights have to be stored, and a wrong parameter name
shows.
"""

import gzip
import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision

from guided_diffusion import edm, script_util, unet

GOLDENS = Path(__file__).parent / "goldens"
CLASS_EMBEDDINGS = ("label_emb.weight", "embedding_table.weight", "map_label.weight")
# Constructed by formula: the rule leaves them alone. The last is iDDPM's table of noise levels.
FIXED_TENSORS = ("pos_embed", "resample_filter")
FIXED_NAMES = ("u",)
THIN_SIZE = 2048
THIN_STRIDES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


def golden_weight(name, shape, gain=1.0):
    """The float64 array that the rule gives to the tensor `name`; its seed is the checksum of its name."""
    z = np.random.RandomState(zlib.crc32(name.encode("utf-8")) & 0xFFFFFFFF).standard_normal(tuple(shape))
    if name.endswith(CLASS_EMBEDDINGS):
        return 0.5 * z
    if name.endswith("freqs"):
        return 2 * z
    if len(shape) >= 2:
        return gain * z / np.sqrt(np.prod(shape[1:]))
    if name.endswith("weight"):
        return 1 + 0.1 * z
    if name.endswith("running_var"):
        return np.exp(0.1 * z)
    return 0.1 * z


def set_golden_weights(module, gain=1.0, factors=None):
    """Fill every parameter and buffer by the rule, times `factors[name]` if there; returns the module in eval
    mode.
    """
    factors = factors or {}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            fixed = name.endswith(FIXED_TENSORS) or name in FIXED_NAMES
            if tensor.is_floating_point() and not fixed:
                weight = golden_weight(name, tuple(tensor.shape), gain) * factors.get(name, 1.0)
                tensor.copy_(torch.from_numpy(np.asarray(weight, dtype=np.float32)))
    return module.eval()


def golden_network(case):
    """The network of one case of sets B, C and J, with its golden weights."""
    if "cls" in case:
        return set_golden_weights(getattr(edm, case["cls"])(**case["config"]))
    rooms = [room for room in (unet, script_util) if hasattr(room, case["constructor"])]
    return set_golden_weights(getattr(rooms[0], case["constructor"])(**case["config"]))


def random_input(seed, shape):
    """A network input of the golden sets: standard normal, float32."""
    return from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))


def from_numpy(array):
    """The array as a tensor on the device under test: the default one, see --device in conftest.py."""
    return torch.from_numpy(np.asarray(array)).to(torch.get_default_device())


def random_image(seed, shape):
    """An image-like input: clip(0.6 * z, -1, 1), all of it in float32."""
    return (random_input(seed, shape) * 0.6).clamp(-1, 1)


class FixedNoise:
    """A randn_like that replays one RandomState sequence; the first call of a sampler's test draws x_T.

    Every draw is rounded to float32 before it takes the dtype in use, as it was when the numbers were made.
    """

    def __init__(self, seed):
        self.random_state = np.random.RandomState(seed)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        draw = self.random_state.standard_normal(tuple(x.shape)).astype(np.float32)
        return torch.from_numpy(draw).to(x.device, x.dtype)


def load_golden(name):
    """(case -> configuration, "case/array" -> numpy array) of one set."""
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as arrays:
        return json.loads((GOLDENS / f"{name}.json").read_text()), {key: arrays[key] for key in arrays.files}


def load_manifest(name):
    """The parameter count and the "name -> shape" of the state dict of one published architecture."""
    return json.loads(gzip.decompress((GOLDENS / "manifests" / f"{name}.json.gz").read_bytes()))


def to_numpy(x):
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def thin(x):
    """A fixed flat subset of at most THIN_SIZE entries; small arrays come back whole.

    The stride is a prime that divides no side of the arrays stored here, so every row, column, channel and
    image, and every phase of a strided convolution, is met.
    """
    x = to_numpy(x)
    if x.size <= THIN_SIZE:
        return x
    return x.reshape(-1)[:: next(k for k in THIN_STRIDES if x.size <= k * THIN_SIZE)]


def rms(x):
    return float(np.sqrt(np.mean(np.square(to_numpy(x), dtype=np.float64))))


def difference(actual, golden):
    actual, golden = to_numpy(actual), to_numpy(golden)
    assert actual.shape == golden.shape, f"shape {actual.shape}, golden {golden.shape}"  # never broadcast
    return actual.astype(np.float64) - golden.astype(np.float64)


def max_abs(actual, golden):
    """max |a - b|; NaN, which fails any `<=`, where either holds a NaN."""
    return float(np.abs(difference(actual, golden)).max())


def rms_relative(actual, golden, reference_rms=None):
    """max |a - b| in units of the reference's RMS."""
    return max_abs(actual, golden) / (rms(golden) if reference_rms is None else reference_rms)


def relative_l2(actual, golden):
    """|a - b| / |b|."""
    return float(
        np.linalg.norm(difference(actual, golden)) / np.linalg.norm(to_numpy(golden).astype(np.float64))
    )


def l2_per_image(x):
    return np.linalg.norm(to_numpy(x).astype(np.float64).reshape(len(x), -1), axis=1)


@cache
def resnet_weights(name):
    """The state dict of a torchvision ResNet under the rule; shared, so read only."""
    factors = (
        {"fc.weight": 3.0} if name == "resnet50" else {}
    )  # without it resnet50's logits are too flat to resolve
    return set_golden_weights(getattr(torchvision.models, name)(weights=None), factors=factors).state_dict()

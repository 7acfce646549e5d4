"""Writes pickles in the format of EDM's snapshots, without EDM.

    python tests/edm_pickles.py OUT.pkl     # as large as the ADM network for 64x64: 296 million weights

The network's classes, and the module that a real file names, exist only while a pickle is written.
"""

import contextlib
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

from guided_diffusion.edm import EDMPrecond, iDDPMPrecond
from guided_diffusion.files.checkpoints import load_state_dict

TINY = {"img_resolution": 8, "img_channels": 3, "label_dim": 2}
TINY |= {"model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1}
ADM_64 = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "use_fp16": True}
ADM_64 |= {"model_channels": 192, "channel_mult": [1, 2, 3, 4]}


class Call:
    """Is pickled as a call of `function`: what a hostile file would have run. With a state, it is given that
    afterwards.
    """

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args, state)

    def __reduce__(self):
        return self.reduced


class EasyDict(dict):
    """A dict by another name."""


def reconstruct(meta):
    raise AssertionError("stands for the function that would execute meta['module_src']")


@contextlib.contextmanager
def edm_modules():
    """The modules that a snapshot names, where pickle looks for them."""
    names = {"torch_utils": {}, "torch_utils.persistence": {"_reconstruct_persistent_obj": reconstruct}}
    names |= {"dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}}
    modules = {name: types.ModuleType(name) for name in names}
    for name, contents in names.items():
        for attribute, thing in contents.items():
            thing.__module__, thing.__qualname__, thing.__name__ = name, attribute, attribute
            setattr(modules[name], attribute, thing)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def persistent(class_name, state, source="raise SystemExit('executed')", **changes):
    """An object as `torch_utils.persistence` pickles it."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Call(reconstruct, {**meta, **changes})


def module_state(parameters=(), buffers=(), modules=(), arguments=None, args=()):
    """The attributes of a module, its own and those that persistence adds."""
    return {
        **nn.Module().__dict__,
        "_parameters": OrderedDict(parameters),
        "_buffers": OrderedDict(buffers),
        "_modules": OrderedDict(modules),
        "_init_args": args,
        "_init_kwargs": EasyDict(arguments or {}),
    }


def pickled_module(module, arguments=None, source=""):
    """A module as a persistent object, its lists and dicts of modules as torch's own."""
    children = {
        name: pickled_module(child, source=source)
        for name, child in module._modules.items()
        if child is not None
    }
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = OrderedDict(children)
        return plain
    if arguments is None:
        arguments = {"init_mode": "kaiming_uniform", "init_weight": np.sqrt(1 / 3)}
    state = module_state(module._parameters, module._buffers, children, arguments)
    return persistent(type(module).__name__, state, source)


def snapshot(net, arguments, source=""):
    """What a snapshot holds, beside a loss and the options of a data set."""
    loss = persistent("EDMLoss", {"P_mean": -1.2, "_init_args": (), "_init_kwargs": {}}, source)
    options = EasyDict(
        class_name="training.dataset.ImageFolderDataset", resolution=net.img_resolution, xflip=False
    )
    return {
        "ema": pickled_module(net, arguments, source),
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": options,
    }


def random_net(network, arguments, seed=0):
    """A network whose parameters are all random, those that begin at zero too."""
    net, generator = network(**arguments), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return net.eval().requires_grad_(False)


def dumps(content, protocol=4):
    with edm_modules():
        return pickle.dumps(content, protocol=protocol)


def touch(path):
    """Python source and a shell command that leave a file at `path`."""
    return f"open({os.fspath(path)!r}, 'w').close()", f"touch {path}"


def tiny_snapshots(source=""):
    """(network, its arguments, its pickle) of each class."""
    for network, options in ((EDMPrecond, {}), (iDDPMPrecond, {"M": 20})):
        arguments = {**TINY, "dropout": 0.1, "use_fp16": False, **options}
        net = random_net(network, arguments)
        yield net, arguments, dumps(snapshot(net, arguments, source))


def write(folder, content, protocol=4):
    """A file of bytes, or of an object, in a folder."""
    path = folder / "network.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, protocol))
    return path


def network(parameters=None, **state):
    """A snapshot whose network has these parameters only."""
    return {"ema": persistent("EDMPrecond", {**module_state(parameters or {"w": torch.ones(2)}), **state})}


def refusal(path):
    """The one line with which a file is refused."""
    try:
        load_state_dict(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 500
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError(f"{path} was read")


if __name__ == "__main__":
    with edm_modules(), open(sys.argv[1], "wb") as file:
        pickle.dump({"ema": pickled_module(random_net(EDMPrecond, ADM_64), ADM_64)}, file)

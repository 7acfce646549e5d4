"""Files that no run can use, for the tables of bad input; {files}/NAME there."""

import os

import numpy as np
import torch
from edm_pickles import TINY as TINY_EDM
from edm_pickles import Call, dumps, network, random_net, snapshot
from helpers import TINY, TINY_64, make_noisy_classifier, save_random, save_unet
from samplers import DIGITS

from guided_diffusion.edm import EDMPrecond
from guided_diffusion.files.checkpoints import load_state_dict

CLASSIFIERS = """
import torch

def seven(num_classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 7))

def raises(num_classes):
    raise ValueError("own.py: no such thing")

class Linear(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear, self.calls = torch.nn.Linear(3 * 16 * 16, num_classes), 0
        with torch.no_grad():
            self.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
            self.linear.bias.zero_()

    def forward(self, x):
        x = x * 1.0
        if x.requires_grad:
            self.calls += 1
            if self.calls == AT_CALL:
                fault = torch.zeros_like(x)
                fault[POSITION, 1, 2, 3] = float("VALUE")
                x.register_hook(lambda gradient: gradient + fault)
        return self.linear(x.flatten(1))
"""


def write_classifiers(path, at_call=None, position=0, value="nan"):
    """One's own classifiers: own.py:Linear has a gradient that is not finite at one pixel, of one image, in
    one guided call (counted from 1).
    """
    told = {"AT_CALL": at_call, "POSITION": position, "VALUE": value}
    source = CLASSIFIERS
    for name, what in told.items():
        source = source.replace(name, str(what))
    path.write_text(source)
    return ("--classifier_type", f"{path}:Linear", "--softplus_beta", "inf")


class Carrier:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_bad_files(folder):
    write_classifiers(folder / "own.py")
    _write_labels(folder)
    _write_checkpoints(folder)
    _write_edm_networks(folder)
    return folder


def _write_labels(folder):
    texts = {"words.txt": "1 a", "empty.txt": "", "empty.npy": "", "twelve.txt": "1 2 12"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.txt").write_bytes(bytes(range(128, 256)))
    np.save(folder / "negative.npy", [4, -3])
    np.save(folder / "fractions.npy", [1.5, 2.5])
    np.save(folder / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(folder / "whole.npy", np.arange(10))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[:-30])


def _write_checkpoints(folder):
    state = load_state_dict(DIGITS / "unet.safetensors")
    torch.save(state, folder / "whole.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    whole = {
        "safetensors": (DIGITS / "unet.safetensors").read_bytes(),
        "pt": (folder / "whole.pt").read_bytes(),
        "pth": (folder / "whole.pt").read_bytes(),
        "old.pt": (folder / "old.pt").read_bytes(),
    }
    for ending, content in whole.items():
        for name, kept in {
            "empty": 0,
            "head": 11,
            "half": len(content) // 2,
            "last": len(content) - 1,
        }.items():
            (folder / f"{name}.{ending}").write_bytes(content[:kept])
    (folder / "weights.bin").write_bytes(b"weights")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"weight": Carrier(folder / "was_run")}, folder / "evil.pt")
    save_unet(folder / "tiny.pt", TINY)
    save_unet(folder / "tiny64.pt", TINY_64)
    noisy = load_state_dict(save_random(folder / "noisy.pt", make_noisy_classifier()))
    noisy["out.2.c_proj.bias"][3] = float("nan")
    torch.save(noisy, folder / "nan_noisy.pt")
    state["out.2.bias"][0] = float("inf")
    torch.save(state, folder / "infinite_unet.pt")


def _write_edm_networks(folder):
    arguments = {**TINY_EDM, "img_resolution": 16, "label_dim": 10}
    for name, changes in {"grey.pkl": {"img_channels": 1}, "unconditional.pkl": {"label_dim": 0}}.items():
        net = {**arguments, **changes}
        (folder / name).write_bytes(dumps(snapshot(random_net(EDMPrecond, net), net)))
    for name, function, action in (
        ("system.pkl", os.system, f"mkdir {folder / 'was_run'}"),
        ("eval.pkl", eval, f"__import__('os').mkdir({str(folder / 'was_run')!r})"),
    ):
        (folder / name).write_bytes(dumps({**network(), "loss_fn": Call(function, action)}))

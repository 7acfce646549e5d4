"""What the tests of the command line share: calling a script in this process, tiny checkpoints, folders of
samples.
"""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from guided_diffusion import logger
from guided_diffusion.flags.parser import run_main
from guided_diffusion.flags.presets import PRESETS
from guided_diffusion.script_util import (
    classifier_defaults,
    create_classifier,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

ROOT = Path(__file__).resolve().parents[1]
# The flags of the digits preset that describe the network and the diffusion, without guidance.
DIGITS_NETWORK = {
    key: PRESETS["digits"][key] for key in model_and_diffusion_defaults() if key in PRESETS["digits"]
}
# Networks small enough to be drawn at random. A noisy classifier has no channel_mult flag: 64 is its smallest
# size.
TINY = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,1",
    "attention_resolutions": "8",
}
TINY_64 = {**TINY, "image_size": 64, "channel_mult": "1,1,1,1"}
TINY_NOISY = {
    "image_size": 64,
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": "8",
}

_LOG_DIR = tempfile.TemporaryDirectory()


def load_script(name):
    """The module scripts/NAME.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Result:
    """What the shell would see."""

    code: int
    out: str
    err: str


def call(main, flags):
    """Run a script's main here, on one thread. An exception that would end the script with a traceback goes
    through.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["script.py", *map(str, flags)]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            logger.configure(_LOG_DIR.name)
            run_main(main, resumable=True)
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
        if isinstance(exit.code, str):
            err.write(f"{exit.code}\n")
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return Result(code, out.getvalue(), err.getvalue())


def environment():
    """For child processes: this checkout, one thread each, no accelerator, no settings from outside."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("OPENAI_LOGDIR", "RANK", "WORLD_SIZE")
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def flags_of(settings):
    """{"image_size": 16} -> ["--image_size", "16"]."""
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def samples_file(folder):
    (path,) = Path(folder).glob("samples_*.npz")
    return path


def samples_bytes(folder):
    return samples_file(folder).read_bytes()


def load_samples(folder):
    """(images, labels) of a finished run."""
    with np.load(samples_file(folder), allow_pickle=False) as file:
        return file["arr_0"], file["arr_1"]


def contents(folder, but=None):
    """Every file below a folder with its bytes, without those of one name."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != but
    }


def make_unet(settings, num_classes=1000):
    """(U-Net, diffusion) for these flags over guided-diffusion's defaults."""
    return create_model_and_diffusion(
        **{**model_and_diffusion_defaults(), **settings}, num_classes=num_classes
    )


def save_unet(path, settings, num_classes=1000):
    """Write a U-Net with random weights, also where an untrained one has zeros, so that its output depends on
    its whole input.
    """
    return save_random(path, make_unet(settings, num_classes)[0])


def make_noisy_classifier(settings=TINY_NOISY, num_classes=1000):
    return create_classifier(**{**classifier_defaults(), **settings}, num_classes=num_classes)


def save_random(path, module):
    generator = torch.Generator().manual_seed(0)
    torch.save(
        {name: 0.05 * torch.randn(t.shape, generator=generator) for name, t in module.state_dict().items()},
        path,
    )
    return path

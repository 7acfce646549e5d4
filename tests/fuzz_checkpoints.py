"""Feeds damaged EDM pickles to `load_state_dict`: each must be read or refused with a ValueError, soon and in
little memory.

    python tests/fuzz_checkpoints.py --files 20000

Small valid pickles are cut, and bytes of them flipped, set, removed, repeated and exchanged. A file that
takes more than 5 s ends the run with the place where it hangs; so does one after which the process has grown
by more than 1 GB.
"""

import argparse
import faulthandler
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # before tests/, whose folders have the packages' names
from edm_pickles import dumps, module_state, persistent

from guided_diffusion.files.checkpoints import load_state_dict
from guided_diffusion.runs.machine import peak_memory

LONGEST, MOST_MEMORY = 5, 1 << 30  # seconds, bytes


def valid_pickle(protocol):
    """A network of a few small tensors, so that most bytes are structure."""
    dtypes = (torch.float32, torch.float16, torch.int64)
    tensors = [torch.rand(3, 2).to(dtype) for dtype in dtypes]
    parameters = {f"p{i}": torch.nn.Parameter(t, requires_grad=False) for i, t in enumerate(tensors)}
    buffers = {"resample_filter": torch.full((1, 1, 2, 2), 0.25), "none": None}
    layer = persistent("Conv2d", module_state(parameters, buffers))
    modules = {"conv": layer, "enc": torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 2)}), "skip": None}
    arguments = {"img_resolution": 8, "channel_mult": [1, 2], "dropout": 0.1}
    network = persistent("EDMPrecond", module_state(modules=modules, arguments=arguments))
    return dumps({"ema": network, "augment_pipe": None}, protocol)


def mutated(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        start = rng.randrange(len(content))
        stop = min(len(content), start + rng.choice((1, 2, 4, 8, 64, 512)))
        kind = rng.choice(("cut", "flip", "flip", "set", "set", "length", "remove", "repeat", "exchange"))
        if kind == "cut":
            content = content[: max(start, 1)]
        elif kind == "flip":
            content[start] ^= 1 << rng.randrange(8)
        elif kind == "set":
            content[start] = rng.randrange(256)
        elif kind == "length":
            content[start:stop] = rng.choice((b"\xff", b"\x7f", b"\x00")) * (stop - start)
        elif kind == "remove" and stop - start < len(content):
            del content[start:stop]
        elif kind == "repeat":
            content[start:start] = content[start:stop] * rng.choice((1, 10))
        elif kind == "exchange":
            content[start:stop] = rng.choice(content[:start] or content).to_bytes(1, "little") * (
                stop - start
            )
    return bytes(content)


def outcome(path):
    """What became of one file. Anything but a ValueError of one line, or a state dict as large as the file at
    most, is an error.
    """
    try:
        state_dict = load_state_dict(path)
    except ValueError as error:
        assert "\n" not in str(error), f"more than one line: {error!r}"
        return "refused by name" if str(error).startswith("refused") else "damaged"
    assert sum(tensor.nbytes for tensor in state_dict.values()) <= path.stat().st_size
    return "read"


def fuzz(folder, files, seed=0):
    """Counter of outcomes. A file that crashes the reader stays at folder/fuzz.pkl."""
    rng, outcomes = random.Random(seed), Counter()
    torch.manual_seed(seed)  # the tensors' bytes are mutated too
    sources = [valid_pickle(protocol) for protocol in (3, 4, 5)]
    path = Path(folder) / "fuzz.pkl"
    for content in sources:
        path.write_bytes(content)
        assert outcome(path) == "read"
    before = peak_memory()
    for _ in range(files):
        path.write_bytes(mutated(rng.choice(sources), rng))
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        outcomes[outcome(path)] += 1
        faulthandler.cancel_dump_traceback_later()
        assert peak_memory() - before < MOST_MEMORY, f"{path} took {peak_memory() - before:,} bytes"
    return outcomes, peak_memory() - before


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="fuzz")
    print(f"the file at hand is {folder}/fuzz.pkl")
    outcomes, growth = fuzz(folder, args.files, args.seed)
    shutil.rmtree(folder)
    counts = ", ".join(f"{n:,} {what}" for what, n in sorted(outcomes.items()))
    print(f"{args.files:,} files: {counts}; memory grew by {growth:,} bytes")


if __name__ == "__main__":
    main()

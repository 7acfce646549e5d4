"""Convert an EDM snapshot pickle into safetensors, once; what reads checkpoints here takes either.

    python scripts/convert_checkpoint.py IN.pkl pretrained_models/OUT.safetensors

Nothing in the pickle is executed. The metadata hold the network's class (class_name), its constructor's
arguments (arguments, JSON) and the SHA-256 of the pickle (source_sha256). The weights keep the licence of
their source: EDM's are CC BY-NC-SA 4.0.
"""

import json
from pathlib import Path

import _beside  # noqa: F401
import torch
from safetensors.torch import save_file

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.edm_pickle import read_snapshot
from guided_diffusion.files.formats import EDM, kind_of
from guided_diffusion.files.pretrained import existing_file, sha256
from guided_diffusion.files.streamed_safetensors import write_streamed
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs import machine


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IN.pkl", type=Path, help="an EDM snapshot")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    parser.add_switch("--overwrite", help="replace OUT.safetensors")
    args = parser.parse_args()
    check_flags(args)
    snapshot = read_snapshot(args.source)
    metadata = {
        "format": "pt",
        "class_name": snapshot.class_name,
        "arguments": json.dumps(snapshot.arguments),
        "source_sha256": sha256(args.source),
    }
    size = sum(tensor.nbytes for tensor in snapshot.tensors.values())
    if 2 * size < (machine.available_memory(torch.device("cpu")) or 0):  # None where the system does not tell
        with renamed_when_complete(args.out) as file:
            save_file({name: tensor.read() for name, tensor in snapshot.tensors.items()}, file.name, metadata)
    else:
        write_streamed(args.out, snapshot.tensors, metadata)
    print(
        f"{args.out}: {snapshot.class_name}, {len(snapshot.tensors)} tensors, {size:,} bytes; "
        f"peak memory {machine.peak_memory():,} bytes"
    )


def check_flags(args):
    existing_file(args.source)
    if kind_of(args.source) != EDM:
        raise ValueError(f"{args.source} is no EDM snapshot: only those need to be converted")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out} must end in .safetensors")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists: choose another name, or pass --overwrite")
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: there is no such folder; create it first")


if __name__ == "__main__":
    run_main(main)

"""Convert an EDM snapshot pickle into safetensors, once; what reads checkpoints here takes either.

    python scripts/convert_checkpoint.py edm-imagenet-64x64-cond-adm.pkl pretrained_models/edm-imagenet-64x64-cond-adm.safetensors

Nothing in the pickle is executed. The metadata hold the network's class (class_name), its constructor's
arguments (arguments, JSON) and the SHA-256 of the pickle (source_sha256). The weights keep the licence of
their source: EDM's are CC BY-NC-SA 4.0.
"""

import json
from pathlib import Path

import _beside  # noqa: F401
import torch

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.checkpoints import sha256
from guided_diffusion.files.edm_pickle import read_snapshot
from guided_diffusion.flags.parser import Parser, run_main
from guided_diffusion.runs.machine import peak_memory

# The names of the safetensors format.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("source", metavar="IN.pkl", type=Path, help="an EDM snapshot")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.safetensors")
    args = parser.parse_args()
    check_flags(args)
    snapshot = read_snapshot(args.source)
    metadata = {
        "format": "pt",
        "class_name": snapshot.class_name,
        "arguments": json.dumps(snapshot.arguments),
        "source_sha256": sha256(args.source),
    }
    size = write_safetensors(args.out, snapshot.tensors, metadata)
    print(
        f"{args.out}: {snapshot.class_name}, {len(snapshot.tensors)} tensors, {size:,} bytes; peak memory {peak_memory():,} bytes"
    )


def check_flags(args):
    if not args.source.is_file():
        raise FileNotFoundError(f"no file at {args.source}; give the path of a downloaded .pkl")
    if args.source.suffix != ".pkl":
        raise ValueError(f"{args.source} must end in .pkl: only EDM snapshots need to be converted")
    if args.out.suffix != ".safetensors":
        raise ValueError(f"{args.out} must end in .safetensors")
    if args.out.exists() and not args.overwrite:
        raise ValueError(f"{args.out} exists: choose another name, or pass --overwrite")
    if not args.out.resolve().parent.is_dir():
        raise ValueError(f"{args.out}: there is no such folder; create it first")


def write_safetensors(path, tensors, metadata):
    """Write StoredTensors by name, one in memory at a time, which the safetensors package cannot; returns the
    size of the tensors.
    """
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    )  # so that each begins at a multiple of its size
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with renamed_when_complete(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.read().reshape(-1).view(torch.uint8).numpy())
    return end


if __name__ == "__main__":
    run_main(main)

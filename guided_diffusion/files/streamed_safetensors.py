"""Safetensors written one tensor at a time.

Why there is a writer of our own: `safetensors.torch.save_file` wants all tensors in memory at once, and a
snapshot may be larger than what a machine has left. scripts/convert_checkpoint.py comes here only then. The
format: eight bytes with the length of the header, the header (JSON: type, shape and place of each tensor),
the numbers.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from guided_diffusion.files.atomic import renamed_when_complete
from guided_diffusion.files.edm_pickle import StoredTensor

_DTYPES = {
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


def write_streamed(
    path: str | Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors that still lie in another file; `path` is complete or absent afterwards."""
    # The largest types first, so that each tensor begins at a multiple of its type's size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with renamed_when_complete(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.read().reshape(-1).view(torch.uint8).numpy().data)

"""What a file of weights is, told by its bytes. Its ending says nothing: people rename what they download."""

import re
import zipfile
from pathlib import Path, PurePosixPath

from guided_diffusion.files.pickle_data import printable

TORCH, SAFETENSORS, EDM = "torch", "safetensors", "EDM snapshot"

_HEAD = 512  # as far as the furthest mark below
_TORCH_OLDER = (
    b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number with which torch's files began before 1.6
)
_GET_AGAIN = "not the file itself: get it again, from an address that needs no log-in"
# Where the mark stands, the mark, what the file is, and what to do.
_OTHERS = (
    (
        0,
        b"version https://git-lfs",
        "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from",
    ),
    (0, b"\x1f\x8b", "is packed with gzip: unpack it first (gunzip)"),
    (0, b"BZh", "is packed with bzip2: unpack it first (bunzip2)"),
    (0, b"\xfd7zXZ\x00", "is packed with xz: unpack it first (unxz)"),
    (0, b"\x28\xb5\x2f\xfd", "is packed with zstd: unpack it first (unzstd)"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first, and give the path of the file in it"),
    (0, b"Rar!", "is a rar archive: unpack it first, and give the path of the file in it"),
    (257, b"ustar", "is a tar archive: unpack it first (tar -xf), and give the path of the file in it"),
    (0, b"\x93NUMPY", "is a NumPy array, not weights by name"),
    (0, b"\x89HDF", "is an HDF5 file (Keras), which this cannot read: convert it to safetensors"),
    (0, b"GGUF", "is a GGUF file, which this cannot read: convert it to safetensors"),
)


def kind_of(path: str | Path) -> str:
    """TORCH, SAFETENSORS or EDM (a bare pickle). Raises ValueError that names what the file is instead."""
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    for start, mark, what in _OTHERS:
        if head.startswith(mark, start):
            raise ValueError(f"{path} {what}")
    if _TORCH_OLDER in head[:32]:
        return TORCH
    # The header's JSON, after its length in eight bytes; a pickle would make a far larger number of them.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 30:
        return SAFETENSORS
    if (
        head.startswith(b"\x80") or path.suffix == ".pkl"
    ):  # protocols 0 and 1, which have no mark, hold no snapshot
        return EDM
    raise ValueError(f"{path} {_text(head) or _unknown(path)}")


def _kind_of_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return TORCH  # cut short; torch says where
    inside = {PurePosixPath(name).name for name in names if name.count("/") <= 1}
    if "constants.pkl" in inside:
        raise ValueError(
            f"{path} is a TorchScript program, not weights; "
            "where you trust it, torch.save the state dict of torch.jit.load(...)"
        )
    if "data.pkl" in inside:
        return TORCH
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError(f"{path} is a NumPy archive (.npz) of {_listed(names)}, not weights of torch")
    raise ValueError(
        f"{path} is a zip archive of {_listed(names)}: unpack it first, and give the path of the file in it"
    )


def _listed(names):
    shown = ", ".join(printable(name) for name in names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _text(head):
    """What a text file is, or None for bytes that are no text."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<[!?a-zA-Z]", start):
        return f"is a web page or a server's answer in XML, {_GET_AGAIN}"
    if start and not re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\xff]", head):
        line = start.splitlines()[0].decode()
        return f"is a text file that begins with {printable(line[:40])!r}, {_GET_AGAIN}"
    return None


def _unknown(path):
    return (
        f"({path.stat().st_size:,} bytes) is truncated or not a checkpoint: neither a torch file, "
        "safetensors nor an EDM snapshot"
    )

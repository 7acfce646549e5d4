"""Files with statistics: the npz that is read, and what to say of the other files in which people keep
them.
"""

import re
import struct
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.moments import Gaussian
from guided_diffusion.files.pickle_data import Record, Window, printable, read_pickle

NEEDED = "statistics are an npz with mu and sigma"
SHOWN_KEYS = 8
DAMAGED_PICKLE = (
    ValueError,
    IndexError,
    KeyError,
    AttributeError,
    TypeError,
    OverflowError,
    struct.error,
)


def load_statistics(path: str | Path) -> tuple[Gaussian, Gaussian | None]:
    """Read the Gaussian of the pooled features (`mu`, `sigma`) and of the spatial ones (`mu_s`, `sigma_s`),
    None where there are none.

    The file is an npz in the layout of guided-diffusion's references or pytorch-fid's statistics; other
    arrays in it stay unread. Raises FileNotFoundError, and ValueError for another file, of which it says
    what it holds, for an npz that lacks an array, and for one that `Gaussian.checked` refuses.
    """
    if instead := other_container(path):
        raise ValueError(f"{path} {instead}; {NEEDED}")
    try:
        archive = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} is no npz file, or a damaged one; {NEEDED}") from error
    with archive:
        if "mu_s" not in archive and "sigma_s" not in archive:
            return _read_gaussian(path, archive, "mu", "sigma"), None
        return _read_gaussian(path, archive, "mu", "sigma"), _read_gaussian(path, archive, "mu_s", "sigma_s")


def load_features(path: str | Path) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """Read the pooled features of some images, `pool3` (N, D), from an npz with statistics, and those images'
    (height, width), `resolution`.

    Raises ValueError for arrays that are absent or damaged, of other shapes, or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            pool3, resolution = archive["pool3"].astype(np.float32), archive["resolution"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: pool3 or resolution is absent, damaged, or holds Python objects"
        ) from error
    if pool3.ndim != 2 or resolution.shape != (2,) or resolution.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: pool3 {pool3.shape} and resolution {resolution.shape} of {resolution.dtype}; needed "
            "are (N, D) and two integers"
        )
    if not np.isfinite(pool3).all():
        raise ValueError(f"{path}: pool3 holds NaN or infinity")
    height, width = resolution.tolist()
    return pool3, (height, width)


def _read_gaussian(path, archive, mu, sigma):
    for name in (mu, sigma):
        if name not in archive:
            raise ValueError(f"{path} has no {name}; {NEEDED}, this one holds {', '.join(archive.files)}")
    try:
        arrays = archive[mu], archive[sigma]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: {mu} or {sigma} is damaged, or holds Python objects, which are refused"
        ) from error
    return Gaussian.checked(*arrays, f"{path} ({mu}, {sigma})")


def other_container(path: str | Path) -> str | None:
    """What a file holds that keeps statistics in another way, as the end of a sentence: a .npy, a pickle, a
    file of PyTorch's. None for any other file.

    A pickle is read as data, to name its keys; nothing in it is run.
    """
    path = Path(path)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        if start == b"\x93NUMPY":
            return _describe_array(file)
        if start[:1] == b"\x80" or path.suffix.lower() in (".pkl", ".pickle"):
            return f"is a pickle, which is not read as statistics{_keys_of_pickle(file, path.stat().st_size)}"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "is a file of PyTorch's, which is not read as statistics"
    return None


def _describe_array(file):
    version = np.lib.format.read_magic(file)
    formats = np.lib.format
    read = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        return "is a single array of Python objects, which are refused"
    return f"is a single array, {dtype} {shape}"


def _keys_of_pickle(file, size):
    """ ": it holds mean, cov", or nothing where it holds no dict or cannot be followed."""
    try:
        content = read_pickle(Window(file, 0, size), (), re.compile(".*", re.DOTALL), most=100_000)
    except DAMAGED_PICKLE:
        return ""
    if isinstance(content, Record):
        return f": it holds a {printable(content.name)}"
    return f": it holds {_name_keys(content)}" if isinstance(content, dict) and content else ""


def _name_keys(content):
    names = [
        f"{printable(key)} ({_name_keys(value)})" if isinstance(value, dict) and value else printable(key)
        for key, value in list(content.items())[:SHOWN_KEYS]
    ]
    return ", ".join(names + ["..."] * (len(content) > SHOWN_KEYS))

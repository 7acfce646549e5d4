"""The folder that torchvision.datasets.CIFAR10 downloads, read without running what its pickles ask for.

Each batch is a pickle of a dict with "data", a numpy array (N, 3072) of uint8, the red, green and blue planes
of 32x32 pixels one after the other, and "labels", a list of N numbers (Krizhevsky, 2009). pickle_data.py
reads it as data; the pixels are taken from the bytes that the array's pickle holds.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guided_diffusion.files.pickle_data import Record, Span, Window, expect, read_pickle

FOLDER = "cifar-10-batches-py"
BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
TEST_BATCH = "test_batch"
SIZE = 32
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_NAMES = {*_ARRAYS, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}
_MOST_INSTRUCTIONS = 1_000_000  # a batch of 10,000 has some 30,000


def is_cifar_folder(folder: str | Path) -> bool:
    """Whether this is the folder with the batches, or the one that torchvision put it into."""
    return any((place / BATCHES[0]).is_file() for place in _places(folder))


def read_cifar_folder(folder: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The training images, (N, 32, 32, 3), and their labels, (N,). Raises ValueError for a damaged batch."""
    place = next(place for place in _places(folder) if (place / BATCHES[0]).is_file())
    batches = [read_batch(place / name) for name in BATCHES if (place / name).is_file()]
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def read_batch(path: str | Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images and labels of one batch, a test batch too; errors as above."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            content = expect(read_pickle(Window(file, 0, size), _NAMES, most=_MOST_INSTRUCTIONS), dict)
            planes = _bytes_of(content["data"], file)
        labels = np.array([expect(label, int) for label in expect(content["labels"], list)], dtype=np.int64)
        images = np.frombuffer(planes, np.uint8).reshape(len(labels), 3, SIZE, SIZE).transpose(0, 2, 3, 1)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"{path} is damaged, or no batch of CIFAR-10 ({error})") from error
    return np.ascontiguousarray(images), labels


def _bytes_of(array: Any, file: Any) -> bytes:
    """The pixels of a pickled array, its state being (version, shape, dtype, Fortran's order, bytes)."""
    record = expect(array, Record)
    if record.name not in _ARRAYS or record.state[3]:
        raise ValueError("data is no plain array")
    content = record.state[4]
    if isinstance(content, Record):  # Python 3 wrote Python 2's text: _codecs.encode(text, "latin1")
        content = content.args[0]
    if isinstance(content, Span):
        file.seek(content.start)
        return file.read(content.length)
    return expect(content, str).encode("latin1")


def _places(folder):
    return Path(folder), Path(folder) / FOLDER
